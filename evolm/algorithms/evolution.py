"""Steady-state evolution: a free worker gets a child of the best trials known at that moment, there is no
generation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from deap import base, tools

from evolm.algorithms.base import History, Proposal
from fitness.pareto import best
from fitness.trial import Trial
from search_spaces.genes import Rng

SMALLEST_START, LARGEST_START = 6, 20


class _Candidate:
    """A trial as DEAP's selection wants it. Its fitness class is made per number of objectives, never registered."""

    def __init__(self, trial: Trial, values: list[float], fitness: Any) -> None:
        self.trial = trial
        self.fitness: Any = fitness(values)


@dataclass(frozen=True, kw_only=True)
class Nsga2:
    """NSGA-II (Deb et al. 2002) with our genomes and operators, one child at a time.

    The population is the best `population` trials by front number and crowding distance (DEAP's `selNSGA2`). Trials
    that reached a higher rung come first: metrics of different rungs do not compare, and the better ones were promoted.
    """

    population: int = 12
    crossover: float = 0.7
    immigrants: float = 0.1

    def propose(self, history: History, rng: Rng, /) -> Proposal:
        """Random genomes at first, then children of tournament winners, and now and then a random one."""
        space, told = history.space, history.told
        start = min(LARGEST_START, max(SMALLEST_START, len(space.genes) + 2))
        if len(history.trials) < start or len(told) < 2 or rng.random() < self.immigrants:
            return Proposal(genome=space.sample(rng), operator="random")
        ranked = self.survivors(history)
        mother = _tournament(ranked, rng)
        father = _tournament([trial for trial in ranked if trial is not mother], rng)
        if rng.random() < self.crossover:
            child = space.cross(mother.frozen, father.frozen, rng)
            if child not in (mother.frozen, father.frozen) and rng.random() < 0.5:
                return Proposal(genome=child, operator="crossover", parents=(mother.id, father.id))
            child = space.mutate(child, rng)
            return Proposal(genome=child, operator="crossover+mutation", parents=(mother.id, father.id))
        return Proposal(genome=space.mutate(mother.frozen, rng), operator="mutation", parents=(mother.id,))

    def survivors(self, history: History) -> list[Trial]:
        """The population, best first."""
        told = history.told
        fitness: Any = type("Fitness", (base.Fitness,), {"weights": (-1.0,) * len(history.objectives)})
        heights = np.array([trial.rung for trial in told])
        ranked: list[Trial] = []
        for rung in np.unique(heights)[::-1]:
            group = [told[i] for i in np.flatnonzero(heights == rung)]
            points = history.points(group)
            room = self.population - len(ranked)
            # DEAP sorts in Python, in quadratic time: it gets as many as there is room for, and no more.
            candidates = [_Candidate(group[i], list(points[i]), fitness) for i in best(points, room)]
            ranked += [candidate.trial for candidate in tools.selNSGA2(candidates, len(candidates))]
            if len(ranked) >= self.population:
                break
        return ranked


def _tournament(ranked: list[Trial], rng: Rng) -> Trial:
    """The better of two, drawn at random; `ranked` is best first."""
    return ranked[int(rng.integers(len(ranked), size=2).min())]
