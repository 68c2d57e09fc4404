"""What every gene can do, whatever its kind."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from search_spaces.errors import Path, dotted
from search_spaces.evaluation import Lookup
from search_spaces.expressions import Expression

Rng = np.random.Generator

LARGEST_INTEGER = 2**53
"""Whole numbers up to here are exact as floats, in JSON and in every tool that reads it."""

TRANSFERS = ("identity", "law", "width", "shape", "none")
"""How a gene's best value carries over from a proxy to the full size."""


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

    @property
    def span(self) -> float:
        """The largest distance between the codes of two values, summed over their numbers."""
        return 1.0

    @abstractmethod
    def encode(self, value: Any) -> list[float]:
        """The value as `width` numbers in [0, 1]."""

    @abstractmethod
    def decode(self, units: Sequence[float]) -> Any:
        """The value nearest to `width` numbers in [0, 1]; the inverse of `encode` on its results."""

    def distance(self, one: Any, other: Any) -> float:
        """How far two legal values are apart, from 0 (equal) to 1: the distance of their codes as a share of `span`."""
        gaps = [abs(a - b) for a, b in zip(self.encode(one), self.encode(other), strict=True)]
        return min(1.0, sum(gaps) / self.span)

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


Choose = Callable[[Gene], Any]
"""Gives the value of one sized gene; how a genome is filled is a matter of what chooses."""


def within(value: Any, low: float, high: float) -> bool:
    """Whether a value is a number between two bounds, both included."""
    return isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high
