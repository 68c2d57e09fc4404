"""Checkpoints: safetensors and JSON, whole or absent, and refused when they are not what they claim.

A checkpoint is a folder with `model.safetensors`, the weights that are judged, `optimizer.safetensors` and
`checkpoint.json`, which carries the state of the run, what of the optimiser's is no tensor, and the SHA-256 of the
others. Where the weights that are judged are a mean, `raw.safetensors` has those that training goes on from. It is
written under a temporary name and appears by a rename.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from trainer.averaging import Average
from trainer.data.cache import digest_of
from trainer.errors import CheckpointError
from trainer.optim import Optimizer
from trainer.optimizer_state import Values, load_optimizer_state, optimizer_state
from trainer.sharding import kept, placed

MANIFEST = "checkpoint.json"
MODEL, OPTIMIZER, RAW = "model.safetensors", "optimizer.safetensors", "raw.safetensors"
TENSORS = (MODEL, OPTIMIZER)


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
    teacher: str | None = None  # digest of its weights
    micro_batch: int | None = None  # samples of a forward pass
    oom_backoffs: int = 0
    spikes: dict[str, Any] | None = None  # the steps that others are compared with
    scaler: dict[str, Any] | None = None  # the scale of the loss in fp16


@dataclass(frozen=True, kw_only=True)
class Content:
    """What a checkpoint holds beside the state of the run: whole tensors on the CPU by file and name, and what of the
    optimiser's is no tensor."""

    tensors: dict[str, dict[str, torch.Tensor]]
    optimizer: Values


def content_of(model: nn.Module, optimizer: Optimizer, average: Average | None = None, *, keep: bool = True) -> Content:
    """The content of a checkpoint. Of a model that is cut over processes every tensor is gathered in turn; those
    without `keep` only take part in that, and get empty ones."""
    moments, others = optimizer_state(optimizer, keep=keep)
    weights = _weights(_tensors(model), keep)
    tensors = {MODEL: weights, OPTIMIZER: moments}
    if average is not None:
        tensors |= {MODEL: weights | _weights(average.state(), keep), RAW: weights}
    return Content(tensors=tensors, optimizer=others)


def save_checkpoint(
    folder: Path,
    model: nn.Module,
    optimizer: Optimizer,
    state: RunState,
    *,
    keep: int = 1,
    average: Average | None = None,
) -> None:
    """Write a checkpoint of what one process holds."""
    write_checkpoint(folder, content_of(model, optimizer, average), state, keep=keep)


def write_checkpoint(folder: Path, content: Content, state: RunState, *, keep: int = 1) -> None:
    """Write a checkpoint; one that is already there under this name is replaced once the new one is complete, or, when
    more than one is to be kept, moves on to `NAME-1`, that one to `NAME-2`, and so on."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    settle(folder)
    temporary = folder.with_name(f"{folder.name}.tmp-{uuid.uuid4().hex[:8]}")
    temporary.mkdir()
    try:
        for name, tensors in content.tensors.items():
            _save(tensors, temporary / name)
        manifest: dict[str, Any] = {
            "state": state.model_dump(),
            "optimizer": content.optimizer,
            "files": {name: _sha256(temporary / name) for name in content.tensors},
        }
        manifest["checksum"] = digest_of(manifest)
        (temporary / MANIFEST).write_text(json.dumps(manifest, indent=1))
        for name in (*content.tensors, MANIFEST):
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
        if set(manifest["files"]) - {RAW} != set(TENSORS):
            raise CheckpointError(f"{folder / MANIFEST}: names other files than {' and '.join(TENSORS)}")
        for name, digest in manifest["files"].items():
            if _sha256(folder / name) != digest:
                raise CheckpointError(f"{folder / name}: content differs from its checksum")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ValidationError) as error:
        raise CheckpointError(f"{folder}: not a complete checkpoint ({error})") from None
    return state


def load_checkpoint(folder: Path, model: nn.Module, optimizer: Optimizer, average: Average | None = None) -> RunState:
    """Fill model, optimiser and mean from a verified checkpoint, to go on with training. Raises CheckpointError."""
    state = read_state(folder)
    try:
        _fill(model, load_file(folder / (MODEL if average is None else RAW)))
        if average is not None:
            average.load(load_file(folder / MODEL))
        load_optimizer_state(optimizer, load_file(folder / OPTIMIZER), _values(folder))
    except (OSError, KeyError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(f"{folder}: does not fit this model ({error})") from None
    return state


def read_content(folder: Path) -> Content:
    """What a verified checkpoint holds. Raises CheckpointError."""
    read_state(folder)
    try:
        tensors = {name: load_file(folder / name) for name in (MODEL, OPTIMIZER, RAW) if (folder / name).exists()}
        return Content(tensors=tensors, optimizer=_values(folder))
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{folder}: cannot be read ({error})") from None


def _values(folder: Path) -> Values:
    values: Values = json.loads((folder / MANIFEST).read_text()).get("optimizer", {})
    return values


def load_weights(folder: Path, model: nn.Module) -> RunState:
    """Fill a model with the weights of a verified checkpoint that are judged. Raises CheckpointError."""
    state = read_state(folder)
    try:
        _fill(model, load_file(folder / MODEL))
    except (KeyError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(f"{folder}: does not fit this model ({error})") from None
    return state


def _tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters, and what is not trained and yet part of the model. Tied ones once."""
    return {**dict(model.named_parameters()), **untrained(model)}


def untrained(model: nn.Module) -> dict[str, torch.Tensor]:
    """What is not trained and yet part of a model: a router's bias. Whole on every process."""
    kept = model.state_dict(keep_vars=True)
    return {name: buffer for name, buffer in model.named_buffers() if name in kept}


@torch.no_grad()
def _fill(model: nn.Module, weights: Mapping[str, torch.Tensor]) -> None:
    for name, tensor in _tensors(model).items():
        tensor.copy_(placed(weights[name], tensor))


def _weights(tensors: Mapping[str, torch.Tensor], keep: bool) -> dict[str, torch.Tensor]:
    return {name: kept(tensor, keep) for name, tensor in tensors.items()}


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
