"""What a recipe needs beyond its own words, known before anything is launched: packages and devices. No torch."""

from __future__ import annotations

from importlib.util import find_spec

from trainer.recipe import OPTIMIZERS_OF_EXTRA


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
