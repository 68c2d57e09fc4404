"""The gene of a choice: `{choice: [swiglu, relu2]}`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import numpy as np

from search_spaces.genes.base import Gene, Rng
from search_spaces.genome import canonical_json, shown


@dataclass(frozen=True, kw_only=True)
class ChoiceGene(Gene):
    """One of several items: scalars, lists or mappings. `ordered` says that neighbours in the list are alike."""

    kind: ClassVar[str] = "choice"
    items: tuple[Any, ...]
    ordered: bool = False

    @property
    def width(self) -> int:
        return 1 if self.ordered else len(self.items)

    @property
    def cardinality(self) -> float:
        return len(self.items)

    @property
    def span(self) -> float:
        # Without an order two items are equal or not: one number falls from 1 to 0, another one rises.
        return 1.0 if self.ordered else 2.0

    @cached_property
    def _places(self) -> dict[str, int]:
        return {canonical_json(item): place for place, item in enumerate(self.items)}

    def index(self, value: Any) -> int:
        """Where the value stands among the items; KeyError when it is none of them. `1`, `1.0` and `true` differ."""
        return self._places[canonical_json(value)]

    def problem(self, value: Any) -> str | None:
        try:
            self.index(value)
        except (KeyError, ValueError, TypeError):
            return f"must be one of {shown(list(self.items), 120)}, is {shown(value)}"
        return None

    def sample(self, rng: Rng) -> Any:
        return self.items[int(rng.integers(len(self.items)))]

    def mutate(self, value: Any, rng: Rng) -> Any:
        others = self.neighbours(value)
        return others[int(rng.integers(len(others)))] if others else value

    def moves(self, value: Any) -> list[Any]:
        return [item for item in self.items if canonical_json(item) != canonical_json(value)]

    def neighbours(self, value: Any) -> list[Any]:
        index = self.index(value)
        near = [index - 1, index + 1] if self.ordered else range(len(self.items))
        return [self.items[i] for i in near if i != index and 0 <= i < len(self.items)]

    def encode(self, value: Any) -> list[float]:
        index = self.index(value)
        if self.ordered:
            return [index / (len(self.items) - 1) if len(self.items) > 1 else 0.5]
        return [float(i == index) for i in range(len(self.items))]

    def decode(self, units: Sequence[float]) -> Any:
        if self.ordered:
            unit = min(1.0, max(0.0, float(units[0])))
            return self.items[math.floor(unit * (len(self.items) - 1) + 0.5)]
        return self.items[int(np.argmax(units))]

    def summary(self) -> str:
        return shown(list(self.items), 60)[1:-1] + (", ordered" if self.ordered else "")

    def describe(self) -> dict[str, Any]:
        return {"items": list(self.items), **({"ordered": True} if self.ordered else {})}
