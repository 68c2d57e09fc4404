"""How every figure looks: colours, symbols, templates, axes, and what stands where there is nothing to draw.

Figures use SVG traces only. Plotly's WebGL traces compile code from strings, which the policy of the page forbids, so
figures thin their points (`thin`) instead.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeVar

import numpy as np
import plotly.graph_objects as go
from numpy.typing import NDArray

from fitness.objectives import Objective
from reports.wording import plain

Scheme = Literal["light", "dark"]
Item = TypeVar("Item")

# Okabe and Ito's palette, which colour-blind readers can tell apart, tuned to be seen on white and on black. Every
# role has a symbol of its own too.
FRONT = "#2b7bba"
BASELINE = "#d55e00"
KNEE = "#009e73"
OTHER = "#8a929c"
PARTS = ("#56b4e9", "#e69f00", "#009e73", "#cc79a7", "#d8c92a", "#8a929c", "#2b7bba", "#d55e00")
PATTERNS = ("", "/", ".", "x", "-", "|", "\\", "+")

MARKERS: Mapping[str, dict[str, Any]] = {
    "lower": {"symbol": "circle-open", "size": 7, "color": OTHER, "opacity": 0.6},
    "other": {"symbol": "circle", "size": 7, "color": OTHER, "opacity": 0.65},
    "front": {"symbol": "diamond", "size": 11, "color": FRONT},
    "knee": {"symbol": "circle-open", "size": 20, "color": KNEE, "line": {"width": 2.5}},
    "baseline": {"symbol": "star", "size": 14, "color": BASELINE},
}

FONT = "system-ui, -apple-system, Segoe UI, Roboto, Helvetica Neue, sans-serif"

MAX_POINTS = 2000
"""Points of a trace; more are thinned."""

_INK: Mapping[Scheme, Mapping[str, str]] = {
    "light": {"paper": "#ffffff", "text": "#22272d", "muted": "#5d656e", "grid": "#ecedea", "line": "#c9ccc8"},
    "dark": {"paper": "#171b20", "text": "#e4e7ea", "muted": "#a0a8b1", "grid": "#272d34", "line": "#444c55"},
}


def template(scheme: Scheme) -> dict[str, Any]:
    """The plotly template of a colour scheme."""
    ink = _INK[scheme]
    axis = {
        "automargin": True,
        "exponentformat": "B",
        "gridcolor": ink["grid"],
        "linecolor": ink["line"],
        "showline": True,
        "tickcolor": ink["line"],
        "tickfont": {"color": ink["muted"], "size": 12},
        "ticks": "outside",
        "title": {"font": {"color": ink["muted"], "size": 13}, "standoff": 14},
        "zeroline": False,
    }
    corner = {"gridcolor": ink["grid"], "linecolor": ink["line"], "tickfont": {"color": ink["muted"], "size": 11}}
    return {
        "layout": {
            "bargap": 0.12,
            "font": {"color": ink["text"], "family": FONT, "size": 13},
            "hoverlabel": {
                "align": "left",
                "bgcolor": ink["paper"],
                "bordercolor": ink["line"],
                "font": {"color": ink["text"], "family": FONT, "size": 12.5},
            },
            "hovermode": "closest",
            "legend": {"orientation": "h", "x": 0, "xanchor": "left", "y": 1.02, "yanchor": "bottom"},
            "margin": {"b": 56, "l": 64, "r": 24, "t": 48},
            "modebar": {"activecolor": FRONT, "bgcolor": "rgba(0,0,0,0)", "color": ink["muted"]},
            "paper_bgcolor": ink["paper"],
            "plot_bgcolor": ink["paper"],
            "ternary": {"aaxis": corner, "baxis": corner, "bgcolor": ink["paper"], "caxis": corner},
            "xaxis": axis,
            "yaxis": axis,
        }
    }


def figure(traces: Sequence[go.Scatter], **layout: Any) -> go.Figure:
    """A figure in the house's style."""
    return go.Figure(data=list(traces), layout={"template": template("light"), **layout})


def nothing(words: str) -> go.Figure:
    """A figure that says in words why there is nothing to see."""
    note = {"text": words, "showarrow": False, "x": 0.5, "y": 0.5, "xref": "paper", "yref": "paper"}
    return figure([], annotations=[note], meta={"empty": words}, xaxis={"visible": False}, yaxis={"visible": False})


def words_of(drawn: go.Figure) -> str | None:
    """Why a figure is empty, when it is."""
    return None if drawn.data else str(drawn.layout.meta["empty"])


def thin(items: Sequence[Item], most: int = MAX_POINTS) -> list[Item]:
    """At most `most` of the items, evenly spread, the first and the last among them."""
    if len(items) <= most:
        return list(items)
    return [items[int(i)] for i in np.linspace(0, len(items) - 1, most).round()]


def scale(values: NDArray[np.float64], *, log: bool) -> dict[str, Any]:
    """The scale of an axis: linear, or logarithmic with labels at 1, 2 and 5 where it is long enough for that."""
    if not log:
        return {"type": "linear"}
    return {"type": "log", "dtick": "D2"} if values.max() / values.min() > 8 else {"type": "log"}


def wants_log(values: NDArray[np.float64]) -> bool:
    """Whether an axis is better logarithmic: positive values over two decades, or counts over one."""
    if len(values) == 0 or values.min() <= 0:
        return False
    counts = values.min() >= 1 and bool((values == values.round()).all())
    return bool(values.max() / values.min() > (10 if counts else 100))


def objective_axis(
    objective: Objective, values: NDArray[np.float64], needed: Sequence[float] | NDArray[np.float64] = ()
) -> dict[str, Any]:
    """The axis of an objective: which way is better, on a scale that fits, without values that are far off.

    A trial that almost diverged would press all others into a line; what lies far beyond the worst tenth is left
    outside the first view, unless it is one of the values that are `needed`.
    """
    better = "smaller" if objective.direction == "min" else "larger"
    log = wants_log(values)
    axis: dict[str, Any] = {
        "title": {"text": f"{plain(objective.metric)}, {better} is better"},
        **scale(values, log=log),
    }
    if len(values) and values.min() == values.max():
        margin = 0.1 * abs(float(values[0])) or 1.0
        return axis | {"range": [float(values[0]) - margin, float(values[0]) + margin]}
    mapped, kept = (objective.sign * (np.log10(part) if log else np.asarray(part)) for part in (values, needed))
    window = _window(mapped, kept)
    if window is not None:
        low, high = sorted(objective.sign * end for end in window)
        axis["range"] = [float(low), float(high)]
    return axis


def outside(axis: Mapping[str, Any], values: NDArray[np.float64]) -> int:
    """How many values lie outside the range that an axis shows at first."""
    if "range" not in axis:
        return 0
    shown = np.log10(values) if axis["type"] == "log" else values
    return int(((shown < axis["range"][0]) | (shown > axis["range"][1])).sum())


def _window(values: NDArray[np.float64], needed: NDArray[np.float64]) -> tuple[float, float] | None:
    """What to show of values with smaller better, with a margin; None when all of them fit."""
    if len(values) < 10:
        return None
    best, bad = values.min(), np.quantile(values, 0.9)
    limit = max(bad + 2 * (bad - best), needed.max(initial=best))
    if values.max() <= limit or bad == best:
        return None
    kept = values[values <= limit].max()
    margin = 0.06 * (kept - best)
    return float(best - margin), float(kept + margin)
