"""The training loss, without ever holding the logits of a whole batch, and what mixtures of experts add to it.

The output head and the cross-entropy are one operation: a few rows of logits at a time are turned into their own
gradient while they are still in the cache. For small models on a CPU this saves a quarter of the step, for large
vocabularies most of the memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

CHUNK_BYTES = {"cpu": 2**21, "cuda": 2**28}
"""Logits held at a time: what fits a core's cache, or what keeps a GPU busy."""


def linear_cross_entropy(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, terms: torch.Tensor | None = None
) -> torch.Tensor:
    """Sum over N positions of the cross-entropy in nats of softmax(hidden @ weight^T) with the targets.

    hidden (N, D), weight (V, D), targets (N) of integers; products in the autocast precision where one is set, softmax
    and sum in fp32. Differentiable in hidden and weight. The terms of the sum are written to `terms` (N), fp32, where
    it is given.
    """
    kind = hidden.device.type
    precision = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
    total: torch.Tensor = _LinearCrossEntropy.apply(hidden, weight, targets, precision, terms)  # type: ignore[no-untyped-call]
    return total


@torch.no_grad()
def token_nats(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """The terms of `linear_cross_entropy`, one for each of the N positions, fp32; not differentiable."""
    rows = _rows(hidden, weight)
    pieces = []
    for start in range(0, len(hidden), rows):
        logits = (hidden[start : start + rows] @ weight.t()).float()
        picked = logits.gather(1, targets[start : start + rows, None])[:, 0]
        pieces.append(logits.logsumexp(dim=1) - picked)
    return torch.cat(pieces)


def load_imbalance(router_logits: Sequence[torch.Tensor], active: int) -> torch.Tensor:
    """How unevenly B sequences use the X experts, summed over sequences: the mean over layers of X * sum_i f_i p_i.

    f_i is the share of a sequence's tokens that use expert i, p_i the mean of its probability (Fedus et al. 2021,
    arXiv 2101.03961, equations 4 to 6); with `active` experts for each token it is `active` where the load is even, and
    X where all tokens are sure of the same expert. Every sequence counts by itself: over a whole batch it would depend
    on how the batch is divided into micro-batches. router_logits: one (B, T, X) for each layer.
    """
    probabilities = torch.stack(tuple(router_logits)).softmax(dim=-1)
    with torch.no_grad():
        chosen = probabilities.topk(active).indices
        load = torch.zeros_like(probabilities).scatter_(-1, chosen, 1.0).mean(dim=2)
    products = load * probabilities.mean(dim=2)
    return products.shape[-1] * products.sum(dim=-1).mean(dim=0).sum()


def _rows(hidden: torch.Tensor, weight: torch.Tensor) -> int:
    """Positions whose logits are held at a time."""
    return max(16, CHUNK_BYTES.get(hidden.device.type, 2**28) // (4 * len(weight)))


class _LinearCrossEntropy(torch.autograd.Function):
    """d(loss)/d(logits) is softmax - one-hot, so both gradients are known as soon as the logits are."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        targets: torch.Tensor,
        precision: torch.dtype,
        terms: torch.Tensor | None,
    ) -> torch.Tensor:
        inputs, matrix = hidden.to(precision), weight.to(precision)
        rows = _rows(hidden, weight)
        to_hidden = torch.empty_like(inputs)
        to_weight = torch.zeros_like(weight, dtype=torch.float32)
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        with torch.autocast(hidden.device.type, enabled=False):
            for start in range(0, len(inputs), rows):
                part = inputs[start : start + rows]
                target = targets[start : start + rows, None]
                logits = (part @ matrix.t()).float()
                picked = logits.gather(1, target)
                top = logits.amax(dim=1, keepdim=True)
                mass = logits.sub_(top).exp_().sum(dim=1, keepdim=True)
                nats = mass.log() + top - picked
                total += nats.sum()
                if terms is not None:
                    terms[start : start + rows] = nats[:, 0]
                gradient = logits.div_(mass).scatter_add_(1, target, torch.full_like(top, -1.0)).to(precision)
                torch.mm(gradient, matrix, out=to_hidden[start : start + rows])
                if precision == torch.float32:
                    to_weight.addmm_(gradient.t(), part)
                else:
                    to_weight += gradient.t() @ part
        ctx.save_for_backward(to_hidden, to_weight)
        ctx.dtypes = (hidden.dtype, weight.dtype)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None, None, None]:
        to_hidden, to_weight = ctx.saved_tensors
        scale = gradients[0]
        return (to_hidden * scale).to(ctx.dtypes[0]), (to_weight * scale).to(ctx.dtypes[1]), None, None, None
