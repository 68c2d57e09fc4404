"""What once went wrong, or nearly did: each case is a way in which a space, a value or an expression can be odd."""

import math
import time

import numpy as np
import pytest

from search_spaces import Genome, Space, SpaceError
from search_spaces.errors import Problems
from search_spaces.reading import read_gene
from search_spaces.simplex import project, rounded, snapped
from search_spaces.yaml_source import parse_yaml


def rng(seed=0):
    return np.random.default_rng(seed)


def problems(genes, constraints=()):
    with pytest.raises(SpaceError) as refused:
        Space.from_dict(genes, constraints)
    return [str(problem).splitlines()[0] for problem in refused.value.problems]


# --- values -----------------------------------------------------------------------------------------------------------


def test_a_whole_number_for_a_real_gene_is_one_recipe_however_it_is_written():
    space = Space.from_dict({"x": {"float": [0, 1], "baseline": 1}})
    assert space.complete({"x": 1}) == space.complete({"x": 1.0}) == space.baseline
    assert space.decode([0.0]).values() == {"x": 0.0} and isinstance(space.decode([0.0]).values()["x"], float)


def test_a_real_number_for_a_whole_gene_is_one_recipe_too():
    space = Space.from_dict({"n": {"int": [1e3, 1e4], "baseline": 2e3}})
    assert space.baseline.text == '{"n":2000}'
    assert space.complete({"n": 3e3}).text == '{"n":3000}'


@pytest.mark.parametrize("bounds", [[1_000_000, 1_000_001], [0.1, 0.1000001], [-5, -4.9999999]])
def test_a_narrow_range_has_many_values(bounds):
    space = Space.from_dict({"x": {"float": bounds}})
    generator = rng()
    drawn = {space.sample(generator) for _ in range(100)}
    assert len(drawn) > 90
    for genome in drawn:
        space.validate(genome)
        assert space.decode(space.encode(genome)) == genome


def test_quantities_are_exact_however_many_digits_they_have():
    space = Space.from_dict(parse_yaml("n: {int: [16.1K, 32.2K]}\nm: {int: [8.2M, 8.3M]}", file="x").value)
    assert [(gene.low, gene.high) for gene in space.genes] == [(16_100, 32_200), (8_200_000, 8_300_000)]


def test_whole_numbers_of_a_gene_stay_exact():
    Space.from_dict({"n": {"int": [0, 2**53]}}).sample(rng())
    assert problems({"n": {"int": [0, 2**53 + 1]}}) == ["n.int: whole numbers of a gene end at 2^53"]


def test_every_value_of_a_logarithmic_whole_gene_has_its_share():
    gene = read_gene({"int": [1, 4], "log": True}, ("n",), Problems())
    generator = rng()
    counts = np.bincount([gene.sample(generator) for _ in range(20_000)], minlength=5)[1:] / 20_000
    edges = np.log([0.5, 1.5, 2.5, 3.5, 4.5])
    assert counts == pytest.approx(np.diff(edges) / (edges[-1] - edges[0]), abs=0.02)


def test_what_python_hands_over_is_read_as_json():
    space = Space.from_dict({"a": {"choice": (1, np.float64(2.5))}, "b": {"int": (np.int64(1), 5)}, "c": (1, 2)})
    assert space.baseline.values() == {"a": 1, "b": 3, "c": [1, 2]}


@pytest.mark.parametrize("value", [math.nan, math.inf, object(), b"x", {1, 2}, "\ud800"])
def test_what_json_cannot_carry_is_refused_where_it_stands(value):
    assert problems({"deep": {"list": {"choice": [1, value]}, "length": 2}})[0].startswith(
        "deep.list.choice[1]: must be"
    )


def test_keys_are_text():
    assert problems({1: 2})[0] == "keys must be text, one is 1"


def test_exact_costs_may_be_numpy_numbers():
    space = Space.from_dict({"n": {"int": [1, 5]}}, ["area <= 9"], exact={"area": lambda v: np.int64(v["n"] ** 2)})
    assert space.sample(rng()).values()["n"] <= 3


# --- lists ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("low", [0, -2])
def test_a_list_has_at_least_one_item(low):
    found = problems({"n": {"int": [low, 2]}, "h": {"list": {"choice": [1]}, "length": "n"}})
    assert found == [f"h.length: must lie in [1, 1024], can be {low} to 2"]


@pytest.mark.parametrize("default", [None, 0, "many", 2.5])
def test_a_length_gene_that_sleeps_is_a_length_all_the_same(default):
    genes = {
        "on": {"choice": [True, False]},
        "n": {"int": [1, 4], "when": "on", "default": default},
        "h": {"list": {"choice": [1, 2]}, "length": "n"},
    }
    assert "h.length" in problems(genes)[0]
    genes["n"]["default"] = 6
    space = Space.from_dict(genes)
    asleep = space.complete({"on": False, "n": 6, "h": [1] * 6})
    assert len(space.encode(asleep)) == space.width and space.decode(space.encode(asleep)) == asleep


def test_an_item_of_a_choice_may_be_a_list():
    space = Space.from_dict({"h": {"list": {"choice": [[2, 4], [4, 4]]}, "length": 3}})
    assert space.baseline.values() == {"h": [[2, 4]] * 3}


def test_a_gene_hides_nowhere():
    assert "a gene cannot stand inside a list" in problems({"a": [{"b": {"int": [1, 2]}}]})[0]
    assert "a gene cannot stand inside an item of a choice" in problems({"a": {"choice": [{"b": {"expr": "1"}}]}})[0]


# --- simplexes --------------------------------------------------------------------------------------------------------


def test_names_alone_may_have_any_floor():
    space = Space.from_dict({"mix": {"simplex": ["x", "y", "z"], "floor": {"x": 0.5}}})
    assert space.baseline.values()["mix"]["x"] == 0.5


@pytest.mark.parametrize("parts", [2, 5, 30])
def test_tight_and_crooked_bounds_round_within_themselves(parts):
    generator = rng(parts)
    for _ in range(200):
        floor = snapped(generator.dirichlet(np.ones(parts)) * generator.uniform(0, 0.99))
        ceiling = snapped(np.minimum(1.0, floor + generator.uniform(1e-7, 0.5, parts)))
        if ceiling.sum() < 1:
            continue
        weights = project(generator.dirichlet(np.ones(parts)), floor, ceiling)
        assert weights.sum() == pytest.approx(1.0, abs=1e-12)
        assert np.all(weights >= floor) and np.all(weights <= ceiling)
        assert np.array_equal(rounded(weights, floor, ceiling), weights)


def test_a_simplex_without_freedom_has_one_value():
    space = Space.from_dict({"mix": {"simplex": {"a": 0.3, "b": 0.7}, "floor": {"a": 0.3, "b": 0.7}}})
    assert space.cardinality == 1


# --- expressions in a space -------------------------------------------------------------------------------------------


def test_a_constraint_without_a_value_is_broken_not_fatal():
    space = Space.from_dict({"a": {"int": [1, 5], "baseline": 1}}, ["10 / (a - 3) != 7"])
    drawn = {space.sample(rng(seed)).values()["a"] for seed in range(60)}
    assert drawn == {1, 2, 4, 5}
    assert space.violations(Genome.of({"a": 3})) == [("10 / (a - 3) != 7", "division by zero")]


def test_a_derived_value_without_a_value_is_drawn_again():
    space = Space.from_dict({"a": {"int": [1, 5], "baseline": 1}, "b": {"expr": "6 / (a - 3)"}})
    assert {space.sample(rng(seed)).values()["a"] for seed in range(60)} == {1, 2, 4, 5}


def test_a_violation_names_only_what_the_genome_has():
    genes = {"g": {"choice": [{"a": 1}, {"a": 1, "b": 2}], "baseline": {"a": 1, "b": 2}}}
    space = Space.from_dict(genes, ["len(g) == 2 and g.b > 1"])
    assert space.violations(Genome.of({"g": {"a": 1}})) == [("len(g) == 2 and g.b > 1", 'g = {"a": 1}')]


def test_a_part_of_a_gene_is_named_in_brackets_too():
    space = Space.from_dict({"mix": {"simplex": {"my web": 0.5, "code": 0.5}}}, ['mix["my web"] <= 0.8'])
    assert space.sample(rng()).values()["mix"]["my web"] <= 0.8
    found = problems({"mix": {"simplex": {"my web": 0.5, "code": 0.5}}, "a": 1}, ['b["my web"] > 1'])
    assert found == ["constraints[0]: unknown name 'b.my web'"]


# --- genomes from outside ---------------------------------------------------------------------------------------------


def test_an_empty_mapping_asks_for_nothing():
    space = Space.from_dict({"m": {"a": 2, "x": {"int": [1, 3]}}})
    assert space.complete({}) == space.complete({"m": {}}) == space.baseline


def test_a_sleeping_gene_says_why_it_cannot_be_set():
    space = Space.from_dict({"k": {"choice": ["a", "b"]}, "n": {"int": [4, 8], "when": "k == 'b'", "default": 0}})
    with pytest.raises(SpaceError) as refused:
        space.complete({"k": "a", "n": 5})
    assert str(refused.value) == "n: must be 0 while `k == 'b'` is false, is 5"


def test_an_illegal_value_is_told_once():
    space = Space.from_dict({"k": {"choice": ["b"]}, "n": {"int": [4, 8], "when": "k == 'b'", "default": 0}})
    with pytest.raises(SpaceError) as refused:
        space.complete({"n": 99})
    assert len(refused.value.problems) == 1


def test_a_space_without_genes_cannot_be_varied():
    space = Space.from_dict({"a": 1})
    with pytest.raises(SpaceError, match="no genes"):
        space.mutate(space.baseline, rng())


# --- time and length --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "genes",
    [
        {f"g{i}": {"expr": f"g{i - 1} + 1" if i else "1"} for i in range(15_000)},
        {f"g{i}": {"int": [1, 2], "when": f"missing{i}", "default": 1} for i in range(900)},
        {f"g{i}": {"int": [1, 2], "setp": 1} for i in range(900)},
    ],
)
def test_a_large_space_is_refused_or_read_in_seconds(genes):
    began = time.process_time()
    found = problems(genes)
    assert time.process_time() - began < 3 and len("\n".join(found[:50])) < 20_000


def test_an_error_of_thousands_of_problems_tells_fifty():
    with pytest.raises(SpaceError) as refused:
        Space.from_dict({f"g{i}": {"int": [2, 1]} for i in range(300)})
    text = str(refused.value)
    assert text.endswith("and 250 more problems") and len(text.splitlines()) <= 101


# --- YAML -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    ['a: "\\u202e"', '"a\\u202e": 1', 'a: "\\x00"', '"a\\u200b": 1', '"\\ufeffa": 1', 'a: ["\\u2066x"]'],
)
def test_what_is_refused_as_text_is_refused_as_an_escape(text):
    with pytest.raises(SpaceError, match=r"not allowed|cannot be seen"):
        parse_yaml(text, file="x.yaml")


def test_a_ladder_of_aliases_is_as_deep_as_what_it_builds():
    ladder = "\n".join(["a0: &a0 [x]", *(f"a{i}: &a{i} [*a{i - 1}]" for i in range(1, 400))])
    with pytest.raises(SpaceError, match="nested deeper than 64 levels"):
        parse_yaml(ladder, file="x.yaml")


def test_thousands_of_bad_scalars_are_told_in_part():
    with pytest.raises(SpaceError) as refused:
        parse_yaml("\n".join(f"k{i}: .inf" for i in range(5_000)), file="x.yaml")
    assert len(refused.value.problems) == 50
