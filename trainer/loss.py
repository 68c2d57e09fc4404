"""The training loss, without ever holding the logits of a whole batch, and what mixtures of experts add to it.

The output head and the cross-entropy are one operation: a few rows of logits at a time are turned into their own
gradient while they are still in the cache. For small models on a CPU this saves a quarter of the step, for large
vocabularies most of the memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional

CHUNK_BYTES = {"cpu": 2**23, "cuda": 2**28}
"""Logits held at a time: what stays in a cache and is still a large product, or what keeps a GPU busy."""


@dataclass(frozen=True, kw_only=True)
class Lesson:
    """What a teacher says of N positions, as its hidden states (N, E) and its output head (V, E), and how much that
    counts: `share` of the loss is temperature^2 * KL(teacher || student), both softened by the temperature (Hinton et
    al. 2015, arXiv 1503.02531, section 2)."""

    hidden: torch.Tensor
    weight: torch.Tensor
    share: float
    temperature: float = 1.0
    multiplier: float = 1.0
    softcap: float = 0.0


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    *,
    multiplier: float = 1.0,
    softcap: float = 0.0,
    z_loss: float = 0.0,
) -> torch.Tensor:
    """Sum over N positions of the cross-entropy in nats of softmax(logits) with the targets, and of z_loss times the
    squared log-sum of the exponentials of the logits (PaLM, arXiv 2204.02311, section 5).

    The logits are multiplier * hidden @ weight^T, bent by c * tanh(logits / c) where a softcap c is given. hidden
    (N, D), weight (V, D), targets (N) of integers; products in the autocast precision where one is set, softmax and sum
    in fp32. Differentiable in hidden and weight.
    """
    return fused_loss(hidden, weight, targets, multiplier=multiplier, softcap=softcap, z_loss=z_loss)[0]


def fused_loss(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    *,
    multiplier: float = 1.0,
    softcap: float = 0.0,
    z_loss: float = 0.0,
    lesson: Lesson | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`linear_cross_entropy`, of which a lesson takes its share, and beside it the cross-entropy alone, which has no
    gradient and one term for each of the N positions: the nats of the text, whatever else is made small."""
    kind = hidden.device.type
    precision = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
    terms = _Terms(multiplier=multiplier, softcap=softcap, z_loss=z_loss, lesson=lesson)
    total: tuple[torch.Tensor, torch.Tensor] = _LinearCrossEntropy.apply(  # type: ignore[no-untyped-call]
        hidden, weight, targets, precision, terms
    )
    return total


@torch.no_grad()
def token_nats(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    *,
    multiplier: float = 1.0,
    softcap: float = 0.0,
) -> torch.Tensor:
    """The cross-entropies that `linear_cross_entropy` sums, one for each of the N positions, fp32; not
    differentiable."""
    rows = _rows(hidden, weight)
    pieces = []
    for start in range(0, len(hidden), rows):
        logits = (hidden[start : start + rows] @ weight.t()).float()
        _bend(logits, multiplier, softcap)
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


def _bend(logits: torch.Tensor, multiplier: float, softcap: float) -> torch.Tensor | None:
    """Multiply and bend logits in place; returns the slope of the bend, d(bent) / d(multiplied), or None."""
    if multiplier != 1.0:
        logits.mul_(multiplier)
    if not softcap:
        return None
    bent = logits.div_(softcap).tanh_()
    slope = 1 - bent.square()
    logits.mul_(softcap)
    return slope


@dataclass(frozen=True, kw_only=True)
class _Terms:
    """What else there is to a loss than hidden states, head and targets."""

    multiplier: float
    softcap: float
    z_loss: float
    lesson: Lesson | None


class _LinearCrossEntropy(torch.autograd.Function):
    """d(loss)/d(logits) is softmax - one-hot, and as simple for the other terms, so both gradients are known as soon as
    the logits are."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        targets: torch.Tensor,
        precision: torch.dtype,
        terms: _Terms,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        inputs, matrix = hidden.to(precision), weight.to(precision)
        rows = _rows(hidden, weight)
        to_hidden = torch.empty_like(inputs)
        to_weight = torch.zeros_like(weight, dtype=torch.float32)
        nats = torch.empty(len(inputs), dtype=torch.float32, device=hidden.device)
        extra = torch.zeros((), dtype=torch.float32, device=hidden.device)
        with torch.autocast(hidden.device.type, enabled=False):
            for start in range(0, len(inputs), rows):
                part = inputs[start : start + rows]
                target = targets[start : start + rows, None]
                logits = (part @ matrix.t()).float()
                gradient = _bent_gradient(logits, target, slice(start, start + rows), terms, nats, extra)
                gradient = gradient.to(precision)
                torch.mm(gradient, matrix, out=to_hidden[start : start + rows])
                if precision == torch.float32:
                    to_weight.addmm_(gradient.t(), part)
                else:
                    to_weight += gradient.t() @ part
        ctx.save_for_backward(to_hidden, to_weight)
        ctx.dtypes = (hidden.dtype, weight.dtype)
        share = 0.0 if terms.lesson is None else terms.lesson.share
        total = (1 - share) * nats.sum() + extra
        ctx.mark_non_differentiable(nats)
        return total, nats

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None, None, None]:
        to_hidden, to_weight = ctx.saved_tensors
        scale = gradients[0]
        return (to_hidden * scale).to(ctx.dtypes[0]), (to_weight * scale).to(ctx.dtypes[1]), None, None, None


def _bent_gradient(
    logits: torch.Tensor,
    target: torch.Tensor,
    rows: slice,
    terms: _Terms,
    nats: torch.Tensor,
    extra: torch.Tensor,
) -> torch.Tensor:
    """`_gradient` in what the logits are before they are multiplied and bent."""
    slope = _bend(logits, terms.multiplier, terms.softcap)
    gradient = _gradient(logits, target, rows, terms, nats, extra)
    if slope is not None:
        gradient.mul_(slope)
    return gradient if terms.multiplier == 1.0 else gradient.mul_(terms.multiplier)


def _gradient(
    logits: torch.Tensor,
    target: torch.Tensor,
    rows: slice,
    terms: _Terms,
    nats: torch.Tensor,
    extra: torch.Tensor,
) -> torch.Tensor:
    """The gradient of some rows' loss in their logits; writes the cross-entropy of these rows to `nats`, and adds what
    else they cost to the sum `extra`."""
    softmax = torch.softmax(logits, dim=1)
    # Of the likeliest token, whose probability is never rounded to zero; softmax itself does not tell its sum.
    log_sum = logits.amax(dim=1, keepdim=True) - softmax.amax(dim=1, keepdim=True).log()
    nats[rows] = (log_sum - logits.gather(1, target))[:, 0]
    pull = None if terms.lesson is None else _pull(logits, terms.lesson, rows, extra)
    kept = 1.0 if terms.lesson is None else 1 - terms.lesson.share
    if terms.z_loss:
        extra += terms.z_loss * log_sum.square().sum()
    if terms.z_loss or terms.lesson is not None:
        softmax.mul_(kept + 2 * terms.z_loss * log_sum)
    gradient = softmax.scatter_add_(1, target, torch.full_like(log_sum, -kept))
    return gradient if pull is None else gradient.add_(pull)


def _pull(logits: torch.Tensor, lesson: Lesson, rows: slice, extra: torch.Tensor) -> torch.Tensor:
    """The gradient towards a teacher in the logits of some rows; adds what the distance to it costs to `extra`."""
    theirs = (lesson.hidden[rows] @ lesson.weight.t()).float()
    _bend(theirs, lesson.multiplier, lesson.softcap)
    softened = functional.log_softmax(logits / lesson.temperature, dim=1)
    wanted = functional.log_softmax(theirs.div_(lesson.temperature), dim=1)
    probabilities = wanted.exp()
    distance = (probabilities * (wanted - softened)).sum()
    extra += lesson.share * lesson.temperature**2 * distance
    return softened.exp_().sub_(probabilities).mul_(lesson.share * lesson.temperature)
