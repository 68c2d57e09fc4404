"""The ledger: everything a search knows, in one SQLite file with one writer.

Nothing is ever changed in it. `trials` says what was proposed, `events` what happened to it, in the order in which it
happened; the state of a trial is what its events add up to. An event that was written survives the death of the
process and of the machine (`synchronous=FULL`); one that was not, never happened. A second result of the same trial
and rung, and a second end of the same launch, are refused by the database itself.

A ledger may be used from several threads, one at a time: its caller holds the lock.
"""

from __future__ import annotations

import gc
import json
import os
import sqlite3
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from itertools import islice
from pathlib import Path
from typing import Any

from fitness import database
from fitness.ballast import Ballast
from fitness.database import SCHEMA_VERSION, Damaged, told, transaction
from fitness.errors import LedgerDamaged, StorageError
from fitness.events import ENDS, fold
from fitness.filesystem import sync_folder
from fitness.migration import migrate, version_of
from fitness.salvage import salvage
from fitness.trial import STATES, Reason, State, Trial
from search_spaces.genome import Genome, canonical_json


class Ledger:
    """Reads a ledger, and writes it when opened for that. Trials are kept in memory, as the events make them.

    `late` counts outcomes that came after their launch was given up. `full` is True once the disk had no room and the
    ballast was given up for the last events: what is left is to end in order.
    """

    def __init__(self, connection: sqlite3.Connection, place: str) -> None:
        self._connection, self.place = connection, place
        self.trials: dict[int, Trial] = {}
        self.numbers: dict[Genome, int] = {}
        self.seq = 0
        self.meta: dict[str, Any] = {}
        self.late = 0
        self.full = False
        self._by_state: dict[State, set[int]] = {state: set() for state in STATES}
        self._began: float | None = None  # when this writer's session began, on the monotonic clock
        self._path: Path | None = None
        self._identity: tuple[int, int] | None = None
        self._ballast: Ballast | None = None

    # --- opening ------------------------------------------------------------------------------------------------------

    @classmethod
    def create(cls, path: Path | None, meta: Mapping[str, Any]) -> Ledger:
        """A new ledger at `path`, or in memory. `meta` are JSON values that never change: the space, the rungs, the
        seed. Raises StorageError when one is there already, or when there is no room for one."""
        place = str(path) if path is not None else "the ledger in memory"
        if path is not None and path.exists():
            raise StorageError(f"{place}: a ledger is already there")
        values = {key: canonical_json(value) for key, value in {"schema_version": SCHEMA_VERSION, **meta}.items()}
        with told(place), ExitStack() as undo:
            if path is not None:
                draft = path.with_name(f"{path.name}.draft")
                undo.callback(draft.unlink, missing_ok=True)
                database.build(draft, values)
                Ballast.beside(path).take()
                database.forget_log(path)
                draft.replace(path)  # a ledger is there as a whole, or not at all
                sync_folder(path.parent)
            ledger = cls(database.connect(path), place)
            undo.callback(ledger.close)
            if path is None:
                database.fill(ledger._connection, values)
            ledger._read()
            ledger._settle(path)
            undo.pop_all()
        return ledger

    @classmethod
    def open(cls, path: Path, *, write: bool = False) -> Ledger:
        """The ledger at `path`, as it is now; one of an older schema is brought up to date when it is opened for
        writing, and read through a copy otherwise.

        Raises StorageError when there is none or it is of a newer evolm, LedgerDamaged when it is damaged.
        """
        if not path.is_file():
            raise StorageError(f"{path}: no ledger there")
        if database.repaired(path).exists():
            raise LedgerDamaged(f"{path.parent}: a repair was cut short; {database.repair_command(path)} finishes it")
        with told(str(path)):
            try:
                if write:
                    return cls._opened(path, database.connect(path), write)
                return database.read(path, lambda connection: cls._opened(path, connection, write))
            except sqlite3.DatabaseError as error:
                if not database.is_damage(error):
                    raise
                raise LedgerDamaged(_told_damage(path, str(error))) from error

    @classmethod
    def _opened(cls, path: Path, connection: sqlite3.Connection, write: bool) -> Ledger:
        ledger = cls(connection, str(path))
        with ExitStack() as undo:
            undo.callback(ledger.close)
            ledger._upgrade(write)
            ledger._read()
            if write:
                ledger._settle(path)
            undo.pop_all()
        return ledger

    def _settle(self, path: Path | None) -> None:
        """Remember which file is written, and keep some room beside it."""
        if path is not None:
            self._path, self._identity = path.absolute(), _identity(path)
            self._ballast = Ballast.beside(self._path)
            self._ballast.take()

    def _upgrade(self, write: bool) -> None:
        """Bring an older schema up to date: in the file, or in a copy in memory where nothing is written."""
        version = version_of(self._connection)
        database.check_version(version, self.place)
        if version == SCHEMA_VERSION:
            return
        if not write:
            copy = sqlite3.connect(":memory:", isolation_level=None, check_same_thread=False)
            try:
                self._connection.backup(copy)
            finally:
                self._connection.close()
                self._connection = copy
        migrate(self._connection)
        self._connection.execute(f"PRAGMA query_only={'OFF' if write else 'ON'}")

    def _read(self) -> None:
        """Fold everything that is there, as of one moment: a writer may be at work."""
        self._connection.execute("BEGIN")
        collecting = gc.isenabled()
        gc.disable()  # all of this stays: the collector would walk through it again and again, for a third of the time
        try:
            self._read_all()
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise Damaged(f"malformed content ({error})") from None
        finally:
            if collecting:
                gc.enable()
            self._connection.execute("COMMIT")

    def _read_all(self) -> None:
        database.check_pages(self._connection)
        self.meta = database.meta_rows(self._connection)
        for identity, digest, genome, parents, operator, seen, _ in database.rows(self._connection, "trials", "id"):
            frozen = Genome(genome)
            if frozen.digest != digest:
                raise ValueError(f"trial {identity} is not the genome that it was")
            known = tuple(json.loads(parents))
            self._add(Trial(id=identity, frozen=frozen, parents=known, operator=operator, seen=seen))
        for seq, identity, kind, rung, body, *_ in database.rows(self._connection, "events", "seq"):
            self._fold(seq, identity, kind, rung, json.loads(body) if identity is not None else {})

    def _add(self, trial: Trial) -> None:
        self.trials[trial.id] = trial
        self.numbers[trial.frozen] = trial.id
        self._by_state[trial.state].add(trial.id)

    def close(self) -> None:
        """Let go of the file."""
        self._connection.close()

    # --- where it lies ------------------------------------------------------------------------------------------------

    def vanished(self) -> bool:
        """Whether the file at the ledger's place is no longer the one that is written: the run folder was removed or
        replaced. SQLite would go on writing to a file that has no name."""
        return self._path is not None and _identity(self._path) != self._identity

    def check_place(self) -> None:
        """Raise StorageError when the ledger has vanished."""
        if self.vanished():
            raise StorageError(
                f"{self.place}: the ledger was removed or replaced while the search was writing it; put the run folder "
                f"back and run `evolm resume`, or begin anew"
            )

    # --- writing ------------------------------------------------------------------------------------------------------

    def propose(self, genome: Genome, *, parents: Sequence[int] = (), operator: str, seen: int) -> Trial:
        """Write down a new trial. Its number is one more than the last one's."""
        trial = Trial(id=len(self.trials) + 1, frozen=genome, parents=tuple(parents), operator=operator, seen=seen)
        row = (trial.id, trial.digest, genome.text, json.dumps(trial.parents), operator, seen, time.time())
        self._insert("trials", row)
        self._add(trial)
        return trial

    def start(self, trial: int, rung: int, worker: Mapping[str, Any]) -> Trial:
        """A launch of a trial towards a rung, by a worker that is described in JSON values. The trial's `lease` is then
        the number of this launch: whoever tells its outcome shows it."""
        return self._write(trial, "start", rung, {"worker": dict(worker)})

    def result(
        self,
        trial: int,
        rung: int,
        *,
        tokens: float,
        metrics: Mapping[str, float],
        flops: float,
        seconds: float,
        top: bool,
        lease: int | None = None,
    ) -> Trial | None:
        """What a trial told at a rung.

        None when the lease is no longer the trial's: only that it came, and what it cost, is written. None, and nothing
        written, when the trial was not running, or had told that rung.
        """
        if self._late(trial, "result", lease, flops, seconds):
            return None
        known = self.trials[trial]
        if known.state != "running" or rung <= known.rung:
            return None
        body = {"tokens": tokens, "metrics": dict(metrics), "flops": flops, "seconds": seconds, "top": top}
        return self._write(trial, "result", rung, body)

    def fail(
        self,
        trial: int,
        reason: Reason,
        message: str = "",
        *,
        flops: float = 0.0,
        seconds: float = 0.0,
        final: bool = True,
        lease: int | None = None,
    ) -> Trial | None:
        """A launch that came to nothing; `final` when it will not be tried again. None when the lease is no longer the
        trial's."""
        if self._late(trial, "fail", lease, flops, seconds):
            return None
        body = {"reason": reason, "message": message[:2000], "flops": flops, "seconds": seconds, "final": final}
        return self._write(trial, "fail", None, body)

    def infeasible(self, trial: int, message: str, lease: int | None = None) -> Trial | None:
        """A genome that turned out to be impossible to train. None when the lease is no longer the trial's."""
        if self._late(trial, "infeasible", lease, 0.0, 0.0):
            return None
        return self._write(trial, "infeasible", None, {"message": message[:2000]})

    def stop(self, trial: int) -> Trial:
        """A trial that the user ended."""
        return self._write(trial, "stop", None, {})

    def open_session(self, about: Mapping[str, Any]) -> None:
        """A controller begins to work: its process, host and versions, as JSON values. The seconds of all that it
        writes count from here, on a clock that nobody can set."""
        self._began = time.monotonic()
        self._append(None, "open", None, about)

    def close_session(self, why: str) -> None:
        """A controller ends in order."""
        self._append(None, "close", None, {"why": why})

    def _late(self, trial: int, kind: str, lease: int | None, flops: float, seconds: float) -> bool:
        """Whether an outcome came after its launch was given up; it is written down as that, and costs what it cost."""
        if lease is None or lease == self.trials[trial].lease:
            return False
        self._append(trial, "late", None, {"kind": kind, "lease": lease, "flops": flops, "seconds": seconds})
        return True

    def _write(self, trial: int, kind: str, rung: int | None, body: Mapping[str, Any]) -> Trial:
        self._append(trial, kind, rung, body)
        return self.trials[trial]

    def _append(self, trial: int | None, kind: str, rung: int | None, body: Mapping[str, Any]) -> None:
        seq, text = self.seq + 1, canonical_json(body)
        elapsed = 0.0 if self._began is None else time.monotonic() - self._began
        lease = self.trials[trial].lease if trial is not None and kind in ENDS else None
        self._insert("events", (seq, trial, kind, rung, text, time.time(), elapsed, lease))
        self._fold(seq, trial, kind, rung, json.loads(text))

    def _insert(self, table: str, row: tuple[Any, ...]) -> None:
        """Write one row, durably; on a full disk in the room that was kept for it."""
        self.check_place()
        with told(self.place):
            try:
                self._commit(table, row)
            except sqlite3.DatabaseError as error:
                if not database.no_room(error) or self._ballast is None or not self._ballast.drop():
                    raise
                self.full = True
                self._commit(table, row)

    def _commit(self, table: str, row: tuple[Any, ...]) -> None:
        with transaction(self._connection):
            database.put(self._connection, table, row)

    def _fold(self, seq: int, identity: int | None, kind: str, rung: int | None, body: Mapping[str, Any]) -> None:
        if identity is not None:
            before = self.trials[identity]
            after = self.trials[identity] = fold(before, seq, kind, rung, body)
            if after.state != before.state:
                self._by_state[before.state].discard(identity)
                self._by_state[after.state].add(identity)
        self.late += kind == "late"
        self.seq = seq

    # --- asking -------------------------------------------------------------------------------------------------------

    def in_state(self, *states: State) -> list[Trial]:
        """The trials that are in one of the states, by number. Takes time with these trials, not with all."""
        return [self.trials[number] for number in sorted(set().union(*(self._by_state[state] for state in states)))]

    def as_of(self, seq: int, before: int) -> tuple[Trial, ...]:
        """The trials with numbers below `before`, as they were known after event `seq`."""
        trials = islice(self.trials.values(), max(0, before - 1))  # numbered from 1, in order
        return tuple(trials) if seq >= self.seq else tuple(trial.as_of(seq) for trial in trials)

    def sessions(self) -> list[dict[str, Any]]:
        """What every controller said when it began, with the `seconds` that it worked until its last event, by its own
        clock; for information `began` and `ended` (seconds since the epoch, by a clock that may have been set
        meanwhile); and `why` it ended, None where it did not say."""
        found: list[dict[str, Any]] = []
        query = "SELECT kind, CASE WHEN kind IN ('open', 'close') THEN body END, time, elapsed FROM events ORDER BY seq"
        for kind, body, when, elapsed in self._connection.execute(query):
            if kind == "open":
                found.append({**json.loads(body), "began": when, "ended": when, "seconds": elapsed, "why": None})
            elif found:
                session = found[-1]
                session["ended"], session["seconds"] = when, max(session["seconds"], elapsed)
                if kind == "close":
                    session["why"] = json.loads(body)["why"]
        return found

    def times(self) -> dict[int, float]:
        """When each event was written, in seconds since the epoch, by its number."""
        return dict(self._connection.execute("SELECT seq, time FROM events").fetchall())

    def worked(self) -> dict[int, float]:
        """The seconds of work that had gone into the search when each event was written, by its number: those of its
        session and of all before it."""
        found: dict[int, float] = {}
        past = now = 0.0
        for seq, kind, elapsed in self._connection.execute("SELECT seq, kind, elapsed FROM events ORDER BY seq"):
            if kind == "open":
                past, now = past + now, 0.0
            now = max(now, elapsed)
            found[seq] = past + now
        return found


def _identity(path: Path) -> tuple[int, int] | None:
    """Which file is at a place; None when there is none that can be seen."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_dev, status.st_ino


def _told_damage(path: Path, words: str) -> str:
    """What is wrong with a ledger, how much of it can be read, and what to do."""
    try:
        found = salvage(path)
    except OSError as error:
        return f"{path.parent}: the ledger cannot be read ({error.strerror or error}); the disk may be failing or gone"
    what = f"{path.parent}: the ledger ({path.name}): {words}; the file is damaged or no ledger"
    if not found.meta:
        return f"{what}, and nothing in it can be read; restore it from a copy, or begin anew"
    return f"{what}; {found.readable} can still be read: {database.repair_command(path)} saves them"
