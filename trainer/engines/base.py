"""The seam between the training loop and what holds a model: one device, or many in different ways.

The loop owns the step: which samples, which loss, how large a step. An engine owns where weights, gradients and moments
lie. Whatever the engine, the loss is a sum over samples divided by the tokens of the whole batch, gradients are summed
over ranks, and a checkpoint is the same folder: a run that was begun under one engine goes on under any other.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import nn

from trainer.averaging import Average
from trainer.checkpoint import Content
from trainer.distillation import Teacher
from trainer.engines.ranks import ALONE, Ranks
from trainer.extras import EngineName, ZeroStage
from trainer.model import EvolmForCausalLM
from trainer.objective import Losses, training_loss
from trainer.optim import Optimizer
from trainer.recipe import Recipe


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

    model: EvolmForCausalLM
    """With the parameters as this rank has them: to be run through `forward` alone."""

    optimizer: Optimizer
    """Whose groups get the learning rate of each step."""

    compiles: bool
    """Whether its blocks can be compiled."""

    norms: Mapping[str, torch.Tensor]
    """The norm of each kind of parameter's gradient when it was last clipped; empty where that is not known."""

    def forward(self, batch: torch.Tensor, *, last: bool, length: int | None = None) -> Losses:
        """`training_loss` of token ids (B, T+1); `last` says that this is the step's last pass."""

    def backward(self, loss: torch.Tensor) -> None:
        """Add the gradient of this rank's loss to that of the step, which is summed over ranks."""

    def clip(self, limit: float) -> torch.Tensor:
        """Clip the gradient to a norm of `limit`; returns the norm that it had."""

    def update(self) -> None:
        """One optimiser step."""

    def content(self, average: Average | None) -> Content:
        """What a checkpoint holds, whatever the engine. Of use on the first rank."""

    def restore(self, folder: Path, average: Average | None) -> None:
        """Fill model, optimiser and mean from a checkpoint of any engine. Raises CheckpointError."""

    def whole(self) -> EvolmForCausalLM | None:
        """The model as one plain module, to be scored or exported; None on all ranks but the first."""


class Objective(nn.Module):
    """`training_loss` as a module, so that what wraps it sees every weight used inside one forward pass."""

    def __init__(self, model: EvolmForCausalLM, recipe: Recipe, teacher: Teacher | None) -> None:
        super().__init__()
        self.model, self.recipe, self.teacher = model, recipe, teacher

    def forward(self, batch: torch.Tensor, length: int | None = None) -> Losses:
        """The losses of token ids (B, T+1), cut into pieces of `length`."""
        return training_loss(self.model, self.recipe, batch, length=length, teacher=self.teacher)


@contextmanager
def uncounted(model: nn.Module) -> Iterator[None]:
    """For passes that count nothing: what a model notes as it trains, such as the loads of experts, is as before."""
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    try:
        yield
    finally:
        with torch.no_grad():
            for name, buffer in model.named_buffers():
                buffer.copy_(before[name])
