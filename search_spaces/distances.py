"""How far one genome is from many others at once: the distances of `Space.distance`, by arrays.

The distance of two genomes is the mean of their genes' distances, each from 0 (equal) to 1 in the gene's own scale:

    number, ordered choice    |a - b| of the positions in the range (in the logarithmic range where the gene has one)
    choice without order      0 or 1
    simplex                   total variation, sum |a_i - b_i| / 2
    list                      sum of the positions' distances / the longer length; a position of one list alone counts 1
    active in one alone       1; asleep in both: 0

All of these are sums of |a - b| over the numbers of the codes, each divided by its gene's `span`. A list is one cell a
position, any other gene a single one, and a gene that sleeps has no cell at all: the last two lines above are one rule.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from search_spaces.genes import Gene, ListGene
from search_spaces.genome import Genome, get
from search_spaces.space import Space


class Distances:
    """Genomes of a space, laid out once, so that the distances of another one to all of them take microseconds."""

    def __init__(self, space: Space, genomes: Sequence[Genome]) -> None:
        self.space = space
        items = [gene.item if isinstance(gene, ListGene) else gene for gene in space.genes]
        cells = [gene.longest if isinstance(gene, ListGene) else 1 for gene in space.genes]
        widths = [item.width for item, count in zip(items, cells, strict=True) for _ in range(count)]
        spans = [item.span for item, count in zip(items, cells, strict=True) for _ in range(count)]
        self._items: list[Gene] = items
        self._genes = _starts(cells)  # the first cell of each gene
        self._cells = _starts(widths)  # the first number of each cell
        self._spans = np.array(spans, dtype=np.float64)
        self._width = sum(widths)
        laid = [self._lay(genome) for genome in genomes]
        self._codes = np.array([codes for codes, _ in laid]).reshape(len(laid), self._width)
        self._there = np.array([there for _, there in laid], dtype=bool).reshape(len(laid), len(widths))

    def to(self, genome: Genome) -> NDArray[np.float64]:
        """The distance of the genome to each of the others, shape (genomes,)."""
        if not self._items:
            return np.zeros(len(self._codes))
        codes, there = self._lay(genome)
        gaps = np.add.reduceat(np.abs(self._codes - codes), self._cells, axis=1) / self._spans
        apart = np.where(self._there & there, np.minimum(1.0, gaps), self._there != there)
        either = np.maximum(self._count(self._there), self._count(there[None]))
        distances = np.add.reduceat(apart, self._genes, axis=1) / np.maximum(1, either)
        mean: NDArray[np.float64] = distances.mean(axis=1)
        return mean

    def _count(self, there: NDArray[np.bool_]) -> NDArray[np.int64]:
        """How many cells each gene has, shape (genomes, genes)."""
        counts: NDArray[np.int64] = np.add.reduceat(there.astype(np.int64), self._genes, axis=1)
        return counts

    def _lay(self, genome: Genome) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
        """The numbers of a genome's cells, and which cells it has."""
        codes, there = np.zeros(self._width), np.zeros(len(self._spans), dtype=bool)
        values = genome.values()
        active = {gene.path for gene in self.space.active(values)}
        for gene, item, cell in zip(self.space.genes, self._items, self._genes, strict=True):
            if gene.path not in active:
                continue
            value = get(values, gene.path)
            for position, one in enumerate(value if isinstance(gene, ListGene) else [value], start=int(cell)):
                start = self._cells[position]
                codes[start : start + item.width] = item.encode(one)
                there[position] = True
        return codes, there


def _starts(lengths: Sequence[int]) -> NDArray[np.int64]:
    """Where each of several parts begins that lie one behind the other."""
    return np.cumsum([0, *lengths], dtype=np.int64)[:-1]
