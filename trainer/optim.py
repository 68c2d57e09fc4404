"""Optimisers: how gradients become steps.

Every group of `parameter_groups` keeps its own scale, weight decay and epsilon in every optimiser.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import nn

from search_spaces.errors import UsageError
from trainer.extras import missing_extra
from trainer.muon import Muon
from trainer.parameter_groups import parameter_groups
from trainer.recipe import OPTIMIZERS_OF_EXTRA, Recipe

Groups = list[dict[str, Any]]

ABSOLUTE = 1.0
"""Adafactor's steps are shares of a weight's root mean square, but of this at least (Shazeer and Stern 2018, arXiv
1804.04235, algorithm 4): with weights below one, its learning rate means what it means in AdamW."""

ADAN_DIFFERENCES = 0.92
"""Decay of the mean of differences of gradients (Xie et al. 2022, arXiv 2208.06677, section 4)."""

ADEMAMIX_SLOW = 0.9999
"""Decay of the slow mean of gradients (Pagliardini et al. 2024, arXiv 2409.03137, section 3)."""


class Optimizer(Protocol):
    """What training and checkpoints ask of an optimiser. A torch.optim.Optimizer is one."""

    @property
    def param_groups(self) -> Groups:
        """The groups, each with its `params` and their `names`."""

    @property
    def state(self) -> Mapping[torch.Tensor, dict[str, Any]]:
        """What it knows of each parameter."""

    def step(self) -> Any:
        """Update the parameters by their gradients."""

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients."""


class Together:
    """Two or more optimisers, each of its own parameters, as one."""

    def __init__(self, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        self.optimizers = list(optimizers)

    @property
    def param_groups(self) -> Groups:
        """The groups of all, themselves and no copies."""
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]

    @property
    def state(self) -> Mapping[torch.Tensor, dict[str, Any]]:
        """What each knows of its parameters."""
        return {parameter: state for optimizer in self.optimizers for parameter, state in optimizer.state.items()}

    def step(self) -> None:
        """One step of each."""
        for optimizer in self.optimizers:
            optimizer.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients."""
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=set_to_none)


def parts(optimizer: Optimizer) -> list[torch.optim.Optimizer]:
    """The optimisers of torch that an optimiser consists of."""
    if isinstance(optimizer, Together):
        return optimizer.optimizers
    assert isinstance(optimizer, torch.optim.Optimizer)
    return [optimizer]


def build_optimizer(model: nn.Module, recipe: Recipe) -> Optimizer:
    """The recipe's optimiser over all parameters of a model. Raises UsageError when it needs an extra that is not
    installed."""
    name, groups = recipe.train.optimizer, parameter_groups(model, recipe)
    if name == "adamw":
        return _adamw(groups, recipe)
    if name == "muon":
        hidden = [group for group in groups if group["kind"] == "hidden"]
        others = [group for group in groups if group["kind"] != "hidden"]
        muon = Muon(_without(hidden, "eps"), recipe.train.learning_rate, recipe.train.momentum)
        return Together([muon, _adamw(others, recipe)])
    if name == "adafactor":
        return torch.optim.Adafactor(_without(groups, "eps"), lr=recipe.train.learning_rate, eps=(None, ABSOLUTE))
    return _of_extra(groups, recipe)


def set_learning_rate(optimizer: Optimizer, value: float) -> None:
    """The scheduled learning rate, times what each group scales it by."""
    for group in optimizer.param_groups:
        group["lr"] = value * group["scale"]


def _adamw(groups: Groups, recipe: Recipe) -> torch.optim.Optimizer:
    """AdamW with decoupled weight decay (Loshchilov and Hutter 2019, arXiv 1711.05101, algorithm 2)."""
    train = recipe.train
    return torch.optim.AdamW(groups, lr=train.learning_rate, betas=(train.beta1, train.beta2), fused=True)


def _of_extra(groups: Groups, recipe: Recipe) -> torch.optim.Optimizer:
    """Lion (arXiv 2302.06675), SOAP (2409.11321), Adan (2208.06677) or AdEMAMix (2409.03137), as pytorch-optimizer has
    them."""
    train = recipe.train
    assert train.optimizer in OPTIMIZERS_OF_EXTRA
    if words := missing_extra(train.optimizer):
        raise UsageError(words)
    import pytorch_optimizer

    rate, betas = train.learning_rate, (train.beta1, train.beta2)
    optimizer: torch.optim.Optimizer
    if train.optimizer == "lion":
        optimizer = pytorch_optimizer.Lion(_without(groups, "eps"), lr=rate, betas=betas)
    elif train.optimizer == "soap":
        optimizer = pytorch_optimizer.SOAP(_one_sided(groups), lr=rate, betas=betas)
    elif train.optimizer == "adan":
        optimizer = pytorch_optimizer.Adan(groups, lr=rate, betas=(train.beta1, ADAN_DIFFERENCES, train.beta2))
    else:
        optimizer = pytorch_optimizer.AdEMAMix(groups, lr=rate, betas=(*betas, ADEMAMIX_SLOW), weight_decouple=True)
    return optimizer


def _without(groups: Groups, key: str) -> Groups:
    return [{name: value for name, value in group.items() if name != key} for group in groups]


def _one_sided(groups: Groups) -> Groups:
    """Groups for SOAP: the vocabulary's side of embeddings and head is left as it is (section 4 of the paper)."""
    return [
        {**group, "max_precondition_dim": max(min(one.shape) for one in group["params"])}
        if group["kind"] in ("embedding", "head")
        else group
        for group in groups
    ]
