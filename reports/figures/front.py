"""The Pareto front: every trial in two of the objectives, or in the only one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import plotly.graph_objects as go
from numpy.typing import NDArray

from fitness.objectives import Objective, minimised
from fitness.pareto import nondominated
from fitness.trial import Trial
from reports.compare import best_first, results_at, top_rung
from reports.figures.hover import about
from reports.figures.style import FRONT, MARKERS, figure, nothing, objective_axis, outside, thin, wants_log
from reports.frame import RunData

NEAR = 0.035
"""Share of the axes within which a second trial of the front does not get a number: it would cover the first."""

AREA = "rgba(43, 123, 186, 0.06)"
"""What has been reached, behind everything else."""

Values = NDArray[np.float64]


@dataclass(frozen=True)
class Layer:
    """Trials that are drawn alike."""

    role: str
    name: str
    trials: list[Trial]

    def values(self, objective: Objective) -> Values:
        """The objective of every trial at its highest rung."""
        return np.array([trial.metrics[objective.metric] for trial in self.trials], dtype=np.float64)


def front(data: RunData) -> go.Figure:
    """The first objective over the second one; with a single objective, the trials by rank."""
    if top_rung(data) < 0:
        return nothing("No trial has a result yet.")
    return _ranked(data) if len(data.objectives) == 1 else _pair(data, across=1, up=0)


def views(data: RunData) -> dict[str, Any]:
    """What a page needs to show any other pair of objectives: for each objective the axis and the values of the
    layers in `front`, for each pair (across, up) the bounding line and the labels of the front."""
    layers = _layers(data)
    numbers = range(len(data.objectives))
    return {
        "objectives": [
            {
                "label": objective.metric,
                "axis": _axis(layers, objective),
                "values": [layer.values(objective) for layer in layers],
            }
            for objective in data.objectives
        ],
        "lines": {f"{i},{j}": _line(data, layers, i, j) for i in numbers for j in numbers if i != j},
    }


def hidden(data: RunData) -> int:
    """How many trials lie outside the first view of `front`."""
    layers = _layers(data)
    seen = data.objectives[:2]
    if not layers:
        return 0
    counts = [outside(_axis(layers, goal), np.concatenate([layer.values(goal) for layer in layers])) for goal in seen]
    return max(counts, default=0)


def _layers(data: RunData) -> list[Layer]:
    """All trials with a result, those in front last. Trials of a rung below the front's are a layer of their own."""
    top = top_rung(data)
    first = data.objectives[0]
    numbers = {trial.id for trial in data.front}
    told = sorted((trial for trial in data.trials if trial.rungs), key=lambda trial: trial.metrics[first.metric])
    compared = {result.trial.id for result in results_at(data, top)}
    layers = [
        Layer("lower", "lower rungs", thin([trial for trial in told if trial.id not in compared])),
        Layer("other", "dominated", thin([trial for trial in told if trial.id in compared - numbers])),
        Layer("front", "front", data.front),
        Layer("knee", "knee", [trial for trial in data.front if trial.id == data.knee and len(data.front) > 2]),
        Layer("baseline", "baseline", [trial for trial in told if trial.id == data.baseline]),
    ]
    return [layer for layer in layers if layer.trials]


def _pair(data: RunData, across: int, up: int) -> go.Figure:
    layers = _layers(data)
    x, y = data.objectives[across], data.objectives[up]
    line = _line(data, layers, across, up)
    still = {"hoverinfo": "skip", "showlegend": False}
    area = go.Scatter(
        x=np.append(line["x"], line["x"][-1]),
        y=np.append(line["y"], line["y"][0]),
        mode="none",
        fill="toself",
        fillcolor=AREA,
        **still,
    )
    bound = go.Scatter(x=line["x"], y=line["y"], mode="lines", line={"color": FRONT, "width": 1.5}, **still)
    dots = [go.Scatter(x=layer.values(x), y=layer.values(y), **_dressed(data, layer)) for layer in layers]
    for dot, layer in zip(dots, layers, strict=True):
        if layer.role == "front":
            dot.update(text=line["labels"], textposition=line["position"], mode="markers+text", textfont={"size": 11.5})
    return figure([area, bound, *dots], xaxis=_axis(layers, x), yaxis=_axis(layers, y), height=500)


def _ranked(data: RunData) -> go.Figure:
    """One objective: the trials from best to worst. Only those of the highest rung, because ranks compare."""
    goal = data.objectives[0]
    results = best_first(results_at(data, top_rung(data)), goal)
    ranks = {result.trial.id: rank for rank, result in enumerate(results, 1)}
    names = {"other": "others", "front": "best", "baseline": "baseline"}
    layers = [
        Layer(layer.role, names[layer.role], [trial for trial in layer.trials if trial.id in ranks])
        for layer in _layers(data)
        if layer.role in names
    ]
    dots = [
        go.Scatter(
            x=np.array([ranks[trial.id] for trial in layer.trials]), y=layer.values(goal), **_dressed(data, layer)
        )
        for layer in layers
        if layer.trials
    ]
    across = {"title": {"text": "rank"}, "rangemode": "tozero", "tickformat": "d"}
    return figure(dots, xaxis=across, yaxis=_axis(layers, goal), height=420)


def _dressed(data: RunData, layer: Layer) -> dict[str, Any]:
    """How the trials of a layer look, and what they say."""
    return {
        "name": layer.name,
        "mode": "markers",
        "marker": MARKERS[layer.role],
        "hovertext": [about(data, trial) for trial in layer.trials],
        "hoverinfo": "text" if layer.role != "knee" else "skip",
    }


def _axis(layers: Sequence[Layer], objective: Objective) -> dict[str, Any]:
    values = {layer.role: layer.values(objective) for layer in layers}
    needed = [values[role] for role in ("front", "baseline") if role in values]
    return objective_axis(objective, np.concatenate(list(values.values())), np.concatenate([*needed, []]))


def _line(data: RunData, layers: Sequence[Layer], across: int, up: int) -> dict[str, Any]:
    """The line that bounds what has been reached in two objectives, as explicit corners, and the labels on it.

    Between two trials of the front nothing better than the worse of both has been reached, so the line has steps; it
    ends at the worst values that any trial shows.
    """
    x, y = data.objectives[across], data.objectives[up]
    points = minimised([result.metrics for result in results_at(data, top_rung(data))], (x, y))
    worst = [max((goal.sign * layer.values(goal)).max() for layer in layers) for goal in (x, y)]
    best = np.unique(points[nondominated(points)], axis=0)
    return {
        "x": x.sign * np.append(np.repeat(best[:, 0], 2), worst[0]),
        "y": y.sign * np.append(worst[1], np.repeat(best[:, 1], 2)),
        "labels": _labels(data, (x, y)),
        "position": f"{'bottom' if y.sign > 0 else 'top'} {'left' if x.sign > 0 else 'right'}",
    }


def _labels(data: RunData, goals: Sequence[Objective]) -> list[str]:
    """The numbers of the front's trials, best and knee first, as long as there is room for them; otherwise nothing."""
    shown = [np.array([trial.metrics[goal.metric] for trial in data.front]) for goal in goals]
    places = np.array([np.log10(values) if wants_log(values) else values for values in shown]).T
    places = (places - places.min(axis=0)) / np.maximum(np.ptp(places, axis=0), 1e-12)
    order = sorted(range(len(places)), key=lambda i: (i > 0 and data.front[i].id != data.knee, i))
    kept: list[int] = []
    for i in order:
        if all(np.abs(places[i] - places[j]).max() > NEAR for j in kept):
            kept.append(i)
    return [str(trial.id) if i in kept else "" for i, trial in enumerate(data.front)]
