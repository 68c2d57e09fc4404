"""Genes that are mixes: which weights the best trials have."""

from __future__ import annotations

from typing import Any

import numpy as np
import plotly.graph_objects as go

from reports.compare import Result, best_first, results_at, telling_rung
from reports.figures.hover import about
from reports.figures.style import BASELINE, FRONT, MARKERS, OTHER, PARTS, PATTERNS, figure, nothing, thin
from reports.frame import RunData
from reports.wording import plain
from search_spaces.errors import Path
from search_spaces.genome import get

OUTLINES = {"circle": OTHER, "diamond": FRONT, "star": BASELINE}
"""Outlines in the triangle, where colour tells the objective."""

COLORBAR = {
    "orientation": "h",
    "y": -0.14,
    "yanchor": "top",
    "len": 0.7,
    "thickness": 10,
    "outlinewidth": 0,
    "tickfont": {"size": 11},
    "nticks": 5,
}

EXAMPLES = 50
"""Trials that are asked whether a gene is a mix; where it is conditional, some have no value for it."""

MAX_BARS = 100
"""Mixes that are drawn side by side; the best ones."""


def is_mix(value: Any) -> bool:
    """Whether a gene's value is a mix: names with weights that add up to one."""
    return (
        isinstance(value, dict)
        and len(value) > 1
        and all(isinstance(part, float | int) and part >= 0 for part in value.values())
        and abs(sum(value.values()) - 1) < 1e-3
    )


def mix_genes(data: RunData) -> list[Path]:
    """The paths of the genes that are mixes in some trial."""
    return [path for path in data.genes if any(is_mix(get(trial.genome, path)) for trial in data.trials[:EXAMPLES])]


def parts_of(data: RunData, path: Path) -> list[str]:
    """The names that a mix gives weights to in any trial."""
    found = (get(trial.genome, path) for trial in data.trials)
    return list(dict.fromkeys(name for mix in found if is_mix(mix) for name in mix))


def mixes(data: RunData, path: Path | None = None) -> go.Figure:
    """The weights of one mix (the first, unless named) as stacked bars, the best trial to the left."""
    found = _found(data, path)
    if isinstance(found, go.Figure):
        return found
    path, results = found
    results = results[:MAX_BARS]
    weights = [get(result.trial.genome, path) for result in results]
    names = [str(result.trial.id) for result in results]
    bars = [
        go.Bar(
            x=names,
            y=np.array([float(mix.get(part, 0)) for mix in weights]),
            width=0.88 * min(1.0, len(names) / 8) if len(names) <= 40 else 1.0,
            name=plain(part, 40),
            marker={
                "color": PARTS[number % len(PARTS)],
                "pattern": {"shape": PATTERNS[number // len(PARTS) % len(PATTERNS)]},
                "line": {"width": 0},
            },
            hovertemplate="%{y:.3f}",
        )
        for number, part in enumerate(parts_of(data, path))
    ]
    return figure(
        [*bars, *_marks(data, results)],
        barmode="stack",
        hovermode="x unified",
        height=400,
        xaxis={
            "title": {"text": f"trial, by {plain(data.objectives[0].metric)}: best to the left"},
            "type": "category",
            "showticklabels": len(names) <= 60,
            "tickangle": 0 if len(names) <= 25 else -90,
        },
        yaxis={"title": {"text": "weight"}, "range": [0, 1.09], "tickvals": [0, 0.25, 0.5, 0.75, 1]},
        legend={"traceorder": "normal"},
    )


def triangle(data: RunData, path: Path | None = None) -> go.Figure:
    """A mix of three parts as a triangle, coloured by the first objective."""
    found = _found(data, path)
    if isinstance(found, go.Figure):
        return found
    path, results = found
    parts = parts_of(data, path)
    if len(parts) != 3:
        return nothing("Only a mix of exactly three parts can be drawn as a triangle.")
    front, goal = {trial.id for trial in data.front}, data.objectives[0]
    results = thin(results)[::-1]  # the best are drawn last, on top
    values = np.array([result.metrics[goal.metric] for result in results])
    ends = sorted([goal.sign * (goal.sign * values).min(), goal.sign * np.quantile(goal.sign * values, 0.9)])
    small, large = (9, 13) if len(results) <= 60 else (6, 10)
    symbols = [
        "star" if r.trial.id == data.baseline else "diamond" if r.trial.id in front else "circle" for r in results
    ]
    dots = go.Scatterternary(
        **{
            axis: np.array([float(get(result.trial.genome, path).get(part, 0)) for result in results])
            for axis, part in zip("abc", parts, strict=True)
        },
        mode="markers",
        marker={
            "color": values,
            "cmin": ends[0],
            "cmax": ends[1],  # a few bad trials would leave the rest with one colour
            "colorscale": "Cividis",
            "reversescale": goal.direction == "max",
            "colorbar": COLORBAR | {"title": {"text": plain(goal.metric), "side": "top"}},
            "opacity": 1,
            "size": [small if symbol == "circle" else large for symbol in symbols],
            "symbol": symbols,
            "line": {"width": 1.5, "color": [OUTLINES[symbol] for symbol in symbols]},
        },
        hovertext=[about(data, result.trial, result.rung) for result in results],
        hoverinfo="text",
        showlegend=False,
    )
    axes = {
        f"{axis}axis": {"title": {"text": plain(part, 14), "font": {"size": 13}}}
        for axis, part in zip("abc", parts, strict=True)
    }
    return figure([dots], ternary={"sum": 1, **axes}, height=400, margin={"b": 84, "l": 36, "r": 36, "t": 36})


def _found(data: RunData, path: Path | None) -> tuple[Path, list[Result]] | go.Figure:
    """The mix to draw and the results that have it, best first; or a figure that says why there is none."""
    paths = mix_genes(data)
    if not paths:
        return nothing("No gene of this space is a mix.")
    path = path or paths[0]
    results = best_first(results_at(data, telling_rung(data)), data.objectives[0])
    results = [result for result in results if is_mix(get(result.trial.genome, path))]
    return (path, results) if results else nothing("No trial has a result yet.")


def _marks(data: RunData, results: list[Result]) -> list[go.Scatter]:
    """The symbols of the front and of the baseline above their bars."""
    roles: dict[str, set[int | None]] = {"front": {trial.id for trial in data.front}, "baseline": {data.baseline}}
    return [
        go.Scatter(
            x=x,
            y=np.full(len(x), 1.045),
            mode="markers",
            name=role,
            marker={**MARKERS[role], "size": {"front": 9, "baseline": 13}[role]},
            hoverinfo="skip",
        )
        for role, numbers in roles.items()
        if (x := [str(result.trial.id) for result in results if result.trial.id in numbers])
    ]
