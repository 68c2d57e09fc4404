"""Multipliers folded into weights: the same function, in the words of classes that know no multipliers."""

from __future__ import annotations

import copy

import torch

from trainer.model import EvolmConfig, EvolmForCausalLM


@torch.no_grad()
def folded(model: EvolmForCausalLM) -> tuple[EvolmConfig, dict[str, torch.Tensor]]:
    """A configuration without multipliers, and the weights that compute the same with it.

    What branches are multiplied by goes into the last thing that each does: its output projection, or the norm after
    it. What the embeddings are multiplied by goes into their matrix; where that is the head's too, and for the logits'
    own multiplier, the final norm makes up for it. The model is left as it is.
    """
    config, weights = copy.deepcopy(model.config), dict(model.state_dict())
    branch, embedding, logits = config.residual_multiplier, config.embedding_multiplier, config.logit_scale
    tied = config.tie_word_embeddings
    final = logits / embedding if tied else logits
    for name, tensor in weights.items():
        by = 1.0
        if "embed_" in name or (tied and name == "lm_head.weight"):
            by = embedding
        elif name.startswith("model.norm."):
            by = final
        elif _writes(name, config.norm_placement):
            by = branch
        if by != 1.0:
            weights[name] = tensor * by
    config.residual_multiplier = config.embedding_multiplier = config.logit_scale = 1.0
    return config, weights


def _writes(name: str, norm_placement: str) -> bool:
    """Whether a weight or bias is of the last part of a branch."""
    if norm_placement == "pre":
        return ".o_proj." in name or ".down_proj" in name
    return "post_attention_layernorm." in name or "post_feedforward_layernorm." in name
