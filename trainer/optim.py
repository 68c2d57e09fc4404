"""Optimisers: how gradients become steps."""

from __future__ import annotations

import torch
from torch import nn

from trainer.parameter_groups import parameter_groups
from trainer.recipe import Recipe


def build_optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """AdamW with decoupled weight decay (Loshchilov and Hutter 2019, arXiv 1711.05101, algorithm 2) on the matrices of
    the blocks and the output head; embeddings and norms are not decayed."""
    train = recipe.train
    return torch.optim.AdamW(
        parameter_groups(model, recipe), lr=train.learning_rate, betas=(train.beta1, train.beta2), fused=True
    )


def set_learning_rate(optimizer: torch.optim.Optimizer, value: float) -> None:
    """The scheduled learning rate, times what each group scales it by."""
    for group in optimizer.param_groups:
        group["lr"] = value * group["scale"]
