"""Guards the folding of multipliers: the same logits from weights that are multiplied once, before anything is run."""

import pytest
import torch

from trainer.export.fold import folded
from trainer.export.lower import lower
from trainer.model import EvolmForCausalLM, build_model

MULTIPLIERS = {"embedding_multiplier": 3.0, "residual_multiplier": 0.3, "logit_multiplier": 0.2}

SHAPES = {
    "pre": {},
    "untied": {"tie_embeddings": False},
    "sandwich": {"norm_placement": "sandwich"},
    "post": {"norm_placement": "post"},
    "layernorm, biases": {"norm": "layernorm", "bias": "all"},
    "mixture": {"ffn": "moe", "n_experts": 3, "n_shared_experts": 1},
    "recursion": {"recursion": 3},
    "parallel": {"parallel_block": True},
    "learned positions": {"positions": "learned"},
    "softcap": {"logit_softcap": 0.1},
}


def some_logits(model):
    """The logits of a sequence."""
    return model(torch.arange(3, 35)[None]).logits


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
@torch.no_grad()
def test_logits_stay(recipe_of, shape):
    model = build_model(recipe_of(model={**shape, **MULTIPLIERS}), 0).eval()
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    config, weights = folded(model)
    assert (config.residual_multiplier, config.embedding_multiplier, config.logit_scale) == (1, 1, 1)
    other = EvolmForCausalLM._from_config(config, attn_implementation="sdpa", dtype=torch.float32).eval()
    other.load_state_dict(weights, strict=True)
    logits = some_logits(model)
    assert (some_logits(other) - logits).abs().max() < 1e-5 * logits.abs().max()
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


@torch.no_grad()
def test_a_model_of_completep_is_exported_as_a_stock_class(recipe_of):
    train = {"parameterization": "completep", "base_d_model": 8, "base_n_layers": 1}
    model = build_model(recipe_of(train=train), 0).eval()
    lowered = lower(model)
    assert type(lowered).__name__ == "Qwen3ForCausalLM"
    logits = some_logits(model)
    assert (some_logits(lowered) - logits).abs().max() < 1e-5 * logits.abs().max()
