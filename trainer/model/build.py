"""From a recipe to a model: the configuration that says the same, and seeded initial weights."""

from __future__ import annotations

from typing import Any

import torch

from trainer.completep import branch_multiplier, factors, logit_multiplier
from trainer.data.loader import stream_seed
from trainer.model.configuration_evolm import EvolmConfig
from trainer.model.modeling_evolm import EvolmForCausalLM
from trainer.parameter_groups import kind_of, writes_to_stream
from trainer.recipe import Recipe

LAYER_ATTRIBUTES = {
    "num_attention_heads": "n_heads",
    "num_key_value_heads": "n_kv_heads",
    "intermediate_size": "ffn_dim",
}


def config_of(recipe: Recipe) -> EvolmConfig:
    """The transformers configuration of a recipe's model. What differs between layers goes into `per_layer_config`."""
    model = recipe.model
    layers = model.layers()
    first = layers[0]
    differing: dict[int, dict[str, Any]] = {}
    for index, layer in enumerate(layers):
        for attribute, field in LAYER_ATTRIBUTES.items():
            if getattr(layer, field) != getattr(first, field):
                differing.setdefault(index, {})[attribute] = getattr(layer, field)
    return EvolmConfig(
        vocab_size=recipe.data.tokenizer.vocab_size,
        hidden_size=model.d_model,
        num_hidden_layers=model.n_layers,
        num_attention_heads=first.n_heads,
        num_key_value_heads=first.n_kv_heads,
        head_dim=first.head_dim,
        intermediate_size=first.ffn_dim,
        ffn=model.ffn,
        num_experts=model.n_experts,
        num_experts_per_tok=model.n_active_experts,
        qk_norm=model.qk_norm,
        rms_norm_eps=model.norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": model.rope_theta},
        max_position_embeddings=recipe.data.sequence_length,
        tie_word_embeddings=model.tie_embeddings,
        initializer_range=model.init_std,
        residual_multiplier=branch_multiplier(recipe),
        logit_scale=logit_multiplier(recipe),
        **({"per_layer_config": differing} if differing else {}),
    )


def build_model(recipe: Recipe, seed: int, device: torch.device | str = "cpu") -> EvolmForCausalLM:
    """The recipe's model with the initial weights of `seed`, in fp32. The global random state is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(stream_seed(seed, "init"))
        model = EvolmForCausalLM._from_config(config_of(recipe), attn_implementation="sdpa", dtype=torch.float32)
    _spread(model, recipe)
    return model.to(device)


@torch.no_grad()
def _spread(model: EvolmForCausalLM, recipe: Recipe) -> None:
    """Give initial weights the standard deviations of the recipe's parameterisation, from those of the standard one."""
    for name, parameter in model.named_parameters():
        std = factors(kind_of(name, parameter), recipe, writes=writes_to_stream(name)).std
        if std != 1:
            parameter.mul_(std)
