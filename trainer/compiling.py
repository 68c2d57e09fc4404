"""Whether compiled blocks pay, and compiling them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from trainer.model import EvolmForCausalLM
from trainer.recipe import Recipe

ASSUMED_RATE = 5e13
"""FLOP/s that uncompiled blocks are taken to reach on a GPU. A constant and no measurement: a run must decide the same
each time, because compiled blocks round otherwise."""

BREAK_EVEN_SECONDS = 240.0
"""Predicted seconds of a run on a GPU from which compiling pays: a minute for the graphs of forward and backward pass
against a quarter of every step. Both are taken from what is usual and are to be replaced by what benchmarks/compile.py
--device cuda says. On a CPU it says that it never pays: the step takes 1.03 to 1.10 times as long, after minutes."""

SHAPES = 64
"""Graphs that are kept of a block before torch gives up: layers of other shapes, batches and lengths of sequences are
graphs of their own."""


def compiles(recipe: Recipe, device: torch.device, flops: float) -> bool:
    """Whether a run of so many FLOPs compiles its blocks: a function of recipe, device and length alone."""
    if recipe.train.compile == "auto":
        return device.type == "cuda" and flops / ASSUMED_RATE > BREAK_EVEN_SECONDS
    return recipe.train.compile == "always"


@contextmanager
def compiled_blocks(model: EvolmForCausalLM, wanted: bool) -> Iterator[None]:
    """While this lasts, the model's blocks run compiled, where that is wanted; blocks alike share one graph."""
    if not wanted:
        yield
        return
    with torch._dynamo.config.patch(recompile_limit=SHAPES):
        for layer in model.model.layers:
            layer.compile(dynamic=False)
        try:
            yield
        finally:
            for layer in model.model.layers:
                layer._compiled_call_impl = None
