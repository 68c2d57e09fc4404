"""Pareto maths on points with smaller better, shape (points, objectives): moocore's algorithms, and one objective
too."""

from __future__ import annotations

import math
from collections.abc import Sequence

import moocore
import numpy as np
from numpy.typing import NDArray

Points = NDArray[np.float64]


def nondominated(points: Points) -> NDArray[np.bool_]:
    """Which points no other point dominates; equal points do not dominate each other."""
    if len(points) == 0:
        return np.zeros(0, dtype=bool)
    return np.asarray(moocore.is_nondominated(points, keep_weakly=True), dtype=bool)


def ranks(points: Points) -> NDArray[np.int64]:
    """Front number of each point: 0 for the non-dominated ones, 1 for those left when these are taken away, and so
    on."""
    if len(points) == 0:
        return np.zeros(0, dtype=np.int64)
    return np.asarray(moocore.pareto_rank(points), dtype=np.int64)


def hypervolume(points: Points, reference: Sequence[float]) -> float:
    """The volume that the points dominate up to the reference point; points beyond it add nothing."""
    if len(points) == 0:
        return 0.0
    return float(moocore.hypervolume(points, ref=np.asarray(reference, dtype=np.float64)))


def contributions(points: Points, reference: Sequence[float]) -> NDArray[np.float64]:
    """The hypervolume that is lost with each point; 0 for dominated points and for equal ones, as the twin remains."""
    if len(points) == 0:
        return np.zeros(0)
    ref = np.asarray(reference, dtype=np.float64)
    if points.shape[1] == 1:
        order = np.argsort(points[:, 0], kind="stable")
        second = points[order[1], 0] if len(order) > 1 else ref[0]
        lost = np.zeros(len(points))
        lost[order[0]] = max(0.0, min(second, ref[0]) - points[order[0], 0])
        return lost
    # A point that is dominated takes nothing with it, but hides what the point before it would lose.
    return np.asarray(moocore.hv_contributions(points, ref=ref, ignore_dominated=False), dtype=np.float64)


def reference_of(points: Points) -> list[float]:
    """A reference point a tenth of the range beyond the worst of the points: for ranking within one set only."""
    worst, best = points.max(axis=0), points.min(axis=0)
    margin = np.where(worst > best, 0.1 * (worst - best), 0.1 * np.maximum(1.0, np.abs(worst)))
    return [float(value) for value in worst + margin]


def preference(points: Points, count: int | None = None) -> list[int]:
    """The best points (all, or `count`), best first: by front number, and within a front by added hypervolume.

    The extremes of a front come first within it: their contribution depends on a reference point that nobody chose.
    """
    wanted = len(points) if count is None else min(count, len(points))
    front = ranks(points)
    order: list[int] = []
    for rank in range(int(front.max(initial=-1)) + 1):
        if len(order) >= wanted:
            break
        members = np.flatnonzero(front == rank)
        scaled = _scaled(points[members])
        added = contributions(scaled, [1.1] * points.shape[1])
        added[np.unique(scaled.argmin(axis=0))] = math.inf
        order += [int(members[i]) for i in np.argsort(-added, kind="stable")]
    return order[:wanted]


def knee(points: Points) -> int | None:
    """The point of the front farthest below the line (plane) between its extremes; None when there is none below it.

    Das 1999, "On characterizing the knee of the Pareto curve"; objectives scaled to [0, 1] on the front.
    """
    front = np.flatnonzero(nondominated(points))
    if len(front) < 3:
        return None
    scaled = _scaled(points[front])
    sums = scaled.sum(axis=1)
    return int(front[np.argmin(sums)]) if sums.min() < scaled[scaled.argmin(axis=0)].sum(axis=1).min() - 1e-12 else None


def _scaled(points: Points) -> Points:
    low, span = points.min(axis=0), np.ptp(points, axis=0)
    scaled: Points = (points - low) / np.where(span > 0, span, 1.0)
    return scaled


class Normaliser:
    """Maps objectives to [0, 1] by bounds that do not move, so that hypervolumes of one run compare.

    `low` and `high` are taken from given points; where all values are positive and the objective is a cost (`log`), the
    scale is logarithmic. The reference is 1.1 in each objective.
    """

    def __init__(self, points: Points, log: Sequence[bool]) -> None:
        self.log = np.array([flag and bool((points[:, i] > 0).all()) for i, flag in enumerate(log)])
        mapped = self._map(points)
        self.low = mapped.min(axis=0)
        span = mapped.max(axis=0) - self.low
        self.span = np.where(span > 0, span, 1.0)

    def _map(self, points: Points) -> Points:
        positive = np.maximum(points, np.finfo(np.float64).tiny)
        return np.where(self.log, np.log(positive), points)

    def normalised(self, points: Points) -> Points:
        """The points on the frozen scale; better than its best by more than the whole scale counts as just that."""
        scaled: Points = np.maximum((self._map(points) - self.low) / self.span, -1.0)
        return scaled

    def hypervolume(self, points: Points) -> float:
        """Normalised hypervolume of the points."""
        if len(points) == 0:
            return 0.0
        return hypervolume(self.normalised(points), [1.1] * points.shape[1])
