"""What a search optimises: named metrics, each to be made small or large."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fitness.errors import BadMetrics
from search_spaces.errors import UsageError, nearest

DIRECTIONS = ("min", "max")

MEASURED = ("bits_per_byte", "perplexity", "train_loss", "tokens_per_second", "seconds")
"""Metrics of every trial that are known only after training; `bits_per_byte/DOMAIN` beside them."""


@dataclass(frozen=True)
class Objective:
    """One metric and the direction that is better."""

    metric: str
    direction: str = "min"

    @property
    def sign(self) -> float:
        """Multiply by this to make smaller better."""
        return 1.0 if self.direction == "min" else -1.0


def read_objectives(given: Mapping[str, str] | Sequence[str]) -> tuple[Objective, ...]:
    """`{"bits_per_byte": "min", "params": "min"}` as objectives. Raises UsageError for an empty or misspelt one."""
    if isinstance(given, str):
        given = [given]
    pairs = given.items() if isinstance(given, Mapping) else [(name, "min") for name in given]
    if len(dict(pairs)) < len(list(pairs)):
        raise UsageError("objectives: a metric is named twice")
    objectives = []
    for metric, direction in pairs:
        if direction not in DIRECTIONS:
            close = nearest(str(direction).lower(), ["min", "max", "minimize", "maximize"])
            advice = f"; did you mean '{close[:3]}'?" if close else ""
            raise UsageError(f"objectives.{metric}: must be min or max, is '{direction}'{advice}")
        objectives.append(Objective(str(metric), direction))
    if not objectives:
        raise UsageError("objectives: at least one is needed, such as {bits_per_byte: min}")
    return tuple(objectives)


def minimised(metrics: Sequence[Mapping[str, float]], objectives: Sequence[Objective]) -> NDArray[np.float64]:
    """The objectives of several trials with smaller better, shape (trials, objectives)."""
    points = np.empty((len(metrics), len(objectives)))
    for column, objective in enumerate(objectives):
        name = objective.metric
        points[:, column] = np.fromiter((one[name] for one in metrics), np.float64, len(metrics))
        points[:, column] *= objective.sign
    return points


def check_metrics(metrics: Mapping[str, float], objectives: Sequence[Objective]) -> dict[str, float]:
    """The metrics as finite floats. Raises BadMetrics, naming the metric, when one is not or an objective is
    missing."""
    checked = {}
    for name, value in metrics.items():
        try:
            number = math.nan if isinstance(value, str | bytes | bool) else float(value)
        except OverflowError:
            number = math.inf
        except (TypeError, ValueError):
            raise BadMetrics(f"metric '{name}' must be a number, is {value!r}") from None
        if isinstance(value, str | bytes | bool):
            raise BadMetrics(f"metric '{name}' must be a number, is {value!r}")
        if not math.isfinite(number):
            raise BadMetrics(f"metric '{name}' must be finite, is {number}")
        checked[name] = number
    for objective in objectives:
        if objective.metric not in checked:
            close = nearest(objective.metric, checked)
            advice = f"; did you mean '{close}'?" if close else ""
            raise BadMetrics(f"objective '{objective.metric}' is missing from the metrics{advice}")
    return checked
