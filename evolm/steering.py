"""What a user does to a run from another shell: end it, or have a genome tried in it."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evolm.config import HEADER, SpaceFile, load_space
from evolm.errors import RunBusy, SpaceError, UsageError
from evolm.requests import Request, send
from evolm.run import current_settings
from evolm.run_folder import RunFolder, existing
from evolm.search import Search
from fitness.ledger import Ledger
from search_spaces.yaml_source import parse_yaml, read_yaml

LOOK_SECONDS = 0.1


@dataclass(frozen=True, kw_only=True)
class Stopped:
    """A run that was asked to stop: whether anybody was at work in it, and whether it has ended since."""

    folder: RunFolder
    was_running: bool
    ended: bool


def stop(run: str, *, now: bool = False, wait: float = 600.0) -> Stopped:
    """Ask the controller of a run to end: running trials save, or, with `now`, do not. Waits so many seconds for it.

    Raises UsageError for a run that does not exist, StorageError where its folder cannot be written.
    """
    folder = existing(run)
    if not folder.busy:
        return Stopped(folder=folder, was_running=False, ended=True)
    file = send(folder, Request(kind="cancel" if now else "stop"))
    ended = _within(wait, lambda: not folder.busy)
    if ended:
        file.unlink(missing_ok=True)  # where it ended before it heard: the next one is not meant
    return Stopped(folder=folder, was_running=True, ended=ended)


def enqueue(run: str, given: str, *, wait: float = 30.0) -> tuple[RunFolder, int | None]:
    """Have a genome tried before anything else: a file of YAML or JSON, or its text; what it leaves out is the
    baseline's. Returns the number of its trial, None when a live run has not heard within `wait` seconds.

    Raises SpaceError for a genome that is not of the run's space, UsageError for one that was tried before.
    """
    folder = existing(run)
    file = load_space(folder.space)
    genome = _read(given, file)
    try:
        with folder.locked():
            search = _search(folder, file, write=True)
            try:
                return folder, search.enqueue(genome).id
            finally:
                search.ledger.close()
    except RunBusy:
        pass  # a controller is at work: it has the ledger
    frozen = file.space.complete(genome)
    known = _search(folder, file).ledger.numbers.get(frozen)
    if known is not None:
        raise UsageError(f"this genome is trial {known} already")
    request = send(folder, Request(kind="enqueue", genome=frozen.values()))
    if not _within(wait, lambda: not request.exists()):
        return folder, None
    return folder, _search(folder, file).ledger.numbers.get(frozen)


def _search(folder: RunFolder, file: SpaceFile, *, write: bool = False) -> Search:
    ledger = Ledger.open(folder.ledger, write=write)
    settings = current_settings(ledger)
    return Search(
        file.space,
        settings.objectives,
        algorithm=settings.algorithm,
        seed=settings.seed,
        fidelity=settings.fidelity,
        ledger=ledger,
    )


def _read(given: str, file: SpaceFile) -> Mapping[str, Any]:
    """The genome that was given, checked against the space."""
    written_out = given.lstrip().startswith("{")
    document = parse_yaml(given, file="GENOME") if written_out else read_yaml(Path(given))
    if not isinstance(document.value, dict):
        raise UsageError(f"{document.file}: a genome is a mapping of sections to values")
    genome = {key: value for key, value in document.value.items() if key not in HEADER}
    try:
        file.space.validate(file.space.complete(genome))
    except SpaceError as error:
        raise SpaceError(document.locate(error.problems)) from None
    return genome


def _within(seconds: float, condition: Callable[[], bool]) -> bool:
    until = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > until:
            return False
        time.sleep(LOOK_SECONDS)
    return True
