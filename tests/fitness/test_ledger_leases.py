"""Guards that a launch is told once, and by itself: whoever comes late is heard, paid for, and changes nothing."""

import sqlite3
from contextlib import closing
from dataclasses import replace

import pytest
from histories import happen, propose, rows, tell

from fitness.ledger import Ledger


@pytest.fixture
def trial(ledger):
    """A running trial."""
    return happen(ledger, propose(ledger).id, "start")


def outcome(ledger, kind, lease):
    """Tell the outcome of a launch of trial 1; with a lease or without."""
    match kind:
        case "result":
            told = {"tokens": 1.0, "metrics": {"loss": 1.0}, "flops": 100, "seconds": 2}
            return ledger.result(1, 0, **told, top=True, lease=lease)
        case "fail":
            return ledger.fail(1, "crashed", "a bug", flops=100, seconds=2, lease=lease)
        case "infeasible":
            return ledger.infeasible(1, "no such shape", lease=lease)


OUTCOMES = ("result", "fail", "infeasible")


def test_a_lease_is_the_number_of_the_launch(ledger, trial):
    assert trial.lease == ledger.seq == 1
    assert happen(ledger, 1, "lost").lease is None
    assert happen(ledger, 1, "start").lease == 3


@pytest.mark.parametrize("end", ["result", "top", "lost", "crash", "infeasible", "stop"])
def test_a_launch_that_has_ended_has_no_lease_and_its_end_says_whose_it_was(ledger, path, trial, end):
    assert happen(ledger, 1, end).lease is None
    assert [event[-1] for event in rows(path)[1]] == [None, 1]


@pytest.mark.parametrize("kind", OUTCOMES)
def test_an_outcome_with_its_lease_counts_as_one_without(ledger, trial, kind):
    with closing(Ledger.create(None, {})) as other:
        happen(other, propose(other).id, "start")
        assert outcome(ledger, kind, trial.lease) == outcome(other, kind, None) == ledger.trials[1]
    assert ledger.late == 0


@pytest.mark.parametrize("kind", OUTCOMES)
def test_an_outcome_of_a_launch_that_was_given_up_is_late(ledger, path, trial, kind):
    before = happen(ledger, 1, "lost", "start")
    assert outcome(ledger, kind, trial.lease) is None
    assert (before.flops, before.seconds) == (5, 1)  # what was known of the launch when it was lost
    after = before if kind == "infeasible" else replace(before, flops=100, seconds=2)
    assert ledger.trials[1] == after
    assert (ledger.late, ledger.seq) == (1, 4)
    with closing(Ledger.open(path)) as again:
        assert (again.trials[1], again.late) == (after, 1)


@pytest.mark.parametrize("end", ["result", "top", "crash", "infeasible", "stop", "lost", "start"])
def test_a_launch_is_paid_for_once_however_often_it_is_told(ledger, path, trial, end):
    happen(ledger, 1, end)
    for kind in ("result", "fail", "result", "infeasible"):
        assert outcome(ledger, kind, trial.lease) is None
        assert (ledger.trials[1].flops, ledger.trials[1].seconds) == (100, 2)
    assert (ledger.late, ledger.seq) == (1, 3)
    with closing(Ledger.open(path, write=True)) as again:
        assert outcome(again, "result", trial.lease) is None
        assert (again.trials, again.late, again.seq) == (ledger.trials, 1, 3)


@pytest.mark.parametrize("end", ["top", "crash", "infeasible", "stop", "lost"])
@pytest.mark.parametrize("kind", OUTCOMES)
def test_an_outcome_that_is_told_twice_is_late(ledger, trial, end, kind):
    ended = happen(ledger, 1, end)
    assert outcome(ledger, kind, trial.lease) is None
    assert (ledger.trials[1].state, ledger.trials[1].rungs, ledger.late) == (ended.state, ended.rungs, 1)


def test_what_was_late_says_what_it_was(ledger, path, trial):
    happen(ledger, 1, "lost")
    outcome(ledger, "result", trial.lease)
    with closing(sqlite3.connect(path)) as connection:
        found = connection.execute("SELECT trial, rung, body, lease FROM events WHERE kind = 'late'").fetchall()
    assert found == [(1, None, '{"flops":95,"kind":"result","lease":1,"seconds":1}', None)]


def test_a_trial_that_was_never_launched_has_no_lease_to_show(ledger):
    propose(ledger)
    assert ledger.fail(1, "crashed", lease=1) is None
    assert ledger.trials[1].state == "proposed"


def test_a_rung_that_was_told_is_not_told_again_by_the_next_launch(ledger, trial):
    happen(ledger, 1, "result", "start")
    assert tell(ledger, 1, 0, lease=ledger.trials[1].lease) is None
    assert (ledger.seq, ledger.late) == (3, 0)


def test_the_database_itself_refuses_two_ends_of_one_launch(ledger, path, trial):
    happen(ledger, 1, "lost")
    with closing(sqlite3.connect(path)) as connection, pytest.raises(sqlite3.IntegrityError, match=r"events\.lease"):
        connection.execute("INSERT INTO events VALUES (3, 1, 'fail', NULL, '{}', 0, 0, 1, '')")


def test_a_launch_over_a_launch_takes_its_lease(ledger, trial):
    second = happen(ledger, 1, "start")
    assert outcome(ledger, "result", trial.lease) is None
    assert outcome(ledger, "result", second.lease).state == "complete"
