"""What a damaged ledger still tells: every row that verifies, and what of them makes a whole ledger again.

Rows are never changed and each carries its own checksum, so one that verifies is believed wherever it was found.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import count, takewhile
from pathlib import Path

from fitness.database import checksum, real
from fitness.migration import upgraded
from fitness.pages import Row, read_log, read_rows

_META, _OLD_EVENT, _TRIAL, _EVENT = 3, 7, 8, 9
"""Columns of a row, the checksum included, by which it is known; old events are those of schema version 1."""

_REALS = {_TRIAL: (6,), _OLD_EVENT: (5,), _EVENT: (5, 6)}
"""Columns that hold real numbers: SQLite keeps 0.0 as the integer 0."""


@dataclass(frozen=True, kw_only=True)
class Salvaged:
    """The rows of a whole ledger, without their checksums: `meta` in JSON by key, trials and events numbered from 1
    without a gap.

    Trials are those up to the first that is missing. An event that is missing, or belongs to a trial that is, leaves
    one of kind `missing` in its place, so that the numbers that proposals had seen stay what they were.
    """

    meta: dict[str, str]
    trials: list[Row]
    events: list[Row]
    lost_trials: int
    lost_events: int

    @property
    def readable(self) -> str:
        """How much it is, in words."""
        events = len(self.events) - self.lost_events
        return f"{_counted(len(self.trials), 'trial')} and {_counted(events, 'event')}"

    @property
    def lost(self) -> str:
        """How much is known to be lost, in words."""
        return f"{_counted(self.lost_trials, 'trial')} and {_counted(self.lost_events, 'event')}"


def _counted(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


@dataclass
class _Found:
    """Rows that verify, by key."""

    meta: dict[str, str] = field(default_factory=dict)
    trials: dict[int, Row] = field(default_factory=dict)
    events: dict[int, Row] = field(default_factory=dict)
    old_events: dict[int, Row] = field(default_factory=dict)

    def take(self, row: Row) -> None:
        """Keep a row that is one of ours and is what was written; of two with one key the later one."""
        reals = _REALS.get(len(row), ())
        row = tuple(float(value) if place in reals else value for place, value in enumerate(row))
        *content, written = row
        if checksum(content) != written:
            return
        if len(row) == _META:
            self.meta[row[0]] = row[1]
        elif len(row) in _REALS:
            {_TRIAL: self.trials, _EVENT: self.events, _OLD_EVENT: self.old_events}[len(row)][row[0]] = tuple(content)


def salvage(path: Path) -> Salvaged:
    """What can be saved of the ledger at `path`, be it no database at all. Raises OSError when it cannot be read."""
    found = _found(read_rows(real(path)))
    old = upgraded(found.old_events[seq] for seq in sorted(found.old_events))
    return _whole(found.meta, found.trials, {**{row[0]: row for row in old}, **found.events})


def newest_in_log(path: Path) -> tuple[int, int]:
    """The highest numbers of a trial and of an event that can be read in the write-ahead log; 0 where there is none.

    Not for a ledger that this process has open: a file that is closed takes SQLite's locks on it along. Raises OSError
    when it cannot be read.
    """
    found = _found(read_log(path))
    return max(found.trials, default=0), max([0, *found.events, *found.old_events])


def _found(rows: Iterable[Row]) -> _Found:
    found = _Found()
    for row in rows:
        try:
            found.take(row)
        except (TypeError, ValueError):
            continue  # text where a number belongs
    return found


def _whole(meta: dict[str, str], trials: dict[int, Row], events: dict[int, Row]) -> Salvaged:
    kept = [trials[number] for number in takewhile(trials.__contains__, count(1))]
    known = max([0, *trials, *(row[1] for row in events.values() if row[1] is not None)])
    last = max([0, *events, *(row[5] for row in kept)])
    placed = _without_gaps(events, last, len(kept))
    lost = sum(row[2] == "missing" for row in placed) - sum(row[2] == "missing" for row in events.values())
    return Salvaged(meta=meta, trials=kept, events=placed, lost_trials=known - len(kept), lost_events=lost)


def _without_gaps(events: dict[int, Row], last: int, trials: int) -> list[Row]:
    """The events from 1 to `last` that belong to one of the trials; one of kind `missing` for each other."""
    kept: dict[int, Row] = {}
    told: set[tuple[str, int, int]] = set()
    for seq in sorted(events, reverse=True):
        row = events[seq]
        # An event that was taken back can have stayed behind: of two that tell the same, the history went on to the
        # later one.
        if (row[1] or 0) <= trials and not told & _marks(row):
            kept[seq] = row
            told |= _marks(row)
    placed: list[Row] = []
    for seq in range(1, last + 1):
        time, elapsed = placed[-1][5:7] if placed else (0.0, 0.0)
        placed.append(kept.get(seq, (seq, None, "missing", None, "{}", time, elapsed, None)))
    return placed


def _marks(row: Row) -> set[tuple[str, int, int]]:
    """What no two events may have in common: the rung that a trial told, the launch that ended."""
    _, trial, kind, rung, _, _, _, lease = row
    result = {("result", trial, rung)} if kind == "result" else set()
    return result | ({("lease", lease, 0)} if lease is not None else set())
