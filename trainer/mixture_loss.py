"""What mixtures of experts add to the training loss: for an even load, and for small logits of their routers."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from trainer.loss import load_imbalance
from trainer.recipe import Model


def watches_routers(model: Model) -> bool:
    """Whether the training loss depends on what routers said."""
    balanced = model.balance == "loss" and model.balance_loss > 0
    return model.ffn == "moe" and (balanced or model.router_z_loss > 0)


def mixture_loss(model: Model, router_logits: Sequence[torch.Tensor]) -> torch.Tensor:
    """The weighted sum of both losses over B sequences; router_logits: one (B, T, X) for each run of a mixture."""
    loss = torch.zeros((), device=router_logits[0].device)
    if model.balance == "loss" and model.balance_loss > 0:
        loss = loss + model.balance_loss * load_imbalance(router_logits, model.n_active_experts)
    if model.router_z_loss > 0:
        loss = loss + model.router_z_loss * router_z_loss(router_logits)
    return loss


def router_z_loss(router_logits: Sequence[torch.Tensor]) -> torch.Tensor:
    """The squared log-sum of exponentials of each token's logits, a mean over tokens and runs of mixtures, summed over
    B sequences (ST-MoE, arXiv 2202.08906, equation 5): it keeps logits where softmax is exact."""
    return torch.stack(tuple(router_logits)).logsumexp(dim=-1).square().mean(dim=(0, 2)).sum()
