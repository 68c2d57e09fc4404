"""Guards lowering: what a stock class of transformers can say, it computes to the same logits with the same weights."""

import pytest
import torch
import transformers
from hypothesis import given, settings
from model_shapes import SHAPES, random_ids, shaken, shapes
from safetensors.torch import load_file

from trainer.export.lower import lower, published_weights, stock_of, tier
from trainer.model import EvolmForCausalLM, build_model, config_of

PLAIN = {"qk_norm": False}
MOE = {"ffn": "moe", "n_experts": 4, "qk_norm": False}
WINDOW = {"attention": ["full", "sliding"], "window": 5}
ALL_SLIDE = {"attention": "sliding", "window": 5}
OLMO = {"norm_placement": "post", "qk_norm": "full"}
MULTIPLIED = {"embedding_multiplier": 3.0, "residual_multiplier": 0.4, "logit_multiplier": 0.5}
LAYERNORM = {**PLAIN, "norm": "layernorm"}

STOCK = {
    "Llama": {
        "": PLAIN,
        "gqa": {**PLAIN, "n_heads": 4, "n_kv_heads": 2},
        "untied": {**PLAIN, "tie_embeddings": False},
        "free head size": {**PLAIN, "n_heads": 4, "head_dim": 10},
        "geglu, biases of queries, keys and values": {**PLAIN, "ffn": "geglu", "bias": "qkv"},
        "all biases": {**PLAIN, "bias": "all"},
        "rope stretched": {**PLAIN, "rope_scaling": "yarn", "rope_factor": 4.0},
        "multiplied": {**PLAIN, **MULTIPLIED},
        "multiplied, untied": {**PLAIN, **MULTIPLIED, "tie_embeddings": False, "bias": "all"},
    },
    "Qwen3": {
        "": {},
        "mqa": {"n_heads": 4, "n_kv_heads": 1},
        "free head size": {"n_heads": 3, "head_dim": 10},
        "untied": {"tie_embeddings": False},
        "lists that are alike": {"n_heads": [2, 2], "ffn_dim": [64, 64], "head_dim": 16},
        "rope and eps": {"rope_theta": 300.0, "norm_eps": 1e-3},
        "rope stretched": {"rope_scaling": "linear", "rope_factor": 2.0},
        "some layers slide": {**WINDOW, "bias": "qkv"},
        "all layers slide": {**ALL_SLIDE, "ffn": "reglu"},
        "multiplied": MULTIPLIED,
    },
    "Mistral": {
        "all layers slide": {**PLAIN, **ALL_SLIDE},
        "heads that do not divide the width": {**PLAIN, "n_heads": 3, "head_dim": 10},
    },
    "Ministral": {"some layers slide": {**PLAIN, **WINDOW, "ffn": "geglu"}},
    "SmolLM3": {
        "no positions on some layers": {**PLAIN, "positions": ["none", "rope"]},
        "no positions at all": {**PLAIN, "positions": "none", "head_dim": 10},
        "sliding too": {**PLAIN, **WINDOW, "positions": ["none", "rope"], "bias": "all"},
    },
    "Olmo2": {
        "": OLMO,
        "gqa, biases": {**OLMO, "n_heads": 4, "n_kv_heads": 2, "bias": "qkv"},
        "scaled": {**OLMO, **MULTIPLIED},
    },
    "Olmo3": {
        "some layers slide": {**OLMO, **WINDOW},
        "all layers slide": {**OLMO, **ALL_SLIDE, "rope_theta": 300.0, "head_dim": 10},
    },
    "Arcee": {
        "relu2": {**PLAIN, "ffn": "relu2"},
        "gelu, biases": {**PLAIN, "ffn": "gelu", "bias": "all"},
        "silu": {**PLAIN, "ffn": "silu", "bias": "qkv", "head_dim": 10},
    },
    "Mixtral": {
        "": MOE,
        "three of five": {**MOE, "n_experts": 5, "n_active_experts": 3},
        "one of four": {**MOE, "n_active_experts": 1},
        "gqa untied": {**MOE, "n_heads": 4, "n_kv_heads": 2, "tie_embeddings": False},
        "free head size": {**MOE, "n_heads": 3, "head_dim": 10},
        "rope and eps": {**MOE, "rope_theta": 300.0, "norm_eps": 1e-3},
        "all layers slide": {**MOE, **ALL_SLIDE},
        "multiplied": {**MOE, **MULTIPLIED},
    },
    "Qwen3Moe": {
        "": {**MOE, "qk_norm": True},
        "dense layers": {**MOE, "qk_norm": True, "n_layers": 3, "n_dense_layers": 2, "dense_ffn_dim": 40},
        "all layers slide": {**MOE, **ALL_SLIDE, "qk_norm": True, "bias": "qkv"},
    },
    "Gemma2": {
        "": {**PLAIN, "norm_placement": "sandwich"},
        "softcaps": {**PLAIN, **WINDOW, "norm_placement": "sandwich", "attention_softcap": 2.0, "logit_softcap": 3.0},
        "multiplied, untied": {**PLAIN, **MULTIPLIED, "norm_placement": "sandwich", "tie_embeddings": False},
        "multiplied, bent": {**PLAIN, **MULTIPLIED, "norm_placement": "sandwich", "logit_softcap": 3.0},
    },
    "Gemma3": {
        "": {"norm_placement": "sandwich", "rope_theta": 300.0},
        "some layers slide": {**WINDOW, "norm_placement": "sandwich", "logit_softcap": 3.0, "ffn": "geglu"},
    },
    "StableLm": {
        "": LAYERNORM,
        "parallel": {**LAYERNORM, "parallel_block": True, "bias": "qkv"},
        "parallel, half of each head turned": {**LAYERNORM, "parallel_block": True, "rope_fraction": 0.5},
    },
    "Starcoder2": {
        "": {**LAYERNORM, "ffn": "gelu"},
        "biases, all layers slide": {**LAYERNORM, **ALL_SLIDE, "ffn": "relu2", "bias": "all"},
        "multiplied": {**LAYERNORM, **MULTIPLIED, "ffn": "silu", "bias": "all"},
    },
}

stock_shapes = pytest.mark.parametrize(
    ("kind", "shape"),
    [
        pytest.param(kind, shape, id=f"{kind} {name}".strip())
        for kind, named in STOCK.items()
        for name, shape in named.items()
    ],
)

OWN = {
    "gelu with qk-norm": ({"ffn": "gelu"}, "a feed-forward part without a gate, qk-norm of each head together"),
    "heads per layer": ({"n_heads": [4, 2], "head_dim": 8}, "layers of different heads"),
    "kv heads per layer": ({"n_heads": 4, "n_kv_heads": [4, 2]}, "layers of different heads"),
    "ffn per layer": ({"ffn_dim": [64, 96]}, "feed-forward parts of different widths"),
    "experts of different widths": ({**MOE, "ffn_dim": [64, 96]}, "feed-forward parts of different widths"),
    "shared experts": ({**MOE, "n_shared_experts": 1}, "shared experts"),
    "balanced by a bias": ({**MOE, "balance": "bias"}, "experts that are chosen with a bias"),
    "recursion": ({"recursion": 2}, "recursion"),
    "learned": ({"positions": "learned"}, "learned positions"),
    "parallel, rmsnorm": ({**PLAIN, "parallel_block": True}, "parallel blocks alone"),
    "sliding mixtures": ({**MOE, **WINDOW}, "a mixture of experts, sliding attention on some layers together"),
}


@pytest.fixture
def model_of(recipe_of):
    return lambda shape: shaken(build_model(recipe_of(model=shape), 0))


@stock_shapes
@torch.no_grad()
def test_a_shape_that_a_stock_class_knows_is_lowered_to_it_with_equal_logits(model_of, kind, shape):
    model, ids = model_of(shape), random_ids(length=24)
    lowered = lower(model)
    assert type(lowered).__name__ == f"{kind}ForCausalLM"
    assert tier(model.config).name == "stock"
    assert tier(model.config).model == type(lowered).__name__
    torch.testing.assert_close(lowered(ids).logits, model(ids).logits, atol=3e-5, rtol=1e-5)


@pytest.mark.parametrize(("shape", "reason"), OWN.values(), ids=OWN.keys())
def test_a_shape_that_none_knows_stays_what_it_is_and_it_is_said_why(model_of, shape, reason):
    model = model_of(shape)
    assert lower(model) is model
    found = tier(model.config)
    assert (found.name, found.model) == ("evolm", "EvolmForCausalLM")
    assert found.reason == f"no stock class has {reason}"


def test_what_kernels_of_engines_cannot_compute_is_for_transformers_alone(model_of):
    found = tier(model_of({"positions": ["rope", "alibi"], "recursion": 2}).config)
    assert (found.name, found.model) == ("native", "EvolmForCausalLM")
    assert found.reason == "no stock class has alibi, recursion; kernels of serving engines add no distances to scores"


@torch.no_grad()
def test_in_our_own_class_a_multiplier_goes_into_weights_where_logits_are_bent(model_of):
    model, ids = model_of({**MULTIPLIED, "logit_softcap": 2.0, "recursion": 2}), random_ids()
    lowered = lower(model)
    assert type(lowered) is EvolmForCausalLM
    assert lowered.config.logit_scale == 1.0 != model.config.logit_scale
    torch.testing.assert_close(lowered(ids).logits, model(ids).logits, atol=3e-5, rtol=1e-5)


@settings(derandomize=True, deadline=None, max_examples=60)
@given(shape=shapes())
@torch.no_grad()
def test_any_shape_is_exported_as_what_it_is(recipe_of, shape):
    model, ids = shaken(build_model(recipe_of(model=shape), 0)), random_ids(length=24)
    lowered, reached = lower(model), tier(model.config)
    assert type(lowered).__name__ == reached.model
    assert (reached.name == "stock") is (type(lowered) is not EvolmForCausalLM)
    reference = model(ids).logits
    assert (lowered(ids).logits - reference).abs().max() < 1e-5 * reference.abs().max() + 1e-5


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_every_gene_has_a_tier(recipe_of, shape):
    config = config_of(recipe_of(model=shape))
    assert tier(config).name == ("stock" if stock_of(config) else "native" if "alibi" in str(shape) else "evolm")


@pytest.mark.parametrize(
    ("name", "shape", "said"),
    [
        ("Llama", {"qk_norm": False}, {}),
        ("Qwen3", {"qk_norm": True}, {}),
        ("Mixtral", MOE, {"num_local_experts": 4, "num_experts_per_tok": 2}),
    ],
)
@torch.no_grad()
def test_copied_weights_give_a_stock_model_the_same_logits(model_of, name, shape, said):
    """Without going through our own lowering: the configuration is written by hand."""
    model, ids = model_of({**shape, "n_heads": 4, "n_kv_heads": 2, "ffn_dim": 80}), random_ids()
    kind, configuration = (getattr(transformers, f"{name}{part}") for part in ("ForCausalLM", "Config"))
    stock = kind(
        configuration(
            vocab_size=320,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            intermediate_size=80,
            rms_norm_eps=1e-6,
            rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
            max_position_embeddings=32,
            tie_word_embeddings=True,
            **said,
        )
    ).eval()
    stock.load_state_dict(model.state_dict())
    torch.testing.assert_close(model(ids).logits, stock(ids).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("shape", [{}, MOE], ids=["qwen3", "mixtral"])
@torch.no_grad()
def test_stock_weights_load_into_our_model(recipe_of, shape):
    ours = config_of(recipe_of(model={"ffn_dim": 96, **shape}))
    torch.manual_seed(0)
    stock = stock_of(ours)
    theirs, model, ids = stock.model(stock.config(ours)).eval(), EvolmForCausalLM(ours).eval(), random_ids()
    model.load_state_dict(theirs.state_dict())
    torch.testing.assert_close(model(ids).logits, theirs(ids).logits, atol=1e-5, rtol=1e-5)


@stock_shapes
@torch.no_grad()
def test_weights_have_the_names_that_transformers_itself_would_write(model_of, kind, shape, tmp_path):
    lowered = lower(model_of(shape))
    lowered.save_pretrained(tmp_path)
    theirs, ours = load_file(tmp_path / "model.safetensors"), published_weights(lowered)
    assert set(theirs) == set(ours) - ({"lm_head.weight"} if lowered.config.tie_word_embeddings else set())
    assert all(torch.equal(tensor, ours[name]) for name, tensor in theirs.items())
