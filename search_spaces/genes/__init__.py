"""The kinds of gene: what values each may take, and how they are drawn, varied and turned into numbers.

A gene is written as a mapping with exactly one kind key:

    {float: [1e-4, 1e-2], log: true}    {int: [128, 512], step: 64}    {choice: [swiglu, relu2]}
    {simplex: {web: 0.6, code: 0.4}, floor: 0.02}    {list: {choice: [2, 4, 8]}, length: model.n_layers}

Operations of a gene never look at other genes. Where a list's length is the value of another gene, `sized` gives the
gene with the length filled in.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from search_spaces.genes.base import LARGEST_INTEGER, TRANSFERS, Choose, Gene, Rng
from search_spaces.genes.choice import ChoiceGene
from search_spaces.genes.lists import ListGene
from search_spaces.genes.mix import SimplexGene
from search_spaces.genes.numbers import FloatGene, IntGene, NumberGene
from search_spaces.genome import get

KINDS: dict[str, type[Gene]] = {gene.kind: gene for gene in (FloatGene, IntGene, ChoiceGene, SimplexGene, ListGene)}


def inherited(gene: Gene, parent: Mapping[str, Any], rng: Rng | None) -> Any:
    """The parent's value, fitted to this genome; where the gene slept in the parent, a fresh one."""
    value = get(parent, gene.path)
    if isinstance(gene, ListGene) and isinstance(value, list):
        value = gene.fit(value, rng)
    if gene.problem(value) is None:
        return value
    return gene.sample(rng) if rng is not None else gene.fit(gene.baseline, None)


__all__ = [
    "KINDS",
    "LARGEST_INTEGER",
    "TRANSFERS",
    "ChoiceGene",
    "Choose",
    "FloatGene",
    "Gene",
    "IntGene",
    "ListGene",
    "NumberGene",
    "Rng",
    "SimplexGene",
    "inherited",
]
