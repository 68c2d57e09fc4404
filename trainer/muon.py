"""Muon: momentum, made orthogonal, for the matrices inside blocks.

torch.optim.Muon takes single matrices one by one; here matrices of one shape are made orthogonal together, and the
stacked weights of experts each by itself.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of the quintic iteration (Jordan et al. 2024, kellerjordan.github.io/posts/muon)."""

ITERATIONS = 5

SMALLEST_NORM = 1e-7


def orthogonalised(matrices: torch.Tensor) -> torch.Tensor:
    """Matrices (N, ..., A, B) with their singular values brought near to one, in bf16: five
    Newton-Schulz iterations."""
    a, b, c = COEFFICIENTS
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.bfloat16().flatten(end_dim=-3)
    x = x.mT if tall else x
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=SMALLEST_NORM)
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).reshape(matrices.shape)


class Muon(torch.optim.Optimizer):
    """Nesterov momentum whose update is made orthogonal (Jordan et al. 2024), with decoupled weight decay.

    An update is scaled by 0.2 * sqrt(max(A, B)), which gives its entries the size of AdamW's, so that one learning rate
    serves both (Liu et al. 2025, arXiv 2502.16982, equation 4). Parameters have two dimensions, or more that are stacks
    of matrices.
    """

    def __init__(self, params: Iterable[dict[str, Any]], lr: float, momentum: float) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update of all parameters that have a gradient."""
        for group in self.param_groups:
            alike: dict[tuple[torch.Size, int], list[torch.Tensor]] = {}
            for name, parameter in zip(group.get("names", [""] * len(group["params"])), group["params"], strict=True):
                if parameter.grad is not None:
                    # An expert's gate and its other factor are two matrices, though they lie in one tensor.
                    parts = 2 if name.endswith(".gate_up_proj") else 1
                    alike.setdefault((parameter.shape, parts), []).append(parameter)
            for (_, parts), parameters in alike.items():
                self._update(parameters, parts, group)

    def _update(self, parameters: list[torch.Tensor], parts: int, group: dict[str, Any]) -> None:
        """Parameters of one shape, whose matrices are so many, one below the other."""
        rate, momentum = group["lr"], group["momentum"]
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        buffers = [self._buffer(parameter) for parameter in parameters]
        torch._foreach_lerp_(buffers, gradients, 1 - momentum)
        steps = torch.stack(torch._foreach_lerp(gradients, buffers, momentum))
        matrices = steps.reshape(*steps.shape[:-2], parts, -1, steps.shape[-1])
        updates = orthogonalised(matrices).reshape(steps.shape)
        scale = 0.2 * max(matrices.shape[-2:]) ** 0.5
        torch._foreach_mul_(parameters, 1 - rate * group["weight_decay"])
        torch._foreach_add_(parameters, list(updates.to(parameters[0].dtype).unbind()), alpha=-rate * scale)

    def _buffer(self, parameter: torch.Tensor) -> torch.Tensor:
        state = self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        buffer: torch.Tensor = state["momentum_buffer"]
        return buffer
