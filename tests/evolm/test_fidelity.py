"""Rungs: how a ladder is read, and who is promoted."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from evolm.algorithms.fidelity import Fidelity, next_promotion, read_fidelity
from evolm.errors import UsageError
from fitness.objectives import read_objectives
from fitness.trial import Rung, Trial
from search_spaces import Genome


@pytest.mark.parametrize(
    ("given", "rungs"),
    [
        ({"tokens": [2_000_000, 32_000_000], "eta": 4}, (2_000_000, 8_000_000, 32_000_000)),
        ({"tokens": [100_000, 400_000]}, (100_000, 400_000)),
        ({"tokens": [1e6, 10e6], "eta": 4}, (1_000_000, 2_500_000, 10_000_000)),
        ({"tokens": [1, 2, 7]}, (1, 2, 7)),
        ({"tokens": 5_000}, (5_000,)),
        ({"tokens": [64, 65]}, (64, 65)),
    ],
)
def test_a_ladder_grows_by_eta_up_to_its_last_rung(given: dict[str, Any], rungs: tuple[int, ...]) -> None:
    fidelity = read_fidelity(given)
    assert fidelity is not None and fidelity.rungs == rungs


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"tokens": [4, 1]}, r"fidelity\.tokens: must grow from rung to rung, is \[4, 1\]"),
        ({"tokens": []}, "must grow from rung to rung"),
        ({"tokens": ["many"]}, "must be numbers of tokens"),
        ({"tokens": [0, 4]}, "must be numbers of tokens"),
        ({}, "must be numbers of tokens, is None"),
        ({"tokens": [1, 4], "eta": 1}, r"fidelity\.eta: must be a whole number of at least 2, is 1"),
        ({"tokens": [1, 4], "eta": True}, "must be a whole number"),
    ],
)
def test_a_ladder_that_is_none_is_refused(given: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        read_fidelity(given)


def trial(number: int, losses: list[float], state: Any = "paused", **metrics: float) -> Trial:
    def rung(index: int, values: Mapping[str, float]) -> Rung:
        return Rung(rung=index, tokens=1, metrics=values, flops=0, seconds=0, seq=number)

    rungs = tuple(rung(i, {"loss": value, **metrics}) for i, value in enumerate(losses))
    return Trial(id=number, frozen=Genome.of({"n": number}), state=state, rungs=rungs)


LOSS = read_objectives(["loss"])
LADDER = Fidelity((1, 4, 16), eta=2)


def test_nobody_goes_on_before_there_are_eta_to_choose_from() -> None:
    assert next_promotion([trial(1, [1.0])], LADDER, LOSS) is None


def test_the_best_of_a_rung_goes_on() -> None:
    waiting = [trial(1, [3.0]), trial(2, [1.0]), trial(3, [2.0]), trial(4, [4.0])]
    promoted = next_promotion(waiting, LADDER, LOSS)
    assert promoted is not None and promoted.id == 2


def test_who_went_on_before_still_counts_among_the_best() -> None:
    trials = [trial(1, [1.0, 1.0]), trial(2, [2.0]), trial(3, [3.0])]
    assert next_promotion(trials, LADDER, LOSS) is None  # one of three may go on, and has


def test_higher_rungs_come_first() -> None:
    trials = [trial(1, [1.0, 5.0]), trial(2, [2.0, 4.0]), trial(3, [0.5]), trial(4, [3.0])]
    promoted = next_promotion(trials, LADDER, LOSS)
    assert promoted is not None and (promoted.id, promoted.rung) == (2, 1)


def test_running_and_failed_trials_do_not_go_on() -> None:
    trials = [trial(1, [1.0], "running"), trial(2, [1.5], "failed"), trial(3, [2.0]), trial(4, [3.0])]
    assert next_promotion(trials, LADDER, LOSS) is None  # one of the three that count may: the one that runs again


def test_the_baseline_goes_on_whatever_its_rank() -> None:
    trials = [trial(1, [9.0]), trial(2, [1.0])]
    promoted = next_promotion(trials, LADDER, LOSS, always=1)
    assert promoted is not None and promoted.id == 1


def test_the_top_rung_is_the_end() -> None:
    trials = [trial(n, [1.0, 1.0, 1.0], "complete") for n in range(8)]
    assert next_promotion(trials, LADDER, LOSS) is None


def test_no_more_than_one_of_eta_goes_on_whatever_comes_later() -> None:
    """Each later trial is better than all before: plain asynchronous halving would send every one of them on."""
    trials: list[Trial] = []
    for number in range(1, 17):
        trials.append(trial(number, [100.0 - number]))
        promoted = next_promotion(trials, LADDER, LOSS)
        if promoted is not None:
            trials[promoted.id - 1] = trial(promoted.id, [*(rung.metrics["loss"] for rung in promoted.rungs), 1.0])
    assert sum(one.rung >= 1 for one in trials) == 8


SIZED = read_objectives(["loss", "size"])


def test_the_trial_that_is_good_at_both_goes_on_first() -> None:
    trials = [
        trial(1, [9.0], size=1.0),
        trial(2, [1.0], size=9.0),
        trial(3, [2.0], size=2.0),
        trial(4, [9.5], size=9.5),
    ]
    first = next_promotion(trials, LADDER, SIZED)
    assert first is not None and first.id == 3


def test_what_goes_on_next_is_unlike_what_went_on_before() -> None:
    trials = [
        trial(1, [3.0, 3.0], size=3.0),
        trial(2, [2.9], size=3.1),  # its twin
        trial(3, [1.0], size=6.0),  # another part of the front
        trial(4, [9.0], size=9.0),
    ]
    second = next_promotion(trials, LADDER, SIZED)
    assert second is not None and second.id == 3


def test_an_outlier_does_not_hide_the_differences_of_the_others() -> None:
    trials = [
        trial(1, [1e9], size=1.0),
        trial(2, [1.2], size=5.0),
        trial(3, [1.1], size=5.0),
        trial(4, [1.3], size=9.0),
    ]
    first = next_promotion(trials, Fidelity((1, 4), eta=4), SIZED)
    assert first is not None and first.id == 3
