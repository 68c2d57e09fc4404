"""Lowering: a genome that says no more than a stock class can say is exported as that class.

Stock classes need no code of ours and are the ones that serving engines know best. Weight names are shared with the
Llama family, so lowering mostly copies. Multipliers are folded into weights, and biases that a class has and the model
has not are zero.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Literal

import torch
from transformers import MixtralForCausalLM, PreTrainedModel, Qwen3MoeForCausalLM

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
    weights = _folded(model, (model.config.hidden_size**-0.5 if stock.shifted else 1.0))
    if stock.shifted:
        weights = {name: tensor - 1 if "norm" in name else tensor for name, tensor in weights.items()}
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
    config = copy.deepcopy(model.config)
    config.logit_scale = config.embedding_multiplier = config.residual_multiplier = 1.0
    with torch.random.fork_rng(devices=[]):
        folded: EvolmForCausalLM = EvolmForCausalLM._from_config(config, dtype=torch.float32)
    folded.load_state_dict(_folded(model, 1.0), strict=True)
    folded.eval()
    return folded


def _folded(model: EvolmForCausalLM, stored: float) -> Weights:
    """The weights with all multipliers in them: that of the embeddings, times `stored`, that of the branches in what
    they write last, and that of the logits, less what a tied embedding has taken, in the last norm."""
    config = model.config
    weights: Weights = dict(model.state_dict())
    embedding, logits, branch = stored * config.embedding_multiplier, config.logit_scale, config.residual_multiplier
    last = (
        ("o_proj", "down_proj")
        if config.norm_placement == "pre"
        else ("post_attention_layernorm", "post_feedforward_layernorm")
    )
    for name, tensor in weights.items():
        if "embed_" in name or (config.tie_word_embeddings and name.startswith("lm_head.")):
            weights[name] = tensor * embedding
        elif name.startswith("model.norm."):
            weights[name] = tensor * (logits / embedding if config.tie_word_embeddings else logits)
        elif any(part in name for part in last):
            weights[name] = tensor * branch
    return weights


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
