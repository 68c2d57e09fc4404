"""Repairs a ledger: what of it still verifies becomes a new file, which takes the place of the damaged one.

The damaged file stays beside it, for whoever can do more with it. A repair that is cut short leaves the ledger as it
was, or refused until a second one has finished the first.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import closing, suppress
from dataclasses import dataclass
from itertools import count
from pathlib import Path

from fitness.database import SCHEMA_VERSION, build, check_version, forget_log, real, repaired, told
from fitness.errors import LedgerDamaged, StorageError
from fitness.filesystem import sync_folder
from fitness.ledger import Ledger
from fitness.salvage import Salvaged, salvage
from search_spaces.genome import canonical_json

_KEPT = ("", "-wal", "-journal")
"""What is worth keeping of a database."""


@dataclass(frozen=True, kw_only=True)
class Repaired:
    """What became of a ledger. `torn` is where the damaged file lies; None when nothing was wrong with it.

    `trials` and `events` were kept, `lost_trials` and `lost_events` are known to be lost; of what stood at the end,
    nothing may be known.
    """

    place: Path
    torn: Path | None
    trials: int
    events: int
    lost_trials: int
    lost_events: int

    def __str__(self) -> str:
        if self.torn is None:
            return f"{self.place}: nothing is wrong with it, nothing was changed"
        return (
            f"{self.place}: kept {self.trials} trials and {self.events} events (what happened to them), lost "
            f"{self.lost_trials} trials and {self.lost_events} events; results among those are trained again; "
            f"the damaged file is {self.torn.name}"
        )


def repair(path: Path) -> Repaired:
    """Repair the ledger at `path`, or finish a repair that was cut short. The caller holds the run's lock.

    Raises StorageError when nothing can be saved, when there is no room, or for a ledger of a newer evolm; the ledger
    is then as it was.
    """
    with told(str(path)):
        try:
            return _repair(real(path))
        except OSError as error:
            raise StorageError(
                f"{path}: {error.strerror or error}; it was not repaired: make room in {path.parent}, or make it "
                f"writable, then repair again"
            ) from error


def _repair(path: Path) -> Repaired:
    ready = repaired(path)
    present, done = _whole(path), _whole(ready)
    if present is not None and (done is None or present >= done):  # or the user put a whole copy there meanwhile
        ready.unlink(missing_ok=True)
        trials, events = present
        return Repaired(place=path, torn=None, trials=trials, events=events, lost_trials=0, lost_events=0)
    if done is not None:  # a repair was cut short
        torn = max(_torn(path), key=lambda one: int(one.name.rpartition("-")[2]), default=None) or _keep(path)
        found = salvage(torn)
    else:
        found = _salvaged(path)
        torn = _keep(path)
        _write(found, path.with_name(f"{path.name}.draft"), ready)
        done = len(found.trials), len(found.events) - found.lost_events
    forget_log(path)
    sync_folder(path.parent)  # the old log is gone before the new file is there
    ready.replace(path)
    sync_folder(path.parent)
    return Repaired(
        place=path,
        torn=torn,
        trials=done[0],
        events=done[1],
        lost_trials=found.lost_trials,
        lost_events=found.lost_events,
    )


def _whole(path: Path) -> tuple[int, int] | None:
    """The numbers of trials and events of a ledger; None where there is none, or a damaged one."""
    if not path.exists():
        return None
    try:
        with closing(Ledger.open(path, repairing=True)) as whole:
            return len(whole.trials), whole.seq - len(whole.missing)
    except LedgerDamaged:
        return None


def _salvaged(path: Path) -> Salvaged:
    found = salvage(path)
    if not found.meta:
        raise StorageError(f"{path}: nothing in it can be read: what the search was is lost; it was left as it is")
    check_version(int(found.meta.get("schema_version", 0)), str(path))
    return found


def _torn(path: Path) -> Iterator[Path]:
    return (one for one in path.parent.glob(f"{path.name}.torn-*") if one.name.rpartition("-")[2].isdecimal())


def _keep(path: Path) -> Path:
    """Give the damaged file and its log a second name each, under the first number that is free or was given before."""
    for number in count(1):
        torn = path.with_name(f"{path.name}.torn-{number}")
        if not torn.exists() or torn.samefile(path):
            break
    for suffix in _KEPT:
        old, new = (one.with_name(f"{one.name}{suffix}") for one in (path, torn))
        if old.exists() and not new.exists():
            try:
                os.link(old, new)
            except OSError:  # a filesystem without second names
                shutil.copy2(old, new)
    sync_folder(path.parent)
    return torn


def _write(found: Salvaged, draft: Path, ready: Path) -> None:
    """Write the whole new ledger, look at it as any reader would, and only then call it ready."""
    meta = {**found.meta, "schema_version": canonical_json(SCHEMA_VERSION)}
    try:
        build(draft, meta, found.trials, found.events)
        Ledger.open(draft).close()
        draft.replace(ready)
    finally:
        with suppress(OSError):
            draft.unlink(missing_ok=True)
    sync_folder(ready.parent)
