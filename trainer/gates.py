"""Two refusals that guard every run: a search finds every leak, so a model must not be able to see what it predicts."""

from __future__ import annotations

import math

import torch

from trainer.errors import Leak
from trainer.model.modeling_evolm import EvolmForCausalLM

TOLERANCE = 1e-4
"""How far an earlier logit may move, relative to the largest: rounding."""

STANDARD_ERRORS = 6


@torch.no_grad()
def check_causality(model: EvolmForCausalLM, length: int = 64) -> None:
    """Raise Leak when changing later tokens moves an earlier logit. One pass: a sequence, and two changes of it."""
    model.eval()
    ids = _random_ids(model, 1, min(length, model.config.max_position_embeddings)).repeat(3, 1)
    positions = (ids.shape[1] // 2, ids.shape[1] - 1)
    for row, position in enumerate(positions, start=1):
        ids[row, position:] = (ids[row, position:] + 1) % model.config.vocab_size
    reference, *changed = model(ids).logits.float()
    for logits, position in zip(changed, positions, strict=True):
        moved = (logits - reference)[:position].abs().max().item()
        if moved > TOLERANCE * reference.abs().max().item():
            raise Leak(f"changing the tokens from position {position} on moved an earlier logit by {moved:.2g}")


@torch.no_grad()
def check_floor(model: EvolmForCausalLM, sequences: int = 8, length: int = 128) -> None:
    """Raise Leak when the loss on uniform random tokens is below their entropy.

    Independent uniform tokens cannot be predicted: the expected loss of every distribution is at least ln(vocabulary)
    (Gibbs' inequality). What is below it by more than the noise of the sample has been looked up, not predicted.
    """
    model.eval()
    ids = _random_ids(model, sequences, min(length, model.config.max_position_embeddings) + 1)
    logits = model(ids[:, :-1]).logits.float()
    nats = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    entropy = math.log(model.config.vocab_size)
    noise = STANDARD_ERRORS * nats.std().item() / math.sqrt(nats.numel())
    if nats.mean().item() < entropy - noise - 0.01:
        raise Leak(f"loss {nats.mean().item():.3f} on random tokens is below their entropy, {entropy:.3f} nats")


def _random_ids(model: EvolmForCausalLM, sequences: int, length: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(model.config.vocab_size, (sequences, length), generator=generator)
    return ids.to(model.lm_head.weight.device)
