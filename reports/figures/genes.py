"""Each gene against the first objective: where in its range a gene does well."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import plotly.graph_objects as go
from numpy.typing import NDArray
from plotly.subplots import make_subplots

from reports.compare import Result, best_first, results_at, telling_rung
from reports.figures.mix import is_mix
from reports.figures.style import MARKERS, nothing, objective_axis, scale, template, thin, wants_log
from reports.frame import RunData
from reports.table import short
from reports.wording import plain
from search_spaces.errors import Path, dotted
from search_spaces.genome import canonical_json, get

COLUMNS, MAX_PANELS = 3, 24
MAX_LEVELS = 8
"""Distinct counts up to which a gene is drawn as levels side by side instead of along a scale."""

POINTS = 400
"""Points of one panel."""


@dataclass(frozen=True)
class Panel:
    """One gene: a number for each result, NaN where the gene has none, and what the numbers stand for."""

    title: str
    values: NDArray[np.float64]
    levels: tuple[str, ...] = ()
    log: bool = False


def genes(data: RunData) -> go.Figure:
    """A panel for each gene that is a scalar or a list: the first objective over its value (a list's mean)."""
    results = thin(best_first(results_at(data, telling_rung(data)), data.objectives[0]), POINTS)
    if not results:
        return nothing("No trial has a result yet.")
    panels = [panel for path in data.genes if (panel := _panel(path, results, path in data.logarithmic))][:MAX_PANELS]
    if not panels:
        return nothing("No gene took more than one value.")
    goal = data.objectives[0]
    y = np.array([result.metrics[goal.metric] for result in results])
    rows = math.ceil(len(panels) / COLUMNS)
    drawn = make_subplots(
        rows=rows,
        cols=COLUMNS,
        shared_yaxes="all",
        subplot_titles=[panel.title for panel in panels],
        horizontal_spacing=0.045,
        vertical_spacing=min(0.2, 90 / (230 * rows)),
    )
    for number, panel in enumerate(panels):
        row, column = divmod(number, COLUMNS)
        for trace in _dots(data, results, panel, y, legend=number == 0):
            drawn.add_trace(trace, row=row + 1, col=column + 1)
        drawn.update_xaxes(_scale(panel), row=row + 1, col=column + 1)
    known = {data.baseline, *(trial.id for trial in data.front)}
    up = objective_axis(goal, y, y[[result.trial.id in known for result in results]])
    drawn.update_yaxes({key: up[key] for key in ("type", "range") if key in up})
    drawn.update_yaxes({"title": {"text": plain(goal.metric)}}, col=1)
    drawn.update_annotations(font={"size": 12.5})
    drawn.update_layout(
        template=template("light"), height=90 + 230 * rows, legend={"y": 1 + 46 / (230 * rows)}, margin={"t": 84}
    )
    return drawn


def _panel(path: Path, results: Sequence[Result], log: bool) -> Panel | None:
    """The panel of one gene; None for a mix (which has a figure of its own) and for one that never changed."""
    found = [get(result.trial.genome, path) for result in results]
    if any(is_mix(value) for value in found):
        return None
    title, found = _scalars(plain(dotted(path)), found)
    distinct = {canonical_json(value): value for value in found if value is not None}
    if len(distinct) < 2:
        return None
    if all(_is_number(value) for value in distinct.values()):
        if len(distinct) > MAX_LEVELS or not all(float(value).is_integer() for value in distinct.values()):
            return Panel(title, np.array([math.nan if value is None else float(value) for value in found]), log=log)
        order = sorted(distinct, key=lambda text: float(distinct[text]))
    else:
        order = sorted(distinct)[: 2 * MAX_LEVELS]
    places = {text: place for place, text in enumerate(order)}
    values = [places.get(canonical_json(value), math.nan) for value in found]
    aside = [_aside(result) for result in results]
    return Panel(title, np.array(values) + np.array(aside), tuple(plain(short(distinct[text]), 18) for text in order))


def _scalars(title: str, found: list[Any]) -> tuple[str, list[Any]]:
    """The values of a gene with lists as one number each, and the title that says which."""
    lists = [value for value in found if isinstance(value, list)]
    if not lists:
        return title, found
    if all(_is_number(item) for value in lists for item in value):
        means = [float(np.mean(value)) if isinstance(value, list) and value else None for value in found]
        return f"mean of {title}", means
    return f"length of {title}", [len(value) if isinstance(value, list) else None for value in found]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _aside(result: Result) -> float:
    """A little to the left or right, always the same for a trial, so that trials of one level do not hide each
    other."""
    return 0.4 * ((result.trial.id * 0.6180339887) % 1 - 0.5)


def _scale(panel: Panel) -> dict[str, Any]:
    if panel.levels:
        places = list(range(len(panel.levels)))
        return {
            "tickvals": places,
            "ticktext": list(panel.levels),
            "range": [-0.6, len(places) - 0.4],
            "showgrid": False,
        }
    known = panel.values[np.isfinite(panel.values)]
    log = panel.log or wants_log(known) or _spans(known, 20)
    small = {"exponentformat": "e"} if known.max() < 1 else {}
    return {**scale(known, log=log), **small, **({} if log else {"nticks": 5})}


def _spans(values: NDArray[np.float64], ratio: float) -> bool:
    return bool(values.min() > 0 and values.max() / values.min() > ratio)


def _dots(
    data: RunData, results: Sequence[Result], panel: Panel, y: NDArray[np.float64], *, legend: bool
) -> list[go.Scatter]:
    """The trials of one panel, by role."""
    numbers = np.array([result.trial.id for result in results])
    base = numbers == (data.baseline if data.baseline is not None else -1)
    front = np.isin(numbers, [trial.id for trial in data.front]) & ~base
    roles = {"other": ~front & ~base, "front": front, "baseline": base}
    names = {"other": "others", "front": "front", "baseline": "baseline"}
    return [
        go.Scatter(
            x=panel.values[members],
            y=y[members],
            customdata=numbers[members],
            name=names[role],
            legendgroup=role,
            showlegend=legend,
            mode="markers",
            marker={**MARKERS[role], "size": {"other": 6, "front": 9, "baseline": 11}[role]},
            hovertemplate="<b>trial %{customdata}</b><br>%{y:.4g}<extra></extra>",
        )
        for role, members in roles.items()
        if members.any()
    ]
