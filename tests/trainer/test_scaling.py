"""Guards the way to larger models: shapes that grow as a whole, and the laws of horizon and of the control arm."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.cost import costs
from trainer.recipe import Recipe
from trainer.scaling import ladder, ladder_rate, scaled, scaling_params

SOURCES = {"sources": {"text": {"path": "text"}}, "sequence_length": 64}


def recipe_with(model=None, train=None):
    return Recipe.model_validate({"data": SOURCES, "model": model or {}, "train": train or {}})


# --- shapes -----------------------------------------------------------------------------------------------------------


MIXTURE = {
    "ffn": "moe",
    "n_experts": 6,
    "n_active_experts": 2,
    "n_shared_experts": 1,
    "n_layers": 3,
    "n_dense_layers": 1,
    "ffn_dim": [96, 32, 64],
    "dense_ffn_dim": 160,
}
WINDOWED = {
    "n_layers": 3,
    "attention": ["sliding", "sliding", "full"],
    "positions": ["rope", "rope", "none"],
    "window": 32,
}
RECURSIVE = {"n_layers": 2, "recursion": [1, 3], "n_heads": [4, 2], "n_kv_heads": [2, 1], "head_dim": 32}


def test_a_mixture_grows_in_its_experts_and_not_in_their_number():
    model = scaled(recipe_with(MIXTURE), width=2, depth=2).model
    assert model.ffn_dim == [192, 192, 64, 64, 128, 128] and model.dense_ffn_dim == 320
    assert (model.n_experts, model.n_active_experts, model.n_shared_experts) == (6, 2, 1)
    assert model.n_dense_layers == 2 and [layer.ffn for layer in model.layers()][:3] == ["swiglu", "swiglu", "moe"]


def test_windows_and_positions_stay_with_their_layers():
    model = scaled(recipe_with(WINDOWED), width=2, depth=2).model
    assert model.attention == ["sliding"] * 4 + ["full"] * 2 and model.positions == ["rope"] * 4 + ["none"] * 2
    assert model.window == 32


def test_recursion_stays_with_its_layers_and_counts_no_depth():
    recipe = scaled(recipe_with(RECURSIVE), depth=2)
    assert recipe.model.recursion == [1, 1, 3, 3] and recipe.model.n_heads == [4, 4, 2, 2]
    assert recipe.train.base_n_layers == 2


def test_heads_keep_their_size_and_their_sharing():
    model = scaled(recipe_with({"d_model": 128, "n_heads": 4, "n_kv_heads": 2}), width=3).model
    assert (model.d_model, model.n_heads, model.n_kv_heads) == (384, 12, 6)
    assert {layer.head_dim for layer in model.layers()} == {32}


@pytest.mark.parametrize("ffn", ["swiglu", "relu2"])
def test_a_width_by_default_grows_by_the_factor_and_not_by_the_default(ffn):
    small = recipe_with({"d_model": 64, "ffn": ffn})
    assert scaled(small, width=2).model.layers()[0].ffn_dim == 2 * small.model.layers()[0].ffn_dim


def test_a_standard_recipe_is_its_own_base_and_a_base_that_is_named_is_kept():
    once = scaled(recipe_with({"d_model": 128, "n_layers": 4}), width=2)
    assert (once.train.parameterization, once.train.base_d_model, once.train.base_n_layers) == ("completep", 128, 4)
    twice = scaled(once, width=2, depth=3)
    assert (twice.train.base_d_model, twice.train.base_n_layers) == (128, 4)
    assert twice.model == scaled(recipe_with({"d_model": 128, "n_layers": 4}), width=4, depth=3).model


@st.composite
def models(draw):
    """Shapes with every field that a scale changes, given or left to its default, for all layers or for each."""
    layers = draw(st.integers(1, 4))

    def each(values):
        return draw(st.one_of(values, st.lists(values, min_size=layers, max_size=layers)))

    kv_heads = draw(st.integers(1, 3))
    model = {
        "n_layers": layers,
        "d_model": draw(st.integers(1, 40)) * 8,
        "head_dim": 2 * draw(st.integers(1, 32)),
        "n_kv_heads": draw(st.sampled_from([None, kv_heads])),
        "n_heads": each(st.integers(1, 3).map(lambda group: group * kv_heads)),
        "attention": each(st.sampled_from(["full", "sliding"])),
        "positions": each(st.sampled_from(["rope", "none", "alibi"])),
        "recursion": each(st.integers(1, 3)),
        "ffn": draw(st.sampled_from(["swiglu", "gelu", "moe"])),
    }
    if draw(st.booleans()):
        model["ffn_dim"] = each(st.integers(1, 300))
    if model["ffn"] == "moe":
        model |= {
            "n_experts": draw(st.integers(2, 8)),
            "n_shared_experts": draw(st.integers(0, 2)),
            "n_dense_layers": draw(st.integers(0, layers)),
            "dense_ffn_dim": draw(st.sampled_from([None, 96])),
        }
    return model


@settings(derandomize=True, deadline=None, max_examples=150)
@given(model=models(), width=st.integers(1, 4), depth=st.integers(1, 3))
def test_every_legal_model_grows_to_a_legal_one_layer_by_layer(model, width, depth):
    """Heads and hidden units grow with the width, layers are repeated, and all else of a layer stays as it was."""
    before, after = recipe_with(model), scaled(recipe_with(model), width=width, depth=depth)
    old, new = before.model.layers(), after.model.layers()
    assert len(new) == depth * len(old)
    for index, layer in enumerate(new):
        base = old[index // depth]
        grown = {"n_heads", "n_kv_heads", "ffn_dim"}
        assert all(getattr(layer, field) == width * getattr(base, field) for field in grown)
        assert all(getattr(layer, field) == getattr(base, field) for field in set(layer._fields) - grown)
    assert costs(after).kv_bytes_per_token == width * depth * costs(before).kv_bytes_per_token
    assert costs(after).embedding_params == width * costs(before).embedding_params


@pytest.mark.parametrize("given", [{"width": 0}, {"depth": 0}, {"tokens": 100}, {"tuned_at": 100}])
def test_strange_requests_are_refused(given):
    with pytest.raises(ValueError, match=r"at least 1|go together"):
        scaled(recipe_with(), **given)


def test_a_model_that_no_recipe_allows_is_refused():
    with pytest.raises(ValueError, match="n_layers"):
        scaled(recipe_with({"n_layers": 600}), depth=2)


# --- horizon ----------------------------------------------------------------------------------------------------------


def test_without_tokens_the_optimisation_stays():
    recipe = recipe_with(train={"weight_decay": 0.3, "batch_tokens": 1000})
    after = scaled(recipe, width=2).train
    changed = {"parameterization", "base_d_model", "base_n_layers"}
    assert after.model_dump(exclude=changed) == recipe.train.model_dump(exclude=changed)


def test_eight_times_the_tokens_are_trained_on_in_twice_the_batch():
    """8^0.383 = 2.2, nearest to 2."""
    recipe = recipe_with(train={"batch_tokens": 4096, "learning_rate": 0.01, "weight_decay": 0.1})
    after = scaled(recipe, width=2, tokens=8_000_000, tuned_at=1_000_000).train
    assert after.batch_tokens == 8192
    assert after.learning_rate == pytest.approx(0.01 * 2**0.5)
    assert after.weight_decay == pytest.approx(0.1 * 2**0.5 / 8)


def test_ramps_grow_with_what_they_ramp():
    train = {
        "batch_tokens": 4096,
        "batch_start_tokens": 1024,
        "batch_ramp_tokens": 10_000,
        "sequence_start": 16,
        "sequence_ramp_tokens": 5_000,
    }
    after = scaled(recipe_with(train=train), tokens=80_000, tuned_at=10_000).train
    assert (after.batch_start_tokens, after.batch_ramp_tokens) == (2048, 80_000)
    assert (after.sequence_start, after.sequence_ramp_tokens) == (16, 40_000)


@settings(derandomize=True, deadline=None, max_examples=150)
@given(
    batch=st.integers(64, 10_000),
    start=st.none() | st.integers(64, 10_000),
    rate=st.floats(1e-5, 1),
    tuned_at=st.integers(1, 10**9),
    ratio=st.floats(1e-3, 1e6),
)
def test_every_horizon_gives_a_legal_recipe_that_forgets_as_it_did(batch, start, rate, tuned_at, ratio):
    train = {"batch_tokens": batch, "learning_rate": rate, "weight_decay": 0.1}
    if start is not None and start <= batch:
        train |= {"batch_start_tokens": start, "batch_ramp_tokens": 100}
    tokens = max(1, round(tuned_at * ratio))
    after = scaled(recipe_with(train=train), tokens=tokens, tuned_at=tuned_at).train
    remembered = after.batch_tokens / (after.learning_rate * after.weight_decay * tokens)
    assert remembered == pytest.approx(batch / (rate * 0.1 * tuned_at))
    if after.batch_tokens > 64:
        steps = math.log2(after.batch_tokens / batch)
        assert abs(steps - 0.383 * math.log2(tokens / tuned_at)) <= 0.5 + 1e-2


# --- the control arm --------------------------------------------------------------------------------------------------


def test_the_ladder_is_pinned_at_108_million_parameters():
    train = ladder(recipe_with(), 108_000_000, 20 * 108_000_000).train
    assert train.batch_tokens == 327_680 and train.learning_rate == pytest.approx(0.00235)
    assert train.warmup_steps == 330  # one token for each parameter
    assert (train.weight_decay, train.z_loss, train.beta2, train.decay_fraction) == (0.1, 1e-5, 0.99, 0.1)


def test_eight_times_the_parameters_take_four_times_the_batch_and_half_the_rate():
    small, large = (ladder(recipe_with(), n, n).train for n in (10_800_000, 86_400_000))
    assert large.batch_tokens == pytest.approx(4 * small.batch_tokens, rel=2e-3)
    assert large.learning_rate == pytest.approx(small.learning_rate / 2)


def test_a_long_run_has_a_lower_peak():
    assert ladder_rate(1_000_000, 80_000_000) == pytest.approx(ladder_rate(1_000_000, 20_000_000) / 2)
    assert ladder_rate(1_000_000, 1_000) == ladder_rate(1_000_000, 20_000_000)


def test_the_ladder_leaves_completep_and_ramps_behind():
    recipe = scaled(recipe_with(train={"batch_start_tokens": 64, "batch_ramp_tokens": 10, "optimizer": "muon"}))
    train = ladder(recipe, 10_000_000, 10_000_000).train
    assert (train.parameterization, train.optimizer, train.batch_start_tokens) == ("standard", "adamw", None)


@pytest.mark.parametrize("tied", [True, False])
def test_parameters_of_the_law_are_matrices_of_blocks_the_head_and_norms(tied):
    recipe = recipe_with({"d_model": 64, "n_layers": 2, "n_heads": 2, "ffn_dim": 96, "tie_embeddings": tied})
    matrices = 2 * (4 * 64 * 64 + 3 * 64 * 96) + 4096 * 64
    norms = 5 * 64 + 2 * 2 * 32
    assert scaling_params(recipe) == matrices + norms
