"""The contract that every algorithm keeps, on every kind of space."""

from __future__ import annotations

import math
from typing import Any

import pytest

from evolm import Search, SpaceExhausted
from evolm.algorithms import BUILT_IN, load_algorithm, names
from evolm.errors import UsageError
from search_spaces import Space

EVERYTHING: dict[str, Any] = {
    "data": {"mix": {"simplex": {"web": 0.5, "code": 0.3, "books": 0.2}, "floor": 0.05}},
    "model": {
        "width": {"int": [64, 512], "step": 64, "baseline": 192},
        "layers": {"int": [1, 6]},
        "heads": {"list": {"choice": [2, 4, 8]}, "length": "model.layers"},
        "ffn": {"choice": ["swiglu", "gelu", "moe"]},
        "experts": {"choice": [4, 8], "when": "model.ffn == 'moe'", "default": 0},
        "inner": {"expr": "round_to(8 / 3 * model.width, 64)"},
    },
    "train": {"rate": {"float": [1e-4, 1e-2], "log": True}, "batch": {"choice": [1, 2, 4], "ordered": True}},
}
CONSTRAINTS = ["model.width * model.layers <= 1024", "data.mix.web <= 0.9"]


def loss(genome: dict[str, Any]) -> float:
    """Cheap, smooth in some genes and rough in others."""
    model, train = genome["model"], genome["train"]
    rough = {"swiglu": 0.0, "gelu": 0.2, "moe": 0.1}[model["ffn"]]
    return abs(genome["data"]["mix"]["web"] - 0.6) + 100 / model["width"] + rough + abs(train["rate"] - 3e-3) * 50


def size(genome: dict[str, Any]) -> float:
    """Costs compare by their logarithm."""
    return math.log(genome["model"]["width"] ** 2 * genome["model"]["layers"])


def searched(name: str, trials: int = 40, seed: int = 0, **options: Any) -> Search:
    space = Space.from_dict(EVERYTHING, CONSTRAINTS)
    search = Search(space, {"loss": "min", "size": "min"}, algorithm=name, seed=seed, exact={"size": size}, **options)
    for _ in range(trials):
        asked = search.ask()
        search.tell(asked, {"loss": loss(asked.genome) * (2 - asked.rung / 2)})
    return search


class AlgorithmContract:
    """Inherit, and name the algorithm."""

    name: str

    def test_every_proposal_is_legal_and_feasible(self) -> None:
        search = searched(self.name)
        for trial in search.trials():
            search.space.validate(trial.frozen)

    def test_no_genome_is_tried_twice(self) -> None:
        trials = searched(self.name, 60).trials()
        assert len({trial.digest for trial in trials}) == len(trials)

    def test_the_baseline_comes_first(self) -> None:
        search = searched(self.name, 1)
        assert search.trials()[0].frozen == search.space.baseline
        assert search.trials()[0].operator == "baseline"

    def test_same_seed_same_genomes(self) -> None:
        one, other = searched(self.name), searched(self.name)
        assert [trial.digest for trial in one.trials()] == [trial.digest for trial in other.trials()]

    def test_another_seed_other_genomes(self) -> None:
        one, other = searched(self.name, seed=0), searched(self.name, seed=1)
        assert [trial.digest for trial in one.trials()][1:] != [trial.digest for trial in other.trials()][1:]

    def test_what_it_proposes_follows_from_the_ledger(self) -> None:
        search = searched(self.name, fidelity={"tokens": [1e6, 4e6]})
        for trial in search.trials():
            assert search.propose(trial.id, trial.seen).genome == trial.frozen

    def test_results_may_be_told_in_any_order(self) -> None:
        search = Search(Space.from_dict(EVERYTHING, CONSTRAINTS), ["loss"], algorithm=self.name)
        asked = [search.ask() for _ in range(30)]
        for one in reversed(asked):
            search.tell(one, {"loss": loss(one.genome)})
        search.space.validate(search.ask().genome)

    def test_failures_never_reach_the_front(self) -> None:
        search = Search(Space.from_dict(EVERYTHING, CONSTRAINTS), ["loss"], algorithm=self.name)
        for number in range(30):
            asked = search.ask()
            if number % 3:
                search.fail(asked, "diverged")
            else:
                search.tell(asked, {"loss": loss(asked.genome)})
        assert all(trial.state == "complete" for trial in search.front())

    def test_goes_on_when_everything_fails(self) -> None:
        search = Search(Space.from_dict(EVERYTHING, CONSTRAINTS), ["loss"], algorithm=self.name)
        for _ in range(40):
            search.fail(search.ask(), "oom")
        assert search.front() == []

    def test_maximising_is_minimising_the_negative(self) -> None:
        def run(direction: str, sign: float) -> list[str]:
            space = Space.from_dict(EVERYTHING, CONSTRAINTS)
            search = Search(space, {"score": direction}, algorithm=self.name, seed=3)
            for _ in range(30):
                asked = search.ask()
                search.tell(asked, {"score": sign * loss(asked.genome)})
            return [trial.digest for trial in search.trials()]

        assert run("min", 1.0) == run("max", -1.0)

    def test_a_small_space_is_tried_to_the_last_genome(self) -> None:
        space = Space.from_dict({"a": {"choice": [1, 2, 3]}, "b": {"int": [0, 4]}}, ["a + b <= 5"])
        search = Search(space, ["loss"], algorithm=self.name)
        with pytest.raises(SpaceExhausted):
            for _ in range(100):
                asked = search.ask()
                search.tell(asked, {"loss": asked.genome["b"]})
        assert len(search.trials()) == 12

    def test_a_space_of_one_genome(self) -> None:
        search = Search(Space.from_dict({"a": {"int": [3, 3]}, "b": 1}), ["loss"], algorithm=self.name)
        assert search.ask().genome == {"a": 3, "b": 1}
        with pytest.raises(SpaceExhausted):
            search.ask()


class TestRandom(AlgorithmContract):
    name = "random"


class TestNsga2(AlgorithmContract):
    name = "nsga2"

    def test_beats_random_on_a_smooth_problem(self) -> None:
        """Median hypervolume over seeds; a search that learned nothing would tie."""

        def median(name: str) -> float:
            volumes = sorted(searched(name, 80, seed).hypervolume((4.0, 15.0)) for seed in range(9))
            return volumes[4]

        assert median("nsga2") > median("random")

    def test_children_name_their_parents(self) -> None:
        trials = searched(self.name, 60).trials()
        children = [trial for trial in trials if trial.parents]
        assert children and all(parent < child.id for child in children for parent in child.parents)


class TestAuto(AlgorithmContract):
    name = "auto"


def test_every_built_in_algorithm_has_its_contract() -> None:
    tested = {cls.name for cls in AlgorithmContract.__subclasses__()}
    assert tested == set(BUILT_IN)


def test_an_unknown_algorithm_is_told_the_nearest() -> None:
    with pytest.raises(UsageError, match="unknown algorithm 'nsga'; did you mean 'nsga2'"):
        load_algorithm("nsga")
    assert set(BUILT_IN) <= set(names())
