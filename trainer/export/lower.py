"""Lowering: a genome that says no more than a stock class can say is exported as that class.

Stock classes need no code of ours and are the ones that serving engines know best. Weight names are shared with the
Llama family, so lowering copies a configuration and tensors, whose content at most takes multipliers up (`folded`).
Files of Mixtral alone name their weights otherwise than the class does, and hold its experts one by one:
`published_weights` takes the stacks apart.

    swiglu, layers alike, no qk-norm    LlamaForCausalLM
    swiglu, layers alike, qk-norm       Qwen3ForCausalLM
    moe, layers alike, no qk-norm       MixtralForCausalLM
    anything else                       EvolmForCausalLM, with its modelling files
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from trainer.export.fold import folded
from trainer.model import EvolmConfig, EvolmForCausalLM


def stock_class(config: EvolmConfig) -> tuple[type[PreTrainedModel], Any] | None:
    """The stock class and its configuration that compute the same function, or None when there is none."""
    if config.is_heterogeneous or config.ffn not in ("swiglu", "moe") or (config.ffn == "moe" and config.qk_norm):
        return None
    if config.ffn == "swiglu" and not config.qk_norm and config.hidden_size % config.num_attention_heads:
        return None  # LlamaConfig refuses it, whatever the head size
    shared = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.intermediate_size,
        "hidden_act": "silu",
        "rms_norm_eps": config.rms_norm_eps,
        "rope_parameters": dict(config.rope_parameters or {}),
        "max_position_embeddings": config.max_position_embeddings,
        "tie_word_embeddings": config.tie_word_embeddings,
        "initializer_range": config.initializer_range,
        "pad_token_id": config.pad_token_id,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": config.eos_token_id,
    }
    if config.ffn == "moe":
        experts = {"num_local_experts": config.num_experts, "num_experts_per_tok": config.num_experts_per_tok}
        return MixtralForCausalLM, MixtralConfig(**shared, **experts)
    if config.qk_norm:
        return Qwen3ForCausalLM, Qwen3Config(**shared)
    return LlamaForCausalLM, LlamaConfig(**shared)


def lower(model: EvolmForCausalLM) -> PreTrainedModel:
    """The model as a stock class with the same weights, multipliers folded into them, or the model itself. Raises
    RuntimeError if the weights differ."""
    config, weights = folded(model)
    stock = stock_class(config)
    if stock is None:
        return model
    kind, config = stock
    with torch.random.fork_rng(devices=[]):
        lowered = kind._from_config(config, dtype=torch.float32)
    lowered.load_state_dict(weights, strict=True)
    return lowered.eval()


def published_weights(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """The weights under the names that files of the model's class carry."""
    weights: dict[str, torch.Tensor] = model.state_dict()
    if not isinstance(model, MixtralForCausalLM):
        return weights
    published = {}
    for name, tensor in weights.items():
        layer, _, part = name.partition(".mlp.experts.")
        if part == "gate_up_proj":
            stacks = dict(zip(("w1", "w3"), tensor.chunk(2, dim=1), strict=True))
        elif part == "down_proj":
            stacks = {"w2": tensor}
        else:
            stacks = {}
            published[name.replace(".mlp.", ".block_sparse_moe.")] = tensor
        for matrix, stack in stacks.items():
            for index, expert in enumerate(stack):
                published[f"{layer}.block_sparse_moe.experts.{index}.{matrix}.weight"] = expert.clone()
    return published
