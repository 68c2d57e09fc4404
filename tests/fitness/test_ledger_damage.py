"""Guards that no damage to a ledger's file is believed, and that a repair keeps every row that verifies."""

import os
import random
import sqlite3
from contextlib import closing, suppress
from pathlib import Path

import pytest
from histories import happen, propose, rows

from fitness.errors import LedgerDamaged, StorageError
from fitness.ledger import Ledger
from fitness.repair import repair

PAGE = 4096


def opening(path, **options):
    """The words with which a damaged ledger is refused."""
    with pytest.raises(LedgerDamaged) as caught:
        Ledger.open(path, **options)
    assert caught.value.exit_code == 5
    assert str(caught.value).startswith(f"{path.parent}: ")
    return str(caught.value)


def execute(path, *statements):
    """Change a ledger by hand."""
    with closing(sqlite3.connect(path)) as connection, connection:
        for statement in statements:
            connection.execute(statement)


def hole(data, page):
    return data[: page * PAGE] + bytes(PAGE) + data[(page + 1) * PAGE :]


@pytest.fixture
def whole(path, large):
    """The rows of the large ledger, whose file is at `path`."""
    path.write_bytes(large)
    return rows(path)


# --- damage is told ---------------------------------------------------------------------------------------------------


def test_another_file_is_no_ledger(path):
    path.write_text("trial,loss\n1,3.2\n" * 300)
    assert opening(path) == (
        f"{path.parent}: the ledger (ledger.db): file is not a database; the file is damaged or no ledger, and nothing "
        "in it can be read; restore it from a copy, or begin anew"
    )


@pytest.mark.parametrize("share", [0.05, 0.5, 0.95])
def test_a_ledger_that_was_cut_off(path, large, share):
    path.write_bytes(large[: int(len(large) * share)])
    assert "malformed; the file is damaged" in opening(path)


@pytest.mark.parametrize("write", [False, True])
def test_it_is_told_how_much_can_be_read_and_what_to_do(ledger, path, write):
    for _ in range(3):
        happen(ledger, propose(ledger).id, "start", "top")
    ledger.close()
    execute(path, "UPDATE events SET body = replace(body, '1', '2') WHERE seq = 2")
    assert opening(path, write=write) == (
        f"{path.parent}: the ledger (ledger.db): row 2 of events is missing or changed; the file is damaged or no "
        f"ledger; 3 trials and 5 events can still be read: `evolm resume {path.parent} --repair` saves them"
    )


def test_a_folder_with_a_blank_in_its_name_is_quoted(tmp_path):
    path = tmp_path / "my runs" / "ledger.db"
    path.parent.mkdir()
    with closing(Ledger.create(path, {})) as ledger:
        propose(ledger)
    execute(path, "UPDATE trials SET seen = 4")
    assert f"`evolm resume '{path.parent}' --repair`" in opening(path)


def test_meta_that_was_changed_by_hand_is_told(ledger, path):
    ledger.close()
    execute(path, "UPDATE meta SET value = '8' WHERE key = 'seed'")
    assert "seed is not what it was" in opening(path)


@pytest.mark.parametrize("write", [False, True])
def test_a_hole_of_zeros_is_told(path, large, write):
    path.write_bytes(hole(large, len(large) // PAGE // 2))
    assert "the file is damaged" in opening(path, write=write)


def test_no_flipped_bit_is_believed(path, large):
    """Wherever a bit flips: the ledger is told to be damaged, or reads as it was (the bit was in unused space)."""
    path.write_bytes(large)
    with closing(Ledger.open(path)) as read:
        before = (read.trials, read.seq, read.meta)
    for position in random.Random(0).sample(range(len(large)), 100):
        path.write_bytes(flipped(large, position))
        try:
            with closing(Ledger.open(path)) as read:
                assert (read.trials, read.seq, read.meta) == before
        except LedgerDamaged as error:
            assert str(path.parent) in str(error)


def flipped(data, position, bit=None):
    changed = bytearray(data)
    changed[position] ^= 1 << (position % 8 if bit is None else bit)
    return bytes(changed)


@pytest.fixture
def small(ledger, path):
    """The bytes of a small ledger, and where in them its schema and its meta data stand."""
    for _ in range(3):
        happen(ledger, propose(ledger).id, "start", "top")
    ledger.close()
    data = path.read_bytes()
    with closing(sqlite3.connect(path)) as connection:
        pages = connection.execute("SELECT rootpage FROM sqlite_schema WHERE name IN ('meta', 'spare_meta')").fetchall()
    used = (at for (page,) in [(1,), *pages] for at in range((page - 1) * PAGE, page * PAGE) if data[at])
    return data, list(used)


@pytest.mark.parametrize("turn", range(4))
def test_no_flipped_bit_of_the_schema_is_believed(path, small, turn):
    data, used = small
    with closing(Ledger.open(path)) as read:
        before = (read.trials, read.seq, read.meta)
    for position in used[turn::4]:
        path.write_bytes(flipped(data, position, 7 if position // 4 % 2 else position // 8 % 7))  # 7: no text any more
        with suppress(LedgerDamaged), closing(Ledger.open(path)) as read:
            assert (read.trials, read.seq, read.meta) == before


def test_a_flipped_bit_of_the_schema_costs_nothing_after_a_repair(path, small):
    data, used = small
    whole = rows(path)
    for position in used[::80]:
        for bit in (position % 8, 7):
            path.write_bytes(flipped(data, position, bit))
            repair(path)
            if rows(path) != whole:  # SQLite reads it as it was, by the schema that it is
                with closing(Ledger.open(path)) as read:
                    assert len(read.trials) == 3
    assert rows(path) == whole


# --- the write-ahead log ----------------------------------------------------------------------------------------------


@pytest.fixture
def killed(tmp_path, path):
    """The files of a ledger whose writer was killed, and its rows: twelve trials, most of them in the log."""
    live = tmp_path / "live" / "ledger.db"
    live.parent.mkdir()
    with closing(Ledger.create(live, {})) as ledger:
        for _ in range(12):
            happen(ledger, propose(ledger).id, "start", "top")
        data, log = live.read_bytes(), live.with_name("ledger.db-wal").read_bytes()
        whole = rows(live)
    path.write_bytes(data)
    path.with_name("ledger.db-wal").write_bytes(log)
    return log, whole


def test_no_flipped_bit_of_the_log_is_written_over(path, killed):
    """The log is refused, or read to its end; but for the last commit, which may have been cut short."""
    log, _ = killed
    data = path.read_bytes()
    told = 0
    for position in [*range(32), *random.Random(0).sample(range(32, len(log)), 20)]:
        path.write_bytes(data)
        path.with_name("ledger.db-shm").unlink(missing_ok=True)
        path.with_name("ledger.db-wal").write_bytes(flipped(log, position))
        try:
            with closing(Ledger.open(path, write=True)) as ledger:
                assert len(ledger.trials) == 12 and ledger.seq >= 23
        except LedgerDamaged as error:
            told += 1
            assert "breaks off before its end; the file is damaged" in str(error)
            assert path.with_name("ledger.db-wal").read_bytes() == flipped(log, position)
    assert told > 40


def test_what_stands_behind_a_flipped_bit_of_the_log_is_kept(path, killed):
    log, whole = killed
    for position in (40, len(log) // 2):
        path.with_name("ledger.db-wal").write_bytes(flipped(log, position))
        done = repair(path)
        assert (done.trials, done.events, done.lost_trials, done.lost_events) == (12, 24, 0, 0)
        assert rows(path) == whole


def test_a_commit_that_was_cut_short_is_no_damage(path, killed):
    log, _ = killed
    frame = 24 + PAGE
    path.with_name("ledger.db-wal").write_bytes(log[: len(log) - frame - 100])
    with closing(Ledger.open(path, write=True)) as ledger:
        assert (len(ledger.trials), ledger.seq) == (12, 23)


def test_a_second_copy_that_was_changed_is_written_anew(path, small):
    Ledger.open(path).close()
    for table, change in (("spare_trials", "UPDATE spare_trials SET seen = 9 WHERE id = 2"), ("spare_meta", None)):
        execute(path, change or "DELETE FROM spare_meta WHERE key = 'seed'")
        Ledger.open(path, write=True).close()
        with closing(sqlite3.connect(path)) as connection:
            first = connection.execute(f"SELECT * FROM {table.removeprefix('spare_')} ORDER BY 1").fetchall()
            assert connection.execute(f"SELECT * FROM {table} ORDER BY 1").fetchall() == first


def test_a_trial_of_which_only_the_second_copy_is_left_is_damage(ledger, path):
    for _ in range(3):
        propose(ledger)
    ledger.close()
    execute(path, "DELETE FROM trials WHERE id = 3")
    assert "rows of trials are missing" in opening(path, write=True)


# --- repair -----------------------------------------------------------------------------------------------------------


def check_repaired(path, whole):
    """Repair what is at `path`; what is kept is what was, and every event that is not is missing by name."""
    damaged = path.read_bytes()
    done = repair(path)
    trials, events = rows(path)
    assert (done.torn is None) == (path.read_bytes() == damaged)
    if done.torn is not None:
        assert done.torn.read_bytes() == damaged
    assert trials == whole[0][: done.trials] and len(trials) == done.trials
    kept = [event for event in events if event[2] != "missing" or event in whole[1]]
    assert kept == [event for event in whole[1] if event in kept] and len(kept) == done.events
    assert [event[0] for event in events] == list(range(1, len(events) + 1))
    missing = [event for event in events if event not in kept]
    assert {event[1:] for event in missing} <= {(None, "missing", None, "{}", None)}
    assert len(missing) == done.lost_events
    with closing(Ledger.open(path)) as read:
        assert (len(read.trials), read.seq) == (len(trials), len(events))
        assert all(trial.seen <= read.seq for trial in read.trials.values())
    return done


@pytest.mark.parametrize("seed", range(10))
def test_a_flipped_bit_costs_at_most_its_page(path, large, whole, seed):
    path.write_bytes(flipped(large, random.Random(seed).randrange(PAGE, len(large))))
    done = check_repaired(path, whole)
    assert done.trials == len(whole[0])  # they are there twice
    assert done.lost_events < 60


def test_a_page_of_zeros_costs_the_events_on_it_and_no_trial(path, large, whole):
    lost = []
    for page in range(len(large) // PAGE):
        path.write_bytes(hole(large, page))
        done = check_repaired(path, whole)
        assert done.trials == len(whole[0])
        lost.append(len(whole[1]) - done.events)
    assert lost[0] == 0  # SQLite's own page: it can read nothing, and nothing is lost
    assert sum(lost) == len(whole[1])  # each is on one page, and goes with no other


def test_the_earlier_a_cut_the_less_is_left(path, large, whole):
    kept = []
    for share in (0.4, 0.6, 0.8, 0.99, 1.0):
        path.write_bytes(large[: int(len(large) * share)])
        done = check_repaired(path, whole)
        kept.append((done.trials, done.events))
    assert kept == sorted(kept) and kept[-1] == (len(whole[0]), len(whole[1]))
    assert kept[0][0] > 0 and kept[-2][1] > len(whole[1]) // 2


@pytest.mark.parametrize("seed", range(10))
def test_many_holes_at_once(path, large, whole, seed):
    rng, data = random.Random(seed), large
    for _ in range(8):
        start = rng.randrange(4 * PAGE, len(data))
        data = data[:start] + rng.randbytes(500) + data[start + 500 :]
    path.write_bytes(data)
    check_repaired(path, whole)
    with closing(Ledger.open(path, write=True)) as ledger:
        happen(ledger, propose(ledger, text="after the repair").id, "start", "top")
        with closing(Ledger.open(path)) as read:
            assert read.trials == ledger.trials


def test_trials_are_kept_up_to_the_first_that_is_gone(ledger, path):
    for _ in range(5):
        happen(ledger, propose(ledger).id, "start", "top")
    ledger.close()
    whole = rows(path)
    for table in ("trials", "spare_trials"):
        execute(path, f"UPDATE {table} SET operator = 'changed' WHERE id = 3")
    done = check_repaired(path, whole)
    assert (done.trials, done.lost_trials, done.events, done.lost_events) == (2, 3, 4, 6)
    assert str(done) == (
        f"{path}: kept 2 trials and 4 events (what happened to them), lost 3 trials and 6 events; results among those "
        "are trained again; the damaged file is ledger.db.torn-1"
    )


def test_an_event_that_is_gone_leaves_the_numbers_of_the_others(ledger, path):
    ledger.open_session({"pid": 1})
    happen(ledger, propose(ledger).id, "start", "result", "start", "result", "start", "top")
    ledger.close()
    whole = rows(path)
    execute(path, "DELETE FROM events WHERE seq IN (2, 5, 7)")
    done = check_repaired(path, whole)
    assert (done.trials, done.events, done.lost_events) == (1, 4, 2)  # of the last one nothing is known
    with closing(Ledger.open(path)) as read:
        trial = read.trials[1]
        assert [(rung.rung, rung.seq) for rung in trial.rungs] == [(0, 3)]
        assert (trial.state, trial.lease, trial.attempts) == ("running", 6, 2)
        assert [session["pid"] for session in read.sessions()] == [1]


def test_a_result_is_kept_when_its_launch_is_gone(ledger, path):
    happen(ledger, propose(ledger).id, "start", "top")
    ledger.close()
    whole = rows(path)
    execute(path, "DELETE FROM events WHERE seq = 1")
    check_repaired(path, whole)
    with closing(Ledger.open(path)) as read:
        assert (read.trials[1].state, read.trials[1].metrics, read.trials[1].ended) == ("complete", {"loss": 1.0}, 2)


def test_the_numbers_that_proposals_had_seen_are_not_given_again(ledger, path):
    happen(ledger, propose(ledger).id, "start", "top")
    propose(ledger)
    ledger.close()
    whole = rows(path)
    execute(path, "DELETE FROM events", "UPDATE meta SET value = '0' WHERE key = 'seed'")
    done = check_repaired(path, whole)
    assert (done.events, done.lost_events) == (0, 2)


def test_what_the_log_holds_is_kept_too(ledger, path, tmp_path):
    for number in range(20):
        happen(ledger, propose(ledger, text="y" * (300 if number else 9000)).id, "start", "top")
    log = path.with_name("ledger.db-wal")
    assert path.stat().st_size < log.stat().st_size  # little of it has come to the file yet
    copy = tmp_path / "copy" / "ledger.db"
    copy.parent.mkdir()
    copy.write_bytes(hole(path.read_bytes(), 1))  # where `meta` is
    frames = flipped(log.read_bytes(), log.stat().st_size // 2)  # SQLite would forget all that comes after
    copy.with_name("ledger.db-wal").write_bytes(frames)
    done = repair(copy)
    assert rows(copy) == rows(path)
    assert (done.lost_trials, done.lost_events) == (0, 0)
    assert copy.with_name("ledger.db.torn-1-wal").read_bytes() == frames
    assert not copy.with_name("ledger.db-wal").exists()


def stale_log(path, *events):
    """A log with events of trial 1 as an earlier round left them behind: taken back, but still to be read."""
    with closing(Ledger.create(path, {})) as ledger:
        happen(ledger, propose(ledger).id, *events)
        log = bytearray(path.with_name(f"{path.name}-wal").read_bytes())
    log[16:24] = bytes(8)  # the log has begun anew since, under another salt
    return bytes(log)


@pytest.mark.parametrize(
    ("gone", "kept", "state"),
    [
        ([], [(1, "start"), (2, "fail"), (3, "start"), (4, "result")], "complete"),
        ([2], [(1, "start"), (2, "missing"), (3, "start"), (4, "result")], "complete"),  # one rung is told once
        ([2, 4], [(1, "start"), (2, "result"), (3, "start")], "running"),
    ],
)
def test_what_was_taken_back_counts_only_where_nothing_else_is_known(ledger, path, tmp_path, gone, kept, state):
    log = stale_log(tmp_path / "other.db", "start", "top")
    happen(ledger, propose(ledger).id, "start", "lost", "start", "top")
    ledger.close()
    execute(path, "DELETE FROM meta", *(f"DELETE FROM events WHERE seq = {seq}" for seq in gone))
    path.with_name("ledger.db-wal").write_bytes(log)
    repair(path)
    assert [(event[0], event[2]) for event in rows(path)[1]] == kept
    with closing(Ledger.open(path)) as read:
        assert read.trials[1].state == state


def test_nothing_is_done_to_a_ledger_that_is_whole(ledger, path):
    happen(ledger, propose(ledger).id, "start", "top")
    ledger.close()
    before = path.read_bytes()
    done = repair(path)
    assert (done.torn, done.trials, done.events, done.lost_trials, done.lost_events) == (None, 1, 2, 0, 0)
    assert "nothing is wrong with it" in str(done)
    assert path.read_bytes() == before
    assert not list(path.parent.glob("*.torn-*"))


@pytest.mark.parametrize("content", [b"", b"short", b"no database at all" * 400, bytes(5 * PAGE)])
def test_what_is_no_ledger_is_left_alone(path, content):
    path.write_bytes(content)
    with pytest.raises(StorageError, match="nothing in it can be read"):
        repair(path)
    assert path.read_bytes() == content
    assert [file.name for file in path.parent.iterdir()] == ["ledger.db"]


def test_a_ledger_of_a_newer_evolm_is_not_repaired(path, monkeypatch):
    monkeypatch.setattr("fitness.ledger.SCHEMA_VERSION", 3)
    with suppress(StorageError):  # it cannot be read back
        Ledger.create(path, {})
    monkeypatch.undo()
    for damage in ([], ["UPDATE meta SET sum = '' WHERE key = 'other'", "DROP TABLE events"]):
        execute(path, *damage)
        before = path.read_bytes()
        with pytest.raises(StorageError, match="a newer evolm wrote it"):
            repair(path)
        assert path.read_bytes() == before


def test_each_damaged_file_is_kept(ledger, path):
    for _ in range(2):
        happen(ledger, propose(ledger).id, "start")
    ledger.close()
    for number in (1, 2):
        execute(path, f"UPDATE events SET time = 5 WHERE seq = {number}")
        assert repair(path).torn == path.with_name(f"ledger.db.torn-{number}")
    with closing(Ledger.open(path)) as read:
        assert [trial.state for trial in read.trials.values()] == ["proposed", "proposed"]


def test_a_repair_goes_on_without_second_names(ledger, path, monkeypatch):
    def refused(*names):
        raise PermissionError(1, "Operation not permitted")

    happen(ledger, propose(ledger).id, "start")
    ledger.close()
    execute(path, "DELETE FROM events")
    monkeypatch.setattr(os, "link", refused)
    execute(path, "UPDATE spare_meta SET sum = ''", "UPDATE trials SET sum = ''")
    damaged = path.read_bytes()
    assert repair(path).torn.read_bytes() == damaged


def test_no_room_for_a_repair(path, large, monkeypatch):
    def full(old, new):
        raise OSError(28, "No space left on device")

    path.write_bytes(hole(large, 0))
    monkeypatch.setattr("fitness.repair.os.link", full)
    monkeypatch.setattr("fitness.repair.shutil.copy2", full)
    with pytest.raises(StorageError, match=r"No space left on device; it was not repaired: make room in"):
        repair(path)
    assert path.read_bytes() == hole(large, 0)


class Killed(BaseException):
    """The process ends here."""


class Steps:
    """Counts what a repair does to the disk, and kills it before or after one of these deeds."""

    def __init__(self, patch, fatal, when):
        self.fatal, self.when, self.taken = fatal, when, 0
        for owner, name in ((os, "link"), (os, "fsync"), (Path, "unlink"), (Path, "replace"), (sqlite3, "connect")):
            patch.setattr(owner, name, self.dying(getattr(owner, name)))

    def dying(self, real):
        def step(*arguments, **options):
            self.taken += 1
            fatal = self.taken == self.fatal
            if fatal and self.when == "before":
                raise Killed
            result = real(*arguments, **options)
            if fatal:
                raise Killed
            return result

        return step


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_repair_that_is_cut_short_anywhere_can_be_repeated(path, large, whole, monkeypatch, when):
    log, torn = (path.with_name(f"ledger.db{suffix}") for suffix in ("-wal", ".torn-1"))
    words = b"not a log, but it has to be kept"
    for fatal in range(1, 100):
        for file in path.parent.glob("ledger.db*"):
            file.unlink()
        path.write_bytes(hole(large, 0))
        log.write_bytes(words)
        with monkeypatch.context() as patch, suppress(Killed):
            steps = Steps(patch, fatal, when)
            repair(path)
            break  # it came through: there is no such step
        with suppress(LedgerDamaged), closing(Ledger.open(path)) as read:  # it is refused, or it is whole
            assert len(read.trials) == len(whole[0])
        repair(path)
        assert rows(path) == whole
        assert (torn.read_bytes(), torn.with_name(f"{torn.name}-wal").read_bytes()) == (hole(large, 0), words)
        assert {file.name for file in path.parent.glob("ledger.db*")} == {"ledger.db", torn.name, f"{torn.name}-wal"}
    assert steps.taken == fatal - 1 >= 10


def test_a_repair_that_was_cut_short_is_told(ledger, path):
    ledger.close()
    path.with_name("ledger.db.repaired").write_bytes(path.read_bytes())
    assert opening(path) == (
        f"{path.parent}: a repair was cut short; `evolm resume {path.parent} --repair` finishes it"
    )


def test_a_repair_without_the_damaged_file_is_finished(path, large, whole):
    ready = path.with_name("ledger.db.repaired")
    ready.write_bytes(large)
    path.write_bytes(hole(large, 0))
    assert repair(path).torn == path.with_name("ledger.db.torn-1")
    assert rows(path) == whole and not ready.exists()


def test_a_copy_that_the_user_put_back_meanwhile_is_kept(ledger, path):
    happen(ledger, propose(ledger).id, "start", "top")
    ledger.close()
    copy = path.read_bytes()
    execute(path, "UPDATE events SET time = 5 WHERE seq = 1")
    repair(path)
    repaired = path.read_bytes()
    for left in (repaired, repaired[:-100]):  # with one event less, and not whole
        path.with_name("ledger.db.repaired").write_bytes(left)
        path.write_bytes(copy)
        assert "nothing is wrong with it" in str(repair(path))
        assert path.read_bytes() == copy and not path.with_name("ledger.db.repaired").exists()


def test_a_repair_that_is_longer_than_what_a_shorter_log_left_is_finished(ledger, path):
    propose(ledger)
    ledger.close()
    shorter = path.read_bytes()
    with closing(Ledger.open(path, write=True)) as again:
        happen(again, 1, "start", "top")
    path.with_name("ledger.db.repaired").write_bytes(path.read_bytes())
    path.write_bytes(shorter)
    done = repair(path)
    assert (done.trials, done.events) == (1, 2)
    assert done.torn.read_bytes() == shorter
