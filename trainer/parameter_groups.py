"""The parameters of a model by what they are, and how the optimiser treats each kind."""

from __future__ import annotations

from typing import Any

from torch import nn

from trainer.completep import Kind, factors
from trainer.recipe import Recipe

__all__ = ["Kind", "kind_of", "parameter_groups", "writes_to_stream"]


def kind_of(name: str, parameter: nn.Parameter) -> Kind:
    """What a parameter of EvolmForCausalLM is, by its name and shape."""
    if "embed_" in name:
        return "embedding"
    if parameter.ndim < 2:
        return "vector"
    if name.startswith("lm_head."):
        return "head"
    return "router" if name.endswith("mlp.gate.weight") else "hidden"


def writes_to_stream(name: str) -> bool:
    """Whether a parameter is the last of its branch: what it gives is added to the residual stream."""
    return ".o_proj." in name or ".down_proj" in name


def parameter_groups(model: nn.Module, recipe: Recipe) -> list[dict[str, Any]]:
    """One group for each kind that the model has, as optimisers take them.

    `scale` is what the scheduled learning rate is multiplied by; weight decay is for matrices other than embeddings,
    and is divided by it: optimisers decay by the product of the two.
    """
    members: dict[Kind, dict[str, nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        members.setdefault(kind_of(name, parameter), {})[name] = parameter
    train = recipe.train
    groups = []
    for kind, named in members.items():
        by = factors(kind, recipe)
        groups.append(
            {
                "kind": kind,
                "names": list(named),
                "params": list(named.values()),
                "scale": by.rate,
                "weight_decay": 0.0 if kind in ("embedding", "vector") else train.weight_decay / by.rate,
                "eps": train.adam_eps * by.eps,
            }
        )
    return groups
