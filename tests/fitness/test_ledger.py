"""Guards the ledger: what its events add up to, that it only ever grows, and that what was acknowledged is there after
a kill, after a full disk, and for every reader.
"""

import json
import random
import sqlite3
import subprocess
import sys
from contextlib import closing

import pytest

from fitness.errors import StorageError
from fitness.ledger import Ledger
from fitness.trial import REASONS, STATES
from search_spaces import Genome


@pytest.fixture
def path(tmp_path):
    return tmp_path / "ledger.db"


@pytest.fixture
def ledger(path):
    with closing(Ledger.create(path, {"seed": 7, "rungs": [1e6, 4e6]})) as created:
        yield created


def propose(ledger, **options):
    number = len(ledger.trials)
    return ledger.propose(Genome.of({"x": number}), **{"operator": "random", "seen": ledger.seq, **options})


def tell(ledger, trial, rung, *, top=False, loss=1.0):
    if ledger.trials[trial].state in ("proposed", "paused") and rung > ledger.trials[trial].rung:
        ledger.start(trial, rung, {"pid": 1})
    return ledger.result(trial, rung, tokens=10.0**rung, metrics={"loss": loss}, flops=100, seconds=2, top=top)


def happen(ledger, trial, *events):
    """Let a trial go through some events, each one word."""
    for event in events:
        rung = ledger.trials[trial].rung + 1
        match event:
            case "start":
                ledger.start(trial, rung, {"pid": 1})
            case "result" | "top":
                tell(ledger, trial, rung, top=event == "top")
            case "lost":
                ledger.fail(trial, "lost", "node went away", flops=5, seconds=1, final=False)
            case "crash":
                ledger.fail(trial, "crashed", "a bug", flops=5, seconds=1)
            case "infeasible":
                ledger.infeasible(trial, "no such shape")
            case "stop":
                ledger.stop(trial)
    return ledger.trials[trial]


def rows(path):
    """Everything in the file but when it was written."""
    with closing(sqlite3.connect(path)) as connection:
        trials = connection.execute("SELECT id, digest, genome, parents, operator, seen FROM trials ORDER BY id")
        events = connection.execute("SELECT seq, trial, kind, rung, body FROM events ORDER BY seq")
        return trials.fetchall(), events.fetchall()


# --- trials and what happens to them ----------------------------------------------------------------------------------


def test_trials_and_events_are_numbered_from_1(ledger):
    assert [propose(ledger).id for _ in range(3)] == [1, 2, 3]
    happen(ledger, 2, "start")
    assert ledger.seq == 1


def test_a_trial_knows_where_it_came_from(ledger):
    propose(ledger)
    child = propose(ledger, parents=[1], operator="mutation", seen=0)
    assert (child.parents, child.operator, child.seen) == ((1,), "mutation", 0)
    assert (child.genome, child.digest) == ({"x": 1}, Genome.of({"x": 1}).digest)


def test_a_genome_leads_to_its_trial(ledger):
    propose(ledger)
    propose(ledger)
    assert ledger.numbers[Genome.of({"x": 1})] == 2


HISTORIES = [
    ([], "proposed"),
    (["start"], "running"),
    (["start", "result"], "paused"),
    (["start", "result", "start"], "running"),
    (["start", "top"], "complete"),
    (["start", "result", "start", "top"], "complete"),
    (["start", "lost"], "proposed"),
    (["start", "lost", "start"], "running"),
    (["start", "result", "start", "lost"], "paused"),
    (["start", "crash"], "failed"),
    (["start", "result", "start", "crash"], "failed"),
    (["start", "infeasible"], "infeasible"),
    (["stop"], "stopped"),
    (["start", "result", "stop"], "stopped"),
]


@pytest.mark.parametrize(("events", "state"), HISTORIES)
def test_the_state_of_a_trial_is_what_its_events_add_up_to(ledger, path, events, state):
    trial = happen(ledger, propose(ledger).id, *events)
    assert trial.state == state
    assert ledger.in_state(state) == [trial]
    with closing(Ledger.open(path)) as again:
        assert again.trials[1] == trial


def test_every_state_has_a_case_above():
    assert {state for _, state in HISTORIES} == set(STATES)


@pytest.mark.parametrize("reason", REASONS)
def test_a_failed_trial_has_a_reason_and_a_message(ledger, reason):
    failed = ledger.fail(propose(ledger).id, reason, "in words")
    assert (failed.state, failed.reason, failed.message) == ("failed", reason, "in words")


def test_a_failure_that_is_not_final_has_no_reason(ledger):
    assert happen(ledger, propose(ledger).id, "start", "lost").reason is None


def test_a_long_message_is_cut(ledger):
    assert len(ledger.fail(propose(ledger).id, "crashed", "x" * 100_000).message) == 2000


def test_every_launch_is_an_attempt_and_is_paid_for(ledger):
    trial = happen(ledger, propose(ledger).id, "start", "lost", "start", "result", "start", "crash")
    assert (trial.attempts, trial.flops, trial.seconds) == (3, 5 + 100 + 5, 1 + 2 + 1)


def test_a_running_trial_names_its_worker(ledger):
    trial = propose(ledger).id
    assert ledger.start(trial, 0, {"pid": 41, "node": "a"}).worker == {"pid": 41, "node": "a"}
    assert tell(ledger, trial, 0).worker is None


def test_the_metrics_of_a_trial_are_those_of_its_highest_rung(ledger):
    trial = propose(ledger)
    assert (trial.metrics, trial.rung) == ({}, -1)
    tell(ledger, trial.id, 0, loss=3.0)
    told = tell(ledger, trial.id, 1, loss=2.0)
    assert (told.metrics, told.rung, [rung.tokens for rung in told.rungs]) == ({"loss": 2.0}, 1, [1.0, 10.0])


def test_a_trial_is_json_for_programs(ledger):
    propose(ledger)
    trial = happen(ledger, propose(ledger, parents=[1], operator="mutation").id, "start", "top")
    assert json.loads(json.dumps(trial.as_dict())) == {
        **{"id": 2, "digest": Genome.of({"x": 1}).digest, "genome": {"x": 1}},
        **{"state": "complete", "reason": None, "message": None, "metrics": {"loss": 1.0}},
        **{"rungs": [{"tokens": 1.0, "metrics": {"loss": 1.0}}], "parents": [1], "operator": "mutation"},
        **{"flops": 100, "seconds": 2, "attempts": 1},
    }


# --- recorded once ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rung", [0, 1])
def test_a_result_that_was_told_before_is_not_written_again(ledger, path, rung):
    happen(ledger, propose(ledger).id, "result", "result")
    before = rows(path)
    assert tell(ledger, 1, rung, loss=99.0) is None
    assert rows(path) == before


def test_the_database_itself_refuses_a_second_result(ledger, path):
    happen(ledger, propose(ledger).id, "result")
    with closing(sqlite3.connect(path)) as connection, pytest.raises(sqlite3.IntegrityError):
        connection.execute("INSERT INTO events VALUES (9, 1, 'result', 0, '{}', 0, '')")


def test_the_database_itself_refuses_a_genome_twice(ledger):
    ledger.propose(Genome.of({"x": 1}), operator="random", seen=0)
    with pytest.raises(StorageError):
        ledger.propose(Genome.of({"x": 1}), operator="random", seen=0)
    assert len(ledger.trials) == 1


def test_what_is_not_finite_is_not_written(ledger):
    happen(ledger, propose(ledger).id, "start")
    with pytest.raises(ValueError, match="not JSON compliant"):
        tell(ledger, 1, 0, loss=float("nan"))
    assert (ledger.seq, ledger.trials[1].state) == (1, "running")


@pytest.mark.parametrize("end", ["crash", "infeasible", "stop", "top"])
def test_a_trial_that_has_ended_is_not_told_again(ledger, end):
    trial = happen(ledger, propose(ledger).id, "start", end)
    assert tell(ledger, trial.id, 1) is None
    assert ledger.trials[trial.id] == trial


def test_a_retry_that_works_leaves_no_trace_of_the_failure(ledger):
    trial = happen(ledger, propose(ledger).id, "start", "lost", "start", "top")
    assert (trial.state, trial.reason, trial.message, trial.attempts) == ("complete", None, "", 2)


# --- a long history ---------------------------------------------------------------------------------------------------

NEXT = {
    "proposed": ["start", "start", "stop"],
    "running": ["result", "result", "top", "lost", "crash", "infeasible"],
    "paused": ["start", "start", "stop"],
}


def one_more(ledger, rng):
    """Something that can happen next, to some trial or to a new one."""
    going = ledger.in_state("proposed", "running", "paused")
    if not going or rng.random() < 0.2:
        propose(ledger)
    else:
        trial = rng.choice(going)
        happen(ledger, trial.id, rng.choice(NEXT[trial.state]))


@pytest.mark.parametrize("seed", range(3))
def test_a_ledger_that_is_opened_again_is_the_one_that_was_written(ledger, path, seed):
    rng = random.Random(seed)
    for _ in range(100):
        one_more(ledger, rng)
    with closing(Ledger.open(path)) as again:
        assert again.trials == ledger.trials
        assert (again.numbers, again.seq, again.meta) == (ledger.numbers, ledger.seq, ledger.meta)


def test_a_ledger_only_ever_grows(ledger, path):
    rng, trials, events = random.Random(0), [], []
    for _ in range(100):
        one_more(ledger, rng)
        now_trials, now_events = rows(path)
        assert (now_trials[: len(trials)], now_events[: len(events)]) == (trials, events)
        trials, events = now_trials, now_events


def test_a_ledger_remembers_what_it_knew_at_any_time(ledger):
    rng, known = random.Random(1), {}
    for _ in range(150):
        one_more(ledger, rng)
        known[ledger.seq] = {trial.id: (trial.rungs, trial.ended) for trial in ledger.trials.values()}
    for seq, trials in known.items():
        then = ledger.as_of(seq, before=len(trials) + 1)
        assert {trial.id: (trial.rungs, trial.ended) for trial in then} == trials


def test_a_later_end_is_not_known_before(ledger):
    happen(ledger, propose(ledger).id, "start", "result", "start", "crash")
    states = [ledger.as_of(seq, before=2)[0].state for seq in range(1, 5)]
    assert states == ["running", "paused", "paused", "failed"]
    assert [ledger.as_of(seq, before=2)[0].reason for seq in (3, 4)] == [None, "crashed"]


def test_trials_that_were_proposed_later_are_not_known_before(ledger):
    for _ in range(5):
        propose(ledger)
    assert [trial.id for trial in ledger.as_of(0, before=3)] == [1, 2]


# --- sessions ---------------------------------------------------------------------------------------------------------


def test_a_session_lasts_from_its_opening_to_its_last_event(ledger):
    ledger.open_session({"host": "a", "pid": 1})
    happen(ledger, propose(ledger).id, "start", "top")
    (session,) = ledger.sessions()
    times = ledger.times()
    assert list(times) == [1, 2, 3]
    assert session == {"host": "a", "pid": 1, "began": times[1], "ended": times[3], "why": None}


def test_each_controller_has_a_session_and_those_that_ended_in_order_say_why(ledger):
    ledger.open_session({"pid": 1})
    ledger.open_session({"pid": 2})
    ledger.close_session("budget")
    assert [(session["pid"], session["why"]) for session in ledger.sessions()] == [(1, None), (2, "budget")]


def test_a_session_is_no_event_of_any_trial(ledger):
    trial = propose(ledger)
    ledger.open_session({"pid": 1})
    assert ledger.trials == {1: trial}


# --- files ------------------------------------------------------------------------------------------------------------


def test_what_never_changes_is_kept(ledger, path):
    with closing(Ledger.open(path)) as again:
        assert again.meta == {"schema_version": 1, "seed": 7, "rungs": [1e6, 4e6]}


def test_a_ledger_can_be_continued(ledger, path):
    happen(ledger, propose(ledger).id, "start")
    ledger.close()
    with closing(Ledger.open(path, write=True)) as again:
        assert happen(again, 1, "top").state == "complete"
        assert propose(again).id == 2
        assert again.seq == 2


def test_a_ledger_in_memory_needs_no_file():
    with closing(Ledger.create(None, {})) as ledger:
        assert happen(ledger, propose(ledger).id, "start", "top").state == "complete"


def test_every_event_is_on_the_disk_before_it_is_acknowledged(ledger, path):
    with closing(sqlite3.connect(path)) as connection:
        assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    # How thoroughly SQLite syncs is a setting of each connection: it cannot be seen from outside. 2 is FULL.
    assert ledger._connection.execute("PRAGMA synchronous").fetchone() == (2,)
    ledger.close()
    with closing(Ledger.open(path, write=True)) as again:
        assert again._connection.execute("PRAGMA synchronous").fetchone() == (2,)


def test_a_reader_sees_what_a_writer_has_written_so_far(ledger, path):
    happen(ledger, propose(ledger).id, "start")
    with closing(Ledger.open(path)) as reader:
        assert reader.trials == ledger.trials
        happen(ledger, 1, "top")
        assert reader.trials[1].state == "running"
    with closing(Ledger.open(path)) as reader:
        assert reader.trials[1].state == "complete"


def test_a_reader_does_not_hinder_the_writer(ledger, path):
    with closing(Ledger.open(path)), closing(Ledger.open(path)):
        assert happen(ledger, propose(ledger).id, "start", "top").state == "complete"


def test_a_reader_changes_nothing(ledger, path):
    happen(ledger, propose(ledger).id, "start")
    ledger.close()
    before = path.read_bytes()
    with closing(Ledger.open(path)) as reader:
        reader.sessions()
        with pytest.raises(StorageError, match="attempt to write a readonly database"):
            reader.stop(1)
        assert reader.trials[1].state == "running"
    assert path.read_bytes() == before


def test_what_is_closed_cannot_be_written(ledger):
    trial = propose(ledger)
    ledger.close()
    with pytest.raises(StorageError):
        ledger.stop(trial.id)
    assert ledger.trials[1].state == "proposed"


# --- files that are not as they should be -----------------------------------------------------------------------------


def opening(path, **options):
    """The words with which a ledger cannot be opened, without its path."""
    with pytest.raises(StorageError) as caught:
        Ledger.open(path, **options)
    assert caught.value.exit_code == 5
    return str(caught.value).removeprefix(f"{path}: ")


@pytest.fixture
def large(ledger, path):
    """The bytes of a ledger of some pages, closed."""
    for number in range(150):
        ledger.propose(Genome.of({"x": number, "text": "y" * 300}), operator="random", seen=0)
    ledger.close()
    return path.read_bytes()


@pytest.mark.parametrize("write", [False, True])
def test_a_missing_ledger(path, write):
    assert opening(path, write=write) == "no ledger there"
    assert not path.exists()


def test_a_folder_is_no_ledger(tmp_path):
    assert opening(tmp_path) == "no ledger there"


def test_a_ledger_is_never_created_over_another(ledger, path):
    propose(ledger)
    with pytest.raises(StorageError, match="a ledger is already there"):
        Ledger.create(path, {})
    with closing(Ledger.open(path)) as again:
        assert len(again.trials) == 1


def test_a_ledger_needs_its_folder(tmp_path):
    with pytest.raises(StorageError, match="unable to open database file"):
        Ledger.create(tmp_path / "missing" / "ledger.db", {})


def test_another_file_is_no_ledger(path):
    path.write_text("trial,loss\n1,3.2\n" * 300)
    assert opening(path) == (
        "file is not a database; the file is damaged or no ledger; `sqlite3 FILE .recover` can save what is readable"
    )


@pytest.mark.parametrize("share", [0.02, 0.5, 0.95])
def test_a_ledger_that_was_cut_off(path, large, share):
    path.write_bytes(large[: int(len(large) * share)])
    assert opening(path) == (
        "database disk image is malformed; the file is damaged or no ledger; "
        "`sqlite3 FILE .recover` can save what is readable"
    )


@pytest.mark.parametrize("write", [False, True])
def test_a_ledger_with_an_empty_page(path, large, write):
    page = len(large) // 2 // 4096 * 4096
    path.write_bytes(large[:page] + bytes(4096) + large[page + 4096 :])
    assert "malformed" in opening(path, write=write)


def test_a_ledger_of_another_version(path, monkeypatch):
    monkeypatch.setattr("fitness.ledger.SCHEMA_VERSION", 2)
    Ledger.create(path, {}).close()
    monkeypatch.undo()
    assert opening(path) == "has schema version 2, this evolm reads 1"


def test_meta_that_was_changed_by_hand_is_told(ledger, path):
    ledger.close()
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("UPDATE meta SET value = '8' WHERE key = 'seed'")
    assert "seed is not what it was" in opening(path)


# --- acknowledged is safe ---------------------------------------------------------------------------------------------

WORK = """
import resource, sys
from pathlib import Path
from fitness.errors import StorageError
from fitness.ledger import Ledger
from search_spaces import Genome

ledger = Ledger.open(Path(sys.argv[1]), write=True)
if len(sys.argv) > 2:
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), resource.RLIM_INFINITY))
try:
    while True:
        trial = ledger.propose(Genome.of({"x": len(ledger.trials)}), operator="random", seen=ledger.seq)
        ledger.start(trial.id, 0, {"pid": 1})
        ledger.result(trial.id, 0, tokens=1, metrics={"loss": 1 / trial.id}, flops=1, seconds=1, top=True)
        print(trial.id, flush=True)
except StorageError:
    print("storage", flush=True)
"""


def worker(path, *limit):
    command = [sys.executable, "-c", WORK, str(path), *map(str, limit)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def assert_complete(path, numbers):
    with closing(Ledger.open(path)) as ledger:
        for number in numbers:
            trial = ledger.trials[number]
            assert (trial.state, trial.metrics) == ("complete", {"loss": 1 / number})


def test_a_kill_loses_nothing_that_was_acknowledged(ledger, path):
    ledger.close()
    acknowledged = []
    for results in (1, 7, 40):
        with worker(path) as process:
            lines = [process.stdout.readline() for _ in range(results)]
            process.kill()
            lines += process.stdout.readlines()
        assert process.returncode == -9
        acknowledged += [int(line) for line in lines if line.endswith("\n")]
        assert_complete(path, acknowledged)
    assert len(acknowledged) >= 48


def test_a_disk_that_takes_no_more_loses_nothing_that_was_acknowledged(ledger, path):
    ledger.close()
    with worker(path, 200_000) as process:
        *told, last = process.stdout.read().split()
    assert last == "storage"
    assert len(told) > 5
    assert_complete(path, map(int, told))
    with closing(Ledger.open(path, write=True)) as again:
        assert propose(again).id == len(again.trials)


# --- what a failing disk changes --------------------------------------------------------------------------------------


def test_no_flipped_bit_is_believed(path, large):
    """Wherever a bit flips: the ledger is told to be damaged, or reads as it was (the bit was in unused space)."""
    path.write_bytes(large)
    with closing(Ledger.open(path)) as whole:
        before = (whole.trials, whole.seq, whole.meta)
    for position in random.Random(0).sample(range(len(large)), 150):
        changed = bytearray(large)
        changed[position] ^= 1 << position % 8
        path.write_bytes(bytes(changed))
        try:
            with closing(Ledger.open(path)) as read:
                assert (read.trials, read.seq, read.meta) == before
        except StorageError as error:
            assert str(path) in str(error)


def test_a_hole_of_zeros_is_told(path, large):
    middle = len(large) // 2 + 100
    path.write_bytes(large[:middle] + bytes(8192) + large[middle + 8192 :])
    assert "the file is damaged" in opening(path)


def test_a_reader_sees_one_moment_while_a_writer_works(path, ledger):
    for _ in range(30):
        happen(ledger, propose(ledger).id, "start", "result")
        with closing(Ledger.open(path)) as reader:
            assert reader.trials == ledger.trials and reader.seq == ledger.seq


def test_reading_what_nobody_writes_leaves_nothing_beside_it(path):
    with closing(Ledger.create(path, {})) as ledger:
        happen(ledger, propose(ledger).id, "start", "result")
    with closing(Ledger.open(path)) as reader:
        assert len(reader.trials) == 1
    assert [file.name for file in path.parent.iterdir()] == ["ledger.db"]
