"""Repair: from a genome that breaks constraints to one near it that does not.

How far a genome is from feasible is a number (`shortfall`): for a comparison, by how much it fails, relative to the two
sides. Genes are moved in random order, each by the moves of its own kind, and the first move that lessens the shortfall
is kept, until nothing is left of it. Constraints may be anything, and a climb may end in a valley: whoever asks for a
repair draws anew when it fails.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

from search_spaces.errors import Path
from search_spaces.evaluation import Call, ExpressionError, Lookup, Node, Operation, Walker
from search_spaces.expressions import Expression
from search_spaces.genes import Choose, Gene, Rng, inherited
from search_spaces.genome import Genome, Values, get
from search_spaces.tree import Constraint, Exact, lookup_in

MAX_CANDIDATES = 400
"""Genomes that one repair looks at."""

NOT_A_RECIPE = 1e3
"""The shortfall of a genome that breaks a rule which has no degrees: more than any constraint's."""

_COMPARISONS = ("==", "!=", "<", "<=", ">", ">=")

Shortfall = float | list[float]


class Space(Protocol):
    """What a repair has to know of a space."""

    constraints: tuple[Constraint, ...]
    exact: Exact
    rule: Callable[[Values], str | None] | None
    defaults: Mapping[str, Any]

    def active(self, values: Values) -> list[Gene]:
        """The genes that have a say in a genome."""

    def fill(self, choose: Choose) -> Genome:
        """The genome in which every active gene has the value that `choose` gives for it."""


def shortfall(expression: Expression, lookup: Lookup) -> float:
    """How far a condition is from true: 0 when it is, otherwise between 0 and the number of its parts."""
    try:
        if expression.test(lookup):
            return 0.0
        return _total(_Measure(expression.text, lookup).missing(expression.root)) or 1.0
    except ExpressionError:  # no value at all for this genome, or none that is a truth
        return 1.0


def space_shortfall(space: Space, genome: Genome) -> float:
    """How far a genome is from feasible: 0 when it is."""
    values = genome.values()
    if space.rule is not None and space.rule(values):
        return NOT_A_RECIPE
    lookup = lookup_in(values, space.exact, space.defaults)
    return sum(shortfall(constraint.expression, lookup) for constraint in space.constraints)


def repaired(space: Space, genome: Genome, rng: Rng) -> Genome | None:
    """A feasible genome near the given one, or None when the moves lead to none."""
    nearest, left = approach(space, genome, rng)
    return nearest if left == 0 else None


def approach(space: Space, genome: Genome, rng: Rng) -> tuple[Genome, float]:
    """The genome nearest to feasible that the moves lead to, and what is left of its shortfall."""
    left = space_shortfall(space, genome)
    looked_at = 0
    while left > 0:
        for candidate in _moves(space, genome, rng):
            looked_at += 1
            remaining = space_shortfall(space, candidate)
            if remaining < left:
                genome, left = candidate, remaining
                break
            if looked_at >= MAX_CANDIDATES:
                return genome, left
        else:
            return genome, left
    return genome, left


def _moves(space: Space, genome: Genome, rng: Rng) -> Iterator[Genome]:
    """Genomes one move away, the genes in random order."""
    values = genome.values()
    genes = [gene for gene in space.active(values) if gene.cardinality > 1]
    for index in rng.permutation(len(genes)):
        moved = genes[int(index)]
        for value in moved.moves(get(values, moved.path)):

            def choose(gene: Gene, target: Path = moved.path, value: Any = value) -> Any:
                return value if gene.path == target else inherited(gene, values, rng)

            try:
                yield space.fill(choose)
            except ExpressionError:  # a condition or derived value that these values leave without meaning
                continue


class _Measure(Walker):
    """Walks a condition and measures what it lacks; the item-by-item ones give a list."""

    def missing(self, node: Node) -> Shortfall:
        match node:
            case Operation(symbol="and", operands=operands):
                return sum(_total(self.missing(operand)) for operand in operands)
            case Operation(symbol="or", operands=operands):
                return min(_total(self.missing(operand)) for operand in operands)
            case Operation(symbol=symbol, operands=(left, right)) if symbol in _COMPARISONS:
                return _paired(self.value(node), self.value(left), self.value(right))
            case Call(function="all", arguments=(argument,)):
                return _total(self.missing(argument))
            case Call(function="any", arguments=(argument,)):
                found = self.missing(argument)
                return min(found, default=1.0) if isinstance(found, list) else found
        return _paired(self.value(node), None, None)


def _paired(truth: Any, left: Any, right: Any) -> Shortfall:
    """What a comparison lacks, item by item where it was made so."""
    if isinstance(truth, list):
        lefts = left if isinstance(left, list) and len(left) == len(truth) else [left] * len(truth)
        rights = right if isinstance(right, list) and len(right) == len(truth) else [right] * len(truth)
        return [_total(_paired(*one)) for one in zip(truth, lefts, rights, strict=True)]
    if truth is True:
        return 0.0
    if _is_number(left) and _is_number(right) and left != right:
        return min(1.0, math.fabs(left - right) / (math.fabs(left) + math.fabs(right)))
    return 1.0


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _total(missing: Shortfall) -> float:
    """Lists count as the mean, so that a condition on every layer does not outweigh one on the whole."""
    return sum(missing) / max(1, len(missing)) if isinstance(missing, list) else missing
