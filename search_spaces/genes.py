"""The kinds of gene: what values each may take, and how they are drawn, varied and turned into numbers.

A gene is written as a mapping with exactly one kind key:

    {float: [1e-4, 1e-2], log: true}    {int: [128, 512], step: 64}    {choice: [swiglu, relu2]}
    {simplex: {web: 0.6, code: 0.4}, floor: 0.02}    {list: {choice: [2, 4, 8]}, length: model.n_layers}

Operations of a gene never look at other genes. Where a list's length is the value of another gene, `sized` gives the
gene with the length filled in.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar

import numpy as np

from search_spaces import simplex
from search_spaces.errors import Path, dotted
from search_spaces.evaluation import ExpressionError, Lookup
from search_spaces.expressions import Expression
from search_spaces.genome import canonical_json, get, shown

Rng = np.random.Generator

MUTATION_SCALE = 0.15
"""Standard deviation of a mutation, as a share of a gene's range (log range where the gene is logarithmic)."""

SIMPLEX_SCALE = 0.5
"""Standard deviation of a mutation of a simplex, in log weight."""

SIGNIFICANT_DIGITS = 6

LARGEST_INTEGER = 2**53
"""Whole numbers up to here are exact as floats, in JSON and in every tool that reads it."""

TRANSFERS = ("identity", "law", "width", "shape", "none")
"""How a gene's best value carries over from a proxy to the full size."""


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
class Gene(ABC):
    """What all kinds share. `baseline` is a legal value: the one that a careful person would have taken."""

    kind: ClassVar[str]
    path: Path
    baseline: Any
    when: Expression | None = None
    default: Any = None
    transfer: str | None = None

    @property
    def name(self) -> str:
        """The gene's path as text."""
        return dotted(self.path)

    @property
    def group(self) -> str:
        """Genes of one group tend to belong together and are often inherited from one parent."""
        return str(self.path[0]) if len(self.path) > 1 else self.name

    def sized(self, lookup: Lookup) -> Gene:
        """This gene for one genome: a list gene with the length that the genome gives it; others as they are."""
        return self

    def fit(self, value: Any, rng: Rng | None) -> Any:
        """A value of some genome, made legal for this (sized) gene while keeping what can stay."""
        return value

    def normal(self, value: Any) -> Any:
        """The one spelling of a legal value: what a person wrote as 1 is 1.0 for a gene of real numbers."""
        return value

    @property
    @abstractmethod
    def width(self) -> int:
        """How many numbers `encode` gives."""

    @property
    @abstractmethod
    def cardinality(self) -> float:
        """How many values there are; infinite for a continuous gene."""

    @abstractmethod
    def problem(self, value: Any) -> str | None:
        """Why the value is not legal, in words, or None."""

    @abstractmethod
    def sample(self, rng: Rng) -> Any:
        """A value drawn from the gene's own distribution."""

    @abstractmethod
    def mutate(self, value: Any, rng: Rng) -> Any:
        """A legal value near the given one, different from it unless the gene has only one value."""

    def cross(self, one: Any, other: Any, rng: Rng) -> Any:
        """A legal value between two legal ones; by default one of the two."""
        return one if rng.random() < 0.5 else other

    @abstractmethod
    def encode(self, value: Any) -> list[float]:
        """The value as `width` numbers in [0, 1]."""

    @abstractmethod
    def decode(self, units: Sequence[float]) -> Any:
        """The value nearest to `width` numbers in [0, 1]; the inverse of `encode` on its results."""

    def distance(self, one: Any, other: Any) -> float:
        """How far two legal values are apart, from 0 (equal) to 1."""
        gaps = [abs(a - b) for a, b in zip(self.encode(one), self.encode(other), strict=True)]
        return sum(gaps) / len(gaps)

    @abstractmethod
    def neighbours(self, value: Any) -> list[Any]:
        """The legal values one small step away."""

    def moves(self, value: Any) -> Iterable[Any]:
        """Legal values to go to when a constraint is broken, one by one: small steps, and larger ones where there are
        some."""
        return self.neighbours(value)

    @abstractmethod
    def summary(self) -> str:
        """The gene's values in a few words."""

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """The gene's own options as JSON values."""


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
        return None if self.step is None and _within(value, self.low, self.high) else super().problem(value)


def _within(value: Any, low: float, high: float) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high


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

    def distance(self, one: Any, other: Any) -> float:
        return super().distance(one, other) if self.ordered else float(self.index(one) != self.index(other))

    def summary(self) -> str:
        return shown(list(self.items), 60)[1:-1] + (", ordered" if self.ordered else "")

    def describe(self) -> dict[str, Any]:
        return {"items": list(self.items), **({"ordered": True} if self.ordered else {})}


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
            if not _within(value[name], floor - 1e-9, ceiling + 1e-9):
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

    def distance(self, one: Any, other: Any) -> float:
        # Total variation: the share of the data that would have to come from elsewhere.
        return float(np.abs(self._weights(one) - self._weights(other)).sum()) / 2

    def summary(self) -> str:
        low, high = (f"{min(ends):g}" if len(set(ends)) == 1 else "own" for ends in (self.floor, self.ceiling))
        bounds = [f"floor {low}"] * (low != "0") + [f"ceiling {high}"] * (high != "1")
        return ", ".join([f"{len(self.names)} parts", *bounds])

    def describe(self) -> dict[str, Any]:
        options: dict[str, Any] = {"names": list(self.names), "floor": list(self.floor)}
        if any(ceiling < 1.0 for ceiling in self.ceiling):
            options["ceiling"] = list(self.ceiling)
        return options


@dataclass(frozen=True, kw_only=True)
class ListGene(Gene):
    """A list of values of one item gene, one a layer for example. Variation works position by position.

    `length` is a number, or an expression (the path of an int gene) that `sized` resolves; `longest` bounds it.
    """

    kind: ClassVar[str] = "list"
    item: Gene
    length: int | Expression
    longest: int

    def sized(self, lookup: Lookup) -> ListGene:
        if isinstance(self.length, int):
            return self
        length = self.length.evaluate(lookup)
        whole = isinstance(length, int) and not isinstance(length, bool)
        if not whole or not 1 <= length <= self.longest:
            raise ExpressionError(f"must be a length from 1 to {self.longest}, is {shown(length)}", self.length.text)
        return replace(self, length=length)

    @property
    def count(self) -> int:
        """The number of items of a sized gene."""
        assert isinstance(self.length, int), "a list gene is used before it was sized"
        return self.length

    def fit(self, value: Any, rng: Rng | None) -> list[Any]:
        """Keep the first items; new ones are drawn, or repeat the last when there is no generator."""
        items = list(value)[: self.count]
        while len(items) < self.count:
            last = items[-1] if items else self.item.baseline
            items.append(self.item.sample(rng) if rng is not None else last)
        return items

    @property
    def width(self) -> int:
        return self.item.width * self.longest

    @property
    def cardinality(self) -> float:
        return float(self.item.cardinality) ** (self.length if isinstance(self.length, int) else self.longest)

    def problem(self, value: Any) -> str | None:
        if not isinstance(value, list):
            return f"must be a list, is {shown(value)}"
        if len(value) != self.count:
            return f"must have {self.count} items, has {len(value)}"
        found = ((i, self.item.problem(item)) for i, item in enumerate(value))
        return next((f"item {i} {words}" for i, words in found if words), None)

    def sample(self, rng: Rng) -> list[Any]:
        return [self.item.sample(rng) for _ in range(self.count)]

    def mutate(self, value: Any, rng: Rng) -> list[Any]:
        chosen = rng.random(self.count) < 1 / max(1, self.count)
        if self.count:
            chosen[int(rng.integers(self.count))] = True
        return [self.item.mutate(v, rng) if hit else v for v, hit in zip(value, chosen, strict=True)]

    def normal(self, value: Any) -> list[Any]:
        return [self.item.normal(item) for item in value]

    def cross(self, one: Any, other: Any, rng: Rng) -> list[Any]:
        return [self.item.cross(a, b, rng) for a, b in zip(one, other, strict=True)]

    def neighbours(self, value: Any) -> list[Any]:
        return [
            [*value[:i], near, *value[i + 1 :]] for i in range(self.count) for near in self.item.neighbours(value[i])
        ]

    def moves(self, value: Any) -> Iterator[Any]:
        # Every position at once, as a limit on the whole wants it, then one by one.
        yield from map(list, zip(*(self.item.moves(item) for item in value), strict=False))
        for position, item in enumerate(value):
            for move in self.item.moves(item):
                yield [*value[:position], move, *value[position + 1 :]]

    def encode(self, value: Any) -> list[float]:
        # Positions beyond this genome's length carry the baseline's code: they say nothing.
        items = [*value, *[self.item.baseline] * (self.longest - len(value))]
        return [number for item in items for number in self.item.encode(item)]

    def decode(self, units: Sequence[float]) -> list[Any]:
        size = self.item.width
        return [self.item.decode(units[i * size : (i + 1) * size]) for i in range(self.count)]

    def distance(self, one: Any, other: Any) -> float:
        # Over the positions that both have; a position that only one has counts as different.
        shared = [self.item.distance(a, b) for a, b in zip(one, other, strict=False)]
        longest = max(len(one), len(other))
        return (sum(shared) + longest - len(shared)) / longest

    def summary(self) -> str:
        return f"{self.length} times {self.item.summary()}"

    def describe(self) -> dict[str, Any]:
        return {"item": {"kind": self.item.kind, **self.item.describe()}, "length": str(self.length)}


KINDS: dict[str, type[Gene]] = {gene.kind: gene for gene in (FloatGene, IntGene, ChoiceGene, SimplexGene, ListGene)}

Choose = Callable[[Gene], Any]
"""Gives the value of one sized gene; how a genome is filled is a matter of what chooses."""


def inherited(gene: Gene, parent: Mapping[str, Any], rng: Rng | None) -> Any:
    """The parent's value, fitted to this genome; where the gene slept in the parent, a fresh one."""
    value = get(parent, gene.path)
    if isinstance(gene, ListGene) and isinstance(value, list):
        value = gene.fit(value, rng)
    if gene.problem(value) is None:
        return value
    return gene.sample(rng) if rng is not None else gene.fit(gene.baseline, None)
