"""Guards that a ledger of the first schema goes on as if it had always been of the present one."""

import hashlib
import json
import signal
import sqlite3
import subprocess
import sys
from contextlib import closing

import pytest
from histories import happen, propose

from fitness.errors import LedgerDamaged, StorageError
from fitness.ledger import Ledger
from search_spaces import Genome

FIRST_SCHEMA = """
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
META = {"schema_version": 1, "seed": 7, "settings": {"trials": 3}}
TOLD = {"tokens": 10.0, "metrics": {"loss": 2.5}, "flops": 100, "seconds": 2}
LOST = {"reason": "lost", "message": "", "flops": 5, "seconds": 1, "final": False}
EVENTS = [  # trial, kind, rung, body, time
    (None, "open", None, {"pid": 1}, 1000.0),
    (1, "start", 0, {"worker": {"pid": 9}}, 1001.0),
    (2, "start", 0, {"worker": {"pid": 8}}, 1001.5),
    (2, "fail", None, LOST, 1003.0),
    (1, "result", 0, {**TOLD, "top": False}, 1002.0),  # the clock was set back
    (2, "start", 0, {"worker": {"pid": 8}}, 1004.0),
    (None, "open", None, {"pid": 2}, 5000.0),
    (2, "fail", None, {**LOST, "reason": "interrupted"}, 5001.0),
    (3, "infeasible", None, {"message": "no such shape"}, 5002.0),
    (1, "start", 1, {"worker": {"pid": 9}}, 5003.0),
]


def checksum(row):
    return hashlib.blake2b(json.dumps(list(row)).encode(), digest_size=8).hexdigest()


def insert(connection, table, row):
    marks = ", ".join("?" * (len(row) + 1))
    connection.execute(f"INSERT INTO {table} VALUES ({marks})", (*row, checksum(row)))


def text(value):
    return json.dumps(value, sort_keys=True, separators=(",", ":"))


@pytest.fixture
def old(path):
    """A ledger as the first schema wrote it, closed."""
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("PRAGMA journal_mode=WAL")
        connection.executescript(FIRST_SCHEMA)
        for key, value in META.items():
            insert(connection, "meta", (key, text(value)))
        for number in range(1, 4):
            genome = Genome.of({"x": number})
            insert(connection, "trials", (number, genome.digest, genome.text, "[1]", "random", number - 1, 1000.5))
        for seq, (trial, kind, rung, body, time) in enumerate(EVENTS, 1):
            insert(connection, "events", (seq, trial, kind, rung, text(body), time))
    return path


def dump(path):
    with closing(sqlite3.connect(f"{path.as_uri()}?immutable=1", uri=True)) as connection:
        return list(connection.iterdump())


def assert_as_it_was(ledger):
    first, second, third = ledger.trials.values()
    assert ledger.meta == {**META, "schema_version": 2}
    assert (first.state, first.lease, first.attempts, first.flops, first.worker) == ("running", 10, 2, 100, {"pid": 9})
    assert [(rung.rung, rung.metrics, rung.seq) for rung in first.rungs] == [(0, {"loss": 2.5}, 5)]
    assert (second.state, second.lease, second.failures, second.attempts) == ("proposed", None, {"lost": 1}, 2)
    assert (third.state, third.message, third.parents, third.seen) == ("infeasible", "no such shape", (1,), 2)
    assert (ledger.seq, ledger.late) == (10, 0)
    assert [(session["pid"], session["seconds"]) for session in ledger.sessions()] == [(1, 4), (2, 3)]


def test_a_reader_reads_the_first_schema_and_leaves_it_alone(old):
    before = old.read_bytes()
    with closing(Ledger.open(old)) as reader:
        assert_as_it_was(reader)
        with pytest.raises(StorageError, match="readonly"):
            reader.stop(1)
    assert old.read_bytes() == before
    assert [file.name for file in old.parent.iterdir()] == ["ledger.db"]


def test_a_writer_brings_the_first_schema_up_to_date_once(old):
    with closing(Ledger.open(old, write=True)) as ledger:
        assert_as_it_was(ledger)
    after = dump(old)
    with closing(Ledger.open(old)) as reader:
        assert_as_it_was(reader)
    with closing(Ledger.open(old, write=True)) as ledger:
        assert_as_it_was(ledger)
    assert dump(old) == after


def test_the_ledger_as_it_was_is_kept(old):
    before = dump(old)
    for _ in range(2):
        Ledger.open(old, write=True).close()
        assert dump(old.with_name("ledger.db.v1")) == before
    assert {file.name for file in old.parent.iterdir()} == {"ledger.db", "ledger.db.v1", "ballast"}


def test_every_old_row_is_kept_and_every_old_launch_has_its_lease(old):
    with closing(sqlite3.connect(old)) as connection:
        trials = connection.execute("SELECT * FROM trials").fetchall()
        events = connection.execute("SELECT seq, trial, kind, rung, body, time FROM events").fetchall()
    Ledger.open(old, write=True).close()
    with closing(sqlite3.connect(old)) as connection:
        assert connection.execute("SELECT * FROM trials").fetchall() == trials
        assert connection.execute("SELECT seq, trial, kind, rung, body, time FROM events").fetchall() == events
        elapsed = [row[0] for row in connection.execute("SELECT elapsed FROM events")]
        assert elapsed == [0, 1, 1.5, 3, 3, 4, 0, 1, 2, 3]
        leases = dict(connection.execute("SELECT seq, lease FROM events WHERE lease IS NOT NULL"))
        assert leases == {4: 3, 5: 2, 8: 6}
        assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        assert connection.execute("PRAGMA foreign_key_check").fetchall() == []


def test_a_migrated_ledger_has_the_schema_of_a_new_one(old, tmp_path):
    Ledger.open(old, write=True).close()
    Ledger.create(tmp_path / "new.db", {}).close()
    schemas = []
    for path in (old, tmp_path / "new.db"):
        with closing(sqlite3.connect(path)) as connection:
            schemas.append(set(connection.execute("SELECT type, name, tbl_name, sql FROM sqlite_schema")))
    assert schemas[0] == schemas[1]


def test_a_migrated_ledger_goes_on(old):
    with closing(Ledger.open(old, write=True)) as ledger:
        assert ledger.result(1, 1, **TOLD, top=True, lease=10).state == "complete"
        happen(ledger, propose(ledger, text="new").id, "start", "top")
        with closing(Ledger.open(old)) as reader:
            assert reader.trials == ledger.trials


DIES = """
import os, signal, sys
from pathlib import Path
import fitness.migration
from fitness.ledger import Ledger

put, left = fitness.migration.put, [int(sys.argv[2])]

def dying(*row):
    left[0] -= 1
    if left[0] == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    put(*row)

fitness.migration.put = dying
Ledger.open(Path(sys.argv[1]), write=True)
"""


@pytest.mark.parametrize("rows", [1, 6, 10])
def test_a_kill_in_the_middle_leaves_the_old_ledger(old, rows):
    before = dump(old)
    done = subprocess.run([sys.executable, "-c", DIES, str(old), str(rows)], check=False)
    assert done.returncode == -signal.SIGKILL
    with closing(Ledger.open(old)) as reader:
        assert_as_it_was(reader)
    with closing(sqlite3.connect(old)) as connection:
        assert list(connection.iterdump()) == before
    with closing(Ledger.open(old, write=True)) as ledger:
        assert_as_it_was(ledger)


def test_a_failure_at_any_row_leaves_the_old_ledger(old, monkeypatch):
    from fitness import migration

    put, before = migration.put, dump(old)
    for fatal in range(1, len(EVENTS) + 1):
        left = iter(range(1, 100))

        def failing(connection, table, row, left=left, fatal=fatal):
            if next(left) == fatal:
                raise sqlite3.OperationalError("database or disk is full")
            put(connection, table, row)

        monkeypatch.setattr(migration, "put", failing)
        with pytest.raises(StorageError, match="disk is full"):
            Ledger.open(old, write=True)
        assert dump(old) == before


@pytest.mark.parametrize(
    "change",
    [
        "UPDATE events SET body = replace(body, '2.5', '2.4') WHERE seq = 5",
        "UPDATE trials SET operator = 'mutation' WHERE id = 2",
        "UPDATE meta SET value = '8' WHERE key = 'seed'",
        "DELETE FROM events WHERE seq = 9",
    ],
)
@pytest.mark.parametrize("write", [False, True])
def test_what_was_changed_is_told_and_not_brought_along(old, change, write):
    with closing(sqlite3.connect(old)) as connection, connection:
        connection.execute(change)
    before = dump(old)
    with pytest.raises(LedgerDamaged, match="the file is damaged"):
        Ledger.open(old, write=write)
    assert dump(old) == before


@pytest.mark.parametrize("write", [False, True])
def test_a_ledger_of_a_newer_evolm(ledger, path, write):
    ledger.close()
    with closing(sqlite3.connect(path)) as connection, connection:
        row = ("schema_version", "3")
        connection.execute("UPDATE meta SET value = ?, sum = ? WHERE key = ?", (row[1], checksum(row), row[0]))
    with pytest.raises(StorageError) as caught:
        Ledger.open(path, write=write)
    assert not isinstance(caught.value, LedgerDamaged)
    assert str(caught.value) == (
        f"{path}: has schema version 3, this evolm reads up to 2; a newer evolm wrote it: use that one, or update "
        "this one"
    )


@pytest.mark.parametrize("write", [False, True])
@pytest.mark.parametrize("table", ["meta", "trials", "events"])
def test_a_newer_schema_with_a_column_more(ledger, path, table, write):
    ledger.close()
    with closing(sqlite3.connect(path)) as connection, connection:
        row = ("schema_version", "3")
        connection.execute("UPDATE meta SET value = ?, sum = ? WHERE key = ?", (row[1], checksum(row), row[0]))
        connection.execute(f"ALTER TABLE {table} ADD COLUMN more TEXT")
        connection.execute(f"ALTER TABLE {table} RENAME COLUMN sum TO checked")
        if table != "meta":
            connection.execute(f"DELETE FROM {table}")
    with pytest.raises(StorageError, match="a newer evolm wrote it") as caught:
        Ledger.open(path, write=write)
    assert not isinstance(caught.value, LedgerDamaged)


@pytest.mark.parametrize("write", [False, True])
@pytest.mark.parametrize(
    "change",
    ["ALTER TABLE meta ADD COLUMN more TEXT", "DELETE FROM meta", "UPDATE meta SET sum = 1", "DROP TABLE meta"],
)
def test_a_ledger_that_does_not_say_its_version_is_damaged(ledger, path, change, write):
    ledger.close()
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute(change)
    with pytest.raises(LedgerDamaged):
        Ledger.open(path, write=write)


def test_a_reader_reads_one_moment_of_a_ledger_that_is_brought_up_to_date(old, monkeypatch):
    from fitness import database

    check, turns = database.check_version, iter([True])

    def meanwhile(*arguments):
        if next(turns, False):
            Ledger.open(old, write=True).close()
        check(*arguments)

    with closing(sqlite3.connect(old)) as other:
        other.execute("SELECT * FROM meta").fetchall()  # so that the log stays there
        other.execute("BEGIN IMMEDIATE")
        other.execute("CREATE TABLE kept (x)")
        other.execute("DROP TABLE kept")
        other.execute("COMMIT")
        monkeypatch.setattr("fitness.database.check_version", meanwhile)
        with closing(Ledger.open(old)) as reader:
            assert_as_it_was(reader)
