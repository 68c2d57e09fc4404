"""From a nested mapping to the parts of a space: genes and derived values in order, the template, the constraints."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from graphlib import CycleError, TopologicalSorter
from heapq import heappop, heappush
from typing import Any

import numpy as np

from search_spaces.errors import Path, Problems, dotted
from search_spaces.evaluation import Lookup, Place
from search_spaces.expressions import Expression
from search_spaces.genes import Gene, ListGene
from search_spaces.genome import Values, get, leaves, shown
from search_spaces.reading import (
    dependencies,
    hides_gene,
    is_derived,
    is_gene,
    longest_of,
    read_derived,
    read_expression,
    read_gene,
)

Node = Gene | tuple[Path, Expression]
"""What is filled in: a gene, or a derived value at its path."""

Exact = Mapping[str, Callable[[Values], float]]
"""Quantities that are known before any training, as functions of a genome: parameters, FLOPs, bytes."""


@dataclass(frozen=True)
class Constraint:
    """A condition that every genome of the space meets."""

    expression: Expression

    @property
    def text(self) -> str:
        """The condition as the user wrote it."""
        return self.expression.text


def plain_json(node: Any, path: Path, problems: Problems) -> Any:
    """A value as plain JSON: tuples are lists, numpy's numbers are numbers, keys are text. Notes what is neither."""
    if isinstance(node, Mapping):
        plain = {}
        for key, value in node.items():
            if isinstance(key, str) and _printable(key):
                plain[key] = plain_json(value, (*path, key), problems)
            else:
                problems.add(path, f"keys must be text, one is {shown(key)}")
        return plain
    if isinstance(node, list | tuple):
        return [plain_json(item, (*path, i), problems) for i, item in enumerate(node)]
    value = node.item() if isinstance(node, np.generic) else node
    finite = isinstance(value, float) and math.isfinite(value)
    if value is None or finite or isinstance(value, bool | int) or (isinstance(value, str) and _printable(value)):
        return value
    problems.add(path, f"must be a finite JSON value, is {shown(value)}")
    return None


def _printable(text: str) -> bool:
    """Whether a text can be written as UTF-8: a lone surrogate, which JSON can hold, cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def read_tree(
    tree: Any, problems: Problems, defaults: Mapping[str, Any]
) -> tuple[dict[Path, Gene | Expression], dict[str, Any]]:
    """Split a nested mapping into its genes and derived values, by path, and the template that they leave."""
    nodes: dict[Path, Gene | Expression] = {}

    def walk(node: Any, path: Path) -> Any:
        found: Gene | Expression | None
        if is_gene(node) or is_derived(node):
            found = read_gene(node, path, problems) if is_gene(node) else read_derived(node, path, problems)
            if found is not None:
                nodes[path] = found
            return None
        if isinstance(node, Mapping):
            return {key: walk(value, (*path, key)) for key, value in node.items()}
        if isinstance(node, list):
            for i, item in enumerate(node):
                if hides_gene(item):
                    problems.add((*path, i), "a gene cannot stand inside a list", help="use {list: GENE, length: N}")
        return node

    template = walk(tree, ())
    if not isinstance(template, dict):
        problems.add((), "a space is a mapping of names to values and genes")
        template = {}
    genes = {path: node for path, node in nodes.items() if isinstance(node, Gene)}
    for path, gene in genes.items():
        if isinstance(gene, ListGene) and isinstance(gene.length, Expression):
            fixed = _fixed(template, gene.length, defaults)
            nodes[path] = replace(gene, longest=longest_of(gene, genes, fixed, problems))
    return nodes, template


def _fixed(template: Mapping[str, Any], length: Expression, defaults: Mapping[str, Any]) -> Any:
    """The value of a length that names no gene."""
    try:
        return lookup_in(dict(template), None, defaults)(next(iter(length.names)))
    except (KeyError, StopIteration):
        return None


def in_order(
    nodes: Mapping[Path, Gene | Expression],
    template: Mapping[str, Any],
    problems: Problems,
    defaults: Mapping[str, Any],
) -> list[Node]:
    """Genes and derived values such that each comes after those it names; circles and unknown names are noted."""
    graph: dict[Path, set[Path]] = {}
    for path, node in nodes.items():
        names = dependencies(node) if isinstance(node, Gene) else set(node.names)
        graph[path] = set()
        for name in sorted(names):
            found = _named_nodes(name, nodes)
            graph[path] |= found
            length = isinstance(node, ListGene) and isinstance(node.length, Expression) and name in node.length.names
            if (
                not found and not _exists(name, template, defaults) and not length
            ):  # a bad length was told by `longest_of`
                _unknown_name(name, path, nodes, (template, defaults), (), problems)
    order = TopologicalSorter(graph)
    try:
        order.prepare()
    except CycleError as error:
        circle = error.args[1][:-1]
        problems.add(circle[0], f"depends on itself, by way of {', '.join(dotted(path) for path in reversed(circle))}")
        return []
    # As in the file, as far as the dependencies allow: people look for their genes where they wrote them.
    position = {path: i for i, path in enumerate(nodes)}
    ordered: list[Node] = []
    ready: list[tuple[int, Path]] = []
    while order.is_active():
        for path in order.get_ready():
            heappush(ready, (position[path], path))
        path = heappop(ready)[1]
        order.done(path)
        node = nodes[path]
        ordered.append(node if isinstance(node, Gene) else (path, node))
    return ordered


def _named_nodes(name: Place, nodes: Mapping[Path, Gene | Expression]) -> set[Path]:
    """The nodes that a name reads: the one at its path, one above it (a part of a simplex), or all below it."""
    above: set[Path] = {name[:n] for n in range(1, len(name) + 1) if name[:n] in nodes}
    return above or {path for path in nodes if path[: len(name)] == name}


def _exists(name: Place, *trees: Mapping[str, Any]) -> bool:
    for tree in trees:
        with suppress(KeyError):
            get(tree, name)
            return True
    return False


def _unknown_name(
    name: Place,
    path: Path,
    nodes: Mapping[Path, Gene | Expression],
    trees: Sequence[Mapping[str, Any]],
    extra: Iterable[str],
    problems: Problems,
) -> None:
    known = {dotted(place) for place in nodes} | {dotted(place) for tree in trees for place, _ in leaves(tree) if place}
    known |= set(extra)
    problems.unknown(path, dotted(name), known, "name")


def read_constraints(
    texts: Sequence[str],
    nodes: Mapping[Path, Gene | Expression],
    template: Mapping[str, Any],
    exact: Exact,
    problems: Problems,
    defaults: Mapping[str, Any],
) -> list[Constraint]:
    """Parse the constraints; names that neither the space nor the exact costs know are noted."""
    constraints = []
    for i, text in enumerate(texts):
        here = ("constraints", i)
        expression = read_expression(text, here, problems)
        if expression is None:
            continue
        for name in sorted(expression.names):
            known = (len(name) == 1 and name[0] in exact) or _named_nodes(name, nodes)
            if not known and not _exists(name, template, defaults):
                _unknown_name(name, here, nodes, (template, defaults), exact, problems)
        constraints.append(Constraint(expression))
    return constraints


def lookup_in(values: Values, exact: Exact | None = None, defaults: Mapping[str, Any] | None = None) -> Lookup:
    """Names of expressions resolved in a genome: an exact cost by its name, anything else as a path, and what the
    genome does not say by its default."""

    def lookup(place: Place) -> Any:
        if exact is not None and len(place) == 1 and place[0] in exact:
            value = exact[place[0]](values)
            return value.item() if isinstance(value, np.generic) else value
        try:
            return get(values, place)
        except KeyError:
            return get(defaults or {}, place)

    return lookup
