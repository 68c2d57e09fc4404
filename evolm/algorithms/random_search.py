"""Random search: every genome drawn from the space's own distribution."""

from __future__ import annotations

from evolm.algorithms.base import History, Proposal
from search_spaces.genes import Rng


class RandomSearch:
    """The control that every other algorithm has to beat."""

    def propose(self, history: History, rng: Rng, /) -> Proposal:
        """A genome that no trial has any say in."""
        return Proposal(genome=history.space.sample(rng), operator="random")
