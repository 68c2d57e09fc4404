"""Tensors that are cut over processes, and whole ones: going from either to the other."""

from __future__ import annotations

import torch
from torch.distributed.tensor import DTensor, distribute_tensor


def part(tensor: torch.Tensor) -> torch.Tensor:
    """What this process has of a tensor: all of it, unless it is cut."""
    value = tensor.detach()
    return value.to_local() if isinstance(value, DTensor) else value


def gathered(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor whole. One that is cut over processes is gathered, which all of them take part in."""
    value = tensor.detach()
    return value.full_tensor() if isinstance(value, DTensor) else value


def kept(tensor: torch.Tensor, keep: bool = True) -> torch.Tensor:
    """A tensor whole, contiguous and on the CPU, for a file; without `keep` an empty one, for processes that only take
    part in gathering it."""
    whole = gathered(tensor)
    return whole.contiguous().cpu() if keep else whole.new_empty(0)


def placed(whole: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """A whole tensor where another of its shape lies: this process's part of it where that one is cut. Raises
    RuntimeError when they differ in shape."""
    if whole.shape != like.shape:
        raise RuntimeError(f"a tensor is {tuple(whole.shape)}, not {tuple(like.shape)}")
    value = whole.to(like.device)
    if isinstance(like, DTensor):
        return distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None)
    return value
