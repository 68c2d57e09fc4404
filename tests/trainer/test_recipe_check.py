"""Guards the words with which a mapping that is no recipe is refused: the path, the rule, and the nearest name."""

import pytest

from trainer.recipe_check import check, rule

DATA = {"sources": {"web": {"path": "web.txt"}}}


def genome(**sections):
    return {"data": DATA, **sections}


def only(**sections):
    """The one thing that is wrong."""
    (finding,) = check(genome(**sections))
    return finding


def test_a_recipe_has_nothing_wrong():
    assert check(genome()) == []
    assert rule(genome()) is None


# --- field by field ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sections", "path", "advice"),
    [
        ({"model": {"d_modle": 1}}, ("model", "d_modle"), "did you mean 'd_model'?"),
        ({"train": {"learning_rte": 1}}, ("train", "learning_rte"), "did you mean 'learning_rate'?"),
        ({"data": {**DATA, "tokeniser": {}}}, ("data", "tokeniser"), "did you mean 'tokenizer'?"),
        (
            {"data": {**DATA, "tokenizer": {"merges": 512}}},
            ("data", "tokenizer", "merges"),
            "known here: kind, vocab_size",
        ),
        (
            {"data": {"sources": {"web": {"path": "a", "dokument": "line"}}}},
            ("data", "sources", "web", "dokument"),
            "did you mean 'document'?",
        ),
        (
            {"data": {**DATA, "held_out": {"maxbytes": 1}}},
            ("data", "held_out", "maxbytes"),
            "did you mean 'max_bytes'?",
        ),
    ],
)
def test_an_unknown_key_gets_the_nearest_one(sections, path, advice):
    assert only(**sections) == (path, f"unknown key '{path[-1]}'", advice)


@pytest.mark.parametrize(
    ("sections", "path", "words"),
    [
        ({"model": {"d_model": 0}}, ("model", "d_model"), "must be > 0, is 0"),
        ({"model": {"d_model": "wide"}}, ("model", "d_model"), 'must be a whole number, is "wide"'),
        ({"model": {"d_model": 1.5}}, ("model", "d_model"), "must be a whole number, is 1.5"),
        ({"model": {"tie_embeddings": "no"}}, ("model", "tie_embeddings"), 'must be true or false, is "no"'),
        ({"train": {"learning_rate": 2}}, ("train", "learning_rate"), "must be <= 1, is 2"),
        ({"train": {"learning_rate": None}}, ("train", "learning_rate"), "must be a number, is null"),
        ({"train": {"beta2": 1}}, ("train", "beta2"), "must be < 1, is 1"),
        ({"train": {"warmup_steps": -1}}, ("train", "warmup_steps"), "must be >= 0, is -1"),
        ({"data": {"sources": {"web": {}}}}, ("data", "sources", "web", "path"), "is missing"),
        ({"data": {}}, ("data", "sources"), "is missing"),
        ({"data": {"sources": ["a"]}}, ("data", "sources"), 'must be a mapping, is ["a"]'),
        ({"data": {**DATA, "mix": {"web": -1}}}, ("data", "mix", "web"), "must be >= 0, is -1"),
        ({"model": None}, ("model",), "must be a mapping, is null"),
        ({"train": "fast"}, ("train",), 'must be a mapping, is "fast"'),
    ],
)
def test_a_field_of_the_wrong_type_or_range(sections, path, words):
    assert only(**sections) == (path, words, None)


def test_a_value_of_a_few_gets_the_nearest():
    assert only(model={"ffn": "swigul"}) == (
        ("model", "ffn"),
        'must be one of swiglu, geglu, reglu, gelu, silu, relu2, moe, is "swigul"',
        "did you mean 'swiglu'?",
    )
    assert only(train={"precision": "int3"}) == (
        ("train", "precision"),
        'must be one of fp32, bf16, fp16, is "int3"',
        None,
    )


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"model": {"n_heads": "four"}}, 'must be a whole number or a list, is "four"'),
        ({"model": {"n_heads": 0}}, "must be > 0 or a list, is 0"),
        ({"model": {"ffn_dim": True}}, "must be a whole number or a list, is true"),
        ({"data": {"sources": {"web": {"path": 3}}}}, "must be text or a list, is 3"),
    ],
)
def test_a_field_with_alternatives_is_one_finding_that_names_them(sections, words):
    assert only(**sections)[1] == words


def test_a_long_value_is_cut():
    assert only(model={"d_model": "x" * 500})[1] == f'must be a whole number, is "{"x" * 56}...'


def test_everything_is_found_at_once():
    found = check({"data": {"sources": {"web": {}}}, "model": {"ffn": "mlp", "d_modle": 1}, "train": {"seed": "a"}})
    assert {path for path, _, _ in found} == {
        ("data", "sources", "web", "path"),
        ("model", "ffn"),
        ("model", "d_modle"),
        ("train", "seed"),
    }


def test_a_missing_section_is_said_where_it_has_no_default():
    assert check({"model": {}}) == [(("data",), "is missing", None)]


def test_what_is_legal_field_by_field_is_left_to_the_rule():
    assert check(genome(model={"n_heads": 4, "n_kv_heads": 3})) == []


# --- as a whole -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"model": {"n_heads": 4, "n_kv_heads": 3}}, "layer 0: n_heads = 4 is no multiple of n_kv_heads = 3"),
        ({"model": {"n_layers": 2, "ffn_dim": [64]}}, "model.ffn_dim has 1 items for 2 layers"),
        ({"train": {"learning_rate": 0}}, "train.learning_rate: must be > 0, is 0"),
        ({"model": {"n_layers": 2, "n_heads": [4, 0]}}, "model.n_heads"),
        ({"data": {"sources": {"web": {}}}}, "data.sources.web.path: is missing"),
    ],
)
def test_the_rule_says_why_a_genome_is_no_recipe(sections, words):
    assert rule(genome(**sections)).startswith(words)


def test_numbers_as_json_gives_them_are_taken():
    assert check(genome(train={"learning_rate": 1, "weight_decay": 0})) == []
