"""Weights that sum to one, each between a floor and a ceiling: drawing, moving and rounding them without rejection.

Weights are whole millionths: short in files, exact in round trips, finer than any data loader can draw. Floors and
ceilings are too, so a rounded weight can always respect them.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Weights = NDArray[np.float64]

UNITS = 1_000_000


def snapped(bounds: Weights) -> Weights:
    """Floors or ceilings to the nearest millionth."""
    return _weights(np.round(bounds * UNITS).astype(np.int64))


def _weights(units: NDArray[np.int64]) -> Weights:
    """Millionths as the floats that are printed with six decimals."""
    weights: Weights = np.round(units / UNITS, 6)
    return weights


def rounded(weights: Weights, floor: Weights, ceiling: Weights) -> Weights:
    """The weights to whole millionths within their (snapped) bounds, summing to exactly one million of them.

    What rounding leaves over goes to the parts that lost most by it (largest remainder). Rounding again changes
    nothing.
    """
    low, high = np.round(floor * UNITS).astype(np.int64), np.round(ceiling * UNITS).astype(np.int64)
    units = np.clip(np.round(weights * UNITS).astype(np.int64), low, high)
    missing = UNITS - int(units.sum())
    while missing:
        step = 1 if missing > 0 else -1
        room = units < high if step > 0 else units > low
        lost = np.where(room, step * (weights * UNITS - units), -np.inf)
        takers = np.argsort(-lost, kind="stable")[: min(abs(missing), int(room.sum()))]
        if len(takers) == 0:  # the bounds leave no such weights: reading has told so
            break
        units[takers] += step
        missing = UNITS - int(units.sum())
    return _weights(units)


def project(weights: Weights, floor: Weights, ceiling: Weights) -> Weights:
    """Scale positive weights by one factor and clip them so that they sum to one within floor and ceiling.

    Ratios between parts that touch no bound are kept. The sum of the clipped weights grows with the factor, so the
    factor is found by bisection.
    """
    positive = np.maximum(weights, 1e-12)
    low, high = 0.0, float(np.max(ceiling / positive)) + 1.0
    middle = high / 2
    while low < middle < high:
        if np.clip(positive * middle, floor, ceiling).sum() < 1.0:
            low = middle
        else:
            high = middle
        if high - low < 1e-12 * high:
            break
        middle = (low + high) / 2
    clipped: Weights = np.clip(positive * high, floor, ceiling)
    return rounded(clipped, floor, ceiling)


def draw(rng: np.random.Generator, floor: Weights, ceiling: Weights) -> Weights:
    """A random point between floor and ceiling, never rejected.

    Without ceilings it is Dirichlet(1, ..., 1) above the floor: broken off a stick part by part, where the share of the
    next of m+1 parts is Beta(1, m) with distribution function 1 - (1-t)^m. A ceiling cuts that Beta to the range in
    which the remaining parts can still be filled; parts are taken in random order so that none is favoured.
    """
    order = rng.permutation(len(floor)).tolist()
    weights = np.zeros(len(floor))
    rest, floors, ceilings = 1.0, float(floor.sum()), float(ceiling.sum())
    lows, highs = floor.tolist(), ceiling.tolist()
    for others, part in zip(range(len(order) - 1, -1, -1), order, strict=True):
        if others == 0:
            weights[part] = rest
            break
        floors, ceilings = floors - lows[part], ceilings - highs[part]  # of the parts that are still to come
        free = rest - lows[part] - floors
        share = _share(rng, rest, free, lows[part], highs[part], ceilings, others)
        weights[part] = lows[part] + max(0.0, free) * share
        rest -= weights[part]
    return rounded(weights, floor, ceiling)


def _share(
    rng: np.random.Generator, rest: float, free: float, floor: float, ceiling: float, ceilings: float, others: int
) -> float:
    """What one part takes of what is free, such that the other parts can hold the remainder."""
    if free <= 1e-12:
        return 0.0
    least = min(1.0, max(0.0, rest - ceilings - floor) / free)
    most = min(1.0, (ceiling - floor) / free)
    below, above = 1 - (1 - least) ** others, 1 - (1 - most) ** others
    return float(1 - (1 - (below + max(0.0, above - below) * rng.random())) ** (1 / others))


def step(rng: np.random.Generator, weights: Weights, floor: Weights, ceiling: Weights, scale: float) -> Weights:
    """A Gaussian step of the log-ratios: each weight is multiplied by exp(scale * z), then fitted to the bounds
    again."""
    moved = np.maximum(weights, 1e-3) * np.exp(scale * rng.standard_normal(len(weights)))
    return project(moved, floor, ceiling)


def moved(weights: Weights, part: int, to: float, floor: Weights, ceiling: Weights) -> Weights:
    """The weights with one of them set, as far as the bounds let it; what the others have above their floors is
    scaled."""
    others = np.arange(len(weights)) != part
    highest = min(float(ceiling[part]), 1 - float(floor[others].sum()))
    lowest = max(float(floor[part]), 1 - float(ceiling[others].sum()))
    result = weights.copy()
    result[part] = min(highest, max(lowest, to))
    surplus = weights - floor
    free = 1 - result[part] - floor[others].sum()
    if surplus[others].sum() > 0:
        result[others] = floor[others] + surplus[others] * (free / surplus[others].sum())
    fits = bool(np.all(result <= ceiling + 1e-9))
    return rounded(result, floor, ceiling) if fits else project(result, floor, ceiling)
