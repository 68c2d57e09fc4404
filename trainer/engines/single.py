"""One process, one device."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from trainer.averaging import Average
from trainer.checkpoint import Content, content_of, load_checkpoint
from trainer.distillation import Teacher
from trainer.engines.base import Setup
from trainer.model import EvolmForCausalLM, build_model
from trainer.objective import Losses, training_loss
from trainer.optim import build_optimizer
from trainer.recipe import Recipe
from trainer.telemetry import gradient_norms


class Single:
    """The model whole, as torch has it."""

    compiles = True

    def __init__(
        self, recipe: Recipe, seed: int, device: torch.device, setup: Setup, teacher: Teacher | None = None
    ) -> None:
        self.recipe, self.ranks, self.teacher = recipe, setup.ranks, teacher
        self.norms: Mapping[str, torch.Tensor] = {}
        self.model = build_model(recipe, seed, device)
        self.optimizer = build_optimizer(self.model, recipe)

    def forward(self, batch: torch.Tensor, *, last: bool, length: int | None = None) -> Losses:
        """See Engine."""
        self.model.train()
        return training_loss(self.model, self.recipe, batch, length=length, teacher=self.teacher)

    def backward(self, loss: torch.Tensor) -> None:
        """See Engine."""
        loss.backward()  # type: ignore[no-untyped-call]

    def clip(self, limit: float) -> torch.Tensor:
        """See Engine."""
        self.norms = gradient_norms(self.optimizer.param_groups)
        norm: torch.Tensor = torch.linalg.vector_norm(torch.stack(list(self.norms.values())))
        torch.nn.utils.clip_grads_with_norm_(self.model.parameters(), limit, norm)
        return norm

    def update(self) -> None:
        """See Engine."""
        self.optimizer.step()

    def content(self, average: Average | None) -> Content:
        """See Engine."""
        return content_of(self.model, self.optimizer, average, keep=self.ranks.first)

    def restore(self, folder: Path, average: Average | None) -> None:
        """See Engine."""
        load_checkpoint(folder, self.model, self.optimizer, average)

    def whole(self) -> EvolmForCausalLM | None:
        """See Engine."""
        return self.model if self.ranks.first else None
