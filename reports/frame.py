"""The data behind every view of a run, and the table that people analyse it with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from fitness.objectives import Objective
from fitness.trial import Trial
from search_spaces.errors import Path, dotted
from search_spaces.genome import canonical_json, get

if TYPE_CHECKING:
    import pandas


@dataclass(frozen=True, kw_only=True)
class RunData:
    """A run as plain values. `curves` are the lines of each trial's metrics.jsonl, by trial; `began` and `ended` are
    the times of its first and last event, in seconds since the epoch; `logarithmic` are the genes on such a scale,
    `promotions` what every finished promotion wrote down."""

    name: str
    path: str
    state: str
    objectives: tuple[Objective, ...]
    genes: list[Path]
    trials: list[Trial]
    front: list[Trial]
    knee: int | None
    baseline: int | None
    hypervolumes: list[tuple[Trial, float]]
    rungs: list[int]
    settings: Mapping[str, Any]
    meta: Mapping[str, Any]
    seconds: float
    space: str
    curves: Mapping[int, list[dict[str, Any]]]
    began: float | None = None
    ended: float | None = None
    versions: Mapping[str, str] = field(default_factory=dict)
    logarithmic: frozenset[Path] = frozenset()
    promotions: Sequence[Mapping[str, Any]] = ()


def gene_columns(data: RunData, trial: Trial) -> dict[str, Any]:
    """A trial's genes, one scalar a column: `data.mix.web`, `model.n_heads[0]`."""
    columns: dict[str, Any] = {}
    genome = trial.genome
    for path in data.genes:
        value = get(genome, path)
        if isinstance(value, dict) and all(isinstance(part, int | float) for part in value.values()):
            columns |= {f"{dotted(path)}.{name}": part for name, part in value.items()}
        elif isinstance(value, list) and all(isinstance(item, int | float | str) for item in value):
            columns |= {f"{dotted(path)}[{i}]": item for i, item in enumerate(value)}
        else:
            columns[dotted(path)] = canonical_json(value) if isinstance(value, dict | list) else value
    return columns


def trial_rows(data: RunData) -> list[dict[str, Any]]:
    """A flat row for each trial: who it is, how it ended, its metrics, its genes."""
    front = {trial.id for trial in data.front}
    rows = []
    for trial in data.trials:
        row: dict[str, Any] = {
            "id": trial.id,
            "state": trial.state,
            "reason": trial.reason,
            "front": trial.id in front,
            "rung": trial.rung if trial.rungs else None,
            "tokens": trial.rungs[-1].tokens if trial.rungs else None,
            "flops": trial.flops,
            "trial_seconds": trial.seconds,
            "attempts": trial.attempts,
            "operator": trial.operator,
            "parents": " ".join(str(parent) for parent in trial.parents),
            "digest": trial.digest,
        }
        rows.append({**row, **trial.metrics, **gene_columns(data, trial)})
    return rows


def trials_frame(data: RunData) -> pandas.DataFrame:
    """`trial_rows` as a frame; a column that a trial has nothing for holds a missing value."""
    import pandas

    return pandas.DataFrame(trial_rows(data))
