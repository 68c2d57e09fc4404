"""What a figure says about the trial under the pointer."""

from __future__ import annotations

from fitness.trial import Rung, Trial
from reports.frame import RunData
from reports.table import short
from reports.wording import origin, plain
from search_spaces.errors import dotted
from search_spaces.genome import get

GENES = 8
"""Genes that are told, in the order of the space file."""


def about(data: RunData, trial: Trial, rung: Rung | None = None) -> str:
    """A trial in a few lines of plotly's markup: its number, where it came from, its objectives at a rung, its
    genes."""
    told = rung or (trial.rungs[-1] if trial.rungs else None)
    genome = trial.genome
    lines = [f"<b>trial {trial.id}</b> ({plain(origin(trial))})"]
    if told is not None:
        lines += [f"{plain(goal.metric)} <b>{short(told.metrics[goal.metric])}</b>" for goal in data.objectives]
        lines.append(f"rung {told.rung + 1}, {short(told.tokens)} tokens" if told.tokens else f"rung {told.rung + 1}")
    lines += [f"{plain(dotted(path))} {plain(short(get(genome, path)))}" for path in data.genes[:GENES]]
    if len(data.genes) > GENES:
        lines.append(f"and {len(data.genes) - GENES} more genes")
    return "<br>".join(lines)
