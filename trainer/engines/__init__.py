"""Where a model is held while it trains: one device, or many.

`single`, `ddp`, `fsdp` (torch's FSDP2) and `deepspeed` (ZeRO) run the same step and write the same checkpoints.
"""

from __future__ import annotations

import torch

from search_spaces.errors import UsageError
from trainer.distillation import Teacher
from trainer.engines.base import ENGINES, Engine, EngineName, Setup, ZeroStage
from trainer.engines.ranks import ALONE, Place, Ranks, open_ranks
from trainer.engines.single import Single
from trainer.recipe import Recipe


def build_engine(
    recipe: Recipe, seed: int, device: torch.device, setup: Setup, teacher: Teacher | None = None
) -> Engine:
    """The engine of a setup, with the recipe's model and the initial weights of `seed`. Raises UsageError for what it
    cannot train."""
    if setup.offload and setup.engine != "deepspeed":
        raise UsageError(f"--offload is for --engine deepspeed, not {setup.engine}")
    if setup.engine == "single":
        if setup.ranks.world > 1:
            raise UsageError(f"--engine single trains in one process, not {setup.ranks.world}; ddp and fsdp in many")
        return Single(recipe, seed, device, setup, teacher)
    if not setup.ranks.together:
        raise UsageError(f"--engine {setup.engine} needs ranks: give --processes, or start it by torchrun")
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
    "ENGINES",
    "Engine",
    "EngineName",
    "Place",
    "Ranks",
    "Setup",
    "ZeroStage",
    "build_engine",
    "open_ranks",
]
