"""Repair: how far a condition is from true, and the way from there to a feasible genome."""

from __future__ import annotations

import numpy as np
import pytest

from search_spaces import Space
from search_spaces.expressions import parse
from search_spaces.genome import get
from search_spaces.repair import approach, repaired, shortfall
from search_spaces.space import MAX_TRIES
from search_spaces.tree import lookup_in

VALUES = {"a": 10, "b": 2, "heads": [2, 4, 8], "word": "x", "off": False}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a >= b", 0.0),
        ("a <= b", 8 / 12),
        ("a == b", 8 / 12),
        ("a != 10", 1.0),  # no degrees: the two sides are equal
        ("a <= b and b >= a", 16 / 12),
        ("a <= b or b <= 1", 1 / 3),
        ("a <= b or b <= 2", 0.0),
        ("all(heads <= 4)", (0 + 0 + 4 / 12) / 3),
        ("all(heads <= 8)", 0.0),
        ("any(heads >= 16)", 8 / 24),
        ("any(heads >= 8)", 0.0),
        ("all(heads == heads)", 0.0),
        ("word == 'y'", 1.0),
        ("word in ['x', 'y']", 0.0),
        ("a in [1, 2]", 1.0),
        ("not (a > b)", 1.0),
        ("off", 1.0),
        ("a <= -10", 1.0),
        ("1 / (b - 2) < 3", 1.0),  # no value at all
        ("missing < 3", 1.0),
        ("b == 2 or 1 / (b - 2) < 3", 0.0),  # the right side is not looked at
        ("heads >= 2", 1.0),  # a list of truths is none
    ],
)
def test_a_shortfall_grows_with_what_is_missing(text: str, expected: float) -> None:
    assert shortfall(parse(text), lookup_in(VALUES)) == pytest.approx(expected)


SPACES = {
    "a cost": Space.from_dict(
        {"d": {"int": [64, 4096], "step": 64}, "n": {"int": [2, 96]}}, ["d * d * n * 12 <= 3M"], exact={}
    ),
    "equal numbers": Space.from_dict({"a": {"int": [1, 1000]}, "b": {"int": [1, 1000]}}, ["a == b"]),
    "a narrow mix": Space.from_dict(
        {"mix": {"simplex": [f"d{i}" for i in range(20)]}}, ["mix.d0 >= 0.6", "mix.d1 >= 0.2"]
    ),
    "every layer": Space.from_dict(
        {"n": {"int": [12, 24]}, "heads": {"list": {"choice": [1, 2, 4, 8, 16]}, "length": "n"}}, ["all(heads >= 8)"]
    ),
    "a sum over layers": Space.from_dict({"w": {"list": {"int": [1, 512]}, "length": 24}}, ["sum(w) <= 200"]),
    "a sleeping gene": Space.from_dict(
        {
            "kind": {"choice": ["a", "b", "c", "d", "e", "f", "g", "h"]},
            "x": {"float": [0, 1], "when": "kind == 'h'", "default": 0.5},
        },
        ["kind == 'h'", "x >= 0.999"],
    ),
}


@pytest.mark.parametrize("space", SPACES.values(), ids=SPACES)
@pytest.mark.parametrize("seed", range(5))
def test_a_genome_is_found_where_next_to_nothing_is_feasible(space: Space, seed: int) -> None:
    rng = np.random.default_rng(seed)
    genome = space.sample(rng)
    assert space.violations(genome) == []
    space.validate(genome)
    child = space.mutate(genome, rng)
    assert child != genome and space.violations(child) == []


@pytest.mark.parametrize("space", SPACES.values(), ids=SPACES)
def test_what_is_repaired_is_legal_and_feasible(space: Space) -> None:
    rng = np.random.default_rng(0)
    drawn = [space.fill(lambda gene: gene.sample(rng)) for _ in range(20)]
    mended = [genome for genome in (repaired(space, one, rng) for one in drawn) if genome is not None]
    assert mended
    for genome in mended:
        space.validate(genome)


def test_a_feasible_genome_stays_as_it_is() -> None:
    space = SPACES["a cost"]
    genome = space.sample(np.random.default_rng(0))
    assert repaired(space, genome, np.random.default_rng(1)) == genome


def test_where_there_is_no_way_the_nearest_genome_is_told() -> None:
    space = Space.from_dict({"d": {"int": [64, 512], "step": 64}}, ["d <= 10"])
    near, left = approach(space, space.baseline, np.random.default_rng(0))
    assert get(near.values(), ("d",)) == 64 and left == pytest.approx(54 / 74)
    assert repaired(space, space.baseline, np.random.default_rng(0)) is None


def test_genes_that_no_constraint_reads_keep_their_distribution_where_draws_are_feasible() -> None:
    """Half of the draws are feasible: nothing is repaired, and the other gene is as it was."""
    from scipy.stats import kstest

    space = Space.from_dict({"x": {"float": [1e-4, 1], "log": True}, "y": {"float": [0, 1]}}, ["y <= 0.5"])
    rng = np.random.default_rng(3)
    drawn = [space.sample(rng).values() for _ in range(2000)]
    assert kstest([np.log10(one["x"]) / 4 + 1 for one in drawn], "uniform").pvalue > 0.01
    assert kstest([one["y"] * 2 for one in drawn], "uniform").pvalue > 0.01


def test_an_empty_space_still_ends() -> None:
    from search_spaces.errors import SpaceError

    space = Space.from_dict({"d": {"int": [64, 512]}, "e": {"float": [0, 1]}}, ["d + e <= 10"])
    with pytest.raises(SpaceError, match=f"no feasible genome in {MAX_TRIES} draws; `d \\+ e <= 10` rejected"):
        space.sample(np.random.default_rng(0))
