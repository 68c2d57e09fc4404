"""From a recipe to a model: the configuration that says the same, and seeded initial weights."""

from __future__ import annotations

from typing import Any

import torch

from trainer.attention_kernels import attention_kernel
from trainer.completep import branch_multiplier, factors, logit_multiplier
from trainer.data.loader import stream_seed
from trainer.model import blocked_attention
from trainer.model.configuration_evolm import EvolmConfig
from trainer.model.modeling_evolm import EvolmForCausalLM
from trainer.parameter_groups import kind_of, writes_to_stream
from trainer.recipe import Model, Recipe
from trainer.recipe.model import ABSOLUTE

LAYER_ATTRIBUTES = {
    "num_attention_heads": "n_heads",
    "num_key_value_heads": "n_kv_heads",
    "intermediate_size": "ffn_dim",
    "ffn": "ffn",
    "positions": "positions",
    "recursion": "recursion",
}
"""What layers may differ in, by the name of the configuration and that of the recipe."""

KERNELS = {"blocked": blocked_attention.NAME, "sdpa": "sdpa", "flex": "flex_attention", "eager": "eager"}
"""Attention kernels by the name of the recipe and that of transformers."""


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
    slides = any(layer.attention == "sliding" for layer in layers)
    return EvolmConfig(
        vocab_size=recipe.data.tokenizer.vocab_size,
        hidden_size=model.d_model,
        num_hidden_layers=model.n_layers,
        head_dim=first.head_dim,
        **{attribute: getattr(first, field) for attribute, field in LAYER_ATTRIBUTES.items()},
        num_experts=model.n_experts,
        num_experts_per_tok=model.n_active_experts,
        num_shared_experts=model.n_shared_experts,
        expert_bias=model.ffn == "moe" and model.balance == "bias",
        qk_norm=model.qk_norm,
        norm=model.norm,
        norm_placement=model.norm_placement,
        rms_norm_eps=model.norm_eps,
        parallel_block=model.parallel_block,
        bias=model.bias,
        absolute_positions=model.positions if model.positions in ABSOLUTE else None,
        rope_parameters=_rope(model, recipe.data.sequence_length),
        max_position_embeddings=recipe.data.sequence_length,
        layer_types=[f"{layer.attention}_attention" for layer in layers],
        sliding_window=model.window if slides else None,
        attn_logit_softcapping=model.attention_softcap or None,
        final_logit_softcapping=model.logit_softcap or None,
        embedding_multiplier=model.embedding_multiplier,
        residual_multiplier=branch_multiplier(recipe),
        logit_scale=logit_multiplier(recipe),
        dropout=model.dropout,
        attention_dropout=model.attention_dropout,
        tie_word_embeddings=model.tie_embeddings,
        initializer_range=model.init_std,
        zero_init=model.zero_init,
        **({"per_layer_config": differing} if differing else {}),
    )


def _rope(model: Model, sequence_length: int) -> dict[str, Any]:
    """Rotary positions as transformers says them. What was there before it was stretched is a context that is shorter
    by the factor."""
    values: dict[str, Any] = {"rope_type": "default", "rope_theta": model.rope_theta}
    if model.rope_scaling != "none":
        values |= {"rope_type": model.rope_scaling, "factor": model.rope_factor}
    if model.rope_scaling == "yarn":
        values["original_max_position_embeddings"] = max(1, round(sequence_length / model.rope_factor))
    if model.rope_fraction != 1.0:
        values["partial_rotary_factor"] = model.rope_fraction
    return values


def build_model(recipe: Recipe, seed: int, device: torch.device | str = "cpu") -> EvolmForCausalLM:
    """The recipe's model with the initial weights of `seed`, in fp32. The global random state is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(stream_seed(seed, "init"))
        model = EvolmForCausalLM._from_config(
            config_of(recipe),
            attn_implementation=KERNELS[attention_kernel(recipe, torch.device(device).type)],
            dtype=torch.float32,
        )
    _spread(model, recipe)
    return model.to(device)


@torch.no_grad()
def _spread(model: EvolmForCausalLM, recipe: Recipe) -> None:
    """Give initial weights the standard deviations of the recipe's parameterisation, from those of the standard one."""
    for name, parameter in model.named_parameters():
        std = factors(kind_of(name, parameter), recipe, writes=writes_to_stream(name)).std
        if std != 1:
            parameter.mul_(std)
