"""Guards the space as a whole: whatever it holds, every genome that comes out of it is legal, feasible and repeatable.

The properties run over random spaces; the examples below them show one rule each.
"""

import json

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from search_spaces import Genome, Space, SpaceError
from search_spaces.distances import Distances
from search_spaces.genome import difference, get

properties = settings(deadline=None, derandomize=True, max_examples=40, suppress_health_check=[HealthCheck.too_slow])

seeds = st.integers(0, 2**32 - 1)


def generator(seed=0):
    return np.random.default_rng(seed)


# --- random spaces ----------------------------------------------------------------------------------------------------


@st.composite
def floats(draw):
    low = draw(st.sampled_from([-3.0, 0.0, 1e-4, 0.1]))
    high = low + draw(st.sampled_from([0.5, 1.0, 10.0]))
    spec = {"float": [low, high]}
    if low > 0 and draw(st.booleans()):
        spec["log"] = True
    elif draw(st.booleans()):
        spec["step"] = (high - low) / draw(st.integers(1, 8))
    return spec


@st.composite
def ints(draw):
    low = draw(st.integers(-10, 300))
    high = low + draw(st.integers(1, 1000))
    spec = {"int": [low, high], "step": draw(st.integers(1, high - low))}
    return spec | ({"log": True} if low > 0 and draw(st.booleans()) else {})


@st.composite
def choices(draw):
    scalars = st.sampled_from(["adamw", "muon", 1, 2.5, True, None, [4, 4], {"ffn": "moe", "experts": 8}])
    items = draw(st.lists(scalars, min_size=1, max_size=5, unique_by=repr))
    return {"choice": items, "ordered": draw(st.booleans())}


@st.composite
def simplices(draw):
    names = ["web", "code", "books", "my corpus"][: draw(st.integers(1, 4))]
    part = draw(st.sampled_from(names))
    spec = {"simplex": names, "floor": draw(st.sampled_from([0, 0.02, 0.2])), "ceiling": {}}
    return spec | ({"ceiling": {part: draw(st.sampled_from([0.6, 0.9]))}} if len(names) > 1 else {})


single = floats() | ints() | choices() | simplices()


@st.composite
def lists(draw):
    item = draw(floats() | ints() | choices())
    return {"list": item, "length": draw(st.integers(1, 4) | st.just("model.n_layers"))}


@st.composite
def spaces(draw):
    """A space with some of everything: all kinds of gene, conditions, lengths, derived values, constraints."""
    layers = draw(st.integers(1, 3))
    model = {
        "n_layers": {"int": [layers, layers + draw(st.integers(0, 4))]},
        "d_model": {"int": [64, 512], "step": 64},
        "ffn": {"choice": ["swiglu", "moe"]},
        "n_experts": draw(single) | {"when": "model.ffn == 'moe'", "default": "none"},
        "ffn_dim": {"expr": "round_to(8 / 3 * model.d_model, 64)"},
        "head_dim": 64,
    }
    model |= {f"layer_{i}": draw(lists()) for i in range(draw(st.integers(0, 2)))}
    train = {f"gene_{i}": draw(single) for i in range(draw(st.integers(0, 4)))}
    possible = [
        "model.d_model <= 448",
        "model.ffn_dim % 64 == 0 and width < 30K",
        "model.ffn == 'moe' or model.d_model > 64",
    ]
    constraints = draw(st.lists(st.sampled_from(possible), unique=True))
    tree = {"model": model, "train": train, "sequence": [128, 512]}
    return Space.from_dict(tree, constraints, exact={"width": lambda values: 3 * values["model"]["d_model"]})


# --- properties -------------------------------------------------------------------------------------------------------


@properties
@given(spaces(), seeds)
def test_what_is_sampled_is_legal_and_feasible(space, seed):
    space.validate(space.sample(generator(seed)))


@properties
@given(spaces(), seeds)
def test_what_is_mutated_is_legal_and_feasible_and_differs_from_its_parent(space, seed):
    rng = generator(seed)
    parent = space.sample(rng)
    child = space.mutate(parent, rng)
    space.validate(child)
    assert child != parent


@properties
@given(spaces(), seeds)
def test_what_is_crossed_is_legal_and_feasible(space, seed):
    rng = generator(seed)
    space.validate(space.cross(space.sample(rng), space.sample(rng), rng))


@properties
@given(spaces(), seeds)
def test_a_genome_crossed_with_itself_stays(space, seed):
    rng = generator(seed)
    genome = space.sample(rng)
    assert space.cross(genome, genome, rng) == genome


@properties
@given(spaces(), seeds)
def test_neighbours_are_feasible_different_and_each_named_once(space, seed):
    genome = space.sample(generator(seed))
    near = space.neighbours(genome)
    for neighbour in near[:10]:
        space.validate(neighbour)
    assert genome not in near
    assert len(set(near)) == len(near)


@properties
@given(spaces(), seeds)
def test_the_same_seed_gives_the_same_genomes(space, seed):
    def family(rng):
        parent = space.sample(rng)
        child = space.mutate(parent, rng)
        return parent, child, space.cross(parent, child, rng)

    assert family(generator(seed)) == family(generator(seed))


@properties
@given(spaces(), seeds)
def test_a_code_lies_in_the_unit_cube_and_leads_back(space, seed):
    genome = space.sample(generator(seed))
    code = space.encode(genome)
    assert code.shape == (space.width,)
    assert np.all((code >= 0) & (code <= 1))
    assert space.decode(code) == genome


@properties
@given(spaces(), seeds)
def test_any_point_of_the_unit_cube_is_a_legal_genome(space, seed):
    genome = space.decode(generator(seed).random(space.width))
    assert space.complete(genome.values()) == genome


@properties
@given(spaces(), seeds)
def test_a_genome_survives_a_round_trip_through_json_in_any_order_of_keys(space, seed):
    genome = space.sample(generator(seed))
    values = json.loads(json.dumps(genome.values()))
    again = Genome.of({key: values[key] for key in reversed(values)})
    space.validate(again)
    assert again.digest == genome.digest


@properties
@given(spaces())
def test_the_baseline_is_legal(space):
    assert space.complete(space.baseline.values()) == space.baseline


@properties
@given(spaces(), seeds)
def test_a_part_of_a_genome_is_completed_from_the_baseline(space, seed):
    train = space.sample(generator(seed)).values()["train"]
    values = space.complete({"train": train} if train else {"sequence": [128, 512]}).values()
    assert values["train"] == train
    assert values["model"] == space.baseline.values()["model"]


@properties
@given(spaces(), seeds)
def test_distance_is_between_0_and_1_and_the_same_both_ways(space, seed):
    rng = generator(seed)
    one, other = space.sample(rng), space.sample(rng)
    assert 0 <= space.distance(one, other) <= 1
    assert space.distance(one, other) == space.distance(other, one)
    assert (space.distance(one, other) == 0) == (one == other)


@properties
@given(spaces(), seeds)
def test_distances_to_many_genomes_are_those_to_each(space, seed):
    rng = generator(seed)
    one, many = space.sample(rng), [space.sample(rng) for _ in range(6)]
    many.append(one)
    assert Distances(space, many).to(one) == pytest.approx([space.distance(one, other) for other in many], abs=1e-12)
    assert Distances(space, many).to(one)[-1] == 0


@properties
@given(spaces(), seeds)
def test_the_difference_to_a_child_names_what_changed(space, seed):
    rng = generator(seed)
    parent = space.sample(rng)
    child = space.mutate(parent, rng)
    assert difference(parent.values(), parent.values()) == []
    assert all(
        " -> " in line or line.endswith(("is new", "is gone")) for line in difference(parent.values(), child.values())
    )
    assert difference(parent.values(), child.values())


@properties
@given(spaces())
def test_a_description_is_json_and_names_every_gene(space):
    described = json.loads(json.dumps(space.describe()))
    assert [entry["path"] for entry in described] == [gene.name for gene in space.genes]
    assert all({"kind", "baseline"} <= set(entry) for entry in described)


@properties
@given(spaces(), seeds)
def test_fixed_values_are_in_every_genome(space, seed):
    values = space.sample(generator(seed)).values()
    assert (values["sequence"], values["model"]["head_dim"]) == ([128, 512], 64)


@properties
@given(spaces(), seeds)
def test_derived_values_and_conditions_hold_in_every_genome(space, seed):
    rng = generator(seed)
    model = space.mutate(space.sample(rng), rng).values()["model"]
    assert model["ffn_dim"] == max(1, round(8 / 3 * model["d_model"] / 64)) * 64
    assert (model["n_experts"] == "none") or model["ffn"] == "moe"


@properties
@given(spaces(), seeds)
def test_lists_are_as_long_as_the_genome_says(space, seed):
    rng = generator(seed)
    values = space.mutate(space.sample(rng), rng).values()
    for gene in space.active(values):
        if gene.kind == "list":
            assert len(get(values, gene.path)) == gene.count


# --- order ------------------------------------------------------------------------------------------------------------


def test_each_value_is_made_after_those_that_it_reads():
    space = Space.from_dict(
        {
            "total": {"expr": "sum(heads) + half"},
            "heads": {"list": {"int": [1, 4]}, "length": "layers", "when": "half > 0", "default": []},
            "half": {"expr": "layers // 2"},
            "layers": {"int": [2, 6]},
        }
    )
    values = space.sample(generator()).values()
    assert values["half"] == values["layers"] // 2
    assert values["total"] == sum(values["heads"]) + values["half"]


def test_values_that_read_nothing_keep_the_order_of_the_file():
    space = Space.from_dict({"b": {"int": [1, 2]}, "a": {"choice": [1, 2]}, "c": {"float": [0.0, 1.0]}})
    assert [gene.name for gene in space.genes] == ["b", "a", "c"]


def test_a_derived_value_that_comes_out_whole_is_an_int():
    space = Space.from_dict({"d": 256, "n": {"expr": "d / 64"}, "m": {"expr": "[d / 64, d / 512]"}})
    assert space.baseline.text == '{"d":256,"m":[4,0.5],"n":4}'


def test_an_expression_may_read_a_part_of_a_mix():
    space = Space.from_dict({"mix": {"simplex": {"web": 0.7, "code": 0.3}}, "share": {"expr": "mix.code * 2"}})
    assert space.baseline.values()["share"] == 0.6


def test_an_expression_may_read_a_setting_of_a_group():
    space = Space.from_dict({"ffn": {"choice": [{"kind": "moe", "n": 8}]}, "n": {"expr": "ffn.n + 1"}})
    assert space.baseline.values()["n"] == 9


def test_an_expression_may_read_a_whole_section():
    space = Space.from_dict({"model": {"a": {"int": [3, 3]}, "b": 4}, "n": {"expr": "len(model) + model['a']"}})
    assert space.baseline.values()["n"] == 5


# --- lists that grow and shrink ---------------------------------------------------------------------------------------

LAYERS = {
    "n": {"int": [1, 8]},
    "heads": {"list": {"choice": [2, 4, 8]}, "length": "n"},
    "width": {"expr": "sum(heads)"},
}


def test_a_child_with_fewer_layers_keeps_the_first_ones():
    space, rng = Space.from_dict(LAYERS), generator()
    parent = space.complete({"n": 8, "heads": [2, 4, 8, 2, 4, 8, 2, 4]})
    cut = [near.values() for near in space.neighbours(parent) if near.values()["n"] == 7]
    assert cut == [{"n": 7, "heads": [2, 4, 8, 2, 4, 8, 2], "width": 30}]
    assert space.mutate(parent, rng) != parent


def test_a_child_with_more_layers_repeats_the_last_one():
    space = Space.from_dict(LAYERS)
    parent = space.complete({"n": 2, "heads": [2, 8]})
    longer = [near.values()["heads"] for near in space.neighbours(parent) if near.values()["n"] == 3]
    assert longer == [[2, 8, 8]]


def test_parents_of_different_depth_have_children_of_any_depth_between():
    space, rng = Space.from_dict(LAYERS), generator()
    short, deep = space.complete({"n": 1, "heads": [2]}), space.complete({"n": 8, "heads": [8] * 8})
    children = [space.cross(short, deep, rng).values() for _ in range(100)]
    assert {1, 8} < {child["n"] for child in children}
    assert all(len(child["heads"]) == child["n"] for child in children)


# --- conditions -------------------------------------------------------------------------------------------------------

MOE = {"ffn": {"choice": ["swiglu", "moe"]}, "experts": {"int": [2, 9], "when": "ffn == 'moe'", "default": 0}}


def test_a_gene_that_sleeps_has_its_default():
    assert Space.from_dict(MOE).complete({"ffn": "swiglu"}).values() == {"ffn": "swiglu", "experts": 0}


def test_a_gene_that_wakes_gets_a_value_of_its_own():
    space, rng = Space.from_dict(MOE), generator()
    asleep = space.complete({"ffn": "swiglu"})
    awake = [space.mutate(asleep, rng).values()["experts"] for _ in range(200)]
    assert set(awake) == set(range(2, 10))
    assert awake.count(6) < 60, "the baseline"


def test_a_gene_that_sleeps_has_no_neighbours_and_no_say():
    space = Space.from_dict(MOE)
    asleep = space.complete({"ffn": "swiglu"})
    assert [gene.name for gene in space.active(asleep.values())] == ["ffn"]
    assert [near.values() for near in space.neighbours(asleep)] == [{"ffn": "moe", "experts": 6}]


def test_a_gene_that_is_active_in_only_one_counts_as_different():
    space = Space.from_dict(MOE)
    assert space.distance(space.complete({"ffn": "swiglu"}), space.complete({"ffn": "moe"})) == 1


def test_a_distance_is_the_mean_of_what_each_gene_says():
    space = Space.from_dict(
        {
            "rate": {"float": [1e-4, 1e-2], "log": True},
            "width": {"int": [0, 100]},
            "batch": {"choice": [1, 2, 4, 8, 16], "ordered": True},
            "ffn": {"choice": ["swiglu", "gelu", "moe"]},
            "experts": {"int": [2, 9], "when": "ffn == 'moe'", "default": 0},
            "mix": {"simplex": ["web", "code", "books"]},
            "layers": {"int": [1, 4]},
            "heads": {"list": {"choice": [2, 4, 8]}, "length": "layers"},
        }
    )
    one = space.complete(
        {
            **{"rate": 1e-3, "width": 20, "batch": 2, "ffn": "gelu", "mix": {"web": 0.5, "code": 0.3, "books": 0.2}},
            **{"layers": 2, "heads": [2, 4]},
        }
    )
    other = space.complete(
        {
            **{"rate": 1e-2, "width": 30, "batch": 8, "ffn": "moe", "mix": {"web": 0.4, "code": 0.2, "books": 0.4}},
            **{"experts": 5, "layers": 4, "heads": [2, 8, 2, 2]},
        }
    )
    expected = (0.5 + 0.1 + 0.5 + 1 + 1 + 0.2 + 2 / 3 + 3 / 4) / 8
    assert space.distance(one, other) == pytest.approx(expected)
    assert Distances(space, [other, one]).to(one) == pytest.approx([expected, 0])


def test_a_space_without_genes_has_no_distances_but_zero():
    space = Space.from_dict({"a": 1})
    assert list(Distances(space, [space.baseline]).to(space.baseline)) == [0]
    assert Distances(space, []).to(space.baseline).shape == (0,)


# --- mutation and crossover -------------------------------------------------------------------------------------------

EIGHT = {section: {name: {"int": [0, 10**6]} for name in "abcd"} for section in ("data", "model")}


def test_a_mutation_changes_about_two_genes():
    space, rng = Space.from_dict(EIGHT), generator()
    changes = [len(difference(space.baseline.values(), space.mutate(space.baseline, rng).values())) for _ in range(400)]
    assert min(changes) == 1
    assert 1.7 < np.mean(changes) < 2.1  # one, and each of the seven others with probability 1/8


def test_a_crossover_often_takes_a_section_whole():
    space, rng = Space.from_dict(EIGHT), generator()
    mother, father = space.sample(rng), space.sample(rng)
    whole = [space.cross(mother, father, rng).values()["data"] for _ in range(400)]
    assert 0.2 < np.mean([data == mother.values()["data"] for data in whole]) < 0.32
    assert 0.2 < np.mean([data == father.values()["data"] for data in whole]) < 0.32


def test_a_neighbour_differs_in_one_gene():
    space = Space.from_dict(EIGHT)
    near = space.neighbours(space.baseline)
    assert len(near) == 16
    assert all(len(difference(space.baseline.values(), other.values())) == 1 for other in near)


def test_an_infeasible_genome_is_nobodys_neighbour():
    space = Space.from_dict({"a": {"int": [1, 9]}, "b": {"int": [1, 9]}}, ["a <= b"])
    near = [genome.values() for genome in space.neighbours(space.complete({"a": 5, "b": 5}))]
    assert near == [{"a": 4, "b": 5}, {"a": 5, "b": 6}]


def test_a_space_of_one_genome_has_no_other():
    space = Space.from_dict({"a": {"choice": ["only"]}})
    with pytest.raises(SpaceError, match="the space holds a single genome"):
        space.mutate(space.baseline, generator())


# --- constraints ------------------------------------------------------------------------------------------------------

WIDTHS = {"d_model": {"int": [1, 10]}, "n_heads": {"list": {"choice": [1, 2]}, "length": 2}}


def test_a_constraint_holds_in_every_genome():
    space, rng = Space.from_dict(WIDTHS, ["all(d_model % n_heads == 0)", "d_model > 4"]), generator()
    for _ in range(50):
        values = space.sample(rng).values()
        assert values["d_model"] > 4
        assert all(values["d_model"] % heads == 0 for heads in values["n_heads"])


def test_a_constraint_may_name_an_exact_cost():
    space = Space.from_dict(WIDTHS, ["params <= 4"], exact={"params": lambda values: values["d_model"] ** 2})
    assert {space.sample(generator(seed)).values()["d_model"] for seed in range(20)} == {1, 2}


def test_a_violation_shows_what_was_seen():
    space = Space.from_dict(
        WIDTHS, ["params <= 30M", "d_model > n_heads[0]"], exact={"params": lambda values: 41_234_567}
    )
    genome = space.complete({"d_model": 1, "n_heads": [1, 2]})
    assert space.violations(genome) == [
        ("params <= 30M", "params = 41,234,567"),
        ("d_model > n_heads[0]", "d_model = 1, n_heads = [1, 2]"),
    ]


def test_a_rule_comes_before_the_constraints():
    def rule(values):
        return "too narrow" if values["d_model"] < 5 else None

    space = Space.from_dict(WIDTHS, ["d_model > 100"], rule=rule)
    assert space.violations(space.complete({"d_model": 2})) == [("the recipe's own rules", "too narrow")]


def test_an_infeasible_space_says_which_constraint_is_to_blame():
    space = Space.from_dict(WIDTHS, ["d_model >= 1", "d_model > 10"])
    with pytest.raises(SpaceError) as caught:
        space.sample(generator())
    assert str(caught.value) == (
        "constraints: no feasible genome in 1000 draws; `d_model > 10` rejected 1000 of them\n"
        "      = widen the constraint or the genes it names"
    )


# --- completing and validating ----------------------------------------------------------------------------------------


def test_what_is_not_given_is_taken_from_the_baseline():
    assert Space.from_dict(WIDTHS).complete({"d_model": 7}).values() == {"d_model": 7, "n_heads": [1, 1]}


def test_completing_does_not_ask_for_feasibility():
    assert Space.from_dict(WIDTHS, ["d_model > 8"]).complete({"d_model": 7}).values()["d_model"] == 7


def test_the_space_and_what_is_given_are_left_as_they_were():
    tree, given_values = {"a": {"b": {"int": [1, 3]}, "c": [1]}}, {"a": {"b": 2}}
    Space.from_dict(tree).complete(given_values).values()["a"]["c"].append(2)
    assert (tree, given_values) == ({"a": {"b": {"int": [1, 3]}, "c": [1]}}, {"a": {"b": 2}})


def test_given_baselines_are_completed():
    space = Space.from_dict(WIDTHS, baselines=[{"d_model": 8}, {"n_heads": [2, 1]}])
    assert [genome.values() for genome in space.baselines] == [
        {"d_model": 8, "n_heads": [1, 1]},
        {"d_model": 6, "n_heads": [2, 1]},
    ]


# --- numbers ----------------------------------------------------------------------------------------------------------


def test_the_width_of_a_list_is_that_of_the_longest():
    assert Space.from_dict(LAYERS).width == 1 + 3 * 8


def test_cardinality_multiplies():
    assert Space.from_dict(WIDTHS).cardinality == 10 * 4


def test_a_code_of_the_wrong_length_is_refused():
    with pytest.raises(ValueError, match="an encoded genome of this space has 5 numbers, got 3"):
        Space.from_dict(WIDTHS).decode([0.5, 0.5, 0.5])


def test_a_description_holds_what_a_gene_was_given():
    (ffn, experts) = Space.from_dict(MOE | {"ffn": {"choice": ["swiglu", "moe"], "transfer": "shape"}}).describe()
    assert ffn == {
        "path": "ffn",
        "kind": "choice",
        "items": ["swiglu", "moe"],
        "baseline": "swiglu",
        "transfer": "shape",
    }
    assert experts == {
        **{"path": "experts", "kind": "int", "low": 2, "high": 9, "step": 1, "baseline": 6},
        **{"when": "ffn == 'moe'", "default": 0},
    }
