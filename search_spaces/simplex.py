"""Weights that sum to one, each between a floor and a ceiling: drawing, moving and rounding them without rejection."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Weights = NDArray[np.float64]

DECIMALS = 6
"""Weights are kept to a millionth: short in files, exact in round trips, finer than any data loader can draw."""


def rounded(weights: Weights, floor: Weights, ceiling: Weights) -> Weights:
    """The weights to `DECIMALS` places within their bounds, still summing to one.

    The remainder goes to the part with the most room for it. Rounding again changes nothing.
    """
    result: Weights = np.clip(np.round(weights, DECIMALS), floor, ceiling)
    remainder = 1.0 - float(result.sum())
    if abs(remainder) > 1e-12:
        part = int(np.argmax(ceiling - result if remainder > 0 else result - floor))
        result[part] = min(ceiling[part], max(floor[part], round(float(result[part]) + remainder, 12)))
    return result


def project(weights: Weights, floor: Weights, ceiling: Weights) -> Weights:
    """Scale positive weights by one factor and clip them so that they sum to one within floor and ceiling.

    Ratios between parts that touch no bound are kept. The sum of the clipped weights grows with the factor, so the
    factor is found by bisection.
    """
    positive = np.maximum(weights, 1e-12)
    low, high = 0.0, float(np.max(ceiling / positive)) + 1.0
    for _ in range(100):
        middle = (low + high) / 2
        if np.clip(positive * middle, floor, ceiling).sum() < 1.0:
            low = middle
        else:
            high = middle
    clipped: Weights = np.clip(positive * high, floor, ceiling)
    return rounded(clipped, floor, ceiling)


def draw(rng: np.random.Generator, floor: Weights, ceiling: Weights) -> Weights:
    """A random point between floor and ceiling, never rejected.

    Without ceilings it is Dirichlet(1, ..., 1) above the floor: broken off a stick part by part, where the share of the
    next of m+1 parts is Beta(1, m) with distribution function 1 - (1-t)^m. A ceiling cuts that Beta to the range in
    which the remaining parts can still be filled; parts are taken in random order so that none is favoured.
    """
    order = rng.permutation(len(floor))
    weights = np.zeros(len(floor))
    rest = 1.0
    for position, part in enumerate(order):
        others = order[position + 1 :]
        if len(others) == 0:
            weights[part] = rest
            break
        free = rest - floor[part] - floor[others].sum()
        if free > 1e-12:
            least = max(0.0, rest - ceiling[others].sum() - floor[part]) / free
            most = min(1.0, (ceiling[part] - floor[part]) / free)
            m = len(others)
            f_least, f_most = 1 - (1 - min(least, 1.0)) ** m, 1 - (1 - most) ** m
            share = 1 - (1 - rng.uniform(f_least, max(f_least, f_most))) ** (1 / m)
        else:
            share = 0.0
        weights[part] = floor[part] + max(0.0, free) * share
        rest -= weights[part]
    return rounded(weights, floor, ceiling)


def step(rng: np.random.Generator, weights: Weights, floor: Weights, ceiling: Weights, scale: float) -> Weights:
    """A Gaussian step of the log-ratios: each weight is multiplied by exp(scale * z), then fitted to the bounds
    again."""
    moved = np.maximum(weights, 1e-3) * np.exp(scale * rng.standard_normal(len(weights)))
    return project(moved, floor, ceiling)
