"""What training makes small, and in which precision it is computed."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch

from trainer.loss import linear_cross_entropy
from trainer.mixture_loss import mixture_loss, watches_routers
from trainer.model import EvolmForCausalLM
from trainer.recipe import Recipe


def training_loss(
    model: EvolmForCausalLM, recipe: Recipe, batch: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """What training makes small, for sequences of token ids (B, T+1): the cross-entropy in nats, summed over tokens,
    and what mixtures of experts add, summed over sequences, or None."""
    routed = watches_routers(recipe.model)
    with autocast(recipe, batch.device):
        output = model.model(batch[:, :-1], use_cache=False, output_router_logits=routed)
        hidden = output.last_hidden_state.flatten(0, 1)
        nats = linear_cross_entropy(hidden, model.lm_head.weight, batch[:, 1:].flatten())
    return nats, mixture_loss(recipe.model, output.router_logits) if routed else None


def autocast(recipe: Recipe, device: torch.device) -> AbstractContextManager[object]:
    """Matrix products in the recipe's precision; weights, optimiser and loss stay fp32."""
    if recipe.train.precision == "bf16":
        return torch.autocast(device.type, dtype=torch.bfloat16)
    return nullcontext()
