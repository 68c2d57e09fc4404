"""Guards the typed recipe: what it takes, what it refuses, and what its defaults mean."""

import pytest
from pydantic import ValidationError

from trainer.recipe import Layer, Model, Recipe, incoherence

SOURCES = {"web": {"path": "web.txt"}, "code": {"path": ["a.py", "b.py"]}}


def recipe(data=None, **sections):
    return Recipe.model_validate({"data": {"sources": SOURCES, **(data or {})}, **sections})


def refusal(**sections):
    """Why a recipe whose fields are each legal is none."""
    with pytest.raises(ValidationError) as error:
        recipe(**sections)
    (only,) = error.value.errors()
    assert only["type"] == "value_error"
    return str(only["ctx"]["error"])


# --- fields -----------------------------------------------------------------------------------------------------------


def test_sources_are_all_that_has_to_be_said():
    assert recipe().model == Model()
    assert recipe().data.mix is None


@pytest.mark.parametrize(
    "sections",
    [
        {"data": {"sourcse": {}}},
        {"data": {"tokenizer": {"vocab": 512}}},
        {"model": {"drop_out": 0.1}},
        {"train": {"lr": 0.1}},
        {"modle": {}},
    ],
)
def test_unknown_keys_are_refused_at_every_depth(sections):
    with pytest.raises(ValidationError, match="Extra inputs are not permitted"):
        recipe(**sections)


@pytest.mark.parametrize(
    ("section", "field", "value"),
    [
        ("model", "d_model", "256"),
        ("model", "d_model", 256.0),
        ("model", "n_layers", True),
        ("model", "tie_embeddings", 1),
        ("train", "learning_rate", "1e-3"),
        ("train", "optimizer", "sgd"),
        ("data", "sequence_length", None),
    ],
)
def test_values_are_never_converted_silently(section, field, value):
    with pytest.raises(ValidationError):
        recipe(**{section: {field: value}})


def test_a_whole_number_is_a_number():
    assert recipe(train={"grad_clip": 1}).train.grad_clip == 1.0


@pytest.mark.parametrize(
    ("section", "field", "legal", "illegal"),
    [
        ("data", "sequence_length", 8, 7),
        ("model", "n_layers", 1, 0),
        ("model", "d_model", 8, 0),
        ("model", "n_active_experts", 1, 0),
        ("model", "balance_loss", 0, -0.1),
        ("model", "window", 2, 1),
        ("model", "rope_fraction", 1, 1.1),
        ("model", "dropout", 0, 1),
        ("model", "logit_softcap", 0, -1),
        ("model", "residual_multiplier", 0.1, 0),
        ("train", "learning_rate", 1, 1.001),
        ("train", "beta1", 0, 1),
        ("train", "beta2", 0.999999, 1),
        ("train", "decay_fraction", 1, 0),
        ("train", "decay_fraction", 1e-6, 1.01),
        ("train", "warmup_steps", 0, -1),
        ("train", "weight_decay", 0, -0.1),
        ("train", "grad_clip", 1e-9, 0),
        ("train", "seed", 2**31 - 1, 2**31),
        ("train", "tokens", 1, 0),
    ],
)
def test_ranges(section, field, legal, illegal):
    assert getattr(getattr(recipe(**{section: {field: legal}}), section), field) == legal
    with pytest.raises(ValidationError):
        recipe(**{section: {field: illegal}})


@pytest.mark.parametrize("size", [259, 2**20])
def test_the_smallest_vocabulary_is_the_bytes_and_the_special_tokens(size):
    assert recipe(data={"tokenizer": {"vocab_size": size}}).data.tokenizer.vocab_size == size


def test_recipes_are_frozen():
    with pytest.raises(ValidationError, match="frozen"):
        recipe().train.seed = 1


# --- layers -----------------------------------------------------------------------------------------------------------


def test_one_value_goes_for_every_layer():
    shape = Model(d_model=64, n_layers=3, n_heads=4, n_kv_heads=2, ffn="relu2", ffn_dim=96)
    assert shape.layers() == [Layer(4, 2, 16, "relu2", 96)] * 3


def test_a_list_gives_one_value_per_layer():
    shape = Model(d_model=64, n_layers=2, n_heads=[2, 4], n_kv_heads=[1, 4], head_dim=8, ffn_dim=[32, 160])
    assert shape.layers() == [Layer(2, 1, 8, "swiglu", 32), Layer(4, 4, 8, "swiglu", 160)]


def test_without_kv_heads_every_head_has_its_own():
    assert [layer.n_kv_heads for layer in Model(n_layers=2, n_heads=[2, 4], head_dim=8).layers()] == [2, 4]


@pytest.mark.parametrize(
    ("ffn", "d_model", "width"),
    [
        ("swiglu", 256, 672),
        ("gelu", 256, 1024),
        ("relu2", 256, 1024),
        ("moe", 256, 672),
        ("swiglu", 96, 256),
        ("swiglu", 128, 352),
        ("swiglu", 4, 32),
    ],
)
def test_the_default_width_of_the_ffn_is_a_multiple_of_32(ffn, d_model, width):
    assert Model(d_model=d_model, ffn=ffn).layers()[0].ffn_dim == width


# --- coherence --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ffn", ["swiglu", "gelu", "relu2"])
@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_every_default_is_coherent(ffn, qk_norm, tied):
    assert incoherence(recipe(model={"ffn": ffn, "qk_norm": qk_norm, "tie_embeddings": tied})) is None


@pytest.mark.parametrize("field", ["n_heads", "n_kv_heads", "ffn_dim"])
@pytest.mark.parametrize("values", [[], [4], [4, 4, 4]])
def test_a_list_has_one_item_per_layer(field, values):
    words = refusal(model={"n_layers": 2, field: values})
    assert words == f"model.{field} has {len(values)} items for 2 layers"


def test_the_width_is_a_multiple_of_the_heads_unless_their_size_is_given():
    assert refusal(model={"d_model": 100, "n_heads": 3}) == (
        "model.d_model = 100 is no multiple of n_heads = 3 (set head_dim)"
    )
    assert recipe(model={"d_model": 100, "n_heads": 3, "head_dim": 16}).model.layers()[0].head_dim == 16


def test_heads_are_a_multiple_of_kv_heads_in_every_layer():
    assert refusal(model={"n_heads": 4, "n_kv_heads": 3}) == ("layer 0: n_heads = 4 is no multiple of n_kv_heads = 3")
    words = refusal(model={"n_layers": 2, "n_heads": 4, "n_kv_heads": [4, 8]})
    assert words == "layer 1: n_heads = 4 is no multiple of n_kv_heads = 8"


@pytest.mark.parametrize("model", [{"head_dim": 7}, {"d_model": 12, "n_heads": 4}])
def test_rotary_positions_need_pairs(model):
    assert "is odd, rotary positions need pairs" in refusal(model=model)


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (
            {"head_dim": 6, "rope_fraction": 0.5},
            "layer 0: rope_fraction = 0.5 of head_dim = 6 is 3, rotary positions need",
        ),
        (
            {"head_dim": 8, "rope_fraction": 0.1},
            "layer 0: rope_fraction = 0.1 of head_dim = 8 is 0, rotary positions need",
        ),
        ({"rope_factor": 2.0}, "model.rope_factor = 2 goes with rope_scaling linear or yarn, not none"),
        (
            {"rope_scaling": "yarn", "rope_theta": 1.0},
            "model.rope_theta = 1 is too small for rope_scaling yarn, which takes more than 1",
        ),
    ],
)
def test_rotary_positions_that_cannot_be(model, words):
    assert words in refusal(model=model)


@pytest.mark.parametrize("positions", ["learned", "sinusoidal", "none", "alibi", ["alibi", "none"]])
def test_heads_that_are_not_turned_may_be_odd(positions):
    assert recipe(model={"n_layers": 2, "head_dim": 7, "positions": positions}).model.layers()[0].head_dim == 7


@pytest.mark.parametrize("positions", ["learned", "sinusoidal"])
def test_what_is_added_to_embeddings_leaves_layers_without_positions(positions):
    assert {layer.positions for layer in Model(positions=positions).layers()} == {"none"}
    with pytest.raises(ValidationError):
        Model(n_layers=2, positions=[positions, "rope"])


@pytest.mark.parametrize(
    ("kernel", "model", "words"),
    [
        ("sdpa", {"attention_softcap": 5.0}, "'sdpa' knows no model.attention_softcap; take auto, flex or eager"),
        ("blocked", {"attention_softcap": 5.0}, "'blocked' knows no model.attention_softcap; take auto, flex or eager"),
        ("blocked", {"attention_dropout": 0.1}, "'blocked' knows no model.attention_dropout; take auto, sdpa or eager"),
        ("flex", {"attention_dropout": 0.1}, "'flex' knows no model.attention_dropout; take auto, sdpa or eager"),
        ("flex", {"positions": "alibi"}, "'flex' cannot add alibi's distances; take auto, sdpa or eager"),
    ],
)
def test_attention_kernels_that_cannot_compute_it(kernel, model, words):
    assert refusal(model=model, train={"attention_kernel": kernel}) == f"train.attention_kernel = {words}"
    for other in ("auto", "eager"):
        assert recipe(model=model, train={"attention_kernel": other}).train.attention_kernel == other


def test_heads_that_differ_between_layers_need_a_size():
    words = refusal(model={"n_layers": 2, "n_heads": [2, 4]})
    assert words == "model.n_heads differs between layers, so model.head_dim must be given"
    assert recipe(model={"n_layers": 2, "n_heads": [4, 4]}).model.layers()[1].head_dim == 64


@pytest.mark.parametrize(
    ("mix", "words"),
    [
        ({"web": 1}, "data.mix gives no weight to source 'code'"),
        ({}, "data.mix gives no weight to source 'code'"),
        ({"web": 1, "cod": 1}, "data.mix names 'cod', which is no source; did you mean 'code'?"),
        ({"web": 1, "code": 1, "books": 1}, "data.mix names 'books', which is no source; there are "),
    ],
)
def test_the_mix_names_the_sources(mix, words):
    assert words in refusal(data={"mix": mix})


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ({"ffn": "moe"}, "model.n_experts = 0 is too few for ffn 'moe', which takes at least 2"),
        ({"ffn": "moe", "n_experts": 1}, "model.n_experts = 1 is too few for ffn 'moe', which takes at least 2"),
        ({"n_experts": 4}, "model.n_experts = 4 goes with ffn 'moe', not 'swiglu'"),
        (
            {"ffn": "moe", "n_experts": 2, "n_active_experts": 3},
            "model.n_active_experts = 3 is more than n_experts = 2",
        ),
        ({"n_shared_experts": 1}, "model.n_shared_experts = 1 goes with ffn 'moe', not 'swiglu'"),
        ({"n_dense_layers": 1}, "model.n_dense_layers = 1 goes with ffn 'moe', not 'swiglu'"),
        (
            {"ffn": "moe", "n_experts": 2, "n_layers": 3, "n_dense_layers": 3},
            "model.n_dense_layers = 3 leaves no mixture in n_layers = 3",
        ),
    ],
)
def test_experts_and_the_mixture_go_together(model, words):
    assert refusal(model=model) == words


@pytest.mark.parametrize(("experts", "active"), [(2, 2), (2, 1), (64, 8)])
def test_mixtures_that_are_legal(experts, active):
    assert recipe(model={"ffn": "moe", "n_experts": experts, "n_active_experts": active}).model.n_experts == experts


def test_without_a_mixture_the_number_of_active_experts_means_nothing():
    assert recipe(model={"n_active_experts": 9}).model.n_experts == 0


def test_some_source_has_a_weight():
    assert refusal(data={"mix": {"web": 0, "code": 0}}) == "data.mix must give some source a positive weight"
    assert recipe(data={"mix": {"web": 0, "code": 1}}).data.mix == {"web": 0, "code": 1}


def test_a_batch_holds_a_sequence():
    assert refusal(data={"sequence_length": 512}, train={"batch_tokens": 511}) == (
        "train.batch_tokens = 511 is less than one sequence (512)"
    )
    assert recipe(data={"sequence_length": 512}, train={"batch_tokens": 512}).train.batch_tokens == 512


@pytest.mark.parametrize("name", ["a b", "", "-a", "a/b", "x" * 65, "ü"])
def test_the_name_of_a_source_can_be_part_of_a_path_and_of_a_metric(name):
    assert f"source name '{name}' must match" in refusal(data={"sources": {name: {"path": "a"}}})


@pytest.mark.parametrize("name", ["a", "A-1_b.c", "0", "x" * 64])
def test_names_that_are_legal(name):
    assert name in recipe(data={"sources": {name: {"path": "a"}}}).data.sources
