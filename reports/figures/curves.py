"""Learning curves: the training loss of every trial over the tokens it has seen."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go
from numpy.typing import NDArray

from reports.figures.style import BASELINE, FRONT, OTHER, figure, nothing, thin
from reports.frame import RunData
from reports.table import short

POINTS = 24_000
"""Points of the whole figure: what a browser draws in a moment, and half a megabyte of file."""

FEWEST, MOST = 12, 400
"""Points of one trial's curve."""

LINES: Mapping[str, Mapping[str, Any]] = {
    "others": {"color": OTHER, "width": 1},
    "front": {"color": FRONT, "width": 2},
    "baseline": {"color": BASELINE, "width": 2, "dash": "dash"},
}
OPACITY = {"others": 0.4, "front": 0.8, "baseline": 1.0}
"""How the curves of each role look."""

MANY = 12
"""Curves of one role from which they are drawn thinner."""

Curve = NDArray[np.float32]
"""Tokens and loss, shape (points, 2); a row of NaN between two pieces."""


def curves(data: RunData) -> go.Figure:
    """Training loss over tokens, both logarithmic; the front in colour."""
    found = {number: curve for number, lines in sorted(data.curves.items()) if len(curve := read_curve(lines))}
    if not found:
        return nothing("No trial has logged a training loss yet.")
    most = min(MOST, max(FEWEST, POINTS // len(found)))
    front = {trial.id for trial in data.front}
    groups: dict[str, dict[int, Curve]] = {role: {} for role in LINES}
    for number, curve in found.items():
        role = "baseline" if number == data.baseline else "front" if number in front else "others"
        groups[role][number] = _thinned(curve, most)
    return figure(
        [_trace(role, members) for role, members in groups.items() if members],
        xaxis={"title": {"text": "tokens"}, "type": "log", "dtick": "D2"},
        yaxis={"title": {"text": "training loss, nats per token"}, "type": "log"},
        height=460,
        **_rungs(data),
    )


def read_curve(lines: Iterable[Mapping[str, Any]]) -> Curve:
    """The training lines of a metrics.jsonl as a curve in pieces: a new rung starts from the trunk, before the branch
    that the last one ended with, so tokens may go back. What is no positive number is a gap."""
    points: list[tuple[float, float]] = []
    last = 0.0
    for line in lines:
        tokens, loss = _positive(line.get("tokens")), _positive(line.get("loss"))
        if math.isnan(tokens) or "loss" not in line:
            continue
        if points and tokens <= last:
            points.append((math.nan, math.nan))
        points.append((tokens, loss))
        last = tokens
    curve = np.array(points, dtype=np.float32).reshape(-1, 2)
    return curve if np.isfinite(curve[:, 1]).any() else curve[:0]


def _positive(value: Any) -> float:
    number = float(value) if isinstance(value, int | float) and not isinstance(value, bool) else math.nan
    return number if 0 < number < math.inf else math.nan


def _thinned(curve: Curve, most: int) -> Curve:
    """The first point of each of `most` equal steps of the logarithmic axis, in every piece of a curve."""
    if len(curve) <= most:
        return curve
    place = np.log(curve[:, 0])
    low, high = np.nanmin(place), np.nanmax(place)
    step = np.floor((place - low) / max(high - low, 1e-6) * most)
    keep = np.ones(len(curve), dtype=bool)
    keep[1:-1] = step[1:-1] != step[:-2]  # a gap is NaN, which differs from everything: gaps and what follows them stay
    return curve[thin(np.flatnonzero(keep).tolist(), 4 * most)]


def _trace(role: str, members: Mapping[int, Curve]) -> go.Scatter:
    """All curves of a role as one trace, with gaps between them: a thousand traces would take a browser minutes."""
    gap = np.full((1, 2), np.nan, dtype=np.float32)
    joined = np.concatenate([piece for curve in members.values() for piece in (curve, gap)])
    alone = all(len(curve) == 1 for curve in members.values())  # a line through one point cannot be seen
    return go.Scatter(
        x=joined[:, 0],
        y=joined[:, 1],
        customdata=np.repeat(np.array(list(members), dtype=np.int32), [len(curve) + 1 for curve in members.values()]),
        name=role,
        mode="markers" if alone else "lines",
        line={**LINES[role], **({"width": 1.2} if len(members) > MANY else {})},
        opacity=OPACITY[role],
        hovertemplate="<b>trial %{customdata}</b><br>%{x:.3s} tokens, loss %{y:.3f}<extra></extra>",
    )


def _rungs(data: RunData) -> dict[str, Sequence[dict[str, Any]]]:
    """A thin line where each rung ends, with its number."""
    rungs = [(number, tokens) for number, tokens in enumerate(data.rungs) if tokens > 0]
    lines = [
        {
            "type": "line",
            "x0": tokens,
            "x1": tokens,
            "y0": 0,
            "y1": 1,
            "yref": "paper",
            "line": {"color": OTHER, "width": 1, "dash": "dot"},
        }
        for _, tokens in rungs
    ]
    words = [
        {
            "text": f"rung {number + 1}, {short(tokens)}",
            "x": math.log10(tokens),
            "y": 0.995,
            "yref": "paper",
            "xanchor": "right",
            "yanchor": "top",
            "xshift": -4,
            "showarrow": False,
            "font": {"size": 11, "color": OTHER},
        }
        for number, tokens in rungs
    ]
    return {"shapes": lines, "annotations": words}
