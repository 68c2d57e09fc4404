"""The scale of the loss in fp16: gradients that would be too small for it are made larger before they are computed."""

from __future__ import annotations

import math
from typing import Any

import torch

from trainer.errors import Diverged
from trainer.optim import Optimizer

SMALLEST = 2.0**-14
"""The scale below which it is not fp16's range that overflows: halved thirty times from where it starts."""


class LossScale:
    """torch's GradScaler (Micikevicius et al. 2018, arXiv 1710.03740, section 3.2): a step whose gradients overflow is
    left out and halves the scale, two thousand steps without one double it."""

    def __init__(self, device: torch.device) -> None:
        self._scaler = torch.amp.GradScaler(device.type)

    def scaled(self, loss: torch.Tensor) -> torch.Tensor:
        """A loss whose gradients are to be added, made larger."""
        return self._scaler.scale(loss)

    def unscale(self, optimizer: Optimizer) -> None:
        """Give gradients their size back, once for each step."""
        self._scaler.unscale_(optimizer)  # type: ignore[arg-type]

    def step(self, optimizer: Optimizer, *, skip: bool = False) -> None:
        """A step of the optimiser, unless a gradient has overflowed or it is to be skipped; adapts the scale."""
        if not skip:
            self._scaler.step(optimizer)  # type: ignore[arg-type]
        self._scaler.update()

    def overflowed(self, step: int, loss: float, norm: float) -> bool:
        """Whether a gradient that is not finite comes of the scale. Raises Diverged when no scale helps."""
        if math.isfinite(norm) or not math.isfinite(loss):
            return False
        scale = self._scaler.get_scale()
        if scale < SMALLEST:
            raise Diverged(f"step {step}: gradient norm {norm} in fp16, even with the loss scaled by {scale:.3g}")
        return True

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps: JSON values."""
        return dict(self._scaler.state_dict())

    def load(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        self._scaler.load_state_dict(state)
