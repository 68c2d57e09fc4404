"""How many sequences a forward pass takes: as many as the device is predicted to hold, and half as many whenever it
does not; and blocks that are run twice to hold more."""

from __future__ import annotations

from functools import partial

import torch
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from trainer.attention_kernels import attention_kernel
from trainer.cost import micro_batch_tokens, sharded_memory
from trainer.engines import Setup
from trainer.model import EvolmForCausalLM
from trainer.recipe import Recipe

USABLE = 0.8
"""Share of a GPU's free memory that is planned with: the rest is for what the prediction leaves out, such as buffers of
kernels and holes between tensors."""


def micro_batch(recipe: Recipe, device: torch.device, setup: Setup | None = None) -> int:
    """Sequences of one forward pass: as the recipe says; on a GPU what its free memory holds beside this rank's part of
    the model, a batch halved as often as it takes; on a CPU some thousand tokens, which are faster there than more."""
    length = recipe.data.sequence_length
    if recipe.train.micro_batch_tokens is not None or device.type != "cuda":
        return micro_batch_tokens(recipe) // length
    free, _ = torch.cuda.mem_get_info(device)
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return largest_micro_batch(recipe, USABLE * (free + cached), setup)


def largest_micro_batch(recipe: Recipe, budget: float, setup: Setup | None = None) -> int:
    """The sequences of one forward pass with which a training step is predicted to take at most `budget` bytes of each
    device of a setup; one where none does."""
    length = recipe.data.sequence_length
    sequences = max(1, recipe.train.batch_tokens // length)
    while sequences > 1 and _predicted(recipe, sequences * length, setup or Setup()) > budget:
        sequences = -(-sequences // 2)
    return sequences


def _predicted(recipe: Recipe, tokens: int, setup: Setup) -> float:
    kernel = attention_kernel(recipe, "cuda")  # what costs are told by is the CPU's, which keeps more
    train = recipe.train.model_copy(update={"micro_batch_tokens": tokens, "attention_kernel": kernel})
    return sharded_memory(
        recipe.model_copy(update={"train": train}),
        setup.engine,
        setup.ranks.world,
        zero_stage=setup.zero_stage,
        offload=setup.offload,
    ).total


def recompute_blocks(model: EvolmForCausalLM) -> None:
    """Have blocks keep their input alone for the backward pass, which runs them again (Chen et al. 2016, arXiv
    1604.06174); dropout draws the same again."""
    for layer in model.model.layers:
        assert isinstance(layer, GradientCheckpointingLayer)
        layer.gradient_checkpointing = True
        layer._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)


def out_of_memory(error: RuntimeError) -> bool:
    """Whether an error says that the device has no memory left."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)
