"""One process, one device."""

from __future__ import annotations

from pathlib import Path

import torch

from trainer.checkpoint import RunState, Tensors, load_checkpoint, tensors_of
from trainer.engines.base import Losses, Setup
from trainer.model import EvolmForCausalLM, build_model
from trainer.objective import training_loss
from trainer.optim import build_optimizer
from trainer.recipe import Recipe


class Single:
    """The model whole, as torch has it."""

    def __init__(self, recipe: Recipe, seed: int, device: torch.device, setup: Setup) -> None:
        self.recipe, self.ranks = recipe, setup.ranks
        self.model = build_model(recipe, seed, device)
        self.optimizer = build_optimizer(self.model, recipe)

    def forward(self, batch: torch.Tensor, *, last: bool) -> Losses:
        """See Engine."""
        self.model.train()
        return training_loss(self.model, self.recipe, batch)

    def backward(self, loss: torch.Tensor) -> None:
        """See Engine."""
        loss.backward()  # type: ignore[no-untyped-call]

    def update(self, limit: float) -> torch.Tensor:
        """See Engine."""
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), limit)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def snapshot(self) -> Tensors | None:
        """See Engine."""
        return tensors_of(self.model, self.optimizer) if self.ranks.first else None

    def restore(self, folder: Path) -> RunState:
        """See Engine."""
        return load_checkpoint(folder, self.model, self.optimizer)

    def whole(self) -> EvolmForCausalLM | None:
        """See Engine."""
        return self.model if self.ranks.first else None
