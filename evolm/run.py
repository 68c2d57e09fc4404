"""A run, looked at: everything that reading commands, reports and notebooks need, from the run's folder alone."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from evolm.config import SpaceFile, load_space
from evolm.errors import UsageError
from evolm.retention import checkpoint_bytes
from evolm.run_folder import RunFolder, existing
from evolm.search import comparable, front_of
from evolm.settings import Settings
from fitness.ledger import Ledger
from fitness.objectives import Objective, minimised, read_objectives
from fitness.pareto import Normaliser, Points, knee
from fitness.trial import Trial
from search_spaces.genes import NumberGene
from trainer import cost
from trainer.metrics_log import read_metrics

if TYPE_CHECKING:
    import pandas
    import plotly.graph_objects as graph_objects

    from reports.frame import RunData

BOUNDS_FROM = 8
"""Results of the highest rung from which the bounds of the normalised hypervolume are taken, once and for all."""

SCHEMA_VERSION = 1


def load(path: str | Path) -> Run:
    """Open a run for reading, by its name or its folder. Raises UsageError when there is none."""
    folder = existing(str(path))
    ledger = Ledger.open(folder.ledger)
    return Run(
        folder=folder,
        ledger=ledger,
        file=load_space(folder.space),
        settings=current_settings(ledger),
    )


def current_settings(ledger: Ledger) -> Settings:
    """The settings that the last controller worked with: a budget may have been raised since the run began."""
    sessions = ledger.sessions()
    last = sessions[-1].get("settings") if sessions else None
    return Settings.from_dict(last or ledger.meta["settings"])


@dataclass(frozen=True, kw_only=True, repr=False)
class Run:
    """A run as it was when it was opened; it may have gone on since."""

    folder: RunFolder
    ledger: Ledger
    file: SpaceFile
    settings: Settings

    def __repr__(self) -> str:
        return f"Run({str(self.folder.path)!r}, {len(self.ledger.trials)} trials, front of {len(self.front())})"

    @property
    def name(self) -> str:
        """The run's name."""
        return self.folder.name

    @property
    def objectives(self) -> tuple[Objective, ...]:
        """What the search optimised."""
        return read_objectives(self.settings.objectives)

    def trials(self) -> list[Trial]:
        """All trials, by number."""
        return list(self.ledger.trials.values())

    def front(self) -> list[Trial]:
        """The Pareto front, by the first objective."""
        return front_of(self.trials(), self.objectives)

    def trial(self, which: str) -> Trial:
        """A trial by its number, `best` (lowest first objective on the front) or `knee`. Raises UsageError."""
        front = self.front()
        if which in ("best", "knee"):
            if not front:
                raise UsageError(f"run '{self.name}' has no result yet, so no {which} trial")
            found = self.knee if which == "knee" else front[0]
            if found is None:
                raise UsageError(
                    f"the front of run '{self.name}' has no knee: no trial lies below the line of its ends"
                )
            return found
        if not (which.isdecimal() and which.isascii()) or int(which) not in self.ledger.trials:
            raise UsageError(
                f"run '{self.name}' has no trial '{which}'; there are 1 to {len(self.ledger.trials)}, `best` and `knee`"
            )
        return self.ledger.trials[int(which)]

    @property
    def knee(self) -> Trial | None:
        """The trial of the front that gives most for what it gives up; None where the front does not bend."""
        if len(self.objectives) < 2:
            return None
        front = self.front()
        index = knee(minimised([trial.metrics for trial in front], self.objectives))
        return None if index is None else front[index]

    @property
    def baseline(self) -> Trial | None:
        """The trial of the space's baseline, if it was tried."""
        number = self.ledger.numbers.get(self.file.space.baseline)
        return self.ledger.trials[number] if number is not None else None

    @property
    def state(self) -> str:
        """`running` while a controller is at work; `finished` when the last one had nothing left to do;
        `interrupted`."""
        if self.folder.busy:
            return "running"
        sessions = self.ledger.sessions()
        why = sessions[-1]["why"] if sessions else None
        return "finished" if why in ("budget", "exhausted") else "interrupted"

    def hypervolumes(self) -> list[tuple[Trial, float]]:
        """The normalised hypervolume after each result of the highest rung, in the order in which they came.

        Objectives are mapped to [0, 1] by the range of the first results (costs logarithmically); the reference is 1.1.
        """
        told, points = self._compared()
        volumes: list[tuple[Trial, float]] = []
        front = points[:0]
        for trial, point in zip(told, points, strict=True):
            if len(front) == 0 or not (front <= point).all(axis=1).any():
                front = np.vstack([front[~(point <= front).all(axis=1)], point])
                volume = self._hypervolume_of(front, points)
            volumes.append((trial, volume))
        return volumes

    @property
    def hypervolume(self) -> float:
        """The normalised hypervolume of the front; 0 before there is one."""
        _, points = self._compared()
        return self._hypervolume_of(points, points) if len(points) else 0.0

    def _compared(self) -> tuple[list[Trial], Points]:
        """The trials of the highest rung in the order in which they came, and their objectives."""
        told = sorted(comparable(self.trials()), key=lambda trial: trial.rungs[-1].seq)
        return told, minimised([trial.metrics for trial in told], self.objectives)

    def _hypervolume_of(self, points: Points, scale: Points) -> float:
        costs = [objective.metric in cost.NAMES for objective in self.objectives]
        return Normaliser(scale[:BOUNDS_FROM], costs).hypervolume(points)

    def status(self) -> dict[str, Any]:
        """What `evolm status --json` prints."""
        trials = self.trials()
        running = [trial for trial in trials if trial.state == "running"] if self.folder.busy else []
        return {
            "schema_version": SCHEMA_VERSION,
            "run": self.name,
            "state": self.state,
            "trials": dict(Counter(trial.state for trial in trials)),
            "failures": dict(Counter(str(trial.reason) for trial in trials if trial.state == "failed")),
            "front": len(self.front()),
            "hypervolume": self.hypervolume,
            "flops": sum(trial.flops for trial in trials),
            "seconds": sum(session["seconds"] for session in self.ledger.sessions()),
            "late": self.ledger.late,
            "checkpoint_bytes": checkpoint_bytes(self.folder),
            "workers": [{**(trial.worker or {}), "trial": trial.id} for trial in running],
        }

    def data(self) -> RunData:
        """The run as the reports want it."""
        from reports.frame import RunData

        baseline, sessions = self.baseline, self.ledger.sessions()
        return RunData(
            name=self.name,
            path=str(self.folder.path),
            state=self.state,
            objectives=self.objectives,
            genes=[gene.path for gene in self.file.space.genes],
            trials=self.trials(),
            front=self.front(),
            knee=self.knee.id if self.knee else None,
            baseline=baseline.id if baseline else None,
            hypervolumes=self.hypervolumes(),
            rungs=list(self.settings.fidelity.rungs),
            settings=self.settings.as_dict(),
            meta=self.ledger.meta,
            seconds=sum(session["seconds"] for session in sessions),
            began=sessions[0]["began"] if sessions else None,
            ended=sessions[-1]["ended"] if sessions else None,
            versions=sessions[-1]["versions"] if sessions else {},
            space=self.file.text,
            curves=self.curves(),
            logarithmic=frozenset(g.path for g in self.file.space.genes if isinstance(g, NumberGene) and g.log),
            promotions=self.promotions(),
        )

    def promotions(self) -> list[dict[str, Any]]:
        """What every finished promotion found, by trial."""
        files = sorted(self.folder.path.glob("promoted/*/promotion.json"), key=lambda file: int(file.parent.name))
        return [json.loads(file.read_text()) for file in files]

    def curves(self) -> dict[int, list[dict[str, Any]]]:
        """The lines of every trial's metrics.jsonl."""
        logs = {trial.id: list(read_metrics(self.folder.trial(trial.id) / "metrics.jsonl")) for trial in self.trials()}
        return {number: lines for number, lines in logs.items() if lines}

    def trials_frame(self) -> pandas.DataFrame:
        """A row for each trial: state, objectives and metrics, genes."""
        from reports.frame import trials_frame

        return trials_frame(self.data())

    def figure(self, name: str) -> graph_objects.Figure:
        """One of the report's figures by name. Raises UsageError with the names there are."""
        from reports import figures

        if name not in figures.FIGURES:
            raise UsageError(f"unknown figure '{name}'; there are {', '.join(figures.FIGURES)}")
        return figures.FIGURES[name](self.data())
