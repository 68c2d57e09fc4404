"""Guards lowering: what a stock class of transformers can say, it computes to the same logits with the same weights."""

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from trainer.export.lower import lower, published_weights, stock_class
from trainer.model import EvolmForCausalLM, build_model, config_of

MOE = {"ffn": "moe", "n_experts": 4, "qk_norm": False}

STOCK = {
    "llama": (LlamaForCausalLM, {"qk_norm": False}),
    "llama gqa": (LlamaForCausalLM, {"qk_norm": False, "n_heads": 4, "n_kv_heads": 2}),
    "llama untied": (LlamaForCausalLM, {"qk_norm": False, "tie_embeddings": False}),
    "llama free head size": (LlamaForCausalLM, {"qk_norm": False, "n_heads": 4, "head_dim": 10}),
    "mixtral": (MixtralForCausalLM, MOE),
    "mixtral, three of five": (MixtralForCausalLM, {**MOE, "n_experts": 5, "n_active_experts": 3}),
    "mixtral, one of four": (MixtralForCausalLM, {**MOE, "n_active_experts": 1}),
    "mixtral gqa untied": (MixtralForCausalLM, {**MOE, "n_heads": 4, "n_kv_heads": 2, "tie_embeddings": False}),
    "mixtral free head size": (MixtralForCausalLM, {**MOE, "n_heads": 3, "head_dim": 10}),
    "mixtral rope and eps": (MixtralForCausalLM, {**MOE, "rope_theta": 300.0, "norm_eps": 1e-3}),
    "qwen3": (Qwen3ForCausalLM, {}),
    "qwen3 mqa": (Qwen3ForCausalLM, {"n_heads": 4, "n_kv_heads": 1}),
    "qwen3 free head size": (Qwen3ForCausalLM, {"n_heads": 3, "head_dim": 10}),
    "qwen3 untied": (Qwen3ForCausalLM, {"tie_embeddings": False}),
    "qwen3 lists that are alike": (Qwen3ForCausalLM, {"n_heads": [2, 2], "ffn_dim": [64, 64], "head_dim": 16}),
    "qwen3 rope and eps": (Qwen3ForCausalLM, {"rope_theta": 300.0, "norm_eps": 1e-3}),
}

OWN = {
    "gelu": {"ffn": "gelu"},
    "relu2": {"ffn": "relu2"},
    "heads per layer": {"n_heads": [4, 2], "head_dim": 8},
    "kv heads per layer": {"n_heads": 4, "n_kv_heads": [4, 2]},
    "ffn per layer": {"ffn_dim": [64, 96]},
    "moe with qk-norm": {**MOE, "qk_norm": True},
    "moe per layer": {**MOE, "ffn_dim": [64, 96]},
}


@pytest.fixture
def model_of(recipe_of):
    def build(shape):
        model = build_model(recipe_of(model=shape), 0)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
        return model.eval()

    return build


def random_ids():
    return torch.randint(3, 320, (2, 24), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("kind", "shape"), STOCK.values(), ids=STOCK.keys())
@torch.no_grad()
def test_a_shape_that_a_stock_class_knows_is_lowered_to_it_with_equal_logits(model_of, kind, shape):
    model, ids = model_of(shape), random_ids()
    lowered = lower(model)
    assert type(lowered) is kind
    torch.testing.assert_close(lowered(ids).logits, model(ids).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("shape", OWN.values(), ids=OWN.keys())
def test_a_shape_that_none_knows_stays_what_it_is(model_of, shape):
    model = model_of(shape)
    assert stock_class(model.config) is None
    assert lower(model) is model


@pytest.mark.parametrize(
    ("kind", "configuration", "shape", "said"),
    [
        (LlamaForCausalLM, LlamaConfig, {"qk_norm": False}, {}),
        (Qwen3ForCausalLM, Qwen3Config, {"qk_norm": True}, {}),
        (MixtralForCausalLM, MixtralConfig, MOE, {"num_local_experts": 4, "num_experts_per_tok": 2}),
    ],
)
@torch.no_grad()
def test_copied_weights_give_a_stock_model_the_same_logits(model_of, kind, configuration, shape, said):
    """Without going through our own lowering: the configuration is written by hand."""
    model, ids = model_of({**shape, "n_heads": 4, "n_kv_heads": 2, "ffn_dim": 80}), random_ids()
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
    kind, theirs = stock_class(ours)
    stock, model, ids = kind(theirs).eval(), EvolmForCausalLM(ours).eval(), random_ids()
    model.load_state_dict(stock.state_dict())
    torch.testing.assert_close(model(ids).logits, stock(ids).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["llama", "mixtral, three of five", "qwen3 untied"])
@torch.no_grad()
def test_weights_have_the_names_that_transformers_itself_would_write(model_of, kind, tmp_path):
    lowered = lower(model_of(STOCK[kind][1]))
    lowered.save_pretrained(tmp_path)
    theirs, ours = load_file(tmp_path / "model.safetensors"), published_weights(lowered)
    assert set(theirs) == set(ours) - ({"lm_head.weight"} if lowered.config.tie_word_embeddings else set())
    assert all(torch.equal(tensor, ours[name]) for name, tensor in theirs.items())
