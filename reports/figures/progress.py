"""How the search came along: the front's hypervolume after each result, over results and over FLOPs."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import plotly.graph_objects as go
from numpy.typing import NDArray

from fitness.trial import Trial
from reports.figures.style import BASELINE, FRONT, figure, nothing
from reports.frame import RunData
from reports.table import short
from reports.wording import plain, scientific, ten_to

Values = NDArray[np.float64]


def over_results(data: RunData) -> go.Figure:
    """What has been reached after each result of the highest rung."""
    across: dict[str, Any] = {"title": {"text": "results of the highest rung"}, "rangemode": "tozero"}
    across |= {"tickformat": ",d", "dtick": 1 if len(data.hypervolumes) < 10 else None}
    return _steps(data, np.arange(1.0, len(data.hypervolumes) + 1), across)


def over_flops(data: RunData) -> go.Figure:
    """What has been reached with the FLOPs of all trials and rungs up to each result, those of failures included."""
    cost = spent(data)
    power = math.floor(math.log10(cost.max())) if cost.max(initial=0.0) > 0 else 0
    across = {"title": {"text": f"FLOPs spent by all trials, in {ten_to(power)}"}, "rangemode": "tozero"}
    return _steps(data, cost / 10.0**power, across)


def spent(data: RunData) -> Values:
    """FLOPs of all launches that had ended when each of `data.hypervolumes` was told."""
    events = sorted(event for trial in data.trials for event in _bills(trial))
    times = np.array([seq for seq, _ in events], dtype=np.float64)
    total = np.concatenate([[0.0], np.cumsum([flops for _, flops in events])])
    told = [trial.rungs[-1].seq for trial, _ in data.hypervolumes]
    return np.asarray(total[np.searchsorted(times, told, side="right")], dtype=np.float64)


def _bills(trial: Trial) -> list[tuple[int, float]]:
    """(event, FLOPs) of a trial: of its results, and what launches that failed cost on top, when the trial ended."""
    results = [(rung.seq, rung.flops) for rung in trial.rungs]
    lost = trial.flops - sum(flops for _, flops in results)
    last = trial.ended if trial.ended is not None else results[-1][0] if results else trial.seen
    return [*results, (last, max(0.0, lost))]


def _steps(data: RunData, x: Values, across: dict[str, Any]) -> go.Figure:
    if not data.hypervolumes:
        return nothing("No trial has reached the highest rung yet.")
    trials = [trial for trial, _ in data.hypervolumes]
    name, y = _reached(data)
    gains = np.flatnonzero(np.diff(y, prepend=np.nan) != 0)
    line = go.Scatter(
        x=x, y=y, mode="lines", line={"color": FRONT, "shape": "hv", "width": 2}, hoverinfo="skip", showlegend=False
    )
    steps = go.Scatter(
        x=x[gains],
        y=y[gains],
        mode="markers",
        marker={"color": FRONT, "size": 7 if len(gains) < 30 else 5, "symbol": "diamond"},
        hovertext=[
            f"<b>trial {trials[i].id}</b><br>{name} <b>{short(float(y[i]))}</b><br>"
            f"result {i + 1}, {scientific(float(spent_at))} FLOPs"
            for i, spent_at in zip(gains.tolist(), spent(data)[gains], strict=True)
        ],
        hoverinfo="text",
        showlegend=False,
        cliponaxis=False,
    )
    first = [i for i, trial in enumerate(trials) if trial.id == data.baseline]
    marks = [
        go.Scatter(
            x=x[first],
            y=y[first],
            mode="markers",
            name="baseline",
            marker={"color": BASELINE, "size": 12, "symbol": "star"},
            hoverinfo="skip",
            showlegend=False,
            cliponaxis=False,
        )
    ]
    return figure(
        [line, steps, *(marks if first else [])],
        xaxis=across,
        yaxis={"title": {"text": name}},
        height=320,
        margin={"t": 24},
    )


def _reached(data: RunData) -> tuple[str, Values]:
    """What is drawn upwards: the hypervolume or, where there is one objective, the best value of it so far."""
    if len(data.objectives) > 1:
        return "hypervolume", np.array([volume for _, volume in data.hypervolumes])
    goal = data.objectives[0]
    told = np.array([goal.sign * trial.metrics[goal.metric] for trial, _ in data.hypervolumes])
    return f"best {plain(goal.metric)}", goal.sign * np.minimum.accumulate(told)
