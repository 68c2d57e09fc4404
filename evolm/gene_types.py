"""Types before any trial: fixed values and the extremes of every gene held against the recipe's schema."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from search_spaces.errors import Path as KeyPath
from search_spaces.errors import Problem, Problems, nearest
from search_spaces.genes import KINDS, ChoiceGene, Gene, ListGene, NumberGene
from search_spaces.genome import Values, get
from search_spaces.reading import hides_gene, is_derived, is_gene, read_gene
from trainer.recipe_check import check


def check_types(recipe: Values, problems: Problems) -> None:
    """Hold fixed values, and the extreme values of every gene, against the recipe's schema.

    Works on what can be read: genes that are not in order are left out, and derived values, which depend on them.
    """
    for path, words in JUDGED_ALIKE.items():
        _refuse_genes_below(recipe, path, words, problems)
    genes: list[Gene] = []
    plain = _without_genes(recipe, (), genes)
    note([entry for entry in check(plain) if entry[1] != "is missing" or entry[0] == ("data",)], recipe, problems)
    for gene in genes:
        for value in _extremes(gene):
            candidate = copy.deepcopy(plain)
            *way, last = gene.path
            get(candidate, tuple(way))[last] = value
            found = [entry for entry in check(candidate) if entry[0][: len(gene.path)] == gene.path]
            if found:
                note([(gene.path, *found[0][1:])], recipe, problems)
                break


JUDGED_ALIKE: dict[KeyPath, str] = {
    ("data", "sources"): "all trials read the same text",
    ("data", "held_out"): "all trials are judged on the same text",
    ("train", "seed"): "trials are compared on the same seed, `search: {seed: 0}`",
}
"""Where no gene may stand: differences of what is trained would be mixed up with differences of how it is judged."""


def _refuse_genes_below(recipe: Values, path: KeyPath, words: str, problems: Problems) -> None:
    node: Any = recipe
    for i, key in enumerate(path):
        node = node.get(key) if isinstance(node, Mapping) else None
        if is_gene(node) or is_derived(node) or (i + 1 == len(path) and hides_gene(node)):
            problems.add(path[: i + 1], f"cannot be a gene: {words}")
            return
    if path == ("train", "seed") and node is not None:
        problems.add(path, "is not read by a search", help="write `search: {seed: ...}`")


def _without_genes(node: Any, path: KeyPath, genes: list[Gene]) -> Any:
    """A recipe with its genes taken out; those that can be read are added to `genes`."""
    if not isinstance(node, dict):
        return node
    plain = {}
    for key, value in node.items():
        here = (*path, key)
        if is_gene(value):
            # A condition without a default is told by the reader; it has no value to be checked here.
            known = {k: v for k, v in value.items() if k != "when" or "default" in value}
            gene = read_gene(known, here, Problems())
            genes += [gene] if gene is not None else []
        elif not is_derived(value):
            plain[key] = _without_genes(value, here, genes)
    return plain


def _extremes(gene: Gene) -> list[Any]:
    values: list[Any] = [gene.default] if gene.when is not None else []
    if isinstance(gene, NumberGene):
        values += [gene.typed(gene.low), gene.typed(gene.high)]
    elif isinstance(gene, ChoiceGene):
        values += list(gene.items)
    elif isinstance(gene, ListGene):
        values += [[value] for value in _extremes(gene.item)]
    return values


def note(found: list[tuple[KeyPath, str, str | None]], written: Values, problems: Problems) -> None:
    """Note findings of a schema, with the advice that what was written there gives."""
    for path, words, advice in found:
        problems.found.append(
            Problem(
                path=path,
                rule=words,
                help=advice or _misspelt_kind(path, written),
                on_key=words.startswith("unknown key"),
            )
        )


def _misspelt_kind(path: KeyPath, written: Values) -> str | None:
    """`{flaot: [0, 1]}` is a mapping to the reader and a gene to its writer."""
    try:
        node = get(written, path)
    except KeyError:
        return None
    if not isinstance(node, Mapping) or is_gene(node) or is_derived(node):
        return None
    close = next((kind for key in node if (kind := nearest(str(key), [*KINDS, "expr"]))), None)
    return f"a gene? did you mean the kind '{close}'?" if close else None
