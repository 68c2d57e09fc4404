"""Guards the ledger's file: what was acknowledged is there after a kill, after a full disk, and for every reader, on a
local disk and on one that other machines share.
"""

import gc
import random
import sqlite3
import subprocess
import sys
import threading
from contextlib import closing

import pytest
from histories import happen, propose

from fitness.ballast import SIZE, Ballast
from fitness.errors import RunBusy, StorageError
from fitness.ledger import Ledger
from fitness.repair import repair
from search_spaces import Genome


@pytest.fixture(params=["local", "network"])
def disk(request, monkeypatch):
    """The kind of disk that the ledger believes to lie on."""
    monkeypatch.setattr("fitness.database.is_network", lambda filesystem: request.param == "network")
    return request.param


def journal_mode(path):
    with closing(sqlite3.connect(path)) as connection:
        return connection.execute("PRAGMA journal_mode").fetchone()[0]


# --- opening and reading ----------------------------------------------------------------------------------------------


def test_what_never_changes_is_kept(ledger, path):
    with closing(Ledger.open(path)) as again:
        assert gc.isenabled()
        assert again.meta == {"schema_version": 2, "seed": 7, "rungs": [1e6, 4e6]}


def test_a_ledger_can_be_continued(disk, path):
    with closing(Ledger.create(path, {})) as ledger:
        happen(ledger, propose(ledger).id, "start")
    with closing(Ledger.open(path, write=True)) as again:
        assert happen(again, 1, "top").state == "complete"
        assert propose(again).id == 2
        assert again.seq == 2


def test_a_ledger_in_memory_needs_no_file():
    with closing(Ledger.create(None, {})) as ledger:
        assert happen(ledger, propose(ledger).id, "start", "top").state == "complete"
        ledger.check_place()
        assert not ledger.vanished()


def test_every_event_is_on_the_disk_before_it_is_acknowledged(disk, path):
    # How thoroughly SQLite syncs is a setting of each connection: it cannot be seen from outside. 2 is FULL.
    with closing(Ledger.create(path, {})) as ledger:
        assert ledger._connection.execute("PRAGMA synchronous").fetchone() == (2,)
    with closing(Ledger.open(path, write=True)) as again:
        assert again._connection.execute("PRAGMA synchronous").fetchone() == (2,)


def test_a_reader_sees_what_a_writer_has_written_so_far(disk, path):
    with closing(Ledger.create(path, {})) as ledger:
        happen(ledger, propose(ledger).id, "start")
        with closing(Ledger.open(path)) as reader:
            assert reader.trials == ledger.trials
            happen(ledger, 1, "top")
            assert reader.trials[1].state == "running"
        with closing(Ledger.open(path)) as reader:
            assert reader.trials[1].state == "complete"


def test_readers_do_not_hinder_the_writer(disk, path):
    with closing(Ledger.create(path, {})) as ledger, closing(Ledger.open(path)), closing(Ledger.open(path)):
        assert happen(ledger, propose(ledger).id, "start", "top").state == "complete"


def test_a_reader_changes_nothing(disk, path):
    with closing(Ledger.create(path, {})) as ledger:
        happen(ledger, propose(ledger).id, "start")
    before = path.read_bytes()
    with closing(Ledger.open(path)) as reader:
        reader.sessions()
        with pytest.raises(StorageError, match="attempt to write a readonly database"):
            reader.stop(1)
        assert reader.trials[1].state == "running"
    assert path.read_bytes() == before


def test_reading_what_nobody_writes_leaves_nothing_beside_it(path):
    with closing(Ledger.create(path, {})) as ledger:
        happen(ledger, propose(ledger).id, "start", "result")
    with closing(Ledger.open(path)) as reader:
        assert len(reader.trials) == 1
    assert sorted(file.name for file in path.parent.iterdir()) == ["ballast", "ledger.db"]


def test_what_is_closed_cannot_be_written(ledger):
    trial = propose(ledger)
    ledger.close()
    with pytest.raises(StorageError):
        ledger.stop(trial.id)
    assert ledger.trials[1].state == "proposed"


def test_a_ledger_serves_several_threads_one_at_a_time(ledger, path):
    def work():
        with lock:
            happen(ledger, propose(ledger).id, "start", "result")
            ledger.sessions()

    lock = threading.Lock()
    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with closing(Ledger.open(path)) as reader:
        assert reader.trials == ledger.trials
        assert [trial.state for trial in reader.trials.values()] == ["paused"] * 4


def test_a_reader_sees_one_moment_while_a_writer_works(disk, path):
    with closing(Ledger.create(path, {})) as ledger:
        for _ in range(15):
            happen(ledger, propose(ledger).id, "start", "result")
            with closing(Ledger.open(path)) as reader:
                assert reader.trials == ledger.trials and reader.seq == ledger.seq


# --- files that are not there, or not where they should be ------------------------------------------------------------


@pytest.mark.parametrize("write", [False, True])
def test_a_missing_ledger(path, write):
    with pytest.raises(StorageError, match="no ledger there") as caught:
        Ledger.open(path, write=write)
    assert caught.value.exit_code == 5
    assert not any(path.parent.iterdir())


def test_a_folder_is_no_ledger(tmp_path):
    with pytest.raises(StorageError, match="no ledger there"):
        Ledger.open(tmp_path)


def test_a_ledger_is_never_created_over_another(ledger, path):
    propose(ledger)
    with pytest.raises(StorageError, match="a ledger is already there"):
        Ledger.create(path, {})
    with closing(Ledger.open(path)) as again:
        assert len(again.trials) == 1


def test_a_ledger_needs_its_folder(tmp_path):
    with pytest.raises(StorageError, match="unable to open database file; make the run folder writable"):
        Ledger.create(tmp_path / "missing" / "ledger.db", {})


@pytest.mark.parametrize(
    ("error", "advice"),
    [
        (PermissionError(13, "Permission denied"), "make the run folder writable"),
        (OSError(5, "I/O error"), "the disk may"),
    ],
)
def test_what_the_system_refuses_is_told(ledger, path, monkeypatch, error, advice):
    def refused(*_):
        raise error

    ledger.close()
    monkeypatch.setattr("fitness.database.filesystem", refused)
    with pytest.raises(StorageError, match=f"{error.strerror}; {advice}"):
        Ledger.open(path)


def test_a_ledger_is_created_as_a_whole_or_not_at_all(path, monkeypatch):
    def killed(self, target):
        raise KeyboardInterrupt

    monkeypatch.setattr("pathlib.Path.replace", killed)
    with pytest.raises(KeyboardInterrupt):
        Ledger.create(path, {})
    monkeypatch.undo()
    assert not path.exists()
    Ledger.create(path, {}).close()


def test_the_log_of_a_ledger_that_is_gone_is_not_played_into_the_next(ledger, path):
    for _ in range(3):
        propose(ledger, text="y" * 3000)
    log = path.with_name("ledger.db-wal")
    left = log.read_bytes()
    ledger.close()
    path.unlink()
    log.write_bytes(left)
    with closing(Ledger.create(path, {})) as other:
        assert not other.trials
        propose(other)
    with closing(Ledger.open(path)) as reader:
        assert len(reader.trials) == 1


def test_a_folder_that_was_removed_under_the_writer_is_noticed(ledger, path, tmp_path):
    propose(ledger)
    ledger.check_place()
    path.rename(tmp_path / "elsewhere.db")
    assert ledger.vanished()
    for write in (ledger.check_place, lambda: ledger.start(1, 0, {}), lambda: propose(ledger)):
        with pytest.raises(StorageError, match="removed or replaced while the search was writing it") as caught:
            write()
        assert str(path) in str(caught.value)
    assert (ledger.seq, len(ledger.trials)) == (0, 1)


def test_another_ledger_in_the_place_of_this_one_is_noticed(ledger, path, tmp_path):
    path.rename(tmp_path / "elsewhere.db")
    Ledger.create(path, {}).close()
    assert ledger.vanished()


@pytest.mark.parametrize("suffix", ["-wal", "-shm"])
def test_a_log_that_was_removed_under_the_writer_is_noticed(ledger, path, suffix):
    propose(ledger)
    path.with_name(f"ledger.db{suffix}").unlink()
    with pytest.raises(StorageError, match="removed or replaced while the search was writing it"):
        propose(ledger)
    assert len(ledger.trials) == 1


def test_a_ledger_behind_a_link_is_the_one_that_it_leads_to(path, tmp_path):
    target = tmp_path / "other disk" / "target.db"
    target.parent.mkdir()
    path.symlink_to(target)
    with closing(Ledger.create(path, {})) as ledger:
        happen(ledger, propose(ledger).id, "start")
        with closing(Ledger.open(path)) as reader:
            assert reader.trials == ledger.trials
        log = target.with_name("target.db-wal").read_bytes()
    with closing(Ledger.open(path, write=True)) as again:
        happen(again, 1, "top")
    assert path.is_symlink() and [file.name for file in tmp_path.iterdir() if file.name.startswith("ledger")] == [
        "ledger.db"
    ]
    target.write_bytes(target.read_bytes()[:-4096])  # damaged, and a part of it lies in a log
    target.with_name("target.db-wal").write_bytes(log)
    assert repair(path).trials == 1
    assert path.is_symlink()
    with closing(Ledger.open(path)) as reader:
        assert reader.trials[1].lease == 1


def test_a_process_that_moves_to_another_folder_still_finds_its_ledger(tmp_path, monkeypatch, path):
    monkeypatch.chdir(tmp_path)
    with closing(Ledger.create(path.relative_to(tmp_path), {})) as ledger:
        (tmp_path / "other").mkdir()
        monkeypatch.chdir(tmp_path / "other")
        propose(ledger)
        assert not ledger.vanished()


# --- local and shared disks -------------------------------------------------------------------------------------------


def test_a_write_ahead_log_is_for_local_disks_alone(disk, path):
    with closing(Ledger.create(path, {})) as ledger:
        assert journal_mode(path) == {"local": "wal", "network": "delete"}[disk]  # how to end a commit is not written
        mode = ledger._connection.execute("PRAGMA journal_mode").fetchone()
        assert mode == ({"local": "wal", "network": "truncate"}[disk],)
        propose(ledger)
        beside = {file.name for file in path.parent.iterdir()} - {"ballast", "ledger.db"}
        assert beside == {"local": {"ledger.db-wal", "ledger.db-shm"}, "network": {"ledger.db-journal"}}[disk]


@pytest.mark.parametrize("first", [False, True])
def test_a_ledger_that_was_moved_to_another_kind_of_disk_is_converted(path, monkeypatch, first):
    monkeypatch.setattr("fitness.database.is_network", lambda filesystem: first)
    with closing(Ledger.create(path, {})) as ledger:
        happen(ledger, propose(ledger).id, "start")
        trials = ledger.trials
    monkeypatch.setattr("fitness.database.is_network", lambda filesystem: not first)
    with closing(Ledger.open(path, write=True)) as again:
        assert again.trials == trials
        mode = again._connection.execute("PRAGMA journal_mode").fetchone()[0]
        assert mode == ("wal" if first else "truncate")
        happen(again, 1, "top")
    with closing(Ledger.open(path)) as reader:
        assert reader.trials[1].state == "complete"


def test_a_second_writer_is_told(ledger, path, monkeypatch):
    ledger._connection.execute("BEGIN IMMEDIATE")
    monkeypatch.setattr("fitness.database.LOCAL_PATIENCE", 0.0)
    with closing(Ledger.open(path, write=True)) as second, pytest.raises(RunBusy, match="another process writes to it"):
        propose(second)
    ledger._connection.execute("ROLLBACK")


def test_on_a_shared_disk_writer_and_readers_wait_for_each_other(path, monkeypatch):
    monkeypatch.setattr("fitness.database.is_network", lambda filesystem: True)
    with closing(Ledger.create(path, {})) as ledger:
        propose(ledger)
        reader = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        reader.execute("BEGIN")
        reader.execute("SELECT * FROM trials").fetchall()  # holds the lock that a reader holds while it folds
        done = threading.Event()
        writer = threading.Thread(target=lambda: (happen(ledger, 1, "start"), done.set()))
        writer.start()
        assert not done.wait(0.05)
        reader.execute("COMMIT")
        writer.join()
        assert done.is_set() and ledger.trials[1].state == "running"
        reader.close()


KILLED_IN_A_COMMIT = """
import os, signal, sqlite3, sys
connection = sqlite3.connect(sys.argv[1], isolation_level=None)
connection.execute("PRAGMA journal_mode=TRUNCATE")
connection.execute("PRAGMA cache_size=1")  # so that pages are written before the commit
connection.execute("BEGIN IMMEDIATE")
connection.execute("UPDATE trials SET genome = 'changed' || genome")
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_reader_takes_back_what_a_killed_writer_left_half_done(path, monkeypatch):
    monkeypatch.setattr("fitness.database.is_network", lambda filesystem: True)
    with closing(Ledger.create(path, {})) as ledger:
        for _ in range(60):
            propose(ledger, text="y" * 1000)
        trials = ledger.trials
    before = path.read_bytes()
    subprocess.run([sys.executable, "-c", KILLED_IN_A_COMMIT, str(path)], check=False)
    assert path.read_bytes() != before
    with closing(Ledger.open(path)) as reader:
        assert reader.trials == trials
        with pytest.raises(StorageError, match="readonly"):
            reader.stop(1)
    assert path.read_bytes() == before


# --- ballast ----------------------------------------------------------------------------------------------------------


def fill(ledger):
    """Let the ledger's disk be full: its file cannot grow by another page."""
    ledger._connection.execute("PRAGMA max_page_count=1")


@pytest.fixture
def freeing(ledger, monkeypatch):
    """Let the ballast's room be what the ledger's file needs."""
    drop = Ballast.drop

    def freed(ballast):
        dropped = drop(ballast)
        if dropped:
            ledger._connection.execute("PRAGMA max_page_count=100000")
        return dropped

    monkeypatch.setattr("fitness.ballast.Ballast.drop", freed)


def grow(ledger, trials=40):
    for _ in range(trials):
        propose(ledger, text="y" * 3000)


def test_a_ledger_keeps_some_room_beside_it(disk, path):
    ballast = path.with_name("ballast")
    Ledger.create(path, {}).close()
    content = ballast.read_bytes()
    assert len(content) == SIZE and len(set(content)) == 256
    Ledger.open(path, write=True).close()
    assert ballast.read_bytes() == content


@pytest.mark.parametrize("left", [None, b"", b"cut off"])
def test_a_writer_makes_the_ballast_where_it_is_not_whole_and_a_reader_does_not(ledger, path, left):
    ledger.close()
    ballast = path.with_name("ballast")
    ballast.unlink() if left is None else ballast.write_bytes(left)
    Ledger.open(path).close()
    assert (ballast.read_bytes() if ballast.exists() else None) == left
    Ledger.open(path, write=True).close()
    assert ballast.stat().st_size == SIZE


def test_the_last_events_fit_on_a_full_disk(ledger, path, freeing):
    fill(ledger)
    assert not ledger.full
    grow(ledger)
    assert ledger.full and len(ledger.trials) == 40
    assert not path.with_name("ballast").exists()
    with closing(Ledger.open(path)) as reader:
        assert reader.trials == ledger.trials


def test_a_disk_that_is_full_without_ballast_is_told_and_the_ledger_goes_on_when_there_is_room(ledger, path):
    fill(ledger)
    with pytest.raises(StorageError, match=r"no room on the disk \(database or disk is full\); free some space"):
        grow(ledger)
    assert ledger.full
    known = dict(ledger.trials)
    with closing(Ledger.open(path)) as reader:
        assert reader.trials == known
    ledger._connection.execute("PRAGMA max_page_count=100000")
    grow(ledger, 1)
    with closing(Ledger.open(path)) as reader:
        assert reader.trials == ledger.trials and len(reader.trials) == len(known) + 1


@pytest.mark.parametrize("what", ["create", "open"])
def test_no_room_for_the_ballast(path, monkeypatch, what):
    import errno

    def full(descriptor):
        raise OSError(errno.EDQUOT, "Disk quota exceeded")

    if what == "open":
        Ledger.create(path, {}).close()
        path.with_name("ballast").unlink()
    monkeypatch.setattr("fitness.ballast.os.fsync", full)
    with pytest.raises(StorageError, match="Disk quota exceeded; a search keeps 4 MiB there") as caught:
        Ledger.create(path, {}) if what == "create" else Ledger.open(path, write=True)
    assert str(path.with_name("ballast")) in str(caught.value)
    assert not path.with_name("ballast").exists()
    assert path.exists() == (what == "open")


# --- acknowledged is safe ---------------------------------------------------------------------------------------------

WORK = """
import resource, sys
from pathlib import Path
import fitness.database
from fitness.errors import StorageError
from fitness.ledger import Ledger
from search_spaces import Genome

fitness.database.is_network = lambda filesystem: sys.argv[2] == "network"
ledger = Ledger.open(Path(sys.argv[1]), write=True)
if len(sys.argv) > 3:
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[3]), resource.RLIM_INFINITY))
try:
    while True:
        trial = ledger.propose(Genome.of({"x": len(ledger.trials)}), operator="random", seen=ledger.seq)
        ledger.start(trial.id, 0, {"pid": 1})
        ledger.result(trial.id, 0, tokens=1, metrics={"loss": 1 / trial.id}, flops=1, seconds=1, top=True)
        print(trial.id, flush=True)
except StorageError:
    print("storage", flush=True)
"""


def worker(path, disk, *limit):
    command = [sys.executable, "-c", WORK, str(path), disk, *map(str, limit)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def assert_complete(path, numbers):
    with closing(Ledger.open(path)) as ledger:
        for number in numbers:
            trial = ledger.trials[number]
            assert (trial.state, trial.metrics) == ("complete", {"loss": 1 / number})


def assert_sound(path):
    with closing(sqlite3.connect(path)) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]


def test_ten_kills_lose_nothing_that_was_acknowledged(disk, path):
    Ledger.create(path, {}).close()
    rng, acknowledged = random.Random(0), []
    for _ in range(10):
        with worker(path, disk) as process:
            lines = [process.stdout.readline() for _ in range(rng.randint(1, 12))]
            process.kill()
            lines += process.stdout.readlines()
        assert process.returncode == -9
        acknowledged += [int(line) for line in lines if line.endswith("\n")]
        assert_complete(path, acknowledged)
        assert_sound(path)
    assert len(acknowledged) == len(set(acknowledged)) >= 10


def test_a_disk_that_takes_no_more_loses_nothing_that_was_acknowledged(disk, path):
    Ledger.create(path, {}).close()
    with worker(path, disk, {"local": 200_000, "network": 80_000}[disk]) as process:
        *told, last = process.stdout.read().split()
    assert last == "storage"
    assert len(told) > 5
    assert_complete(path, map(int, told))
    with closing(Ledger.open(path, write=True)) as again:
        assert propose(again).id == len(again.trials)
    assert_sound(path)


def test_the_log_begins_anew_before_it_fills_half_of_the_ballast(ledger, path):
    for _ in range(300):
        propose(ledger)
    assert path.with_name("ledger.db-wal").stat().st_size < SIZE / 2


LAST_TO_CLOSE = """
import sqlite3, sys
connection = sqlite3.connect(sys.argv[1])
connection.execute("SELECT * FROM trials").fetchall()
connection.close()  # who is the last one takes the log away
"""


def test_a_reader_in_the_writers_process_leaves_the_writer_its_locks(ledger, path):
    """SQLite's locks on a file are gone from a process that closes the file anywhere."""
    propose(ledger)
    for _ in range(2):
        Ledger.open(path).close()
        subprocess.run([sys.executable, "-c", LAST_TO_CLOSE, str(path)], check=True)
        assert path.with_name("ledger.db-wal").exists() and not ledger.vanished()
        propose(ledger)
    with closing(Ledger.open(path)) as reader:
        assert len(reader.trials) == 3


def test_on_a_shared_disk_a_reader_lets_the_writer_go_on_while_it_folds(path, monkeypatch):
    monkeypatch.setattr("fitness.database.is_network", lambda filesystem: True)
    monkeypatch.setattr("fitness.database.NETWORK_PATIENCE", 0.0)
    with closing(Ledger.create(path, {})) as ledger:
        propose(ledger)
        monkeypatch.setattr("fitness.ledger.Genome", lambda text: happen(ledger, 1, "start") and Genome(text))
        with closing(Ledger.open(path)) as reader:
            assert reader.trials[1].state == "proposed"
        assert ledger.trials[1].state == "running"
