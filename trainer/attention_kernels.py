"""Which attention kernel a recipe is trained with, and what the one for CPUs keeps. No torch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from trainer.recipe import Recipe

Kernel = Literal["blocked", "sdpa", "flex", "eager"]

BLOCK = 64
"""Queries of a block: at 32 the products are too small, at 128 too much above the diagonal is computed."""

LONGEST = 2048
"""Tokens beyond which the probabilities that blocks keep would take more memory than the time is worth."""


def attention_kernel(recipe: Recipe, device: str) -> Kernel:
    """The kernel on a kind of device: the one that is named (but sdpa for blocked where sequences are too long), or the
    fastest that can do what the recipe asks.

    That is the blocked kernel on a CPU and sdpa on others; with a softcap, which neither knows, flex on a GPU, where
    that can do all else that is asked, and eager otherwise.
    """
    short = recipe.data.sequence_length <= LONGEST
    if recipe.train.attention_kernel != "auto":
        return "sdpa" if recipe.train.attention_kernel == "blocked" and not short else recipe.train.attention_kernel
    model = recipe.model
    plain = not model.attention_dropout and all(layer.positions != "alibi" for layer in model.layers())
    if model.attention_softcap:
        return "flex" if device == "cuda" and plain else "eager"
    return "blocked" if device == "cpu" and plain and short else "sdpa"


def blocks(length: int, window: int | None) -> Iterator[tuple[int, int, int]]:
    """For each block of queries: the first key that any of them sees, its first query, and where both end."""
    for low in range(0, length, BLOCK):
        first = 0 if window is None else max(0, low - window + 1)
        yield first, low, min(length, low + BLOCK)


def kept_positions(length: int, window: int | None = None) -> int:
    """Attention probabilities that blocks keep for one sequence and head."""
    return sum((high - low) * (high - first) for first, low, high in blocks(length, window))
