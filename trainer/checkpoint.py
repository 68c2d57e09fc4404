"""Checkpoints: safetensors and JSON, whole or absent, and refused when they are not what they claim.

A checkpoint is a folder with `model.safetensors`, `optimizer.safetensors` and `checkpoint.json`, which carries the
state of the run and the SHA-256 of the other two. It is written under a temporary name and appears by a rename.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import uuid
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from trainer.data.cache import digest_of
from trainer.errors import CheckpointError

MANIFEST = "checkpoint.json"
TENSORS = ("model.safetensors", "optimizer.safetensors")


class RunState(BaseModel):
    """Where a run stands. Position, seed and recipe determine all randomness that follows, so none is stored."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    format: Literal[1] = 1
    samples: int
    recipe: str  # digest of the recipe that was trained
    tokenizer: str  # SHA-256 of its tokenizer
    corpus: str  # digest of its documents
    seed: int
    horizon: int | None  # samples of the run whose decay has begun; None on the trunk, which leads to any horizon
    seconds: float
    flops: float
    losses: list[float] = []  # of the last steps, for the loss of the record and the patience with a bad run


def save_checkpoint(
    folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, state: RunState, *, keep: int = 1
) -> None:
    """Write a checkpoint; one that is already there under this name is replaced once the new one is complete, or, when
    more than one is to be kept, moves on to `NAME-1`, that one to `NAME-2`, and so on."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    settle(folder)
    temporary = folder.with_name(f"{folder.name}.tmp-{uuid.uuid4().hex[:8]}")
    temporary.mkdir()
    try:
        tensors = dict(zip(TENSORS, (_weights(model), _moments(model, optimizer)), strict=True))
        for name, content in tensors.items():
            _save(content, temporary / name)
        manifest: dict[str, Any] = {
            "state": state.model_dump(),
            "files": {name: _sha256(temporary / name) for name in tensors},
        }
        manifest["checksum"] = digest_of(manifest)
        (temporary / MANIFEST).write_text(json.dumps(manifest, indent=1))
        for name in (*tensors, MANIFEST):
            _sync(temporary / name)
        old = folder.with_name(f"{folder.name}.old-{uuid.uuid4().hex[:8]}")
        if folder.exists():
            os.rename(folder, old if keep == 1 else _room(folder, keep))
        os.rename(temporary, folder)
        _sync(folder.parent)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _room(folder: Path, keep: int) -> Path:
    """Move older saves one place on, the oldest one away; returns the place of the one before the newest."""
    places = [folder.with_name(f"{folder.name}-{age}") for age in range(1, keep)]
    shutil.rmtree(places[-1], ignore_errors=True)
    for older, newer in zip(reversed(places), reversed(places[:-1]), strict=False):
        if newer.exists():
            os.rename(newer, older)
    return places[0]


def read_state(folder: Path) -> RunState:
    """The state in a checkpoint, its files verified. Raises CheckpointError."""
    settle(folder)
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        if manifest.pop("checksum") != digest_of(manifest):
            raise CheckpointError(f"{folder / MANIFEST}: content differs from its checksum")
        state = RunState.model_validate(manifest["state"])
        if set(manifest["files"]) != set(TENSORS):
            raise CheckpointError(f"{folder / MANIFEST}: names other files than {' and '.join(TENSORS)}")
        for name, digest in manifest["files"].items():
            if _sha256(folder / name) != digest:
                raise CheckpointError(f"{folder / name}: content differs from its checksum")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ValidationError) as error:
        raise CheckpointError(f"{folder}: not a complete checkpoint ({error})") from None
    return state


def load_checkpoint(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> RunState:
    """Fill model and optimiser from a verified checkpoint. Raises CheckpointError."""
    state = read_state(folder)
    parameters = dict(model.named_parameters())
    try:
        weights = load_file(folder / "model.safetensors")
        moments = load_file(folder / "optimizer.safetensors")
        with torch.no_grad():
            for name, tensor in _tensors(model).items():
                tensor.copy_(weights[name])
        for name, parameter in parameters.items():
            keys = ("exp_avg", "exp_avg_sq", "step")
            optimizer.state[parameter] = {
                key: moments[f"{name}.{key}"].to(parameter.device if key != "step" else "cpu") for key in keys
            }
    except (KeyError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(f"{folder}: does not fit this model ({error})") from None
    _place_steps(optimizer)
    return state


def _place_steps(optimizer: torch.optim.Optimizer) -> None:
    """Fused optimisers keep their step counter on the device of the parameter."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if group.get("fused"):
                optimizer.state[parameter]["step"] = optimizer.state[parameter]["step"].to(parameter.device)


def _tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters, and what is not trained and yet part of the model: a router's bias. Tied ones once."""
    kept = model.state_dict(keep_vars=True)
    buffers = {name: buffer for name, buffer in model.named_buffers() if name in kept}
    return {**dict(model.named_parameters()), **buffers}


def _weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().contiguous().cpu() for name, tensor in _tensors(model).items()}


def _moments(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    return {
        f"{name}.{key}": value.detach().contiguous().cpu()
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state[parameter].items()
    }


def _save(tensors: dict[str, torch.Tensor], file: Path) -> None:
    """Write tensors; what the system says of the disk is an OSError, which safetensors keeps in its words alone."""
    try:
        save_file(tensors, file)
    except SafetensorError as error:
        found = re.search(r"os error (\d+)", str(error))
        number = int(found[1]) if found else errno.EIO
        raise OSError(number, os.strerror(number), str(file)) from error


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def settle(folder: Path) -> None:
    """End what a kill cut short: a replacement between its two renames is undone, what it left is removed."""
    if not folder.exists():
        for old in sorted(folder.parent.glob(f"{folder.name}.old-*")):
            os.rename(old, folder)
            break
    for left in (*folder.parent.glob(f"{folder.name}.old-*"), *folder.parent.glob(f"{folder.name}.tmp-*")):
        shutil.rmtree(left, ignore_errors=True)
