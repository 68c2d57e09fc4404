"""Guards what a ledger remembers: what events add up to, that nothing is told twice, and that it only ever grows."""

import json
import random
import sqlite3
from contextlib import closing

import pytest
from histories import happen, one_more, propose, rows, tell

from fitness.errors import StorageError
from fitness.ledger import Ledger
from fitness.trial import REASONS, STATES
from search_spaces import Genome

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
    failed = ledger.fail(happen(ledger, propose(ledger).id, "start").id, reason, "in words")
    assert (failed.state, failed.reason, failed.message) == ("failed", reason, "in words")


def test_a_failure_that_is_not_final_has_no_reason(ledger):
    assert happen(ledger, propose(ledger).id, "start", "lost").reason is None


def test_a_long_message_is_cut(ledger):
    happen(ledger, propose(ledger).id, "start")
    assert len(ledger.fail(1, "crashed", "x" * 100_000).message) == 2000


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
        connection.execute("INSERT INTO events VALUES (9, 1, 'result', 0, '{}', 0, 0, NULL, '')")


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


@pytest.mark.parametrize("events", [[], ["start", "result"], ["start", "top"], ["start", "crash"], ["stop"]])
def test_only_a_running_trial_comes_to_nothing(ledger, events):
    before = happen(ledger, propose(ledger).id, *events)
    seq = ledger.seq
    for end in ("crash", "lost", "infeasible", *(["stop"] if before.ended else [])):
        with pytest.raises(ValueError, match=f"trial 1 is {before.state}, not "):
            happen(ledger, 1, end)
    assert (ledger.trials[1], ledger.seq) == (before, seq)


# --- a long history ---------------------------------------------------------------------------------------------------


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


def test_a_ledger_remembers_what_proposals_knew_at_any_time(ledger, path):
    rng, known = random.Random(1), {}
    for _ in range(150):
        one_more(ledger, rng)
        known[ledger.seq] = ledger.as_of(ledger.seq, before=1000)  # what a proposal was shown then
        assert [(trial.rungs, trial.ended) for trial in known[ledger.seq]] == [
            (trial.rungs, trial.ended) for trial in ledger.trials.values()
        ]
    ledger.close()
    with closing(Ledger.open(path)) as again:
        for seq, trials in known.items():
            assert ledger.as_of(seq, before=len(trials) + 1) == again.as_of(seq, before=len(trials) + 1) == trials


def test_a_later_end_is_not_known_before(ledger):
    happen(ledger, propose(ledger).id, "start", "result", "start", "crash")
    states = [ledger.as_of(seq, before=2)[0].state for seq in range(1, 5)]
    assert states == ["proposed", "paused", "paused", "failed"]
    assert [ledger.as_of(seq, before=2)[0].reason for seq in (3, 4)] == [None, "crashed"]


def test_trials_that_were_proposed_later_are_not_known_before(ledger):
    for _ in range(5):
        propose(ledger)
    assert [trial.id for trial in ledger.as_of(0, before=3)] == [1, 2]


# --- failures ---------------------------------------------------------------------------------------------------------


def test_failures_since_the_last_result_are_counted_by_reason(ledger):
    trial = propose(ledger).id
    for reason in ("lost", "oom", "lost", "interrupted"):
        ledger.start(trial, 0, {})
        ledger.fail(trial, reason, final=False)
    assert ledger.trials[trial].failures == {"lost": 2, "oom": 1}
    assert tell(ledger, trial, 0).failures == {}
    assert "failures" not in ledger.trials[trial].as_dict()


def test_a_trial_that_is_looked_at_later_is_not_changed_by_what_happens(ledger):
    before = happen(ledger, propose(ledger).id, "start", "lost")
    happen(ledger, 1, "start", "lost")
    assert before.failures == {"lost": 1}


# --- asking -----------------------------------------------------------------------------------------------------------


def test_trials_in_some_states_come_by_number_whenever_they_got_there(ledger):
    for _ in range(4):
        propose(ledger)
    for trial in (3, 1, 4):
        happen(ledger, trial, "start")
    happen(ledger, 4, "result")
    assert [trial.id for trial in ledger.in_state("running")] == [1, 3]
    assert [trial.id for trial in ledger.in_state("paused", "running", "running")] == [1, 3, 4]
    assert ledger.in_state("complete") == ledger.in_state() == []


@pytest.mark.parametrize("seed", range(3))
def test_every_trial_is_in_the_one_state_that_it_says(ledger, path, seed):
    rng = random.Random(seed)
    for _ in range(80):
        one_more(ledger, rng)
    with closing(Ledger.open(path)) as again:
        for one in (ledger, again):
            for state in STATES:
                assert one.in_state(state) == [trial for trial in one.trials.values() if trial.state == state]


def test_a_history_of_no_trials(ledger):
    propose(ledger)
    assert ledger.as_of(0, before=1) == ledger.as_of(0, before=0) == ()


# --- sessions and clocks ----------------------------------------------------------------------------------------------


class Clocks:
    """The clock on the wall, which anybody may set, and the one that only goes forward."""

    def __init__(self, monkeypatch):
        self.wall, self.steady = 1_700_000_000.0, 50.0
        monkeypatch.setattr("fitness.ledger.time.time", lambda: self.wall)
        monkeypatch.setattr("fitness.ledger.time.monotonic", lambda: self.steady)

    def pass_(self, seconds):
        self.wall, self.steady = self.wall + seconds, self.steady + seconds


@pytest.fixture
def clocks(monkeypatch):
    return Clocks(monkeypatch)


def test_a_session_lasts_from_its_opening_to_its_last_event(ledger, clocks):
    ledger.open_session({"host": "a", "pid": 1})
    clocks.pass_(2.5)
    happen(ledger, propose(ledger).id, "start", "top")
    clocks.pass_(100)
    (session,) = ledger.sessions()
    times = {"began": 1_700_000_000.0, "ended": 1_700_000_002.5, "seconds": 2.5}
    assert session == {"host": "a", "pid": 1, **times, "why": None}


def test_each_controller_has_a_session_and_those_that_ended_in_order_say_why(ledger):
    ledger.open_session({"pid": 1})
    ledger.open_session({"pid": 2})
    ledger.close_session("budget")
    assert [(session["pid"], session["why"]) for session in ledger.sessions()] == [(1, None), (2, "budget")]


def test_a_session_is_no_event_of_any_trial(ledger):
    trial = propose(ledger)
    ledger.open_session({"pid": 1})
    assert ledger.trials == {1: trial}


@pytest.mark.parametrize("jump", [-86_400, 86_400])
def test_a_wall_clock_that_is_set_changes_no_seconds(ledger, clocks, jump):
    ledger.open_session({})
    clocks.pass_(3)
    propose(ledger)
    happen(ledger, 1, "start")
    clocks.wall += jump
    clocks.pass_(4)
    happen(ledger, 1, "top")
    (session,) = ledger.sessions()
    assert session["seconds"] == 7
    assert session["ended"] - session["began"] == 7 + jump


def test_work_adds_up_over_sessions_and_not_over_the_time_between(ledger, path, clocks):
    ledger.open_session({})
    clocks.pass_(10)
    happen(ledger, propose(ledger).id, "start")
    ledger.close()
    clocks.pass_(5_000)
    with closing(Ledger.open(path, write=True)) as again:
        happen(again, 1, "lost")
        again.open_session({})
        clocks.pass_(1)
        happen(again, 1, "stop")
        assert [session["seconds"] for session in again.sessions()] == [10, 1]


def test_what_happens_outside_of_any_session_belongs_to_none(ledger, clocks):
    happen(ledger, propose(ledger).id, "start")
    clocks.pass_(9)
    happen(ledger, 1, "top")
    assert ledger.sessions() == []
