"""What a recipe needs beyond its own words, known before anything is launched: packages, devices, and an engine that
can train it. No torch."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any, Literal, get_args

from search_spaces.errors import UsageError
from trainer.recipe import OPTIMIZERS_OF_EXTRA, Recipe

EngineName = Literal["single", "ddp", "fsdp", "deepspeed"]
ENGINES: tuple[EngineName, ...] = get_args(EngineName)

ZeroStage = Literal[1, 2, 3]
ZERO_STAGES: tuple[ZeroStage, ...] = get_args(ZeroStage)

SHARDING = ("fsdp", "deepspeed")
"""Engines that cut matrices over the ranks."""

SHARDED_OPTIMIZERS = ("adamw",)
"""Those that treat every weight by itself and so do not mind where a matrix is cut, and are shown to."""

ENGINE_FIELDS = ("optimizer", "precision", "compile", "ema", "skip_spikes")
"""Fields of `train` that not every engine takes every value of."""


def missing_extra(optimizer: str) -> str | None:
    """Why an optimiser cannot be built here, with what to install, or None."""
    if optimizer not in OPTIMIZERS_OF_EXTRA or find_spec("pytorch_optimizer") is not None:
        return None
    return f"train.optimizer '{optimizer}' needs the extra `optim`: pip install 'evolm[optim]'"


def unusable_precision(precision: str, device: str) -> str | None:
    """Why a precision cannot be trained in on a device (`cpu`, `cuda`, `cuda:1`), or None."""
    if precision != "fp16" or not device.startswith("cpu"):
        return None
    return (
        "train.precision 'fp16' is for GPUs: on a CPU its matrix products take a hundred times longer; use bf16 or fp32"
    )


def unusable_kernel(kernel: str, device: str) -> str | None:
    """Why a device (`cpu`, `cuda`, `cuda:1`) cannot train with an attention kernel, or None."""
    if kernel != "flex" or not device.startswith("cpu"):
        return None
    return "train.attention_kernel 'flex' has no backward pass on a CPU; take auto, blocked or sdpa"


def untrainable(engine: str, field: str, value: Any) -> str | None:
    """Why an engine cannot train with a value of one of `ENGINE_FIELDS`, or None."""
    if engine not in SHARDING:
        return None
    if field == "optimizer" and value not in SHARDED_OPTIMIZERS:
        return (
            f"engine {engine} cuts matrices over the ranks and trains with {' or '.join(SHARDED_OPTIMIZERS)}; "
            f"{value} needs them whole or is not shown to be the same, take engine ddp"
        )
    if field == "precision" and value == "fp16":
        return f"engine {engine} trains in fp32 or bf16; for fp16 take engine single or ddp"
    if field == "compile" and value == "always":
        return f"engine {engine} does not compile blocks: set train.compile to auto, or take engine ddp"
    if field in ("ema", "skip_spikes") and engine == "deepspeed" and value:
        return f"engine deepspeed has no train.{field}, which is {value:g}; leave it 0, or take engine fsdp or ddp"
    return None


def refuse_untrainable(recipe: Recipe, engine: str) -> None:
    """Raises UsageError for a recipe that an engine cannot train."""
    for field in ENGINE_FIELDS:
        if words := untrainable(engine, field, getattr(recipe.train, field)):
            raise UsageError(words)


def refuse_setup(engine: str, world: int, *, together: bool, offload: bool) -> None:
    """Raises UsageError for an engine that cannot be had over `world` processes, which are ranks where they are
    `together`."""
    if offload and engine != "deepspeed":
        raise UsageError(f"--offload is for --engine deepspeed, not {engine}")
    if engine == "single" and world > 1:
        raise UsageError(f"--engine single trains in one process, not {world}; take ddp, fsdp or deepspeed")
    if engine != "single" and not together:
        raise UsageError(f"--engine {engine} needs ranks: give --processes, or start it by torchrun")
