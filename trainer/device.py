"""Where tensors live."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from search_spaces.errors import UsageError

_MMAP_THRESHOLD, _TRIM_THRESHOLD = -3, -1
_NEVER = 2**30


def usable_device(name: str) -> torch.device:
    """The device of that name (`cpu`, `cuda`, `cuda:1`). Raises UsageError where this machine has none."""
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        words = str(error).strip().splitlines()[0]
        raise UsageError(f"device '{name}' cannot be used here: {words}; `cpu` always can") from None
    return device


@contextmanager
def reused_memory() -> Iterator[None]:
    """On a CPU, memory that a tensor gives back is kept for the next one, and goes back to the system at the end.

    The C library otherwise maps every large tensor anew, and the system clears each of its pages: a fifth of the step
    of a small model. What a process is set to stays set; on systems without `mallopt` this does nothing.
    """
    library = ctypes.CDLL(None)
    mallopt, trim = (getattr(library, name, None) for name in ("mallopt", "malloc_trim"))
    if mallopt is not None:
        mallopt(_MMAP_THRESHOLD, _NEVER)
        mallopt(_TRIM_THRESHOLD, _NEVER)
    try:
        yield
    finally:
        if trim is not None:
            trim(0)
