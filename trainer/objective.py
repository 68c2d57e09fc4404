"""What training makes small, in which precision it is computed, and with which randomness."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import NamedTuple

import torch

from trainer.data.loader import stream_seed
from trainer.distillation import Teacher
from trainer.loss import fused_loss
from trainer.mixture_loss import mixture_loss, watches_routers
from trainer.model import EvolmForCausalLM
from trainer.recipe import Recipe

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
"""Of the matrix products; weights, optimiser and loss stay fp32."""


class Losses(NamedTuple):
    """Of some sequences: `objective`, summed over tokens, and `balance`, what mixtures of experts add, summed over
    sequences, or None, are made small; `nats` is the cross-entropy alone, of each token in their order, without a
    gradient."""

    objective: torch.Tensor
    balance: torch.Tensor | None
    nats: torch.Tensor


def training_loss(
    model: EvolmForCausalLM,
    recipe: Recipe,
    batch: torch.Tensor,
    *,
    length: int | None = None,
    teacher: Teacher | None = None,
) -> Losses:
    """The losses of sequences of token ids (B, T+1), each cut into pieces of `length` tokens that do not see each other
    where one is given: the tokens that are predicted stay the same."""
    inputs, targets = (part.reshape(-1, length or part.shape[1]) for part in (batch[:, :-1], batch[:, 1:]))
    routed = watches_routers(recipe.model)
    with autocast(recipe, batch.device):
        lesson = None if teacher is None else teacher.lesson(inputs)
        output = model.model(inputs, use_cache=False, output_router_logits=routed)
        head = model.head()
        objective, nats = fused_loss(
            output.last_hidden_state.flatten(0, 1),
            head.weight,
            targets.flatten(),
            multiplier=head.multiplier,
            softcap=head.softcap,
            z_loss=recipe.train.z_loss,
            lesson=lesson,
        )
    return Losses(objective, mixture_loss(recipe.model, output.router_logits) if routed else None, nats)


def autocast(recipe: Recipe, device: torch.device) -> AbstractContextManager[object]:
    """Matrix products in the recipe's precision."""
    dtype = DTYPES.get(recipe.train.precision)
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype=dtype)


def dropout_stream(recipe: Recipe, seed: int, sample: int, device: torch.device) -> AbstractContextManager[None]:
    """The randomness of dropout for a micro-batch that begins with `sample`: a stream of its own, which depends on seed
    and position alone. The global random state is left as it was."""
    if not (recipe.model.dropout or recipe.model.attention_dropout):
        return nullcontext()
    return _seeded(stream_seed(seed, "dropout", sample), device)


@contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield
