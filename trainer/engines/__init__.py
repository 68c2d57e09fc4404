"""Where a model is held while it trains: one device, or many.

`single`, `ddp`, `fsdp` (torch's FSDP2) and `deepspeed` (ZeRO) run the same step and write the same checkpoints.
"""

from __future__ import annotations

import torch

from trainer.distillation import Teacher
from trainer.engines.base import Engine, Setup
from trainer.engines.ranks import ALONE, Ranks, open_ranks
from trainer.engines.single import Single
from trainer.extras import refuse_setup, refuse_untrainable
from trainer.recipe import Recipe


def build_engine(
    recipe: Recipe, seed: int, device: torch.device, setup: Setup, teacher: Teacher | None = None
) -> Engine:
    """The engine of a setup, with the recipe's model and the initial weights of `seed`. Raises UsageError for what it
    cannot train."""
    refuse_setup(setup.engine, setup.ranks.world, together=setup.ranks.together, offload=setup.offload)
    refuse_untrainable(recipe, setup.engine)
    if setup.engine == "single":
        return Single(recipe, seed, device, setup, teacher)
    if setup.engine == "ddp":
        from trainer.engines.ddp import DDP

        return DDP(recipe, seed, device, setup, teacher)
    if setup.engine == "fsdp":
        from trainer.engines.fsdp import FSDP

        return FSDP(recipe, seed, device, setup, teacher)
    from trainer.engines.deepspeed import DeepSpeed

    return DeepSpeed(recipe, seed, device, setup, teacher)


__all__ = [
    "ALONE",
    "Engine",
    "Ranks",
    "Setup",
    "build_engine",
    "open_ranks",
]
