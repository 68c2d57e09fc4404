"""The parameters of a model by what they are, and how the optimiser treats each kind."""

from __future__ import annotations

from typing import Any, Literal

from torch import nn

from trainer.recipe import Recipe

Kind = Literal["embedding", "hidden", "router", "head", "vector"]
"""Token and position embeddings; matrices inside blocks; a mixture's routers; an untied output head; norms, biases and
gates."""


def kind_of(name: str, parameter: nn.Parameter) -> Kind:
    """What a parameter of EvolmForCausalLM is, by its name and shape."""
    if "embed_" in name:
        return "embedding"
    if parameter.ndim < 2:
        return "vector"
    if name.startswith("lm_head."):
        return "head"
    return "router" if name.endswith("mlp.gate.weight") else "hidden"


def parameter_groups(model: nn.Module, recipe: Recipe) -> list[dict[str, Any]]:
    """One group for each kind that the model has, as optimisers take them.

    `scale` is what the scheduled learning rate is multiplied by; weight decay is for matrices other than embeddings.
    """
    members: dict[Kind, dict[str, nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        members.setdefault(kind_of(name, parameter), {})[name] = parameter
    train = recipe.train
    return [
        {
            "kind": kind,
            "names": list(named),
            "params": list(named.values()),
            "scale": 1.0,
            "weight_decay": 0.0 if kind in ("embedding", "vector") else train.weight_decay,
            "eps": train.adam_eps,
        }
        for kind, named in members.items()
    ]
