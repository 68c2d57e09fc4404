"""Where tensors live."""

from __future__ import annotations

import torch

from search_spaces.errors import UsageError


def usable_device(name: str) -> torch.device:
    """The device of that name (`cpu`, `cuda`, `cuda:1`). Raises UsageError where this machine has none."""
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        words = str(error).strip().splitlines()[0]
        raise UsageError(f"device '{name}' cannot be used here: {words}; `cpu` always can") from None
    return device
