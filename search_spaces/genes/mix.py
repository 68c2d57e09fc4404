"""The gene of a mix: `{simplex: {web: 0.6, code: 0.4}, floor: 0.02}`."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import numpy as np

from search_spaces import simplex
from search_spaces.genes.base import Gene, Rng, within
from search_spaces.genome import shown

SIMPLEX_SCALE = 0.5
"""Standard deviation of a mutation of a simplex, in log weight."""


@dataclass(frozen=True, kw_only=True)
class SimplexGene(Gene):
    """Named weights that sum to one, each between its floor and its ceiling."""

    kind: ClassVar[str] = "simplex"
    names: tuple[str, ...]
    floor: tuple[float, ...]
    ceiling: tuple[float, ...]

    @property
    def width(self) -> int:
        return len(self.names)

    @property
    def cardinality(self) -> float:
        free = [low for low, high in zip(self.floor, self.ceiling, strict=True) if low < high]
        pinned = len(free) < 2 or sum(self.floor) > 1 - 1e-9 or sum(self.ceiling) < 1 + 1e-9
        return 1 if pinned else math.inf

    @property
    def span(self) -> float:
        return 2.0  # total variation: the share of the data that would have to come from elsewhere

    @cached_property
    def bounds(self) -> tuple[simplex.Weights, simplex.Weights]:
        """Floors and ceilings as arrays."""
        return np.array(self.floor), np.array(self.ceiling)

    def _values(self, weights: simplex.Weights) -> dict[str, float]:
        return {name: float(weight) for name, weight in zip(self.names, weights, strict=True)}

    def _weights(self, value: Mapping[str, float]) -> simplex.Weights:
        return np.array([value[name] for name in self.names], dtype=np.float64)

    def problem(self, value: Any) -> str | None:
        if not isinstance(value, Mapping) or set(value) != set(self.names):
            return f"must give a weight to each of {', '.join(self.names)}, is {shown(value)}"
        for name, floor, ceiling in zip(self.names, self.floor, self.ceiling, strict=True):
            if not within(value[name], floor - 1e-9, ceiling + 1e-9):
                return f"weight of {name} must lie in [{floor:g}, {ceiling:g}], is {shown(value[name])}"
        total = sum(value.values())
        return None if math.isclose(total, 1.0, abs_tol=1e-6) else f"weights must sum to 1, sum to {total:g}"

    def sample(self, rng: Rng) -> dict[str, float]:
        return self._values(simplex.draw(rng, *self.bounds))

    def mutate(self, value: Any, rng: Rng) -> dict[str, float]:
        return self._values(simplex.step(rng, self._weights(value), *self.bounds, SIMPLEX_SCALE))

    def cross(self, one: Any, other: Any, rng: Rng) -> Any:
        # The set of legal weights is convex: every point between two of them is one.
        share = rng.random()
        return self._values(
            simplex.rounded(share * self._weights(one) + (1 - share) * self._weights(other), *self.bounds)
        )

    def neighbours(self, value: Any) -> list[Any]:
        near = []
        for part in range(len(self.names)):
            for factor in (0.8, 1.25):
                weights = self._weights(value)
                weights[part] *= factor
                moved = self._values(simplex.project(weights, *self.bounds))
                if moved != value and moved not in near:
                    near.append(moved)
        return near

    def moves(self, value: Any) -> Iterator[Any]:
        # Each part half of the way to its ceiling, then to its floor; the others make room in proportion.
        weights, (floor, ceiling) = self._weights(value), self.bounds
        for bounds in (ceiling, floor):
            for part, end in enumerate(bounds):
                moved = self._values(simplex.moved(weights, part, (weights[part] + end) / 2, floor, ceiling))
                if moved != value:
                    yield moved

    def encode(self, value: Any) -> list[float]:
        return [float(weight) for weight in self._weights(value)]

    def decode(self, units: Sequence[float]) -> dict[str, float]:
        weights = np.maximum(np.asarray(units, dtype=np.float64), 0.0)
        floor, ceiling = self.bounds
        inside = bool(np.all((weights >= floor - 1e-9) & (weights <= ceiling + 1e-9)))
        if inside and math.isclose(weights.sum(), 1.0, abs_tol=1e-9):
            return self._values(simplex.rounded(weights, floor, ceiling))
        return self._values(simplex.project(weights, floor, ceiling))

    def normal(self, value: Any) -> dict[str, float]:
        return self.decode(self.encode(value))

    def summary(self) -> str:
        low, high = (f"{min(ends):g}" if len(set(ends)) == 1 else "own" for ends in (self.floor, self.ceiling))
        bounds = [f"floor {low}"] * (low != "0") + [f"ceiling {high}"] * (high != "1")
        return ", ".join([f"{len(self.names)} parts", *bounds])

    def describe(self) -> dict[str, Any]:
        options: dict[str, Any] = {"names": list(self.names), "floor": list(self.floor)}
        if any(ceiling < 1.0 for ceiling in self.ceiling):
            options["ceiling"] = list(self.ceiling)
        return options
