"""The figures of a run, by name. Each is made from the run's data alone and can be shown anywhere plotly can."""

from __future__ import annotations

from collections.abc import Callable

import plotly.graph_objects as go

from reports.figures.curves import curves
from reports.figures.front import front
from reports.figures.genes import genes
from reports.figures.mix import mixes, triangle
from reports.figures.progress import over_flops, over_results
from reports.frame import RunData

FIGURES: dict[str, Callable[[RunData], go.Figure]] = {
    "front": front,
    "hypervolume": over_results,
    "hypervolume_flops": over_flops,
    "curves": curves,
    "mix": mixes,
    "mix_triangle": triangle,
    "genes": genes,
}
"""What `Run.figure` knows, in the order of the report."""
