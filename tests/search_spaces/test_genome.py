"""Guards the genome: one spelling per content, an id that depends on nothing else, values that cannot be changed."""

import hashlib
import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from search_spaces.genome import Genome, canonical_json, difference, get, leaves

properties = settings(deadline=None, derandomize=True, max_examples=80)

scalars = st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.floats(allow_nan=False, allow_infinity=False)
values = st.recursive(
    scalars | st.text(st.characters(exclude_categories=["Cs"]), max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("abcé", max_size=3), inner, max_size=3),
    max_leaves=12,
)
mappings = st.dictionaries(st.text("abcdef", min_size=1, max_size=3), values, max_size=5)


def backwards(value):
    """The same JSON value with the keys of every mapping in the opposite order."""
    if isinstance(value, dict):
        return {key: backwards(value[key]) for key in reversed(value)}
    return [backwards(item) for item in value] if isinstance(value, list) else value


def test_canonical_json_sorts_keys_and_leaves_no_blanks():
    assert canonical_json({"b": [1, 2.5], "a": {"d": None, "c": True}}) == '{"a":{"c":true,"d":null},"b":[1,2.5]}'


def test_canonical_json_writes_the_shortest_floats():
    assert canonical_json([0.1, 1e-4, 1e22, 3.0]) == "[0.1,0.0001,1e+22,3.0]"


def test_canonical_json_keeps_letters_of_every_script():
    assert canonical_json("größe") == '"größe"'


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_has_no_canonical_json(value):
    with pytest.raises(ValueError, match="not JSON compliant"):
        Genome.of({"train": {"learning_rate": [value]}})


@properties
@given(mappings)
def test_the_id_does_not_depend_on_the_order_of_keys(mapping):
    assert Genome.of(mapping).digest == Genome.of(backwards(mapping)).digest


@properties
@given(mappings)
def test_a_genome_survives_a_round_trip_through_json(mapping):
    genome = Genome.of(mapping)
    assert Genome.of(json.loads(genome.text)) == genome
    assert genome.values() == mapping


@properties
@given(mappings, mappings)
def test_ids_agree_exactly_when_texts_do(one, other):
    one, other = Genome.of(one), Genome.of(other)
    assert (one.digest == other.digest) == (one.text == other.text) == (one == other)


def test_the_id_is_the_first_half_of_the_sha_256():
    assert Genome.of({"a": 1}).digest == hashlib.sha256(b'{"a":1}').hexdigest()[:32]


def test_one_and_one_point_zero_and_true_are_three_genomes():
    assert len({Genome.of({"a": value}).digest for value in (1, 1.0, True)}) == 3


def test_equal_genomes_are_one_key_of_a_dict():
    assert {Genome.of({"a": 1, "b": 2}): "first"}[Genome.of({"b": 2, "a": 1})] == "first"


def test_values_are_fresh_every_time():
    genome = Genome.of({"model": {"n_heads": [2, 4]}})
    genome.values()["model"]["n_heads"].append(8)
    assert genome.values() == {"model": {"n_heads": [2, 4]}}


def test_a_genome_cannot_be_changed():
    with pytest.raises(AttributeError):
        Genome.of({"a": 1}).text = "{}"


def test_get_walks_through_mappings_and_lists():
    assert get({"model": {"n_heads": [2, 4]}}, ("model", "n_heads", 1)) == 4


@pytest.mark.parametrize(
    ("path", "name"),
    [
        (("model", "width"), "model.width"),
        (("model", "n_heads", 7), "model.n_heads[7]"),
        (("model", "d_model", "x"), "model.d_model.x"),
    ],
)
def test_get_names_the_path_that_is_missing(path, name):
    with pytest.raises(KeyError) as caught:
        get({"model": {"n_heads": [2, 4], "d_model": 64}}, path)
    assert caught.value.args == (name,)


def test_leaves_are_everything_but_mappings():
    assert dict(leaves({"a": {"b": 1, "c": [{"d": 2}]}, "e": {}})) == {
        ("a", "b"): 1,
        ("a", "c"): [{"d": 2}],
        ("e",): {},
    }


def test_difference_says_what_changed_in_words():
    before = {"train": {"lr": 0.001, "optimizer": "adamw"}, "old": 1}
    after = {"train": {"lr": 0.002, "optimizer": "adamw"}, "new": [1, 2]}
    assert difference(before, after) == ["train.lr: 0.001 -> 0.002", "old: 1 is gone", "new: [1,2] is new"]


def test_difference_tells_one_from_true():
    assert difference({"a": 1}, {"a": True}) == ["a: 1 -> true"]


@properties
@given(mappings)
def test_nothing_differs_from_itself(mapping):
    assert difference(mapping, backwards(mapping)) == []
