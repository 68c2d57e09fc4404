"""The SQLite file under a ledger: its tables, how it is opened, how a row is written, and what its errors mean.

Every row ends in a checksum of the rest: what a failing disk changed is told, not believed. What all later rows build
on, `meta` and `trials`, is there twice, on pages of their own: a lost event costs a launch, a lost trial would cost
every trial after it.
"""

from __future__ import annotations

import errno
import hashlib
import json
import shlex
import shutil
import sqlite3
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

from fitness.errors import LedgerDamaged, RunBusy, StorageError
from fitness.filesystem import filesystem, is_network, sync_folder

SCHEMA_VERSION = 2

EVENTS = """
CREATE TABLE events (
    seq INTEGER PRIMARY KEY,
    trial INTEGER REFERENCES trials (id),
    kind TEXT NOT NULL,
    rung INTEGER,
    body TEXT NOT NULL,
    time REAL NOT NULL,
    elapsed REAL NOT NULL,
    lease INTEGER REFERENCES events (seq),
    sum TEXT NOT NULL
);
CREATE UNIQUE INDEX one_result ON events (trial, rung) WHERE kind = 'result';
CREATE UNIQUE INDEX one_end ON events (lease) WHERE lease IS NOT NULL;
"""

SPARES = """
CREATE TABLE spare_meta (key TEXT PRIMARY KEY, value TEXT NOT NULL, sum TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE spare_trials (
    id INTEGER PRIMARY KEY,
    digest TEXT NOT NULL,
    genome TEXT NOT NULL,
    parents TEXT NOT NULL,
    operator TEXT NOT NULL,
    seen INTEGER NOT NULL,
    time REAL NOT NULL,
    sum TEXT NOT NULL
);
"""

SCHEMA = f"""
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
{EVENTS}{SPARES}"""

TABLES = {
    "meta": ("meta", "spare_meta"),
    "trials": ("trials", "spare_trials"),
    "events": ("events",),
}
"""Where a row of each kind is written."""

LOCAL_PATIENCE = 5.0
"""Seconds until a writer believes that another one is at work: readers do not hold it up."""

NETWORK_PATIENCE = 60.0
"""Seconds that a writer without a write-ahead log waits for readers, who hold their lock while they read once, and they
for it."""

LOG_PAGES = 200
"""Pages of the write-ahead log after which it begins anew: what a full disk has to hold beside the ledger."""

T = TypeVar("T")
Rows = list[tuple[Any, ...]]


class Damaged(sqlite3.DatabaseError):
    """What is in the file is not what was written."""


@contextmanager
def believing() -> Iterator[None]:
    """Raise Damaged for content that cannot be what was written. Python itself fails to tell what SQLite says about a
    schema that is no text."""
    try:
        yield
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise Damaged(f"malformed content ({error})") from error


# --- opening ----------------------------------------------------------------------------------------------------------


def real(path: Path) -> Path:
    """The file itself: what SQLite keeps beside it does not lie beside a link to it."""
    return path.resolve() if path.is_symlink() else path


@believing()
def connect(path: Path | None) -> sqlite3.Connection:
    """The one writer, of a file or of a database in memory: every transaction is on the disk before it is acknowledged.

    The write-ahead log needs memory that all its readers share, so on a network filesystem a rollback journal takes its
    place; a file that was written the other way is converted.
    """
    network = path is not None and is_network(filesystem(path))
    connection = sqlite3.connect(
        ":memory:" if path is None else path,
        isolation_level=None,
        check_same_thread=False,  # the caller holds a lock
        timeout=NETWORK_PATIENCE if network else LOCAL_PATIENCE,
    )
    try:
        connection.execute(f"PRAGMA journal_mode={'TRUNCATE' if network else 'WAL'}")
        connection.execute("PRAGMA synchronous=FULL")
        connection.execute("PRAGMA foreign_keys=ON")
        connection.execute(f"PRAGMA wal_autocheckpoint={LOG_PAGES}")
    except BaseException:
        connection.close()
        raise
    return connection


def read(path: Path, use: Callable[[sqlite3.Connection], T]) -> T:
    """What `use` makes of a connection that changes nothing, neither the file nor what lies beside it.

    The file itself is opened by SQLite alone: to close it anywhere else in a process takes away the locks that a writer
    in the same process holds (https://sqlite.org/howtocorrupt.html, section 2.2).
    """
    uri = path.absolute().as_uri()
    if not (is_network(filesystem(path)) or in_use(path)):
        try:
            return use(_reader(f"{uri}?immutable=1"))  # nobody writes: nothing beside the file is needed
        except sqlite3.DatabaseError:
            pass  # unless somebody has just begun to
    try:
        return use(_reader(f"{uri}?mode=ro"))
    except sqlite3.OperationalError as error:
        if no_room(error) or _name(error) in _NO_INDEX:
            return _read_copy(path, use)
        if _name(error) != "SQLITE_READONLY_ROLLBACK":
            raise
    # A writer was killed in the middle of a commit: whoever comes next takes its half of a row back.
    return use(_reader(f"{uri}?mode=rw"))


def _read_copy(path: Path, use: Callable[[sqlite3.Connection], T]) -> T:
    """The same through a copy elsewhere: a log that a writer left can only be read with an index beside it, for which
    a full or read-only disk has no room. The copy is gone once it is closed."""
    with tempfile.TemporaryDirectory(prefix="evolm-") as folder:
        copy = Path(folder) / path.name
        for beside in ("", "-wal"):
            with suppress(FileNotFoundError):
                shutil.copyfile(f"{path}{beside}", f"{copy}{beside}")
        return use(_reader(f"{copy.as_uri()}?mode=rw"))


def in_use(path: Path, *suffixes: str) -> bool:
    """Whether something lies in the log beside a file (in a journal too where no suffixes are given): somebody writes,
    or was killed."""
    for suffix in suffixes or ("-wal", "-journal"):
        with suppress(FileNotFoundError):
            if path.with_name(f"{path.name}{suffix}").stat().st_size:
                return True
    return False


def _reader(uri: str) -> sqlite3.Connection:
    connection = sqlite3.connect(uri, uri=True, isolation_level=None, check_same_thread=False, timeout=NETWORK_PATIENCE)
    connection.execute("PRAGMA query_only=ON")
    return connection


def build(
    path: Path,
    meta: Mapping[str, str],
    trials: Iterable[Sequence[Any]] = (),
    events: Iterable[Sequence[Any]] = (),
) -> None:
    """Write a whole ledger into a new file, under a name that nobody reads yet; `meta` is in JSON."""
    path.unlink(missing_ok=True)
    connection = sqlite3.connect(path, isolation_level=None)
    try:
        connection.execute("PRAGMA synchronous=FULL")
        connection.execute("PRAGMA foreign_keys=ON")
        fill(connection, meta, trials, events)
    finally:
        connection.close()


def forget_log(path: Path) -> None:
    """Remove what SQLite kept beside a database whose place another one takes: a log that outlived its database would
    be played into the next one."""
    for suffix in ("-wal", "-journal", "-shm"):
        path.with_name(f"{path.name}{suffix}").unlink(missing_ok=True)


def fill(
    connection: sqlite3.Connection,
    meta: Mapping[str, str],
    trials: Iterable[Sequence[Any]] = (),
    events: Iterable[Sequence[Any]] = (),
) -> None:
    """Make the tables of a ledger, and write what it begins with."""
    with transaction(connection):
        run(connection, SCHEMA)
        for table, rows in (("meta", meta.items()), ("trials", trials), ("events", events)):
            for row in rows:
                put(connection, table, row)


def run(connection: sqlite3.Connection, script: str) -> None:
    """Execute several statements without ending the transaction, as `executescript` would."""
    for statement in filter(str.strip, script.split(";")):
        connection.execute(statement)


# --- rows -------------------------------------------------------------------------------------------------------------


_JSON = json.JSONEncoder().encode


def checksum(row: Sequence[Any]) -> str:
    """The sum of a row's values, 64 bits in hexadecimal."""
    return hashlib.blake2b(_JSON(list(row)).encode(), digest_size=8).hexdigest()


def put(connection: sqlite3.Connection, table: str, row: Sequence[Any]) -> None:
    """Insert a row with its checksum, wherever its table is kept."""
    marks = ", ".join("?" * (len(row) + 1))
    for place in TABLES[table]:
        connection.execute(f"INSERT INTO {place} VALUES ({marks})", (*row, checksum(row)))


def fetch(connection: sqlite3.Connection, table: str) -> Rows:
    """The rows of a table in order, with their checksums, as they stand there."""
    return connection.execute(f"SELECT * FROM {table} ORDER BY {'seq' if table == 'events' else 'id'}").fetchall()


def verified(table: str, rows: Iterable[Sequence[Any]]) -> Iterator[list[Any]]:
    """The rows of a table without their checksums. Raises Damaged when one is missing (they are numbered from 1 without
    a gap) or is not what was written."""
    for number, (*row, written) in enumerate(rows, 1):
        if row[0] != number or checksum(row) != written:
            raise Damaged(f"row {number} of {table} is missing or changed")
        yield row


def meta_rows(connection: sqlite3.Connection) -> dict[str, Any]:
    """What never changes, by its key. Raises Damaged for a value that is not what was written."""
    found = {}
    for key, value, written in connection.execute("SELECT key, value, sum FROM meta"):
        if checksum((key, value)) != written:
            raise Damaged(f"{key} is not what it was")
        found[key] = json.loads(value)
    return found


def check_pages(connection: sqlite3.Connection) -> None:
    """Let SQLite look through its pages. Raises Damaged with what it found first."""
    (verdict,) = connection.execute("PRAGMA quick_check(1)").fetchone()
    if verdict != "ok":
        raise Damaged(verdict)


def mend_spares(connection: sqlite3.Connection) -> None:
    """Write the second copies anew where they are not what the first ones are, which were verified. Raises Damaged when
    there are more of them."""
    for table in ("meta", "trials"):
        better = f"SELECT * FROM {table} EXCEPT SELECT * FROM spare_{table}"
        more = f"(SELECT count(*) FROM {table}) < (SELECT count(*) FROM spare_{table})"
        bad, lost = connection.execute(f"SELECT EXISTS ({better}), {more}").fetchone()
        if lost:
            raise Damaged(f"rows of {table} are missing")
        if bad:
            with transaction(connection):
                connection.execute(f"INSERT OR REPLACE INTO spare_{table} {better}")


def keep_copy(connection: sqlite3.Connection, copy: Path) -> None:
    """Write what a connection sees into another file, as a whole or not at all."""
    draft = copy.with_name(f"{copy.name}.draft")
    draft.unlink(missing_ok=True)
    try:
        with closing(sqlite3.connect(draft)) as other:
            connection.backup(other)
        draft.replace(copy)
        sync_folder(copy.parent)
    finally:
        draft.unlink(missing_ok=True)


@contextmanager
def transaction(connection: sqlite3.Connection) -> Iterator[None]:
    """All or nothing; nothing stays open when it fails."""
    connection.execute("BEGIN IMMEDIATE")
    try:
        yield
        connection.execute("COMMIT")
    finally:
        if connection.in_transaction:
            connection.execute("ROLLBACK")


# --- what SQLite says, in words ---------------------------------------------------------------------------------------

_NO_ROOM = ("SQLITE_FULL", "SQLITE_IOERR_WRITE", "SQLITE_IOERR_FSYNC", "SQLITE_IOERR_SHMSIZE")
"""A full disk says the first; a spent quota is an input/output error to SQLite, on some filesystems when it syncs."""

_NO_INDEX = ("SQLITE_CANTOPEN", "SQLITE_READONLY_CANTINIT", "SQLITE_READONLY_DIRECTORY", "SQLITE_READONLY_RECOVERY")

_DAMAGE = ("malformed", "not a database", "no such table", "no such column", "decode", "unsupported file format")

_UNWRITABLE = "make the run folder writable, then run `evolm resume`"
_FAILING = "the disk may be full, failing or gone"
_ADVICE = {
    "full": "free some space on that disk, then run `evolm resume`; nothing acknowledged is lost",
    "readonly": _UNWRITABLE,
    "unable to open": _UNWRITABLE,
    "constraint failed": "the ledger has it already, and nothing was written",
}
"""What to do about it, by a word of the message."""


def no_room(error: Exception) -> bool:
    """Whether a write may have failed for lack of room."""
    return _name(error) in _NO_ROOM


def _name(error: Exception) -> str:
    """SQLite's name of an error; empty where Python's own module found it."""
    return getattr(error, "sqlite_errorname", "")


def is_damage(error: Exception) -> bool:
    """Whether the file is not what was written."""
    return isinstance(error, Damaged) or any(sign in str(error) for sign in _DAMAGE)


def repair_command(path: Path) -> str:
    """What the user runs to save what is readable of a ledger."""
    return f"`evolm resume {shlex.quote(str(path.parent))} --repair`"


def repaired(path: Path) -> Path:
    """Where the repaired ledger lies until it takes the place of the damaged one."""
    return path.with_name(f"{path.name}.repaired")


def check_version(version: int, place: str) -> None:
    """Raise StorageError when a ledger is of a version that is not known yet."""
    if version > SCHEMA_VERSION:
        raise StorageError(
            f"{place}: has schema version {version}, this evolm reads up to {SCHEMA_VERSION}; a newer evolm wrote it: "
            f"use that one, or update this one"
        )


@contextmanager
def told(place: str) -> Iterator[None]:
    """Turn what SQLite and the system say into what the user needs to know."""
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        advice = _ADVICE["full"] if full else _UNWRITABLE if isinstance(error, PermissionError) else _FAILING
        raise StorageError(f"{place}: {error.strerror or error}; {advice}") from error
    except (sqlite3.DatabaseError, UnicodeDecodeError) as error:
        words = str(error)
        if "locked" in words:
            raise RunBusy(f"{place}: another process writes to it") from error
        if is_damage(error):
            command = repair_command(Path(place))
            raise LedgerDamaged(f"{place}: {words}; the file is damaged: {command} saves what is readable") from error
        if no_room(error):
            raise StorageError(f"{place}: no room on the disk ({words}); {_ADVICE['full']}") from error
        advice = next((advice for sign, advice in _ADVICE.items() if sign in words), _FAILING)
        raise StorageError(f"{place}: {words}; {advice}") from error
