"""What an algorithm is given and what it gives."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from fitness.objectives import Objective, minimised
from fitness.trial import Trial
from search_spaces.genes import Rng
from search_spaces.genome import Genome
from search_spaces.space import Space


@dataclass(frozen=True, kw_only=True)
class History:
    """All that a proposal may know: the space, the objectives, and every trial as it was when the proposal was made."""

    space: Space
    objectives: tuple[Objective, ...]
    trials: tuple[Trial, ...]

    @cached_property
    def told(self) -> list[Trial]:
        """The trials that have told something and have not failed."""
        return [trial for trial in self.trials if trial.rungs and trial.state not in ("failed", "infeasible")]

    def points(self, trials: Sequence[Trial]) -> NDArray[np.float64]:
        """The objectives of trials with smaller better, shape (trials, objectives)."""
        return minimised([trial.rungs[-1].metrics for trial in trials], self.objectives)


@dataclass(frozen=True, kw_only=True)
class Proposal:
    """A genome to try, where it came from, and from whom."""

    genome: Genome
    operator: str
    parents: tuple[int, ...] = ()


class Algorithm(Protocol):
    """Proposes genomes. The same history and the same generator give the same proposal."""

    def propose(self, history: History, rng: Rng, /) -> Proposal:
        """A feasible genome. It may be one that was tried before; the search then asks again."""
