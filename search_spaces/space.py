"""A space: a nested mapping in which some values are genes, with what ties them together.

Everything that makes a genome (sampling, mutation, crossover, decoding, the baseline) walks the same way through
`fill`: genes and derived values in the order in which they depend on each other, each given a value by whoever chooses.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from search_spaces.errors import Path, Problem, Problems, SpaceError, dotted
from search_spaces.evaluation import ExpressionError, Lookup
from search_spaces.expressions import Expression
from search_spaces.genes import Choose, Gene, ListGene, Rng, inherited
from search_spaces.genome import Genome, Values, canonical_json, get, leaves, shown
from search_spaces.reading import MAX_NODES
from search_spaces.repair import repaired
from search_spaces.tree import Constraint, Exact, Node, in_order, lookup_in, plain_json, read_constraints, read_tree

MAX_CONSTRAINTS = 100

MAX_TRIES = 1_000
"""How many genomes are drawn, at most, in search of a feasible one."""

REPAIRED_TRIES = frozenset(16 * 2**i for i in range(6))
"""Draws that are repaired when they are infeasible. Rejection alone keeps a gene's own distribution, and serves where
one draw of ten or so is feasible; a repair serves where next to none is."""

Rule = Callable[[Values], str | None]
"""Says in words why a genome is no complete, coherent recipe, or None."""


class Space:
    """All genomes that a search may try.

    Build one with `from_dict`; `evolm.Space.load` reads the YAML file of a recipe.
    """

    def __init__(
        self,
        *,
        template: Mapping[str, Any],
        nodes: Sequence[Node],
        constraints: Sequence[Constraint] = (),
        exact: Exact | None = None,
        rule: Rule | None = None,
        defaults: Mapping[str, Any] | None = None,
    ) -> None:
        self.template = template
        self.defaults: Mapping[str, Any] = defaults or {}
        self.nodes = tuple(nodes)
        self.genes: tuple[Gene, ...] = tuple(node for node in nodes if isinstance(node, Gene))
        self.constraints = tuple(constraints)
        self.exact: Exact = dict(exact or {})
        self.rule = rule
        self.baselines: tuple[Genome, ...] = ()
        self._blank = json.dumps(template)

    @classmethod
    def from_dict(
        cls,
        genes: Mapping[str, Any],
        constraints: Sequence[str] = (),
        *,
        exact: Exact | None = None,
        rule: Rule | None = None,
        baselines: Sequence[Mapping[str, Any]] = (),
        defaults: Mapping[str, Any] | None = None,
    ) -> Self:
        """Build a space from any nested mapping of JSON values, some of them genes or derived values.

        `exact` adds names to the constraints (functions of the genome, such as a parameter count), `rule` a check of
        the whole genome, `baselines` genomes (or parts of them; the rest is taken from the baseline) to be tried first,
        `defaults` what expressions read where a genome says nothing.

        Raises SpaceError with every problem that was found.
        """
        problems = Problems()
        space = cls.read(genes, constraints, problems, exact=exact, rule=rule, baselines=baselines, defaults=defaults)
        problems.raise_if_any()
        assert space is not None
        return space

    @classmethod
    def read(
        cls,
        genes: Mapping[str, Any],
        constraints: Sequence[str],
        problems: Problems,
        *,
        exact: Exact | None = None,
        rule: Rule | None = None,
        baselines: Sequence[Mapping[str, Any]] = (),
        defaults: Mapping[str, Any] | None = None,
    ) -> Self | None:
        """Like `from_dict`, for a caller that has more to say: problems are noted, not raised; None when there are
        any."""
        before = len(problems.found)
        tree = plain_json(genes, (), problems)
        if len(problems.found) > before:
            return None
        nodes, template = read_tree(tree, problems, defaults or {})
        if len(nodes) > MAX_NODES or len(constraints) > MAX_CONSTRAINTS:
            many = f"{len(nodes)} genes and derived values, {len(constraints)} constraints"
            problems.add((), f"holds {many}; {MAX_NODES} and {MAX_CONSTRAINTS} are the most")
            return None
        ordered = in_order(nodes, template, problems, defaults or {})
        conditions = read_constraints(constraints, nodes, template, exact or {}, problems, defaults or {})
        if len(problems.found) > before:
            return None
        space = cls(template=template, nodes=ordered, constraints=conditions, exact=exact, rule=rule, defaults=defaults)
        space._try_baseline(problems)
        if len(problems.found) == before:
            space.baselines = tuple(space._read_baselines(baselines, problems))
        return space if len(problems.found) == before else None

    # --- genomes ------------------------------------------------------------------------------------------------------

    def fill(self, choose: Choose) -> Genome:
        """The genome in which every active gene has the value that `choose` gives for it."""
        values: Values = json.loads(self._blank)
        lookup = lookup_in(values, None, self.defaults)
        for node in self.nodes:
            if isinstance(node, Gene):
                gene = node.sized(lookup)
                active = gene.when is None or gene.when.test(lookup)
                _put(values, gene.path, choose(gene) if active else gene.default)
            else:
                path, expression = node
                _put(values, path, _plain(expression.evaluate(lookup)))
        return Genome.of(values)

    @cached_property
    def baseline(self) -> Genome:
        """The genome of all baselines: the recipe that a search has to beat."""
        return self.fill(lambda gene: gene.fit(gene.baseline, None))

    def sample(self, rng: Rng) -> Genome:
        """A random feasible genome. Raises SpaceError when `MAX_TRIES` draws find none."""
        return self._feasible(lambda: self.fill(lambda gene: gene.sample(rng)), rng)

    def mutate(self, genome: Genome, rng: Rng) -> Genome:
        """A feasible genome near the given one: one gene changed, each other with probability 1/n.

        Raises SpaceError when there is no other genome, or none is found in `MAX_TRIES` draws.
        """
        parent = genome.values()
        if not self.genes:
            raise SpaceError(Problem(path=(), rule="the space has no genes: it holds a single genome"))

        def propose() -> Genome:
            hits = rng.random(len(self.genes)) < 1 / max(1, len(self.genes))
            hits[int(rng.integers(len(self.genes)))] = True
            changed = {gene.path for gene, hit in zip(self.genes, hits, strict=True) if hit}

            def choose(gene: Gene) -> Any:
                value = inherited(gene, parent, rng)
                return gene.mutate(value, rng) if gene.path in changed else value

            return self.fill(choose)

        return self._feasible(propose, rng, other_than=genome)

    def cross(self, one: Genome, other: Genome, rng: Rng) -> Genome:
        """A feasible genome between two: half of the groups of genes come whole from one parent, the rest gene by
        gene."""
        first, second = one.values(), other.values()
        groups = sorted({gene.group for gene in self.genes})

        def propose() -> Genome:
            source = {group: (first, second, None)[int(rng.choice(3, p=[0.25, 0.25, 0.5]))] for group in groups}

            def choose(gene: Gene) -> Any:
                whole = source[gene.group]
                if whole is not None:
                    return inherited(gene, whole, rng)
                return gene.cross(inherited(gene, first, rng), inherited(gene, second, rng), rng)

            return self.fill(choose)

        return self._feasible(propose, rng)

    def neighbours(self, genome: Genome) -> list[Genome]:
        """The feasible genomes that differ from this one by one small step of one gene."""
        values = genome.values()
        found: dict[Genome, None] = {}
        for moved in self.active(values):
            for near in moved.neighbours(get(values, moved.path)):

                def choose(gene: Gene, target: Path = moved.path, near: Any = near) -> Any:
                    return near if gene.path == target else inherited(gene, values, None)

                try:
                    candidate = self.fill(choose)
                except ExpressionError:  # a condition or derived value has no meaning there
                    continue
                if candidate != genome and not self.violations(candidate):
                    found[candidate] = None
        return list(found)

    def active(self, values: Values) -> list[Gene]:
        """The genes that have a say in a genome, with the lengths that it gives them."""
        lookup = lookup_in(values, None, self.defaults)
        return [gene.sized(lookup) for gene in self.genes if gene.when is None or gene.when.test(lookup)]

    def _feasible(self, propose: Callable[[], Genome], rng: Rng, other_than: Genome | None = None) -> Genome:
        """The first feasible proposal; now and then, where nearly all are rejected, one is repaired instead."""
        broken: Counter[str] = Counter()
        for tries in range(1, MAX_TRIES + 1):
            try:
                genome = propose()
            except ExpressionError as error:  # a condition or derived value that these values leave without meaning
                broken[error.text] += 1
                continue
            if genome == other_than:
                continue
            reasons = self.violations(genome)
            if not reasons:
                return genome
            broken.update(text for text, _ in reasons)
            if tries in REPAIRED_TRIES and (mended := repaired(self, genome, rng)) is not None and mended != other_than:
                return mended
        if not broken:
            raise SpaceError(Problem(path=(), rule="the space holds a single genome"))
        text, count = broken.most_common(1)[0]
        rule = f"no feasible genome in {MAX_TRIES} draws; `{text}` rejected {count} of them"
        raise SpaceError(Problem(path=("constraints",), rule=rule, help="widen the constraint or the genes it names"))

    # --- feasibility --------------------------------------------------------------------------------------------------

    def violations(self, genome: Genome) -> list[tuple[str, str]]:
        """What a legal genome breaks: (constraint or rule, what was seen instead). Empty when it is feasible."""
        values = genome.values()
        if self.rule is not None and (words := self.rule(values)):
            return [("the recipe's own rules", words)]
        lookup = lookup_in(values, self.exact, self.defaults)
        broken = []
        for constraint in self.constraints:
            try:
                if not constraint.expression.test(lookup):
                    broken.append((constraint.text, _seen(constraint.expression, lookup)))
            except ExpressionError as error:  # no value at all for this genome: 1 / (x - 3) where x is 3
                broken.append((constraint.text, error.message))
        return broken

    def validate(self, genome: Genome | Mapping[str, Any]) -> None:
        """Check a complete genome: raises SpaceError with every illegal value and every constraint it breaks."""
        problems = Problems()
        values = genome.values() if isinstance(genome, Genome) else plain_json(genome, (), problems)
        problems.raise_if_any()
        frozen = self._assign(values, problems, complete=True)
        problems.raise_if_any()
        assert frozen is not None
        for text, seen in self.violations(frozen):
            problems.add(("constraints",), f"breaks `{text}`", help=seen)
        problems.raise_if_any()

    def complete(self, values: Mapping[str, Any], path: Path = ()) -> Genome:
        """The genome that has the given values and the baseline's for the rest.

        Raises SpaceError, with paths below `path`, for unknown places, illegal values and fixed values that differ.
        """
        problems = Problems()
        plain = plain_json(values, path, problems)
        problems.raise_if_any()
        genome = self._assign(plain, problems, path=path)
        problems.raise_if_any()
        assert genome is not None
        return genome

    def _assign(
        self, values: Mapping[str, Any], problems: Problems, *, complete: bool = False, path: Path = ()
    ) -> Genome | None:
        """Fill the space with given values and note everything about them that does not fit."""
        before = len(problems.found)
        judged: set[Path] = set()

        def choose(gene: Gene) -> Any:
            judged.add(gene.path)
            try:
                value = get(values, gene.path)
            except KeyError:
                if complete:
                    problems.add((*path, *gene.path), "is missing")
                return gene.fit(gene.baseline, None)
            if isinstance(gene, ListGene) and not isinstance(value, list) and gene.item.problem(value) is None:
                return gene.normal([value] * gene.count)  # one value for all, as everywhere in a recipe
            if words := gene.problem(value):
                problems.add((*path, *gene.path), words, value=value)
                return gene.fit(gene.baseline, None)
            return gene.normal(value)

        try:
            genome = self.fill(choose)
        except ExpressionError as error:
            problems.add(path, f"`{error.text}` has no value for it: {error.message}")
            return None
        self._compare(values, genome.values(), judged, path, problems)
        return None if len(problems.found) > before else genome

    def _compare(
        self, given: Mapping[str, Any], filled: Values, judged: set[Path], path: Path, problems: Problems
    ) -> None:
        """Note what was given for places that do not exist, are fixed, derived, or asleep in this genome."""
        asleep = {gene.path: gene for gene in self.genes if gene.path not in judged}
        for place, value in leaves(given):
            if any(place[: len(done)] == done for done in judged):
                continue
            try:
                expected = get(filled, place)
            except KeyError:
                known = [dotted(known_place) for known_place, _ in leaves(filled)]
                problems.unknown((*path, *place), dotted(place), known, "place in the space")
                continue
            nothing = isinstance(value, Mapping) and isinstance(expected, Mapping)  # an empty mapping asks for nothing
            if nothing or canonical_json(expected) == canonical_json(value):
                continue
            gene = next((gene for where, gene in asleep.items() if place[: len(where)] == where), None)
            if gene is not None:
                rule = f"must be {shown(gene.default)} while `{gene.when}` is false, is {shown(value)}"
            else:
                rule = f"is fixed at {shown(expected)} in this space, got {shown(value)}"
            problems.add((*path, *place), rule, value=value)

    def _try_baseline(self, problems: Problems) -> None:
        """Note conditions, derived values and constraints that have no value for the baseline."""
        try:
            values = self.baseline.values()
        except ExpressionError as error:
            problems.add(self._place_of(error.text), f"`{error.text}` has no value for the baseline: {error.message}")
            return
        if self.rule is not None and self.rule(values):
            return  # it has no costs; whoever gave the rule tells what is wrong, with its place
        lookup = lookup_in(values, self.exact, self.defaults)
        for i, constraint in enumerate(self.constraints):
            try:
                constraint.expression.test(lookup)
            except ExpressionError as error:
                rule = f"`{error.text}` has no value for the baseline: {error.message}"
                problems.add(("constraints", i), rule)

    def _place_of(self, text: str) -> Path:
        """Where an expression stands: a derived value, a gene's condition or length."""
        for node in self.nodes:
            if not isinstance(node, Gene) and node[1].text == text:
                return (*node[0], "expr")
            if isinstance(node, Gene) and node.when is not None and node.when.text == text:
                return (*node.path, "when")
        return ()

    def _read_baselines(self, baselines: Sequence[Mapping[str, Any]], problems: Problems) -> Iterable[Genome]:
        for i, values in enumerate(baselines):
            here = ("baselines", i)
            if not isinstance(values, Mapping):
                problems.add(here, f"must be a mapping, is {shown(values)}", value=values)
                continue
            genome = self._assign(values, problems, path=here)
            if genome is None:
                continue
            for text, seen in self.violations(genome):
                problems.add(here, f"breaks `{text}`", help=seen)
            yield genome

    # --- numbers ------------------------------------------------------------------------------------------------------

    @property
    def width(self) -> int:
        """The length of an encoded genome."""
        return sum(gene.width for gene in self.genes)

    @property
    def cardinality(self) -> float:
        """How many genomes there are, constraints aside; infinite when a gene is continuous."""
        return math.prod(float(gene.cardinality) for gene in self.genes)

    def encode(self, genome: Genome) -> NDArray[np.float64]:
        """The genome as `width` numbers in [0, 1]; an inactive gene has the code of its baseline."""
        values = genome.values()
        lookup = lookup_in(values, None, self.defaults)
        units: list[float] = []
        for node in self.genes:
            gene = node.sized(lookup)
            active = gene.when is None or gene.when.test(lookup)
            units += gene.encode(get(values, gene.path) if active else gene.fit(gene.baseline, None))
        return np.array(units, dtype=np.float64)

    def decode(self, units: Sequence[float] | NDArray[np.float64]) -> Genome:
        """The genome nearest to an encoded point; it is legal, but may break a constraint."""
        numbers = [float(unit) for unit in units]
        if len(numbers) != self.width:
            raise ValueError(f"an encoded genome of this space has {self.width} numbers, got {len(numbers)}")
        slices: dict[Path, list[float]] = {}
        start = 0
        for gene in self.genes:
            slices[gene.path] = numbers[start : start + gene.width]
            start += gene.width
        return self.fill(lambda gene: gene.decode(slices[gene.path]))

    def distance(self, one: Genome, other: Genome) -> float:
        """The mean distance of the genes, from 0 (equal) to 1; a gene active in only one of the two counts 1."""
        first, second = one.values(), other.values()
        mine = {gene.path: gene for gene in self.active(first)}
        theirs = {gene.path for gene in self.active(second)}
        total = 0.0
        for gene in self.genes:
            if gene.path in mine and gene.path in theirs:
                total += mine[gene.path].distance(get(first, gene.path), get(second, gene.path))
            elif gene.path in mine or gene.path in theirs:
                total += 1.0
        return total / max(1, len(self.genes))

    def describe(self) -> list[dict[str, Any]]:
        """The genes as JSON objects: path, kind, options, baseline, condition."""
        described = []
        for gene in self.genes:
            entry = {"path": gene.name, "kind": gene.kind, **gene.describe(), "baseline": gene.baseline}
            if gene.when is not None:
                entry |= {"when": gene.when.text, "default": gene.default}
            if gene.transfer is not None:
                entry["transfer"] = gene.transfer
            described.append(entry)
        return described


def _plain(value: Any) -> Any:
    """A derived value as a recipe wants it: `d_model / 64` is a whole number where it comes out as one."""
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _put(values: Values, path: Path, value: Any) -> None:
    *way, last = path
    get(values, tuple(way))[last] = value


def _seen(expression: Expression, lookup: Lookup) -> str:
    """The values behind a broken constraint: `params = 41,231,872`."""
    parts = []
    for place in sorted(expression.names):
        try:
            value = lookup(place)
        except KeyError:  # not in this genome; the expression did not need it
            continue
        large = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) >= 1e4
        parts.append(f"{dotted(place)} = {f'{value:,}' if large else shown(value)}")
    return ", ".join(parts)
