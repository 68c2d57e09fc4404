"""Ask and tell: what a user of the Python interface relies on."""

from __future__ import annotations

from pathlib import Path

import pytest

import evolm
from evolm.errors import BadMetrics, UsageError
from fitness.ledger import Ledger
from search_spaces import Space

SPACE = {"x": {"float": [0, 1]}, "n": {"int": [1, 100]}}


def small(**options: object) -> evolm.Search:
    return evolm.Search(Space.from_dict(SPACE), options.pop("objectives", ["loss"]), **options)  # type: ignore[arg-type]


def test_the_readme_loop() -> None:
    search = evolm.Search(evolm.Space.from_dict(SPACE), objectives={"loss": "min"}, seed=0)
    for _ in range(20):
        trial = search.ask()
        search.tell(trial, {"loss": (trial.genome["x"] - 0.3) ** 2})
    assert search.front()[0].metrics["loss"] < 0.05


def test_a_genome_is_a_plain_dict_of_ones_own() -> None:
    search = small()
    asked = search.ask()
    asked.genome["x"] = "changed"
    assert search.trials()[0].genome["x"] == 0.5


def test_exact_objectives_need_not_be_told() -> None:
    search = small(objectives={"loss": "min", "n": "min"}, exact={"n": lambda genome: genome["n"]})
    told = search.tell(search.ask(), {"loss": 1.0})
    assert told.metrics["n"] == told.genome["n"]


def test_parts_become_metrics_of_their_own() -> None:
    search = small()
    told = search.tell(search.ask(), {"loss": 3.2}, parts={"loss": {"web": 3.0, "code": 3.6}})
    assert told.metrics == {"loss": 3.2, "loss/web": 3.0, "loss/code": 3.6}


@pytest.mark.parametrize(
    ("metrics", "words"),
    [
        ({"loss": float("nan")}, "metric 'loss' must be finite, is nan"),
        ({"loss": float("inf")}, "metric 'loss' must be finite, is inf"),
        ({"loss": "low"}, "metric 'loss' must be a number, is 'low'"),
        ({"los": 1.0}, "objective 'loss' is missing from the metrics; did you mean 'los'?"),
    ],
)
def test_what_is_no_metric_is_refused_by_name(metrics: dict[str, float], words: str) -> None:
    search = small()
    asked = search.ask()
    with pytest.raises(BadMetrics) as refused:
        search.tell(asked, metrics)
    assert str(refused.value) == words
    search.tell(asked, {"loss": 1.0})  # the trial is still there to be told


def test_a_trial_is_told_once() -> None:
    search = small()
    asked = search.ask()
    search.tell(asked, {"loss": 1.0})
    with pytest.raises(UsageError, match="trial 1 is complete, not running"):
        search.tell(asked, {"loss": 2.0})
    with pytest.raises(UsageError, match="there is no trial 7"):
        search.tell(7, {"loss": 2.0})


def test_a_trial_that_may_be_retried_is_asked_again() -> None:
    search = small()
    asked = search.ask()
    search.fail(asked, "lost", final=False)
    again = search.ask()
    assert (again.id, again.genome) == (asked.id, asked.genome) and again.lease > asked.lease


def test_rungs_ask_the_same_trial_again() -> None:
    search = small(fidelity={"tokens": [1e6, 4e6]}, algorithm="random")
    asked = [search.ask() for _ in range(8)]
    assert {one.fidelity["tokens"] for one in asked if one.fidelity} == {1_000_000}
    for number, one in enumerate(asked):
        search.tell(one, {"loss": float(number)})
    promoted = [search.ask() for _ in range(3)]
    # The baseline always goes on, and beside it a quarter of the eight.
    assert [(one.id, one.rung) for one in promoted] == [(1, 1), (2, 1), (3, 1)]
    assert (search.ask().id, search.ask().rung) == (9, 0)
    assert promoted[0].fidelity == {"tokens": 4_000_000}


def test_the_front_compares_like_with_like() -> None:
    search = small(objectives={"loss": "min", "n": "min"}, exact={"n": lambda g: g["n"]}, fidelity={"tokens": [1, 4]})
    first = search.ask()
    search.tell(first, {"loss": 5.0})
    assert [trial.id for trial in search.front()] == [1]
    promoted = search.ask()
    search.tell(promoted, {"loss": 4.0})
    search.tell(search.ask(), {"loss": 0.1})  # better, but of a lower rung
    assert [trial.id for trial in search.front()] == [1]


def test_hypervolume_is_in_raw_units_up_to_the_callers_reference() -> None:
    search = small(objectives={"loss": "min", "score": "max"}, algorithm="random")
    for loss, score in ((1.0, 1.0), (2.0, 3.0)):
        search.tell(search.ask(), {"loss": loss, "score": score})
    assert search.hypervolume((3.0, 0.0)) == pytest.approx(1 * 1 + 1 * 3)
    with pytest.raises(UsageError, match="the reference needs 2 numbers, has 1"):
        search.hypervolume((3.0,))


def test_a_closed_search_goes_on_as_if_it_had_never_been_closed(tmp_path: Path) -> None:
    def run(search: evolm.Search, trials: int) -> None:
        for _ in range(trials):
            asked = search.ask()
            search.tell(asked, {"loss": asked.genome["x"]})

    whole = small(seed=5)
    run(whole, 30)
    first = small(seed=5, ledger=Ledger.create(tmp_path / "ledger.db", {}))
    run(first, 13)
    first.ledger.close()
    second = small(seed=5, ledger=Ledger.open(tmp_path / "ledger.db", write=True))
    run(second, 17)
    assert [trial.digest for trial in second.trials()] == [trial.digest for trial in whole.trials()]


def test_objectives_are_read_with_care() -> None:
    with pytest.raises(UsageError, match=r"objectives\.loss: must be min or max, is 'minimize'; did you mean 'min'\?"):
        small(objectives={"loss": "minimize"})
    with pytest.raises(UsageError, match="at least one is needed"):
        small(objectives={})


def test_a_baseline_that_breaks_a_constraint_is_not_tried() -> None:
    space = Space.from_dict(SPACE, ["x > 0.9"])
    search = evolm.Search(space, ["loss"])
    assert search.ask().genome["x"] > 0.9


def test_an_impossible_space_is_refused_in_words() -> None:
    space = Space.from_dict(SPACE, ["x > 2"])
    with pytest.raises(evolm.SpaceExhausted):
        evolm.Search(space, ["loss"]).ask()
