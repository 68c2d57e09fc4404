"""Pareto maths on points with smaller better, shape (points, objectives): moocore's algorithms, and one objective
too."""

from __future__ import annotations

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


def dominates(points: Points) -> NDArray[np.bool_]:
    """Who dominates whom, shape (points, points): row i, column j says whether point i dominates point j."""
    no_worse = (points[:, None, :] <= points[None, :, :]).all(axis=2)
    better = (points[:, None, :] < points[None, :, :]).any(axis=2)
    return np.asarray(no_worse & better, dtype=bool)


def ranks(points: Points) -> NDArray[np.int64]:
    """Front number of each point: 0 for the non-dominated ones, 1 for those left when these are taken away, and so
    on."""
    if len(points) == 0:
        return np.zeros(0, dtype=np.int64)
    return np.asarray(moocore.pareto_rank(points), dtype=np.int64)


def crowding(points: Points) -> NDArray[np.float64]:
    """The crowding distance of each point: how far apart its neighbours are, over the range, summed over objectives;
    infinite at the ends (Deb et al. 2002, doi 10.1109/4235.996017, section III-B)."""
    distance = np.zeros(len(points))
    for column in points.T if len(points) else ():
        order = np.argsort(column, kind="stable")
        span = column[order[-1]] - column[order[0]]
        if span > 0:  # where all are alike, none is at an end
            distance[order[1:-1]] += (column[order[2:]] - column[order[:-2]]) / span
            distance[order[[0, -1]]] = np.inf
    return distance


def best(points: Points, count: int) -> NDArray[np.int64]:
    """The positions of the best `count` points: by front number, and on the front that has to be cut by crowding
    distance."""
    fronts = ranks(points)
    if len(points) <= count:
        return np.argsort(fronts, kind="stable")
    if count <= 0:
        return np.zeros(0, dtype=np.int64)
    last = np.sort(fronts)[count - 1]
    whole, edge = np.flatnonzero(fronts < last), np.flatnonzero(fronts == last)
    spread = edge[np.argsort(-crowding(points[edge]), kind="stable")]
    return np.concatenate([whole, spread[: count - len(whole)]])


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


def as_ranks(points: Points) -> Points:
    """Each objective as its rank among the points, from 0 (best) to 1, equal values alike: neither units nor outliers
    have a say."""
    ranked = np.empty(points.shape)
    for column in range(points.shape[1]):
        _, place = np.unique(points[:, column], return_inverse=True)
        ranked[:, column] = place / max(1, place.max(initial=0))
    return ranked


def adds_most(taken: Points, waiting: Points) -> int:
    """Which of the waiting points adds most hypervolume to those that are taken, up to 1.1 in each objective.

    A step of greedy hypervolume subset selection (Guerreiro et al. 2016, doi 10.1162/EVCO_a_00188). Where none adds
    anything, the one that dominates most by itself.
    """
    reference = [1.1] * waiting.shape[1]
    before = hypervolume(taken, reference)
    members = np.flatnonzero(nondominated(waiting))  # a point adds no more than one that dominates it
    gains = [
        (
            hypervolume(np.vstack([taken, waiting[i : i + 1]]), reference) - before,
            hypervolume(waiting[i : i + 1], reference),
        )
        for i in members
    ]
    best = max(range(len(members)), key=lambda i: (round(gains[i][0], 12), gains[i][1], -i))
    return int(members[best])


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
