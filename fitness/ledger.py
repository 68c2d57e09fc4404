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
from contextlib import ExitStack, closing
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
from fitness.salvage import newest_in_log, salvage
from fitness.trial import STATES, Reason, State, Trial
from search_spaces.genome import Genome, canonical_json


class Ledger:
    """Reads a ledger, and writes it when opened for that. Trials are kept in memory, as the events make them.

    `missing` are the numbers of events that a repair could not save. `full` is True once the disk had no room and the
    ballast was given up for the last events: what is left is to end in order.
    """

    def __init__(self, connection: sqlite3.Connection, place: str) -> None:
        self._connection, self.place = connection, place
        self.trials: dict[int, Trial] = {}
        self.numbers: dict[Genome, int] = {}
        self.seq = 0
        self.meta: dict[str, Any] = {}
        self.missing: list[int] = []
        self.full = False
        self._by_state: dict[State, set[int]] = {state: set() for state in STATES}
        self._began: float | None = None  # when this writer's session began, on the monotonic clock
        self._spent: dict[int, tuple[float, float]] = {}  # flops and seconds of a launch that has ended, by its lease
        self._late_leases: set[int] = set()
        self._known: dict[int, Trial] = {}  # as proposals know them; but for the stale ones, which have changed since
        self._stale: set[int] = set()
        self._files: dict[Path, tuple[int, int] | None] = {}
        self._ballast: Ballast | None = None

    # --- opening ------------------------------------------------------------------------------------------------------

    @classmethod
    def create(cls, path: Path | None, meta: Mapping[str, Any]) -> Ledger:
        """A new ledger at `path`, or in memory. `meta` are JSON values that never change: the space, the rungs, the
        seed. Raises StorageError when one is there already, or when there is no room for one."""
        place = str(path) if path is not None else "the ledger in memory"
        if path is not None and path.exists():
            raise StorageError(f"{place}: a ledger is already there")
        path = path and database.real(path)
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
            ledger._read(path, write=True)
            ledger._settle(path)
            undo.pop_all()
        return ledger

    @classmethod
    def open(cls, path: Path, *, write: bool = False, repairing: bool = False) -> Ledger:
        """The ledger at `path`, as it is now; one of an older schema is brought up to date when it is opened for
        writing, and read through a copy otherwise. A log of which SQLite reads but the beginning is damage for who
        writes, or is `repairing` what is there; others may read what SQLite reads.

        Raises StorageError when there is none or it is of a newer evolm, LedgerDamaged when it is damaged.
        """
        file = database.real(path)
        if not file.is_file():
            raise StorageError(f"{path}: no ledger there")
        if not repairing and database.repaired(file).exists():
            raise LedgerDamaged(f"{path.parent}: a repair was cut short; {database.repair_command(path)} finishes it")
        with told(str(path)):
            try:
                if write or repairing:
                    _check_log(file)
                if write:
                    return cls._opened(file, str(path), database.connect(file), write)
                return database.read(file, lambda connection: cls._opened(file, str(path), connection, write))
            except sqlite3.DatabaseError as error:
                if not database.is_damage(error):
                    raise
                raise LedgerDamaged(_told_damage(path, str(error))) from error

    @classmethod
    @database.believing()
    def _opened(cls, path: Path, place: str, connection: sqlite3.Connection, write: bool) -> Ledger:
        ledger = cls(connection, place)
        with ExitStack() as undo:
            undo.callback(ledger.close)
            ledger._read(path, write)
            if write:
                database.mend_spares(ledger._connection)
                ledger._settle(path)
            undo.pop_all()
        return ledger

    def _settle(self, path: Path | None) -> None:
        """Remember which files are written, and keep some room beside them."""
        if path is not None:
            path = path.absolute()
            beside = (path.with_name(f"{path.name}{suffix}") for suffix in ("", "-wal", "-shm"))
            self._files = {file: _identity(file) for file in beside if file.exists()}
            self._ballast = Ballast.beside(path)
            self._ballast.take()

    def _read(self, path: Path | None, write: bool) -> None:
        """Fold everything that is there, as of one moment: a writer may be at work."""
        collecting = gc.isenabled()
        gc.disable()  # all of this stays: the collector would walk through it again and again, for a third of the time
        try:
            self._fold_all(*self._fetch(path, write))
        finally:
            if collecting:
                gc.enable()

    def _fetch(self, path: Path | None, write: bool) -> tuple[database.Rows, database.Rows]:
        """The rows of trials and events as they stand there. On a shared disk a writer waits that long."""
        self._connection.execute("BEGIN")
        try:
            version = version_of(self._connection)
            database.check_version(version, self.place)
            if version < SCHEMA_VERSION:
                self._upgrade(path, write, version)
            database.check_pages(self._connection)
            self.meta = database.meta_rows(self._connection)
            return database.fetch(self._connection, "trials"), database.fetch(self._connection, "events")
        finally:
            if self._connection.in_transaction:
                self._connection.execute("COMMIT")

    def _upgrade(self, path: Path | None, write: bool, version: int) -> None:
        """Bring an older schema up to date: in the file, of which a copy is kept, or in memory where nothing is
        written."""
        file = self._connection
        if write and path is not None:
            self._connection.execute("COMMIT")
            database.keep_copy(self._connection, path.with_name(f"{path.name}.v{version}"))
        else:
            self._connection = sqlite3.connect(":memory:", isolation_level=None, check_same_thread=False)
            with closing(file):
                file.backup(self._connection)
        migrate(self._connection)
        self._connection.execute(f"PRAGMA query_only={'OFF' if write else 'ON'}")

    def _fold_all(self, trials: database.Rows, events: database.Rows) -> None:
        for identity, digest, genome, parents, operator, seen, _ in database.verified("trials", trials):
            frozen = Genome(genome)
            if frozen.digest != digest:
                raise ValueError(f"trial {identity} is not the genome that it was")
            known = tuple(json.loads(parents))
            self._add(Trial(id=identity, frozen=frozen, parents=known, operator=operator, seen=seen))
        for seq, identity, kind, rung, body, *_ in database.verified("events", events):
            self._fold(seq, identity, kind, rung, json.loads(body) if identity is not None else {})

    def _add(self, trial: Trial) -> None:
        self.trials[trial.id] = trial
        self.numbers[trial.frozen] = trial.id
        self._known[trial.id] = trial
        self._by_state[trial.state].add(trial.id)

    def close(self) -> None:
        """Let go of the file."""
        self._connection.close()

    # --- where it lies ------------------------------------------------------------------------------------------------

    def vanished(self) -> bool:
        """Whether the file at the ledger's place, or its log, is no longer the one that is written: the run folder was
        removed or replaced. SQLite would go on writing to a file that has no name."""
        return any(_identity(file) != identity for file, identity in self._files.items())

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
        trial's. Raises ValueError without a lease for a trial that is not running."""
        if self._late(trial, "fail", lease, flops, seconds):
            return None
        self._demand(trial, "running")
        body = {"reason": reason, "message": message[:2000], "flops": flops, "seconds": seconds, "final": final}
        return self._write(trial, "fail", None, body)

    def infeasible(self, trial: int, message: str, lease: int | None = None) -> Trial | None:
        """A genome that turned out to be impossible to train. None when the lease is no longer the trial's. Raises
        ValueError without a lease for a trial that is not running."""
        if self._late(trial, "infeasible", lease, 0.0, 0.0):
            return None
        self._demand(trial, "running")
        return self._write(trial, "infeasible", None, {"message": message[:2000]})

    def stop(self, trial: int) -> Trial:
        """A trial that the user ended. Raises ValueError for one that has ended."""
        self._demand(trial, "proposed", "running", "paused")
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
        """Whether an outcome came after its launch had ended; it is written down as that, once, and costs what its end
        had not told."""
        if lease is None or lease == self.trials[trial].lease:
            return False
        if lease not in self._late_leases:
            paid, worked = self._spent.get(lease, (0.0, 0.0))
            spent = {"flops": max(0.0, flops - paid), "seconds": max(0.0, seconds - worked)}
            self._append(trial, "late", None, {"kind": kind, "lease": lease, **spent})
        return True

    def _demand(self, trial: int, *states: State) -> None:
        if (state := self.trials[trial].state) not in states:
            raise ValueError(f"trial {trial} is {state}, not {' or '.join(states)}")

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
            self._stale.add(identity)
            if kind == "late":
                self._late_leases.add(body["lease"])
            elif kind in ENDS and before.lease is not None:
                self._spent[before.lease] = body.get("flops", 0.0), body.get("seconds", 0.0)
            after = self.trials[identity] = fold(before, seq, kind, rung, body)
            if after.state != before.state:
                self._by_state[before.state].discard(identity)
                self._by_state[after.state].add(identity)
        elif kind == "missing":
            self.missing.append(seq)
        self.seq = seq

    # --- asking -------------------------------------------------------------------------------------------------------

    @property
    def late(self) -> int:
        """How many launches told an outcome after they had ended."""
        return len(self._late_leases)

    def in_state(self, *states: State) -> list[Trial]:
        """The trials that are in one of the states, by number. Takes time with these trials, not with all."""
        return [self.trials[number] for number in sorted(set().union(*(self._by_state[state] for state in states)))]

    def as_of(self, seq: int, before: int) -> tuple[Trial, ...]:
        """The trials with numbers below `before`, as proposals know them after event `seq` (`Trial.as_of`)."""
        for number in self._stale:
            self._known[number] = self.trials[number].as_of(self.seq)
        self._stale.clear()
        trials = islice(self._known.values(), max(0, before - 1))  # numbered from 1, in order
        if seq >= self.seq:
            return tuple(trials)
        return tuple(trial if trial.changed <= seq else trial.as_of(seq) for trial in trials)

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


def _identity(path: Path) -> tuple[int, int] | None:
    """Which file is at a place; None when there is none that can be seen."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_dev, status.st_ino


def _check_log(path: Path) -> None:
    """Raise Damaged where the log beside a ledger tells more than SQLite reads of it, which ends without a word at the
    first page that is not what was written: the next writer would begin there, over what follows.

    One row more is none: the last commit may have been cut short, and was then never acknowledged.
    """
    if not database.in_use(path, "-wal"):
        return
    last = newest_in_log(path)  # before any connection is there, which would lose its locks by it
    read = database.read(path, _newest)
    if any(told > known + 1 for told, known in zip(last, read, strict=True)):
        raise Damaged("its write-ahead log breaks off before its end")


@database.believing()
def _newest(connection: sqlite3.Connection) -> tuple[int, int]:
    """The numbers of the last trial and of the last event that SQLite reads."""
    with closing(connection):
        (trial,) = connection.execute("SELECT max(id) FROM trials").fetchone()
        (event,) = connection.execute("SELECT max(seq) FROM events").fetchone()
        return trial or 0, event or 0


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
