"""The gene of a list: `{list: {choice: [2, 4, 8]}, length: model.n_layers}`."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from search_spaces.evaluation import ExpressionError, Lookup
from search_spaces.expressions import Expression
from search_spaces.genes.base import Gene, Rng
from search_spaces.genome import shown


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
        try:
            return float(self.item.cardinality) ** (self.length if isinstance(self.length, int) else self.longest)
        except OverflowError:
            return math.inf

    @property
    def span(self) -> float:
        return self.item.span * self.longest

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
