"""The ledger: everything a search knows, in one SQLite file with one writer.

Nothing is ever changed in it. `trials` says what was proposed, `events` what happened to it, in the order in which it
happened; the state of a trial is what its events add up to. An event that was written survives the death of the
process and of the machine (`synchronous=FULL`); one that was not, never happened. A second result of the same trial
and rung is refused by the database itself. Every row carries a checksum: what a failing disk changed is told, not
believed.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from fitness.errors import RunBusy, StorageError
from fitness.trial import Reason, Rung, State, Trial
from search_spaces.genome import Genome, canonical_json

SCHEMA_VERSION = 1

_SCHEMA = """
CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL, sum TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE trials (
    id INTEGER PRIMARY KEY,
    digest TEXT NOT NULL UNIQUE,
    genome TEXT NOT NULL,
    parents TEXT NOT NULL,
    operator TEXT NOT NULL,
    seen INTEGER NOT NULL,
    time REAL NOT NULL,
    sum TEXT NOT NULL
);
CREATE TABLE events (
    seq INTEGER PRIMARY KEY,
    trial INTEGER REFERENCES trials (id),
    kind TEXT NOT NULL,
    rung INTEGER,
    body TEXT NOT NULL,
    time REAL NOT NULL,
    sum TEXT NOT NULL
);
CREATE UNIQUE INDEX one_result ON events (trial, rung) WHERE kind = 'result';
"""


class Ledger:
    """Reads a ledger, and writes it when opened for that. Trials are kept in memory, as the events make them."""

    def __init__(self, connection: sqlite3.Connection, place: str) -> None:
        self._connection, self.place = connection, place
        self.trials: dict[int, Trial] = {}
        self.numbers: dict[Genome, int] = {}
        self.seq = 0
        self.meta: dict[str, Any] = {}

    # --- opening ------------------------------------------------------------------------------------------------------

    @classmethod
    def create(cls, path: Path | None, meta: Mapping[str, Any]) -> Ledger:
        """A new ledger at `path`, or in memory. `meta` are JSON values that never change: the space, the rungs, the
        seed."""
        place = str(path) if path is not None else "the ledger in memory"
        with _told(place):
            if path is not None and path.exists():
                raise StorageError(f"{place}: a ledger is already there")
            connection = _connect(str(path) if path is not None else ":memory:")
            connection.executescript(f"BEGIN;{_SCHEMA}COMMIT;")
            values = {"schema_version": SCHEMA_VERSION, **meta}
            with _transaction(connection):
                rows = [(key, canonical_json(value)) for key, value in values.items()]
                connection.executemany("INSERT INTO meta VALUES (?, ?, ?)", [(*row, _checksum(row)) for row in rows])
            ledger = cls(connection, place)
            ledger._read()
        return ledger

    @classmethod
    def open(cls, path: Path, *, write: bool = False) -> Ledger:
        """The ledger at `path`, as it is now. Raises StorageError when there is none or when it is damaged."""
        if not path.is_file():
            raise StorageError(f"{path}: no ledger there")
        if write:
            return cls._opened(path, lambda: _connect(str(path)))
        uri = path.absolute().as_uri()
        quiet = not path.with_name(f"{path.name}-wal").exists()  # nobody writes: nothing beside the file is needed
        if quiet:
            try:
                return cls._opened(path, lambda: _reader(f"{uri}?immutable=1"))
            except StorageError:
                pass  # unless somebody has just begun to
        return cls._opened(path, lambda: _reader(f"{uri}?mode=ro"))

    @classmethod
    def _opened(cls, path: Path, connect: Callable[[], sqlite3.Connection]) -> Ledger:
        with _told(str(path)), ExitStack() as undo:
            ledger = cls(connect(), str(path))
            undo.callback(ledger.close)
            ledger._read()
            undo.pop_all()
        return ledger

    def _read(self) -> None:
        """Fold everything that is there, as of one moment: a writer may be at work."""
        self._connection.execute("BEGIN")
        try:
            self._read_all()
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise sqlite3.DatabaseError(f"malformed content ({error})") from None
        finally:
            self._connection.execute("COMMIT")

    def _read_all(self) -> None:
        (verdict,) = self._connection.execute("PRAGMA quick_check(1)").fetchone()
        if verdict != "ok":
            raise ValueError(verdict)
        for key, value, checksum in self._connection.execute("SELECT * FROM meta"):
            if _checksum((key, value)) != checksum:
                raise ValueError(f"{key} is not what it was")
            self.meta[key] = json.loads(value)
        version = self.meta.get("schema_version")
        if version != SCHEMA_VERSION:
            raise StorageError(f"{self.place}: has schema version {version}, this evolm reads {SCHEMA_VERSION}")
        for identity, digest, genome, parents, operator, seen, _ in self._rows("trials", "id"):
            frozen = Genome(genome)
            if frozen.digest != digest:
                raise ValueError(f"trial {identity} is not the genome that it was")
            known = tuple(json.loads(parents))
            self._add(Trial(id=identity, frozen=frozen, parents=known, operator=operator, seen=seen))
        for seq, identity, kind, rung, body, _ in self._rows("events", "seq"):
            self._fold(seq, identity, kind, rung, body)

    def _rows(self, table: str, key: str) -> Iterator[list[Any]]:
        """The rows of a table in order, numbered from 1 without a gap, each with the checksum that it was written
        with."""
        rows = self._connection.execute(f"SELECT * FROM {table} ORDER BY {key}")
        for number, (*row, checksum) in enumerate(rows, 1):
            if row[0] != number or _checksum(row) != checksum:
                raise ValueError(f"row {number} of {table} is missing or changed")
            yield row

    def _add(self, trial: Trial) -> None:
        self.trials[trial.id] = trial
        self.numbers[trial.frozen] = trial.id

    def close(self) -> None:
        """Let go of the file."""
        self._connection.close()

    # --- writing ------------------------------------------------------------------------------------------------------

    def propose(self, genome: Genome, *, parents: Sequence[int] = (), operator: str, seen: int) -> Trial:
        """Write down a new trial. Its number is one more than the last one's."""
        trial = Trial(id=len(self.trials) + 1, frozen=genome, parents=tuple(parents), operator=operator, seen=seen)
        row = (trial.id, trial.digest, genome.text, json.dumps(trial.parents), operator, seen, time.time())
        self._insert("trials", row)
        self._add(trial)
        return trial

    def start(self, trial: int, rung: int, worker: Mapping[str, Any]) -> Trial:
        """A launch of a trial towards a rung, by a worker that is described in JSON values."""
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
    ) -> Trial | None:
        """What a trial told at a rung; None, and nothing written, when it was not running, or had told that rung."""
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
    ) -> Trial:
        """A launch that came to nothing; `final` when it will not be tried again."""
        body = {"reason": reason, "message": message[:2000], "flops": flops, "seconds": seconds, "final": final}
        return self._write(trial, "fail", None, body)

    def infeasible(self, trial: int, message: str) -> Trial:
        """A genome that turned out to be impossible to train."""
        return self._write(trial, "infeasible", None, {"message": message[:2000]})

    def stop(self, trial: int) -> Trial:
        """A trial that the user ended."""
        return self._write(trial, "stop", None, {})

    def open_session(self, about: Mapping[str, Any]) -> None:
        """A controller begins to work: its process, host and versions, as JSON values."""
        self._append(None, "open", None, about)

    def close_session(self, why: str) -> None:
        """A controller ends in order."""
        self._append(None, "close", None, {"why": why})

    def _write(self, trial: int, kind: str, rung: int | None, body: Mapping[str, Any]) -> Trial:
        self._append(trial, kind, rung, body)
        return self.trials[trial]

    def _append(self, trial: int | None, kind: str, rung: int | None, body: Mapping[str, Any]) -> None:
        seq, text = self.seq + 1, canonical_json(body)
        self._insert("events", (seq, trial, kind, rung, text, time.time()))
        self._fold(seq, trial, kind, rung, text)

    def _insert(self, table: str, row: tuple[Any, ...]) -> None:
        """Write one row with its checksum, durably."""
        marks = ", ".join("?" * (len(row) + 1))
        with _told(self.place), _transaction(self._connection):
            self._connection.execute(f"INSERT INTO {table} VALUES ({marks})", (*row, _checksum(row)))

    def _fold(self, seq: int, identity: int | None, kind: str, rung: int | None, body: str) -> None:
        if identity is not None:
            self.trials[identity] = _FOLDS[kind](self.trials[identity], seq, rung, json.loads(body))
        self.seq = seq

    # --- asking -------------------------------------------------------------------------------------------------------

    def in_state(self, *states: State) -> list[Trial]:
        """The trials that are in one of the states, by number."""
        return [trial for trial in self.trials.values() if trial.state in states]

    def as_of(self, seq: int, before: int) -> tuple[Trial, ...]:
        """The trials with numbers below `before`, as they were known after event `seq`."""
        trials = (trial for trial in self.trials.values() if trial.id < before)
        return tuple(trials) if seq >= self.seq else tuple(trial.as_of(seq) for trial in trials)

    def sessions(self) -> list[dict[str, Any]]:
        """What every controller said when it began, with `began` and `ended` (seconds since the epoch, of its last
        event) and `why` it ended, None where it did not say."""
        found: list[dict[str, Any]] = []
        for kind, body, when in self._connection.execute("SELECT kind, body, time FROM events ORDER BY seq"):
            if kind == "open":
                found.append({**json.loads(body), "began": when, "ended": when, "why": None})
            elif found:
                found[-1]["ended"] = when
                if kind == "close":
                    found[-1]["why"] = json.loads(body)["why"]
        return found

    def times(self) -> dict[int, float]:
        """When each event was written, in seconds since the epoch, by its number."""
        return dict(self._connection.execute("SELECT seq, time FROM events").fetchall())


# --- what an event makes of a trial -----------------------------------------------------------------------------------


def _started(trial: Trial, seq: int, rung: int | None, body: dict[str, Any]) -> Trial:
    return replace(
        trial, state="running", attempts=trial.attempts + 1, worker=body["worker"], reason=None, message="", ended=None
    )


def _resulted(trial: Trial, seq: int, rung: int | None, body: dict[str, Any]) -> Trial:
    told = Rung(
        rung=cast(int, rung),
        tokens=body["tokens"],
        metrics=body["metrics"],
        flops=body["flops"],
        seconds=body["seconds"],
        seq=seq,
    )
    return replace(
        trial,
        state="complete" if body["top"] else "paused",
        lost=0,
        rungs=(*trial.rungs, told),
        flops=trial.flops + told.flops,
        seconds=trial.seconds + told.seconds,
        worker=None,
        reason=None,
        message="",
        ended=seq if body["top"] else None,
    )


def _failed(trial: Trial, seq: int, rung: int | None, body: dict[str, Any]) -> Trial:
    again: State = "paused" if trial.rungs else "proposed"
    return replace(
        trial,
        state="failed" if body["final"] else again,
        lost=trial.lost + (body["reason"] == "lost"),
        reason=body["reason"] if body["final"] else None,
        message=body["message"],
        flops=trial.flops + body["flops"],
        seconds=trial.seconds + body["seconds"],
        worker=None,
        ended=seq if body["final"] else None,
    )


def _infeasible(trial: Trial, seq: int, rung: int | None, body: dict[str, Any]) -> Trial:
    return replace(trial, state="infeasible", message=body["message"], worker=None, ended=seq)


def _stopped(trial: Trial, seq: int, rung: int | None, body: dict[str, Any]) -> Trial:
    return replace(trial, state="stopped", worker=None, ended=seq)


_FOLDS: dict[str, Callable[[Trial, int, int | None, dict[str, Any]], Trial]] = {
    "start": _started,
    "result": _resulted,
    "fail": _failed,
    "infeasible": _infeasible,
    "stop": _stopped,
}


# --- SQLite -----------------------------------------------------------------------------------------------------------


def _connect(database: str) -> sqlite3.Connection:
    """The one writer: every transaction is on the disk before it is acknowledged."""
    connection = sqlite3.connect(database, isolation_level=None)
    connection.execute("PRAGMA journal_mode=WAL")
    connection.execute("PRAGMA synchronous=FULL")
    connection.execute("PRAGMA foreign_keys=ON")
    return connection


def _reader(uri: str) -> sqlite3.Connection:
    return sqlite3.connect(uri, uri=True, isolation_level=None)


def _checksum(row: Sequence[Any]) -> str:
    return hashlib.blake2b(json.dumps(list(row)).encode(), digest_size=8).hexdigest()


@contextmanager
def _transaction(connection: sqlite3.Connection) -> Iterator[None]:
    connection.execute("BEGIN IMMEDIATE")
    try:
        yield
        connection.execute("COMMIT")
    finally:
        if connection.in_transaction:
            connection.execute("ROLLBACK")


@contextmanager
def _told(place: str) -> Iterator[None]:
    """Turn what SQLite says into what the user needs to know."""
    try:
        yield
    except sqlite3.DatabaseError as error:
        words = str(error)
        if "locked" in words:
            raise RunBusy(f"{place}: another process writes to it") from error
        advice = next((advice for sign, advice in _ADVICE.items() if sign in words), "the disk may be failing or gone")
        raise StorageError(f"{place}: {words}; {advice}") from error


_DAMAGED = "the file is damaged or no ledger; `sqlite3 FILE .recover` can save what is readable"
_UNWRITABLE = "make the run folder writable, then run `evolm resume`"
_ADVICE = {
    "full": "free some space on that disk, then run `evolm resume`; nothing acknowledged is lost",
    "readonly": _UNWRITABLE,
    "unable to open": _UNWRITABLE,
    "malformed": _DAMAGED,
    "not a database": _DAMAGED,
    "no such table": _DAMAGED,
    "decode": _DAMAGED,
}
"""What to do about it, by a word of the message."""
