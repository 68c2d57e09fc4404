"""What training makes small, and in which precision it is computed."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch

from trainer.loss import linear_cross_entropy, load_imbalance
from trainer.model import EvolmForCausalLM
from trainer.recipe import Recipe


def training_loss(
    model: EvolmForCausalLM, recipe: Recipe, batch: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """What training makes small, for sequences of token ids (B, T+1): the cross-entropy in nats, summed over tokens,
    and the weighted load-balancing loss, summed over sequences, or None."""
    balanced = recipe.model.ffn == "moe" and recipe.model.balance_loss > 0
    with autocast(recipe, batch.device):
        output = model.model(batch[:, :-1], use_cache=False, output_router_logits=balanced)
        hidden = output.last_hidden_state.flatten(0, 1)
        nats = linear_cross_entropy(hidden, model.lm_head.weight, batch[:, 1:].flatten())
    if not balanced:
        return nats, None
    return nats, recipe.model.balance_loss * load_imbalance(output.router_logits, recipe.model.n_active_experts)


def autocast(recipe: Recipe, device: torch.device) -> AbstractContextManager[object]:
    """Matrix products in the recipe's precision; weights, optimiser and loss stay fp32."""
    if recipe.train.precision == "bf16":
        return torch.autocast(device.type, dtype=torch.bfloat16)
    return nullcontext()
