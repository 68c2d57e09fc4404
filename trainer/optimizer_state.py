"""What an optimiser knows, as tensors and JSON values by name: what a checkpoint keeps of it.

A value is named PARAMETER.KEY, an item of a list in it PARAMETER.KEY.INDEX. A matrix whose columns lie together in
memory, as decompositions leave them, is kept as its transpose and noted: products of the same numbers in another layout
are rounded otherwise, and a run that goes on must be the same run bit by bit.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from trainer.optim import Optimizer, parts
from trainer.sharding import kept, placed

Values = dict[str, Any]

TRANSPOSED = "transposed"
STEPS = "steps"
VALUES = "values"


def optimizer_state(optimizer: Optimizer, *, keep: bool = True) -> tuple[dict[str, torch.Tensor], Values]:
    """The tensors of an optimiser, whole and on the CPU, and what else it knows, as JSON values. Tensors that are cut
    over processes are gathered one by one; those without `keep` only take part in that, and get empty ones."""
    tensors: dict[str, torch.Tensor] = {}
    values: dict[str, Any] = {}
    transposed: list[str] = []
    steps: dict[str, int] = {}
    for group in optimizer.param_groups:
        for name, parameter in zip(group["names"], group["params"], strict=True):
            if "step" in group:
                steps[name] = int(group["step"])
            for key, leaf in _leaves(name, optimizer.state.get(parameter, {})):
                if not isinstance(leaf, torch.Tensor):
                    values[key] = leaf
                elif leaf.ndim == 2 and not leaf.is_contiguous() and leaf.t().is_contiguous():
                    transposed.append(key)
                    tensors[key] = kept(leaf.t(), keep)
                else:
                    tensors[key] = kept(leaf, keep)
    return tensors, {key: known for key, known in ((VALUES, values), (TRANSPOSED, transposed), (STEPS, steps)) if known}


def load_optimizer_state(optimizer: Optimizer, tensors: Mapping[str, torch.Tensor], others: Values) -> None:
    """Fill an optimiser from what `optimizer_state` gave. Raises KeyError for what is of no parameter of it."""
    leaves: Values = {**tensors, **others.get(VALUES, {})}
    for key in others.get(TRANSPOSED, []):
        leaves[key] = tensors[key].t()
    steps = others.get(STEPS, {})
    names = {name for group in optimizer.param_groups for name in group["names"]}
    found = _by_parameter(leaves, names)
    for one in parts(optimizer):
        for group in one.param_groups:
            for name, parameter in zip(group["names"], group["params"], strict=True):
                fused = bool(group.get("fused"))
                state = {key: _placed(key, value, parameter, fused) for key, value in found.get(name, {}).items()}
                if state:  # nothing is known before the first step
                    one.state[parameter] = state
                if name in steps:
                    group["step"] = steps[name]


def _leaves(prefix: str, value: Any) -> Iterator[tuple[str, Any]]:
    """What is in a tree of mappings and lists, with its path; an empty list is a leaf."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _leaves(f"{prefix}.{key}", item)
    elif isinstance(value, list | tuple) and value:
        for index, item in enumerate(value):
            yield from _leaves(f"{prefix}.{index}", item)
    else:
        yield prefix, list(value) if isinstance(value, tuple) else value


def _by_parameter(leaves: Values, names: set[str]) -> dict[str, Values]:
    """The state of each parameter, its lists put together again."""
    found: dict[str, Values] = {}
    for path, leaf in leaves.items():
        name, rest = path, ""
        while name and name not in names:
            name, _, last = name.rpartition(".")
            rest = f"{last}.{rest}" if rest else last
        if not name:
            raise KeyError(path)
        key, _, index = rest.partition(".")
        state = found.setdefault(name, {})
        if index:
            state.setdefault(key, {})[int(index)] = leaf
        else:
            state[key] = leaf
    return {
        name: {
            key: [value[index] for index in sorted(value)] if isinstance(value, dict) else value
            for key, value in state.items()
        }
        for name, state in found.items()
    }


def _placed(key: str, value: Any, parameter: torch.Tensor, fused: bool) -> Any:
    """A value where the optimiser keeps it: with its parameter, but step counters on the CPU unless it is fused."""
    if isinstance(value, list):
        return [_placed(key, item, parameter, fused) for item in value]
    if not isinstance(value, torch.Tensor):
        return value
    if value.shape == parameter.shape:
        return placed(value, parameter)
    return value.to("cpu" if key == "step" and not fused else parameter.device)
