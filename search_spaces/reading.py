"""From what a user wrote to genes: every rule of the gene syntax, each broken one noted with its place and a way
out."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from search_spaces import simplex
from search_spaces.errors import Path, Problems
from search_spaces.evaluation import ExpressionError, Place
from search_spaces.expressions import Expression, parse
from search_spaces.genes import (
    KINDS,
    LARGEST_INTEGER,
    TRANSFERS,
    ChoiceGene,
    FloatGene,
    Gene,
    IntGene,
    ListGene,
    NumberGene,
    SimplexGene,
)
from search_spaces.genome import canonical_json, shown
from search_spaces.syntax import OPTIONS

MAX_ITEMS = 10_000
MAX_LIST = 1_024
MAX_PARTS = 256
MAX_NODES = 1_000
"""Genes and derived values of one space."""


def is_gene(node: Any) -> bool:
    """Whether a node of a space is written as a gene: a mapping that has a kind for a key."""
    return isinstance(node, Mapping) and any(kind in node for kind in KINDS)


def is_derived(node: Any) -> bool:
    """Whether a node of a space is a derived value: `{expr: "..."}`."""
    return isinstance(node, Mapping) and "expr" in node


def read_expression(text: Any, path: Path, problems: Problems) -> Expression | None:
    """Parse an expression of a space; note why and where when it cannot be."""
    if isinstance(text, bool | int | float):
        text = canonical_json(text)
    if not isinstance(text, str):
        problems.add(path, f"must be an expression, is {shown(text)}", value=text)
        return None
    try:
        return parse(text)
    except ExpressionError as error:
        problems.add(path, f"cannot be read: {error.message} (column {error.column} of `{text}`)", value=text)
        return None


def read_derived(spec: Mapping[str, Any], path: Path, problems: Problems) -> Expression | None:
    """Read `{expr: "..."}`."""
    for key in spec:
        if key != "expr":
            problems.unknown((*path, key), key, ["expr"], "option of a derived value")
    return read_expression(spec["expr"], (*path, "expr"), problems)


def read_gene(spec: Mapping[str, Any], path: Path, problems: Problems) -> Gene | None:
    """Read one gene; None when its kind or its bounds leave nothing to go on with."""
    kinds = [kind for kind in KINDS if kind in spec]
    if len(kinds) > 1:
        problems.add(path, f"has {len(kinds)} kinds ({', '.join(kinds)}), a gene has exactly one")
        return None
    kind = kinds[0]
    for option in spec:
        if option != kind and option not in OPTIONS[kind]:
            article = "an" if kind == "int" else "a"
            problems.unknown((*path, option), option, OPTIONS[kind], f"option of {article} {kind} gene")
    gene = _READERS[kind](spec, path, problems)
    if gene is None:
        return None
    return _with_condition(gene, spec, problems)


def _with_condition(gene: Gene, spec: Mapping[str, Any], problems: Problems) -> Gene:
    path = gene.path
    fields: dict[str, Any] = {}
    if "when" in spec:
        fields["when"] = read_expression(spec["when"], (*path, "when"), problems)
        if "default" not in spec:
            problems.add(
                path, "has `when` but no `default`", help="add `default:`, the value while the gene is inactive"
            )
        fields["default"] = spec.get("default")
    elif "default" in spec:
        problems.add((*path, "default"), "has `default` but no `when`", help="`baseline:` names the starting value")
    if (transfer := spec.get("transfer")) is not None:
        if transfer in TRANSFERS:
            fields["transfer"] = transfer
        else:
            problems.unknown((*path, "transfer"), str(transfer), TRANSFERS, "transfer class")
    if "baseline" in spec and not isinstance(gene, ListGene):
        if words := gene.problem(spec["baseline"]):
            problems.add((*path, "baseline"), words, value=spec["baseline"])
        else:
            fields["baseline"] = gene.normal(spec["baseline"])
    return replace(gene, **fields)


def _flag(spec: Mapping[str, Any], option: str, path: Path, problems: Problems) -> bool:
    value = spec.get(option, False)
    if not isinstance(value, bool):
        problems.add((*path, option), f"must be true or false, is {shown(value)}", value=value)
        return False
    return value


def _number(value: Any, path: Path, problems: Problems, *, whole: bool = False) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        problems.add(path, f"must be a {'whole ' if whole else ''}number, is {shown(value)}", value=value)
        return None
    if whole and isinstance(value, float):
        if not value.is_integer():
            problems.add(path, f"must be a whole number, is {value:g}", value=value)
            return None
        return int(value)
    return value


def _read_number(spec: Mapping[str, Any], path: Path, problems: Problems) -> NumberGene | None:
    kind = "int" if "int" in spec else "float"
    bounds = spec[kind]
    if not isinstance(bounds, list) or len(bounds) != 2:
        problems.add((*path, kind), f"must be [low, high], is {shown(bounds)}", value=bounds)
        return None
    read = [_number(b, (*path, kind, i), problems, whole=kind == "int") for i, b in enumerate(bounds)]
    low, high = read
    if low is None or high is None:
        return None
    if low > high:
        rule = f"low <= high must hold, got [{low:g}, {high:g}]"
        problems.add((*path, kind), rule, value=bounds, help=f"did you mean [{high:g}, {low:g}]?")
        return None
    if kind == "int" and max(-low, high) > LARGEST_INTEGER:
        problems.add((*path, kind), "whole numbers of a gene end at 2^53", value=bounds)
        return None
    if kind == "float":
        low, high = float(low), float(high)
        if not math.isfinite(high - low):
            problems.add((*path, kind), "the bounds are farther apart than numbers go", value=bounds)
            return None
    log = _flag(spec, "log", path, problems)
    if log and low <= 0:
        problems.add((*path, kind, 0), f"low > 0 must hold on a logarithmic scale, got {low:g}", value=low)
        return None
    step: float | None = 1 if kind == "int" else None
    if "step" in spec:
        step = _number(spec["step"], (*path, "step"), problems, whole=kind == "int")
        if step is not None and step <= 0:
            problems.add((*path, "step"), f"step > 0 must hold, got {step:g}", value=step)
            return None
        if step is not None and (high - low) / step > LARGEST_INTEGER:
            problems.add((*path, "step"), "makes more values than there are whole numbers up to 2^53", value=step)
            return None
        if step is not None and step > high - low > 0:
            problems.add((*path, "step"), f"step <= high - low = {high - low:g} must hold, got {step:g}", value=step)
            return None
    gene_type = IntGene if kind == "int" else FloatGene
    gene = gene_type(path=path, baseline=None, low=low, high=high, step=step, log=log)
    middle = math.sqrt(low * high) if log else (low + high) / 2
    return replace(gene, baseline=gene.legal(middle))


def _read_choice(spec: Mapping[str, Any], path: Path, problems: Problems) -> ChoiceGene | None:
    items = spec["choice"]
    if not isinstance(items, list) or not items:
        problems.add((*path, "choice"), f"must be a list of at least one item, is {shown(items)}", value=items)
        return None
    if len(items) > MAX_ITEMS:
        problems.add((*path, "choice"), f"has {len(items)} items, {MAX_ITEMS} are the most", help="use int or float")
        return None
    seen: dict[str, int] = {}
    for i, item in enumerate(items):
        text = canonical_json(item)
        if text in seen:
            problems.add((*path, "choice", i), f"item {text} is given twice", value=item)
        seen[text] = i
        if hides_gene(item):
            problems.add((*path, "choice", i), "a gene cannot stand inside an item of a choice", value=item)
    ordered = _flag(spec, "ordered", path, problems)
    return ChoiceGene(path=path, baseline=items[0], items=tuple(items), ordered=ordered)


def _read_simplex(spec: Mapping[str, Any], path: Path, problems: Problems) -> SimplexGene | None:
    given = spec["simplex"]
    here = (*path, "simplex")
    weighted = isinstance(given, Mapping)  # names alone leave the weights to us
    if isinstance(given, list) and all(isinstance(name, str) for name in given) and len(set(given)) == len(given):
        given = dict.fromkeys(given, 1.0)
    if not isinstance(given, Mapping) or not given:
        problems.add(here, f"must be a mapping of names to weights, is {shown(given)}", value=given)
        return None
    if len(given) > MAX_PARTS:
        problems.add(here, f"has {len(given)} parts, {MAX_PARTS} are the most")
        return None
    weights = [_number(weight, (*here, name), problems) for name, weight in given.items()]
    if any(weight is None for weight in weights):
        return None
    numbers = np.array(weights, dtype=np.float64)
    if np.any(numbers < 0) or numbers.sum() <= 0:
        problems.add(here, "weights must not be negative, and one must be positive", value=dict(given))
        return None
    names = tuple(given)
    floor = _bounds(spec, "floor", 0.0, names, path, problems)
    ceiling = _bounds(spec, "ceiling", 1.0, names, path, problems)
    if floor is None or ceiling is None:
        return None
    if floor.sum() > 1 + 1e-9 or ceiling.sum() < 1 - 1e-9 or np.any(floor > ceiling):
        rule = f"no weights fit: floors sum to {floor.sum():g}, ceilings to {ceiling.sum():g}"
        problems.add(here, rule, help="floors may sum to at most 1, ceilings to at least 1, floor <= ceiling each")
        return None
    share = numbers / numbers.sum()
    gene = SimplexGene(path=path, baseline=None, names=names, floor=tuple(floor), ceiling=tuple(ceiling))
    for name, weight, low, high in zip(names, share, floor, ceiling, strict=True):
        if weighted and "baseline" not in spec and not low - 1e-6 <= weight <= high + 1e-6:
            rule = f"weight {weight:g} of {name} is outside its bounds [{low:g}, {high:g}]"
            problems.add((*here, name), rule, value=float(weight), help="the weights given are the baseline")
    return replace(gene, baseline=gene.decode(list(share)))


def _bounds(
    spec: Mapping[str, Any], option: str, default: float, names: tuple[str, ...], path: Path, problems: Problems
) -> simplex.Weights | None:
    """Floors or ceilings: one number for all parts, or a mapping for some of them."""
    given = spec.get(option, default)
    here = (*path, option)
    if isinstance(given, Mapping):
        for name in given:
            if name not in names:
                problems.unknown((*here, name), name, names, "part of the simplex")
        each = [_number(given.get(name, default), (*here, name), problems) for name in names]
    else:
        each = [_number(given, here, problems)] * len(names)
    if any(bound is None for bound in each):
        return None
    bounds = np.array(each, dtype=np.float64)
    if np.any(bounds < 0) or np.any(bounds > 1):
        problems.add(here, f"must lie in [0, 1], is {shown(given)}", value=given)
        return None
    return simplex.snapped(bounds)


def _read_list(spec: Mapping[str, Any], path: Path, problems: Problems) -> ListGene | None:
    inner = spec["list"]
    here = (*path, "list")
    if not is_gene(inner) or "list" in inner:
        problems.add(here, "must be a gene that is not itself a list", value=inner, help="list: {choice: [2, 4, 8]}")
        return None
    for option in ("when", "default", "transfer"):
        if option in inner:
            problems.add((*here, option), f"`{option}` belongs to the list, not to its items")
    item = read_gene({k: v for k, v in inner.items() if k not in ("when", "default", "transfer")}, here, problems)
    length = spec.get("length")
    if length is None:
        problems.add(path, "a list needs `length`: a number, or the path of an int gene")
        return None
    parsed: int | Expression | None
    if isinstance(length, int) and not isinstance(length, bool):
        parsed = length
        if not 1 <= length <= MAX_LIST:
            problems.add((*path, "length"), f"must lie in [1, {MAX_LIST}], is {length}", value=length)
            return None
    else:
        parsed = read_expression(length, (*path, "length"), problems)
    if item is None or parsed is None:
        return None
    entries = _list_baseline(spec, item, path, problems)
    longest = parsed if isinstance(parsed, int) else 0  # a space fills it in when it knows the int gene
    return ListGene(path=path, baseline=entries, item=item, length=parsed, longest=longest)


def _list_baseline(spec: Mapping[str, Any], item: Gene, path: Path, problems: Problems) -> list[Any]:
    """The items that a list's baseline begins with; where none is given, or a single one, it is repeated."""
    if "baseline" not in spec:
        return [item.baseline]
    given = spec["baseline"]
    if item.problem(given) is None:  # an item of a choice may itself be a list
        return [item.normal(given)]
    if not isinstance(given, list) or not given:
        problems.add((*path, "baseline"), item.problem(given) or "must not be empty", value=given)
        return [item.baseline]
    for i, entry in enumerate(given):
        if words := item.problem(entry):
            problems.add((*path, "baseline", i), words, value=entry)
    return given


_READERS = {
    "float": _read_number,
    "int": _read_number,
    "choice": _read_choice,
    "simplex": _read_simplex,
    "list": _read_list,
}


def hides_gene(node: Any) -> bool:
    """Whether a gene or a derived value stands somewhere inside a value."""
    if isinstance(node, Mapping):
        return is_gene(node) or is_derived(node) or any(hides_gene(value) for value in node.values())
    return isinstance(node, list) and any(hides_gene(item) for item in node)


def longest_of(gene: ListGene, genes: Mapping[Path, Gene], fixed: Any, problems: Problems) -> int:
    """The greatest length that a list gene can take: its number, or the largest value of the gene that it names.

    Every value that the named gene can take, its default included, has to be a length.
    """
    if isinstance(gene.length, int):
        return gene.length
    place = (*gene.path, "length")
    if gene.length.names != {_whole(gene.length)}:
        problems.add(place, f"must be a number or the path of an int gene, is `{gene.length}`")
        return 0
    named = genes.get(next(iter(gene.length.names))) if gene.length.names == {_whole(gene.length)} else None
    lengths: list[Any]
    if isinstance(named, IntGene):
        lengths = [named.low, named.high]
    elif isinstance(named, ChoiceGene):
        lengths = list(named.items)
    else:
        lengths = [fixed]
    if named is not None and named.when is not None:
        lengths.append(named.default)
    if named is None and fixed is None:
        ints = [other.name for other in genes.values() if isinstance(other, IntGene)]
        problems.unknown(place, gene.length.text, ints, "length")
        return 0
    if any(isinstance(length, bool) or not isinstance(length, int) for length in lengths):
        rule = f"must be a number or the path of an int gene, is `{gene.length}`"
        ints = [other.name for other in genes.values() if isinstance(other, IntGene)]
        problems.add(place, rule, help=f"int genes here: {', '.join(ints)}" if ints else None)
        return 0
    if not 1 <= min(lengths) <= max(lengths) <= MAX_LIST:
        problems.add(place, f"must lie in [1, {MAX_LIST}], can be {min(lengths)} to {max(lengths)}")
        return 0
    return int(max(lengths))


def _whole(expression: Expression) -> tuple[str, ...]:
    """The place that an expression reads when it is nothing but a name."""
    return tuple(expression.text.strip().split("."))


def dependencies(gene: Gene) -> set[Place]:
    """The names that must be known before the gene can be given a value."""
    names = set(gene.when.names) if gene.when is not None else set()
    if isinstance(gene, ListGene) and isinstance(gene.length, Expression):
        names |= gene.length.names
    return names
