"""Guards the five kinds of gene: what each allows, how it is drawn and varied, and its place in the unit cube.

The first part holds for every kind; the parts below are about one kind each.
"""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from search_spaces.errors import Problems
from search_spaces.genes.numbers import reflect, rounded
from search_spaces.genome import canonical_json
from search_spaces.reading import read_gene
from search_spaces.space import lookup_in

properties = settings(deadline=None, derandomize=True, max_examples=25)


def gene(spec, path=("train", "x")):
    """A gene as it is written in a space, its length filled in."""
    problems = Problems()
    made = read_gene(spec, path, problems)
    problems.raise_if_any()
    return made


def generator(seed=0):
    return np.random.default_rng(seed)


def draws(spec, count):
    made, rng = gene(spec), generator()
    return [made.sample(rng) for _ in range(count)]


def same(one, other):
    """Whether two values are one: `1`, `1.0` and `true` are three."""
    return canonical_json(one) == canonical_json(other)


def off(sample, distribution):
    """The Kolmogorov-Smirnov distance to a distribution function, as a multiple of its 0.1 % critical value."""
    values = distribution(np.sort(np.asarray(sample, dtype=float)))
    n = len(values)
    gap = max(np.max(np.arange(1, n + 1) / n - values), np.max(values - np.arange(n) / n))
    return gap / (1.95 / math.sqrt(n))


def unevenness(counts):
    """Pearson's chi-square against equal counts, as a multiple of its 0.1 % critical value (Wilson and Hilferty)."""
    counts = np.asarray(counts)
    expected, freedom = counts.sum() / len(counts), len(counts) - 1
    critical = freedom * (1 - 2 / (9 * freedom) + 3.09 * math.sqrt(2 / (9 * freedom))) ** 3
    return ((counts - expected) ** 2 / expected).sum() / critical


# --- what holds for every kind ----------------------------------------------------------------------------------------

GENES = {
    "float": {"float": [-2.0, 3.0]},
    "float of one value": {"float": [0.5, 0.5]},
    "float in steps": {"float": [0.1, 0.9], "step": 0.2},
    "float with a logarithm": {"float": [1e-5, 1e-1], "log": True},
    "float with a logarithm in steps": {"float": [1.0, 100.0], "log": True, "step": 0.5},
    "int": {"int": [-5, 12]},
    "int of one value": {"int": [7, 7]},
    "int in steps": {"int": [128, 512], "step": 64},
    "int in steps that miss the upper bound": {"int": [1, 10], "step": 4},
    "int with a logarithm": {"int": [1, 4096], "log": True},
    "choice": {"choice": ["swiglu", "relu2", None, 1, 1.0, True, [1, 2], {"kind": "moe", "experts": 4}]},
    "choice of one": {"choice": ["adamw"]},
    "choice in order": {"choice": [2, 4, 8, 16], "ordered": True},
    "simplex": {"simplex": {"web": 0.6, "code": 0.3, "books": 0.1}},
    "simplex of one": {"simplex": {"web": 1}},
    "simplex with bounds": {
        "simplex": ["a", "b", "c", "d"],
        "floor": {"a": 0.1, "b": 0.05},
        "ceiling": {"a": 0.4, "d": 0.25},
    },
    "list of choices": {"list": {"choice": [2, 4, 8]}, "length": 5},
    "list of floats": {"list": {"float": [1e-3, 1.0], "log": True}, "length": 3},
    "list of simplices": {"list": {"simplex": ["a", "b"], "floor": 0.1}, "length": 2},
    "list of one": {"list": {"int": [1, 9]}, "length": 1},
}

every_kind = pytest.mark.parametrize("spec", GENES.values(), ids=GENES)
seeds = st.integers(0, 2**32 - 1)


@every_kind
@properties
@given(seed=seeds)
def test_what_is_drawn_is_legal(spec, seed):
    made = gene(spec)
    assert made.problem(made.sample(generator(seed))) is None


@every_kind
@properties
@given(seed=seeds)
def test_what_is_mutated_is_legal_and_different(spec, seed):
    made, rng = gene(spec), generator(seed)
    value = made.sample(rng)
    mutated = made.mutate(value, rng)
    assert made.problem(mutated) is None
    assert same(mutated, value) == (made.cardinality == 1)


@every_kind
@properties
@given(seed=seeds)
def test_what_is_crossed_is_legal(spec, seed):
    made, rng = gene(spec), generator(seed)
    assert made.problem(made.cross(made.sample(rng), made.sample(rng), rng)) is None


@every_kind
@properties
@given(seed=seeds)
def test_a_value_crossed_with_itself_stays(spec, seed):
    made, rng = gene(spec), generator(seed)
    value = made.sample(rng)
    assert same(made.cross(value, value, rng), value)


@every_kind
@properties
@given(seed=seeds)
def test_neighbours_are_legal_and_different(spec, seed):
    made = gene(spec)
    value = made.sample(generator(seed))
    near = made.neighbours(value)
    assert bool(near) == (made.cardinality > 1)
    for neighbour in near:
        assert made.problem(neighbour) is None
        assert not same(neighbour, value)


@every_kind
@properties
@given(seed=seeds)
def test_a_code_is_width_numbers_in_the_unit_interval_and_leads_back(spec, seed):
    made = gene(spec)
    value = made.sample(generator(seed))
    code = made.encode(value)
    assert len(code) == made.width
    assert all(0 <= unit <= 1 for unit in code)
    assert same(made.decode(code), value)


@every_kind
@properties
@given(seed=seeds)
def test_any_point_of_the_unit_cube_is_a_legal_value(spec, seed):
    made = gene(spec)
    assert made.problem(made.decode(generator(seed).random(made.width))) is None


@every_kind
@properties
@given(seed=seeds)
def test_distance_is_between_0_and_1_and_the_same_both_ways(spec, seed):
    made, rng = gene(spec), generator(seed)
    one, other = made.sample(rng), made.sample(rng)
    assert 0 <= made.distance(one, other) <= 1
    assert made.distance(one, other) == made.distance(other, one)
    assert same(one, other) == (made.distance(one, other) == 0)


@every_kind
def test_the_same_seed_gives_the_same_values(spec):
    assert draws(spec, 20) == draws(spec, 20)


@every_kind
def test_the_baseline_is_legal(spec):
    made = gene(spec)
    assert made.problem(made.fit(made.baseline, None)) is None


@every_kind
def test_a_value_survives_a_round_trip_through_json(spec):
    made = gene(spec)
    value = made.sample(generator())
    again = json.loads(json.dumps(value))
    assert same(again, value)
    assert made.problem(again) is None


@every_kind
def test_a_description_is_json(spec):
    described = gene(spec).describe()
    assert json.loads(json.dumps(described)) == described


# --- what is not legal, in words --------------------------------------------------------------------------------------

MIX = {"simplex": ["web", "code"], "floor": 0.1, "ceiling": {"web": 0.8}}


@pytest.mark.parametrize(
    ("spec", "value", "words"),
    [
        ({"float": [0.0, 1.0]}, 1.5, "must lie in [0, 1], is 1.5"),
        ({"float": [0.0, 1.0]}, math.inf, "must lie in [0, 1], is inf"),
        ({"float": [0.0, 1.0]}, "high", 'must be a number, is "high"'),
        ({"float": [0.0, 1.0]}, True, "must be a number, is true"),
        ({"float": [0.0, 1.0]}, None, "must be a number, is null"),
        ({"float": [0.5, 1.5], "step": 0.25}, 0.6, "must be 0.5 plus a multiple of 0.25, is 0.6"),
        ({"int": [1, 9]}, 10, "must lie in [1, 9], is 10"),
        ({"int": [1, 9]}, 2.5, "must be a whole number, is 2.5"),
        ({"int": [1, 9]}, [2], "must be a number, is [2]"),
        ({"int": [128, 512], "step": 64}, 200, "must be 128 plus a multiple of 64, is 200"),
        ({"choice": ["adamw", "muon"]}, "sgd", 'must be one of ["adamw", "muon"], is "sgd"'),
        ({"choice": [1, 2]}, 1.0, "must be one of [1, 2], is 1.0"),
        ({"choice": [1, 2]}, True, "must be one of [1, 2], is true"),
        ({"choice": [{"kind": "moe"}]}, {"kind": "relu2"}, 'must be one of [{"kind": "moe"}], is {"kind": "relu2"}'),
        (MIX, {"web": 1.0}, 'must give a weight to each of web, code, is {"web": 1.0}'),
        (MIX, [0.5, 0.5], "must give a weight to each of web, code, is [0.5, 0.5]"),
        (MIX, {"web": 0.95, "code": 0.05}, "weight of web must lie in [0.1, 0.8], is 0.95"),
        (MIX, {"web": 0.5, "code": "0.5"}, 'weight of code must lie in [0.1, 1], is "0.5"'),
        (MIX, {"web": 0.5, "code": 0.4}, "weights must sum to 1, sum to 0.9"),
        ({"list": {"int": [1, 9]}, "length": 2}, 3, "must be a list, is 3"),
        ({"list": {"int": [1, 9]}, "length": 2}, [1], "must have 2 items, has 1"),
        ({"list": {"int": [1, 9]}, "length": 2}, [1, 10], "item 1 must lie in [1, 9], is 10"),
    ],
)
def test_an_illegal_value_is_told_in_words(spec, value, words):
    assert gene(spec).problem(value) == words


def test_a_number_given_by_hand_may_have_more_digits_than_one_that_is_drawn():
    assert gene({"float": [0.0, 1.0]}).problem(0.123456789012) is None


# --- numbers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "baseline"),
    [
        ({"float": [1.0, 3.0]}, 2.0),
        ({"float": [1e-4, 1e-2], "log": True}, 1e-3),
        ({"float": [0.0, 1.0], "baseline": 0.25}, 0.25),
        ({"int": [0, 10]}, 5),
        ({"int": [128, 512], "step": 64}, 320),
        ({"int": [1, 1024], "log": True}, 32),
        ({"int": [0, 10], "baseline": 9}, 9),
    ],
)
def test_the_baseline_of_a_number_is_the_middle_of_its_scale(spec, baseline):
    assert gene(spec).baseline == baseline


@pytest.mark.parametrize(
    ("spec", "bounds"),
    [
        ({"float": [0.25, 0.75]}, [0.25, 0.75]),
        ({"float": [1e-4, 1e-2], "log": True}, [1e-4, 1e-2]),
        ({"float": [0.1, 0.9], "step": 0.2}, [0.1, 0.9]),
        ({"int": [3, 9]}, [3, 9]),
        ({"int": [1, 10], "step": 4}, [1, 9]),
        ({"int": [1, 4096], "log": True}, [1, 4096]),
    ],
)
def test_the_ends_of_the_unit_interval_are_the_bounds(spec, bounds):
    made = gene(spec)
    assert [made.decode([0.0]), made.decode([1.0])] == bounds


@pytest.mark.parametrize("beyond", [-3.0, 1.5, 1e9])
def test_codes_beyond_the_unit_interval_are_cut(beyond):
    assert gene({"int": [3, 9]}).decode([beyond]) == (3 if beyond < 0 else 9)


def test_steps_count_from_the_lower_bound():
    assert sorted(set(draws({"int": [10, 25], "step": 5}, 200))) == [10, 15, 20, 25]
    assert sorted(set(draws({"float": [0.1, 0.75], "step": 0.3}, 200))) == [0.1, 0.4, 0.7]


def test_ints_are_ints_and_floats_are_floats():
    assert {type(value) for value in draws({"int": [1, 1000], "log": True}, 50)} == {int}
    assert {type(value) for value in draws({"float": [1.0, 1000.0]}, 50)} == {float}


@pytest.mark.parametrize(
    ("spec", "count"),
    [
        ({"int": [1, 10]}, 10),
        ({"int": [1, 10], "step": 4}, 3),
        ({"float": [0.1, 0.9], "step": 0.2}, 5),
        ({"float": [0.0, 1.0]}, math.inf),
        ({"float": [1.0, 1.0]}, 1),
        ({"choice": [1, 2, 3]}, 3),
        ({"simplex": ["a", "b"]}, math.inf),
        ({"simplex": ["a"]}, 1),
        ({"list": {"choice": [1, 2, 3]}, "length": 4}, 81),
    ],
)
def test_cardinality_counts_the_values(spec, count):
    assert gene(spec).cardinality == count


def test_floats_are_drawn_evenly():
    assert off(draws({"float": [-2.0, 3.0]}, 4000), lambda x: (x + 2) / 5) < 1


def test_logarithmic_floats_are_drawn_evenly_in_the_logarithm():
    assert off(draws({"float": [1e-5, 1e-1], "log": True}, 4000), lambda x: (np.log10(x) + 5) / 4) < 1


def test_ints_are_drawn_evenly():
    counts = np.bincount(draws({"int": [0, 19]}, 8000))
    assert len(counts) == 20
    assert unevenness(counts) < 1


def test_steps_are_drawn_evenly_the_ends_included():
    _, counts = np.unique(draws({"int": [128, 512], "step": 64}, 7000), return_counts=True)
    assert len(counts) == 7
    assert unevenness(counts) < 1


def test_logarithmic_ints_are_drawn_evenly_in_the_logarithm():
    assert off(draws({"int": [1000, 100_000], "log": True}, 4000), lambda x: (np.log10(x) - 3) / 2) < 1


def test_these_measures_notice_a_wrong_distribution():
    assert off(draws({"float": [0.0, 1.0]}, 4000), lambda x: x**1.1) > 1
    assert unevenness([500, 500, 500, 600]) > 0.7 > unevenness([500, 505, 495, 510])


def test_a_mutation_stays_near():
    made, rng = gene({"float": [1e-4, 1e-2], "log": True}), generator()
    moves = [abs(made.encode(made.mutate(1e-3, rng))[0] - 0.5) for _ in range(2000)]
    assert 0.1 < np.mean(moves) < 0.14  # 0.15 * sqrt(2 / pi) = 0.12
    assert made.problem(made.mutate(1e-4, rng)) is None


def test_a_child_of_two_numbers_lies_between_them():
    made, rng = gene({"int": [1, 10_000], "log": True}), generator()
    children = {made.cross(10, 1000, rng) for _ in range(200)}
    assert {10, 1000} < children
    assert min(children) == 10
    assert max(children) == 1000


@pytest.mark.parametrize(
    ("spec", "value", "near"),
    [
        ({"int": [1, 9]}, 5, [4, 6]),
        ({"int": [1, 9]}, 1, [2]),
        ({"int": [128, 512], "step": 64}, 512, [448]),
        ({"float": [0.0, 1.0], "step": 0.25}, 0.5, [0.25, 0.75]),
        ({"float": [0.0, 1.0]}, 0.5, [0.4, 0.6]),
        ({"float": [1e-5, 1e5], "log": True}, 1.0, [0.1, 10.0]),
    ],
)
def test_the_neighbours_of_a_number_are_a_step_or_a_tenth_of_the_scale_away(spec, value, near):
    assert gene(spec).neighbours(value) == near


@pytest.mark.parametrize(
    ("unit", "folded"), [(0.3, 0.3), (-0.2, 0.2), (1.25, 0.75), (2.5, 0.5), (-1.5, 0.5), (0.0, 0.0), (1.0, 1.0)]
)
def test_reflection_folds_into_the_unit_interval(unit, folded):
    assert reflect(unit) == pytest.approx(folded)


@pytest.mark.parametrize(("value", "short"), [(1 / 3, 0.333333), (123456789.0, 123457000.0), (1e-12, 1e-12)])
def test_floats_are_kept_to_six_digits(value, short):
    assert rounded(value) == short


# --- choices ----------------------------------------------------------------------------------------------------------


def test_the_baseline_of_a_choice_is_its_first_item():
    assert gene({"choice": ["adamw", "muon"]}).baseline == "adamw"


def test_items_are_drawn_evenly():
    _, counts = np.unique(draws({"choice": list("abcdef")}, 6000), return_counts=True)
    assert unevenness(counts) < 1


def test_items_are_told_apart_by_their_spelling():
    made = gene({"choice": [1, 1.0, True, "1"]})
    assert [made.index(value) for value in (1, 1.0, True, "1")] == [0, 1, 2, 3]


def test_a_group_of_settings_is_one_item_whatever_the_order_of_its_keys():
    made = gene({"choice": [{"a": 1, "b": 2}, {"a": 3, "b": 4}]})
    assert made.index({"b": 4, "a": 3}) == 1


def test_without_order_every_other_item_is_a_neighbour():
    assert gene({"choice": ["a", "b", "c"]}).neighbours("b") == ["a", "c"]


def test_in_order_only_the_next_items_are():
    made = gene({"choice": [2, 4, 8, 16], "ordered": True})
    assert [made.neighbours(value) for value in (2, 8)] == [[4], [4, 16]]


def test_without_order_a_choice_is_one_number_an_item():
    made = gene({"choice": ["a", "b", "c"]})
    assert made.encode("b") == [0.0, 1.0, 0.0]
    assert made.decode([0.2, 0.1, 0.7]) == "c"
    assert made.distance("a", "c") == 1


def test_in_order_it_is_a_single_number():
    made = gene({"choice": [2, 4, 8], "ordered": True})
    assert [made.encode(value) for value in (2, 4, 8)] == [[0.0], [0.5], [1.0]]
    assert made.decode([0.3]) == 4
    assert made.distance(2, 4) == 0.5


# --- simplices --------------------------------------------------------------------------------------------------------


def test_the_weights_given_are_the_baseline():
    assert gene({"simplex": {"web": 6, "code": 2, "books": 2}}).baseline == {"web": 0.6, "code": 0.2, "books": 0.2}


def test_names_alone_weigh_the_same():
    assert gene({"simplex": ["a", "b", "c", "d"]}).baseline == {"a": 0.25, "b": 0.25, "c": 0.25, "d": 0.25}


def test_distance_is_the_share_that_has_to_come_from_elsewhere():
    made = gene({"simplex": ["a", "b", "c", "d"]})
    one, other = {"a": 0.5, "b": 0.3, "c": 0.2, "d": 0.0}, {"a": 0.3, "b": 0.2, "c": 0.3, "d": 0.2}
    assert made.distance(one, other) == pytest.approx(0.3)


def test_a_child_of_two_mixes_lies_on_the_line_between_them():
    made, rng = gene({"simplex": ["a", "b"]}), generator()
    shares = [made.cross({"a": 0.2, "b": 0.8}, {"a": 0.6, "b": 0.4}, rng)["a"] for _ in range(200)]
    assert 0.2 <= min(shares) < 0.25 < 0.55 < max(shares) <= 0.6


def test_a_neighbour_has_a_quarter_more_or_a_fifth_less_of_one_part():
    near = gene({"simplex": {"a": 0.5, "b": 0.5}}).neighbours({"a": 0.5, "b": 0.5})
    assert [round(mix["a"] / mix["b"], 3) for mix in near] == [0.8, 1.25]


# --- lists ------------------------------------------------------------------------------------------------------------

HEADS = {"list": {"choice": [2, 4, 8], "baseline": 4, "ordered": True}, "length": "n_layers"}


def heads(length):
    return replace(gene(HEADS), longest=16).sized(lookup_in({"n_layers": length}))


def test_a_list_takes_its_length_from_the_genome():
    assert len(heads(3).sample(generator())) == 3
    assert len(heads(7).sample(generator())) == 7


@pytest.mark.parametrize(
    ("given_baseline", "values"),
    [
        ({}, [4, 4, 4]),
        ({"baseline": 8}, [8, 8, 8]),
        ({"baseline": [2, 4, 8]}, [2, 4, 8]),
        ({"baseline": [2, 8]}, [2, 8, 8]),
    ],
)
def test_a_baseline_is_repeated_to_the_length(given_baseline, values):
    made = gene({"list": {"choice": [2, 4, 8], "baseline": 4}, "length": 3, **given_baseline})
    assert made.fit(made.baseline, None) == values


def test_a_list_that_shrinks_keeps_its_first_items():
    assert heads(2).fit([8, 2, 4], generator()) == [8, 2]


def test_a_list_that_grows_keeps_what_it_has_and_draws_the_rest():
    grown = {tuple(heads(5).fit([8, 2, 4], generator(seed))) for seed in range(50)}
    assert {items[:3] for items in grown} == {(8, 2, 4)}
    assert len({items[3:] for items in grown}) == 9


def test_without_a_generator_it_repeats_the_last():
    assert heads(5).fit([8, 2, 4], None) == [8, 2, 4, 4, 4]


def test_a_mutation_changes_at_least_one_position_and_on_average_two():
    made, rng = heads(10), generator()
    changes = [sum(item != 4 for item in made.mutate([4] * 10, rng)) for _ in range(500)]
    assert min(changes) == 1
    assert 1.7 < np.mean(changes) < 2.1


def test_lists_are_crossed_position_by_position():
    rng = generator()
    children = {tuple(heads(3).cross([2, 2, 2], [8, 8, 8], rng)) for _ in range(200)}
    assert len(children) == 8


def test_neighbours_of_a_list_differ_in_one_position():
    assert heads(2).neighbours([2, 8]) == [[4, 8], [2, 4]]


def test_positions_that_only_one_list_has_count_as_different():
    assert heads(4).distance([2, 4], [2, 4, 8, 8]) == 0.5


def test_positions_beyond_the_length_carry_the_code_of_the_baseline():
    longest = gene({"list": {"choice": [2, 4, 8], "baseline": 4, "ordered": True}, "length": 4})
    assert longest.encode([8, 2]) == [1.0, 0.0, 0.5, 0.5]


def test_items_of_a_list_are_drawn_evenly_and_independently():
    pairs = [tuple(pair) for pair in draws({"list": {"choice": [1, 2, 3]}, "length": 2}, 9000)]
    _, counts = np.unique(pairs, axis=0, return_counts=True)
    assert len(counts) == 9
    assert unevenness(counts) < 1
