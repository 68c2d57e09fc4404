"""The tables of the page: the front in full, and all trials in short."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fitness.trial import Trial
from reports.frame import RunData
from reports.table import short
from reports.wording import origin
from search_spaces.errors import dotted
from search_spaces.genome import get

MAX_ROWS = 2000
"""Rows of the table of all trials."""

MAX_MESSAGE = 120
"""Characters of a message in a table."""


@dataclass(frozen=True, kw_only=True)
class Grid:
    """A table: the names of its columns, which of them hold words instead of numbers, and its cells."""

    header: tuple[str, ...]
    words: frozenset[int]
    rows: tuple[tuple[str, ...], ...]
    left_out: int = 0


def brief_grid(data: RunData) -> Grid:
    """The front and its objectives, for readers without scripts."""
    goals = [goal.metric for goal in data.objectives]
    rows = tuple((str(trial.id), *_cells(trial.metrics, goals)) for trial in data.front)
    return Grid(header=("trial", *goals), words=frozenset(), rows=rows)


def front_grid(data: RunData) -> Grid:
    """The front: objectives, metrics by domain, genes."""
    goals = [goal.metric for goal in data.objectives]
    parts = _domains(data, data.front)
    header = ("trial", *goals, *parts, "from", *(dotted(path) for path in data.genes))
    rows = tuple(
        (
            str(trial.id),
            *_cells(trial.metrics, [*goals, *parts]),
            origin(trial),
            *_genes(data, trial),
        )
        for trial in data.front
    )
    first_gene = len(header) - len(data.genes)
    words = {first_gene - 1, *_wordy(rows, first_gene)}
    return Grid(
        header=header,
        words=frozenset(words),
        rows=rows,
    )


def trials_grid(data: RunData) -> Grid:
    """Every trial: how it ended, its objectives, what it cost, its genes."""
    goals = [goal.metric for goal in data.objectives]
    front = {trial.id for trial in data.front}
    header = (
        "trial", "state", "reason", "front", "rung", *goals, "FLOPs", "seconds", "attempts", "from",
        *(dotted(path) for path in data.genes), "message",
    )  # fmt: skip
    rows = tuple(
        (
            str(trial.id),
            trial.state,
            trial.reason or "",
            "yes" if trial.id in front else "",
            str(trial.rung) if trial.rungs else "",
            *_cells(trial.metrics, goals),
            f"{trial.flops:.3g}",
            short(trial.seconds),
            str(trial.attempts),
            origin(trial),
            *_genes(data, trial),
            trial.message[:MAX_MESSAGE],
        )
        for trial in data.trials[:MAX_ROWS]
    )
    first_gene = len(header) - len(data.genes) - 1
    words = {1, 2, 3, first_gene - 1, len(header) - 1, *_wordy(rows, first_gene)}
    return Grid(header=header, words=frozenset(words), rows=rows, left_out=max(0, len(data.trials) - MAX_ROWS))


def _cells(metrics: Any, names: Sequence[str]) -> list[str]:
    return [short(metrics[name]) if name in metrics else "" for name in names]


def _genes(data: RunData, trial: Trial) -> list[str]:
    genome = trial.genome
    values = [get(genome, path) for path in data.genes]
    return ["" if value is None else short(value) for value in values]


def _domains(data: RunData, trials: Sequence[Trial]) -> list[str]:
    """The metrics that split an objective by domain or task, such as `bits_per_byte/code`."""
    prefixes = tuple(
        f"{name}/" for name in dict.fromkeys([*(goal.metric for goal in data.objectives), "bits_per_byte"])
    )
    return list(dict.fromkeys(name for trial in trials for name in trial.metrics if name.startswith(prefixes)))


def _wordy(rows: Sequence[Sequence[str]], first: int) -> set[int]:
    """The columns from `first` on that hold something else than numbers."""
    return {
        i for row in rows for i, cell in enumerate(row) if i >= first and cell and not cell.lstrip("-")[:1].isdigit()
    }
