"""Plain-text tables for the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fitness.objectives import Objective
from fitness.trial import Trial
from search_spaces.errors import Path
from search_spaces.genome import get
from search_spaces.quantities import format_count

WIDEST = 44
"""Characters of a cell; what is longer is cut."""


def short(value: Any) -> str:
    """A value in a few characters: counts with a suffix, weights with two decimals, lists without blanks."""
    if isinstance(value, bool) or value is None:
        return str(value).lower()
    if isinstance(value, int | float):
        return format_count(value) if abs(value) >= 10_000 else f"{value:.4g}"
    if isinstance(value, dict):
        return " ".join(
            f"{name}:{short(part) if not isinstance(part, float) else f'{part:.2f}'}" for name, part in value.items()
        )
    if isinstance(value, list):
        return ",".join(short(item) for item in value)
    return str(value)


def text_table(header: Sequence[str], rows: Sequence[Sequence[str]], widest: int = WIDEST) -> str:
    """Columns wide enough for their cells, numbers to the right, without trailing blanks or control characters."""
    clean = [["".join(c for c in cell if c.isprintable()) for cell in row] for row in [list(header), *map(list, rows)]]
    cut = [[cell if len(cell) <= widest else cell[: widest - 1] + "…" for cell in row] for row in clean]
    widths = [max(len(row[i]) for row in cut) for i in range(len(header))]
    return "\n".join(
        "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cut
    )


def trial_table(trials: Sequence[Trial], objectives: Sequence[Objective], genes: Sequence[Path]) -> str:
    """Trials with their objectives and genes, a line each."""
    header = ["trial", *(objective.metric for objective in objectives), *(str(path[-1]) for path in genes)]
    rows = [
        [
            str(trial.id),
            *(short(trial.metrics[objective.metric]) for objective in objectives),
            *(short(get(trial.genome, path)) for path in genes),
        ]
        for trial in trials
    ]
    return text_table(header, rows)
