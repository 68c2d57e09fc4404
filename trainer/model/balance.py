"""How evenly the experts of mixtures are used, and the bias that keeps them so without a loss."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import distributed, nn

from trainer.model.layers_evolm import EvolmMixture


def mixtures(model: nn.Module) -> Iterator[tuple[str, EvolmMixture]]:
    """The mixtures of a model and their names, from its first layer to its last."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, EvolmMixture))


def expert_counts(model: nn.Module) -> dict[str, torch.Tensor]:
    """For each mixture, how many of the tokens trained on since the model was made used each of its X experts: (X)."""
    return {name: mixture.experts.loads.clone() for name, mixture in mixtures(model)}


def expert_loads(model: nn.Module, before: Mapping[str, torch.Tensor] | None = None) -> dict[str, torch.Tensor]:
    """For each mixture, the share of the tokens trained on since the model was made, or since it had the counts
    `before`, that used each of its X experts: (X), fp32, with the sum of active experts. Nothing is ever dropped:
    experts have no capacity that could be full."""
    loads = {}
    for name, mixture in mixtures(model):
        count = (mixture.experts.loads - (before[name] if before else 0)).float()
        loads[name] = mixture.top_k * count / count.sum().clamp(min=1)
    return loads


@torch.no_grad()
def rebalance(model: nn.Module, rate: float) -> None:
    """After a step, move each router's bias by `rate`: up where an expert was used less than the mean since the last
    call, down where it was used more (DeepSeek-V3, arXiv 2412.19437, section 2.1.2; arXiv 2408.15664, algorithm 1).

    Where processes train together, all of them must call it: their counts are added. Without a bias, it does nothing.
    """
    for _, mixture in mixtures(model):
        bias, experts = mixture.gate.e_score_correction_bias, mixture.experts
        if bias is None:
            continue
        loads = (experts.loads - experts.balanced).float()
        if distributed.is_available() and distributed.is_initialized():
            distributed.all_reduce(loads)
        bias += rate * (loads.mean() - loads).sign()
        experts.balanced.copy_(experts.loads)


@torch.no_grad()
def forget_loads(model: nn.Module) -> None:
    """Leave the counts since the last `rebalance` out: those of a step that is begun anew, or skipped. Without a bias,
    which alone depends on them, it does nothing."""
    for _, mixture in mixtures(model):
        if mixture.gate.e_score_correction_bias is not None:
            mixture.experts.loads.copy_(mixture.experts.balanced)
