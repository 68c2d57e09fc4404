"""Genes of numbers: `{float: [1e-4, 1e-2], log: true}` and `{int: [128, 512], step: 64}`."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

from search_spaces.genes.base import Gene, Rng, within
from search_spaces.genome import shown

MUTATION_SCALE = 0.15
"""Standard deviation of a mutation, as a share of a gene's range (log range where the gene is logarithmic)."""

SIGNIFICANT_DIGITS = 6


def rounded(value: float, digits: int = SIGNIFICANT_DIGITS) -> float:
    """A float to the digits that genomes keep: short in files, and exact in round trips through the unit interval."""
    return float(f"{value:.{digits}g}")


def _short(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:g}"


def reflect(unit: float) -> float:
    """Fold a number back into [0, 1], as if the ends were mirrors."""
    unit = math.fabs(unit) % 2.0
    return 2.0 - unit if unit > 1.0 else unit


@dataclass(frozen=True, kw_only=True)
class NumberGene(Gene):
    """A number between two bounds, both included, on a linear or logarithmic scale, continuous or in steps."""

    low: float
    high: float
    step: float | None = None
    log: bool = False

    @property
    def width(self) -> int:
        return 1

    @cached_property
    def steps(self) -> int | None:
        """How many steps lie between the bounds; None for a continuous gene."""
        return None if self.step is None else math.floor((self.high - self.low) / self.step + 1e-9)

    @property
    def cardinality(self) -> float:
        if self.low == self.high:
            return 1
        return math.inf if self.steps is None else self.steps + 1

    @cached_property
    def _logs(self) -> tuple[float, float]:
        """The ends of the logarithmic scale: with steps half a step beyond the bounds, so that each value has its
        share of the scale, the first and the last too."""
        if self.step is None:
            return math.log(self.low), math.log(self.high)
        return math.log(max(self.low - self.step / 2, self.low / 2)), math.log(self.high + self.step / 2)

    def encode(self, value: Any) -> list[float]:
        if self.low == self.high:
            return [0.5]
        if self.log:
            low, high = self._logs
            return [(math.log(value) - low) / (high - low)]
        return [(value - self.low) / (self.high - self.low)]

    def decode(self, units: Sequence[float]) -> Any:
        unit = min(1.0, max(0.0, float(units[0])))
        if self.low == self.high:
            return self.legal(self.low)
        if self.log:
            low, high = self._logs
            return self.legal(math.exp(low + unit * (high - low)))
        return self.legal(self.low + unit * (self.high - self.low))

    def legal(self, value: float) -> Any:
        """The nearest legal value."""
        if self.step is not None and self.steps is not None:
            index = min(self.steps, max(0, math.floor((value - self.low) / self.step + 0.5)))
            value = self.low + index * self.step
        return self.typed(min(self.high, max(self.low, value)))

    @abstractmethod
    def typed(self, value: float) -> Any:
        """The number as the gene's own type."""

    def sample(self, rng: Rng) -> Any:
        if self.steps is not None and not self.log:
            return self.typed(
                min(self.high, self.low + int(rng.integers(self.steps, endpoint=True)) * (self.step or 0))
            )
        return self.decode([rng.random()])

    def mutate(self, value: Any, rng: Rng) -> Any:
        unit = self.encode(value)[0]
        mutated = self.decode([reflect(unit + MUTATION_SCALE * rng.standard_normal())])
        if mutated != value:
            return mutated
        others = self.neighbours(value)
        return others[int(rng.integers(len(others)))] if others else value

    def cross(self, one: Any, other: Any, rng: Rng) -> Any:
        if rng.random() < 0.5:
            return super().cross(one, other, rng)
        share = rng.random()
        return self.decode([share * self.encode(one)[0] + (1 - share) * self.encode(other)[0]])

    def neighbours(self, value: Any) -> list[Any]:
        if self.step is not None:
            moved = [self.legal(value - self.step), self.legal(value + self.step)]
        else:
            unit = self.encode(value)[0]
            moved = [self.decode([unit - 0.1]), self.decode([unit + 0.1])]
        return [near for near in moved if near != value]

    def moves(self, value: Any) -> list[Any]:
        # Half of the way to either end, so that a wide range is crossed in few steps, then the neighbours.
        unit = self.encode(value)[0]
        far = [self.decode([unit / 2]), self.decode([(1 + unit) / 2])]
        return [one for one in dict.fromkeys([*far, *self.neighbours(value)]) if one != value]

    def problem(self, value: Any) -> str | None:
        if isinstance(value, bool) or not isinstance(value, int | float):
            return f"must be a number, is {shown(value)}"
        if not self.low <= value <= self.high:
            return f"must lie in [{self.low:g}, {self.high:g}], is {value:g}"
        if not math.isclose(self.legal(value), value, rel_tol=1e-9, abs_tol=1e-12):
            return f"must be {self.low:g} plus a multiple of {self.step:g}, is {value:g}"
        return None

    def summary(self) -> str:
        if self.low == self.high:
            return f"{self.low:g}"
        step = f", step {self.step:g}" if self.step is not None and (self.kind, self.step) != ("int", 1) else ""
        return f"{_short(self.low)} to {_short(self.high)}{step}{', log' if self.log else ''}"

    def describe(self) -> dict[str, Any]:
        options: dict[str, Any] = {"low": self.low, "high": self.high}
        if self.step is not None:
            options["step"] = self.step
        if self.log:
            options["log"] = True
        return options


@dataclass(frozen=True, kw_only=True)
class FloatGene(NumberGene):
    """A real number."""

    kind: ClassVar[str] = "float"

    @cached_property
    def _digits(self) -> int:
        """Digits that tell a millionth of the range apart, also where the range is narrow."""
        if self.step is not None or self.low == self.high:
            return 12
        return SIGNIFICANT_DIGITS + max(0, round(math.log10(max(-self.low, self.high) / (self.high - self.low))))

    def typed(self, value: float) -> float:
        return float(min(self.high, max(self.low, rounded(value, self._digits))))

    def normal(self, value: Any) -> float:
        return float(value)

    def problem(self, value: Any) -> str | None:
        # A value given by hand may have more digits than the ones that evolm draws.
        return None if self.step is None and within(value, self.low, self.high) else super().problem(value)


@dataclass(frozen=True, kw_only=True)
class IntGene(NumberGene):
    """A whole number; the step is 1 where none is given."""

    kind: ClassVar[str] = "int"

    def typed(self, value: float) -> int:
        return round(value)

    def normal(self, value: Any) -> int:
        return int(value)

    def problem(self, value: Any) -> str | None:
        if isinstance(value, float) and not value.is_integer():
            return f"must be a whole number, is {value:g}"
        return super().problem(value)
