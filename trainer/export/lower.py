"""Lowering: a genome that says no more than a stock class can say is exported as that class.

Stock classes need no code of ours and are the ones that serving engines know best. Weight names are shared with the
Llama family, so lowering mostly copies. Multipliers are taken up by weights (`folded`), and biases that a class has and
the model has not are zero.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from transformers import MixtralForCausalLM, PreTrainedModel, Qwen3MoeForCausalLM

from trainer.export.fold import folded
from trainer.export.stock import CLASSES, Stock, demands
from trainer.model import EvolmConfig, EvolmForCausalLM

Weights = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Tier:
    """How far an exported model carries, and why.

    `stock`: a class of transformers, which needs no code of ours. `evolm`: EvolmForCausalLM with its modelling files,
    in transformers and in engines that run transformers' classes with kernels of their own. `native`: in transformers
    alone.
    """

    name: Literal["stock", "evolm", "native"]
    model: str
    reason: str


def tier(config: EvolmConfig) -> Tier:
    """The tier of a model, the name of its class, and the reason."""
    if (stock := stock_of(config)) is not None:
        return Tier("stock", stock.name, f"{stock.name} computes the same")
    demanded = demands(config)
    known = frozenset[str]().union(*(stock.needs | stock.can for stock in CLASSES))
    alone = sorted(demanded - known)
    if alone:
        reason = f"no stock class has {', '.join(alone)}"
    else:
        reason = f"no stock class has {', '.join(sorted(demanded))} {'together' if len(demanded) > 1 else 'alone'}"
    if "alibi" in demanded:
        return Tier("native", "EvolmForCausalLM", f"{reason}; kernels of serving engines add no distances to scores")
    return Tier("evolm", "EvolmForCausalLM", reason)


def stock_of(config: EvolmConfig) -> Stock | None:
    """The first stock class that computes what this configuration says, or None."""
    demanded = demands(config)
    return next((one for one in CLASSES if one.needs <= demanded <= one.needs | one.can), None)


def lower(model: EvolmForCausalLM) -> PreTrainedModel:
    """The model as a stock class with the same logits, or as EvolmForCausalLM. Raises RuntimeError where the weights of
    the two do not pair up."""
    stock = stock_of(model.config)
    if stock is None:
        return _of_our_own(model)
    with torch.random.fork_rng(devices=[]):
        lowered = stock.model._from_config(stock.config(model.config), dtype=torch.float32)
    _, weights = folded(model)
    if stock.shifted:
        weights = _shifted(weights, model.config)
    for ours, theirs in stock.renamed:
        weights = {name.replace(ours, theirs): tensor for name, tensor in weights.items()}
    for name, tensor in lowered.state_dict().items():
        if name.endswith(".bias"):
            weights.setdefault(name, torch.zeros_like(tensor))
    lowered.load_state_dict(weights, strict=True)
    return lowered.eval()


def _of_our_own(model: EvolmForCausalLM) -> EvolmForCausalLM:
    """The model as it is; but engines multiply logits after they bend them, so that a multiplier is folded where there
    is a softcap too."""
    if model.config.logit_scale == 1.0 or not model.config.final_logit_softcapping:
        return model
    config, weights = folded(model)
    with torch.random.fork_rng(devices=[]):
        bare: EvolmForCausalLM = EvolmForCausalLM._from_config(config, dtype=torch.float32)
    bare.load_state_dict(weights, strict=True)
    bare.eval()
    return bare


def _shifted(weights: Weights, config: EvolmConfig) -> Weights:
    """For classes whose norms multiply by 1 + weight and whose embeddings are multiplied by the root of the width: the
    final norm makes up for that where the embeddings are the head's too."""
    root = config.hidden_size**0.5
    shifted = {name: tensor - 1 if "norm" in name else tensor for name, tensor in weights.items()}
    for name in ("model.embed_tokens.weight", *(("lm_head.weight",) if config.tie_word_embeddings else ())):
        shifted[name] = weights[name] / root
    if config.tie_word_embeddings:
        shifted["model.norm.weight"] = weights["model.norm.weight"] * root - 1
    return shifted


def published_weights(model: PreTrainedModel) -> Weights:
    """The weights under the names that files of the model's class carry: those of mixtures hold experts one by one."""
    weights: Weights = model.state_dict()
    if isinstance(model, MixtralForCausalLM):
        block, gate, up, down = "block_sparse_moe", "w1", "w3", "w2"
    elif isinstance(model, Qwen3MoeForCausalLM):
        block, gate, up, down = "mlp", "gate_proj", "up_proj", "down_proj"
    else:
        return weights
    published = {}
    for name, tensor in weights.items():
        layer, _, part = name.partition(".mlp.experts.")
        if part == "gate_up_proj":
            stacks = dict(zip((gate, up), tensor.chunk(2, dim=1), strict=True))
        elif part == "down_proj":
            stacks = {down: tensor}
        else:
            stacks = {}
            published[name.replace(".mlp.", f".{block}.")] = tensor
        for matrix, stack in stacks.items():
            for index, expert in enumerate(stack):
                published[f"{layer}.{block}.experts.{index}.{matrix}.weight"] = expert.clone()
    return published
