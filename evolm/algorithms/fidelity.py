"""Rungs: how long trials are trained, and which of them go on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from fitness.objectives import Objective, minimised
from fitness.pareto import adds_most, as_ranks
from fitness.trial import Trial
from search_spaces.errors import UsageError

DEFAULT_ETA = 4


@dataclass(frozen=True)
class Fidelity:
    """The ladder: tokens of each rung, lowest first; `eta` is how many trials of a rung there are for each that goes
    on."""

    rungs: tuple[int, ...]
    eta: int = DEFAULT_ETA

    @property
    def top(self) -> int:
        """The number of the last rung."""
        return len(self.rungs) - 1


def read_fidelity(given: Mapping[str, Any] | None) -> Fidelity | None:
    """`{"tokens": [2M, 32M], "eta": 4}` as rungs: from the first number, times eta each, up to the last.

    More than two numbers are the rungs themselves; one number is a single rung. Raises UsageError.
    """
    if given is None:
        return None
    eta = given.get("eta", DEFAULT_ETA)
    if isinstance(eta, bool) or not isinstance(eta, int) or eta < 2:
        raise UsageError(f"fidelity.eta: must be a whole number of at least 2, is {eta!r}")
    tokens = given.get("tokens")
    numbers = tokens if isinstance(tokens, list | tuple) else [tokens]
    rungs = []
    for number in numbers:
        if isinstance(number, bool) or not isinstance(number, int | float) or number < 1:
            raise UsageError(f"fidelity.tokens: must be numbers of tokens, is {tokens!r}")
        rungs.append(int(number))
    if not rungs or any(low >= high for low, high in pairwise(rungs)):
        raise UsageError(f"fidelity.tokens: must grow from rung to rung, is {tokens!r}")
    if len(rungs) == 2:
        low, high = rungs
        rungs = [high]
        while rungs[0] / eta > low * 1.01:
            rungs.insert(0, round(rungs[0] / eta))
        if low < rungs[0]:
            rungs.insert(0, low)
    return Fidelity(tuple(rungs), eta)


def next_promotion(
    trials: Sequence[Trial], fidelity: Fidelity, objectives: Sequence[Objective], always: int | None = None
) -> Trial | None:
    """The trial to train on, or None: asynchronous successive halving that promotes (Li et al. 2020, arXiv 1810.05934).

    Highest rung first, a trial goes on when fewer than 1/eta of those that reached the rung have gone on: the one that
    adds most hypervolume to them, with objectives as ranks among all that reached it. `always` is a trial that goes on
    whatever its rank and counts for nobody: the baseline.
    """
    good = [
        (trial.rungs[-1].rung, trial) for trial in trials if trial.rungs and trial.state not in ("failed", "infeasible")
    ]
    for rung in sorted({height for height, trial in good if trial.state == "paused"}, reverse=True):
        reached = [trial for height, trial in good if height >= rung]
        waiting = {trial.id for height, trial in good if height == rung and trial.state == "paused"}
        if always in waiting:
            return next(trial for trial in reached if trial.id == always)
        quota = len(reached) // fidelity.eta
        if waiting and sum(trial.id not in waiting and trial.id != always for trial in reached) < quota:
            told = [(trial, rung_of.metrics) for trial in reached if (rung_of := trial.at(rung)) is not None]
            points = as_ranks(minimised([metrics for _, metrics in told], objectives))
            behind = [i for i, (trial, _) in enumerate(told) if trial.id in waiting]
            ahead = [i for i, (trial, _) in enumerate(told) if trial.id not in waiting and trial.id != always]
            return told[behind[adds_most(points[ahead], points[behind])]][0]
    return None
