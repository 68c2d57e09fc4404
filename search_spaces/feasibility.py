"""What constraints leave of a space: shares with their uncertainty, who takes most, the smallest and largest genome.

Shares are counted over genomes that are drawn as a search would draw them if there were no constraints.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations
from typing import Any

import numpy as np

from search_spaces.evaluation import ExpressionError
from search_spaces.genes import Gene, ListGene, Rng, inherited
from search_spaces.genome import Genome, get
from search_spaces.repair import repaired, shortfall
from search_spaces.space import Space
from search_spaces.tree import Constraint, lookup_in

DRAWS = 1_000
"""Genomes that are drawn for a report on a space."""

MOST_VALUES = 40_000
"""Values that these genomes hold in all: a space of 100 genes is judged by fewer draws, in the same time."""

CLIMB = 300
"""Genomes that the search for the smallest or largest one looks at."""


@dataclass(frozen=True, kw_only=True)
class Share:
    """How many of the drawn genomes meet a condition. `low` and `high` bound the share in the whole space with 95 %
    confidence (Wilson's interval)."""

    text: str
    met: int
    draws: int

    @property
    def share(self) -> float:
        """The share of the drawn genomes; 0 where none was drawn."""
        return self.met / max(1, self.draws)

    @cached_property
    def interval(self) -> tuple[float, float]:
        """Wilson 1927: the shares that the count does not contradict at 95 %."""
        z, n, p = 1.959964, self.draws, self.share
        if n == 0:
            return 0.0, 1.0
        middle = (p + z * z / (2 * n)) / (1 + z * z / n)
        half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
        return (0.0 if self.met == 0 else middle - half), (1.0 if self.met == n else middle + half)

    def as_dict(self) -> dict[str, Any]:
        """As JSON values."""
        low, high = self.interval
        return {"text": self.text, "share": self.share, "low": low, "high": high}


@dataclass(frozen=True, kw_only=True)
class Feasibility:
    """What is known of a space before anything is launched.

    `feasible` and `rules` are shares of all genomes drawn, `constraints` of those that are coherent recipes: the others
    have no costs. `tightest` are the two conditions that together leave least; `ranges` the least and greatest value of
    each exact cost over the feasible genomes that were seen; `smallest` and `largest` the genomes at the ends of the
    first cost.
    """

    draws: int
    feasible: Share
    rules: Share | None
    constraints: tuple[Share, ...]
    tightest: Share | None
    ranges: dict[str, tuple[float, float]]
    example: Genome | None
    smallest: Genome | None
    largest: Genome | None


def examine(space: Space, rng: Rng, draws: int = DRAWS) -> Feasibility:
    """Draw genomes without regard to the constraints and count what each leaves."""
    values = sum(node.longest if isinstance(node, ListGene) else 1 for node in space.nodes)
    draws = max(1, min(draws, MOST_VALUES // max(1, values)))
    drawn = [genome for genome in (_drawn(space, rng) for _ in range(draws)) if genome is not None]
    recipes = [genome for genome in drawn if space.rule is None or not space.rule(genome.values())]
    met = [[_meets(space, constraint, genome) for constraint in space.constraints] for genome in recipes]
    kept = np.array(met, dtype=bool).reshape(len(recipes), len(space.constraints))
    texts = [constraint.text for constraint in space.constraints]
    shares = [_share(text, kept[:, i]) for i, text in enumerate(texts)]
    pairs = [
        _share(f"{texts[i]}` and `{texts[j]}", kept[:, i] & kept[:, j]) for i, j in combinations(range(len(texts)), 2)
    ]
    found = [genome for genome, row in zip(recipes, met, strict=True) if all(row)]
    feasible = Share(text="all", met=len(found), draws=draws)
    found = found or _some_repaired(space, drawn, rng)
    ends = [_end(space, found, sign) for sign in (1, -1)] if space.exact and found else []
    return Feasibility(
        draws=draws,
        feasible=feasible,
        rules=Share(text="the recipe's own rules", met=len(recipes), draws=draws) if space.rule is not None else None,
        constraints=tuple(shares),
        tightest=min(pairs, key=lambda pair: pair.met, default=None),
        ranges=_ranges(space, [*found, *ends]),
        example=found[0] if found else None,
        smallest=ends[0] if ends else None,
        largest=ends[1] if ends else None,
    )


def _share(text: str, kept: Any) -> Share:
    return Share(text=text, met=int(np.sum(kept)), draws=len(kept))


def _drawn(space: Space, rng: Rng) -> Genome | None:
    try:
        return space.fill(lambda gene: gene.sample(rng))
    except ExpressionError:  # a condition or derived value has no meaning for these values
        return None


def _meets(space: Space, constraint: Constraint, genome: Genome) -> bool:
    return shortfall(constraint.expression, lookup_in(genome.values(), space.exact, space.defaults)) == 0


def _some_repaired(space: Space, genomes: Sequence[Genome], rng: Rng) -> list[Genome]:
    mended = (repaired(space, genome, rng) for genome in genomes[:8])
    return [genome for genome in mended if genome is not None]


def _ranges(space: Space, genomes: Sequence[Genome]) -> dict[str, tuple[float, float]]:
    """The least and greatest value of each exact cost."""
    values = [genome.values() for genome in genomes]
    costs = {name: [float(cost(one)) for one in values] for name, cost in space.exact.items()}
    return {name: (min(found), max(found)) for name, found in costs.items() if found}


def _end(space: Space, genomes: Sequence[Genome], sign: int) -> Genome:
    """The feasible genome with the least (sign 1) or greatest (-1) first cost that a climb from the best drawn one
    finds."""
    cost = next(iter(space.exact.values()))

    def height(genome: Genome) -> float:
        return sign * float(cost(genome.values()))

    best = min(genomes, key=height)
    lowest, looked_at = height(best), 0
    idle: set[Any] = set()  # genes that do not move the cost
    improved = True
    while improved and looked_at < CLIMB:
        improved = False
        for gene in space.active(best.values()):
            if gene.path in idle:
                continue
            before, heights = looked_at, {lowest}
            for candidate in _stepped(space, best, gene):
                looked_at += 1
                if looked_at >= CLIMB:
                    break
                if space.rule is not None and space.rule(candidate.values()):
                    continue
                if (here := height(candidate)) < lowest and not space.violations(candidate):
                    best, lowest, improved = candidate, here, True
                    break
                heights.add(here)
            if looked_at > before and heights == {lowest} and not improved:
                idle.add(gene.path)
            if looked_at >= CLIMB:
                break
    return _plainest(space, best, height)


def _plainest(space: Space, genome: Genome, height: Callable[[Genome], float]) -> Genome:
    """The genome with every gene at its baseline that makes no difference."""
    for gene in space.active(genome.values()):
        values = genome.values()

        def choose(other: Gene, path: Any = gene.path, values: Any = values) -> Any:
            return other.fit(other.baseline, None) if other.path == path else inherited(other, values, None)

        try:
            plainer = space.fill(choose)
        except ExpressionError:
            continue
        if not space.violations(plainer) and height(plainer) == height(genome):
            genome = plainer
    return genome


def _stepped(space: Space, genome: Genome, moved: Gene) -> Iterator[Genome]:
    values = genome.values()
    for value in moved.moves(get(values, moved.path)):

        def choose(gene: Gene, value: Any = value) -> Any:
            return value if gene.path == moved.path else inherited(gene, values, None)

        try:
            candidate = space.fill(choose)
        except ExpressionError:
            continue
        yield candidate
