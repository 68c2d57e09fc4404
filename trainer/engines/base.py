"""The seam between the training loop and what holds a model: one device, or many in different ways.

The loop owns the step: which samples, which loss, how large a step. An engine owns where weights, gradients and moments
lie. Whatever the engine, the loss is a sum over samples divided by the tokens of the whole batch, gradients are summed
over ranks, and a checkpoint is the same folder: a run that was begun under one engine goes on under any other.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import torch
from torch import nn

from trainer.checkpoint import RunState, Tensors
from trainer.engines.ranks import ALONE, Ranks
from trainer.model import EvolmForCausalLM
from trainer.objective import training_loss
from trainer.recipe import Recipe

EngineName = Literal["single", "ddp", "fsdp", "deepspeed"]
ENGINES: tuple[EngineName, ...] = ("single", "ddp", "fsdp", "deepspeed")

ZeroStage = Literal[1, 2, 3]

Losses = tuple[torch.Tensor, torch.Tensor | None]


@dataclass(frozen=True, kw_only=True)
class Setup:
    """Which engine, over which ranks. `zero_stage` and `offload` (optimiser state in the CPU's memory) are
    DeepSpeed's. None of it is part of a recipe: it changes results by rounding alone."""

    engine: EngineName = "single"
    ranks: Ranks = ALONE
    zero_stage: ZeroStage = 2
    offload: bool = False


class Engine(Protocol):
    """Holds one model and its optimiser. All ranks call every method, in the same order."""

    optimizer: torch.optim.Optimizer
    """Whose groups get the learning rate of each step."""

    def forward(self, batch: torch.Tensor, *, last: bool) -> Losses:
        """`training_loss` of token ids (B, T+1); `last` says that this is the step's last pass."""

    def backward(self, loss: torch.Tensor) -> None:
        """Add the gradient of this rank's loss to that of the step, which is summed over ranks."""

    def update(self, limit: float) -> torch.Tensor:
        """One optimiser step with the gradient, cut to a norm of `limit`; returns the norm that it had."""

    def snapshot(self) -> Tensors | None:
        """Whole weights and moments by parameter name, in fp32 on the CPU; None on all ranks but the first."""

    def restore(self, folder: Path) -> RunState:
        """Fill model and optimiser from a checkpoint of any engine. Raises CheckpointError."""

    def whole(self) -> EvolmForCausalLM | None:
        """The model as one plain module, to be scored or exported; None on all ranks but the first."""


class Objective(nn.Module):
    """`training_loss` as a module, so that what wraps it sees every weight used inside one forward pass."""

    def __init__(self, model: EvolmForCausalLM, recipe: Recipe) -> None:
        super().__init__()
        self.model, self.recipe = model, recipe

    def forward(self, batch: torch.Tensor) -> Losses:
        """Token ids (B, T+1) -> nats summed over tokens, and what a mixture adds summed over sequences."""
        return training_loss(self.model, self.recipe, batch)
