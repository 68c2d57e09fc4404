"""Which checkpoints stay on the disk: those from which a trial may still go on, and those of the best."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from evolm.algorithms.fidelity import Fidelity
from evolm.run_folder import RunFolder, final_checkpoint, latest_checkpoint, rung_checkpoint, saves
from evolm.settings import Settings
from fitness.objectives import Objective, minimised
from fitness.pareto import dominates
from fitness.trial import Trial

HOPELESS_EVERY = 0.02
"""New results, as a share of all trials, after which the trials that cannot be promoted any more are looked for."""


@dataclass(frozen=True, kw_only=True)
class Keep:
    """How much is kept: the final weights of so many complete trials, and so many bytes in all (None: no bound)."""

    best: int = 0
    max_bytes: int | None = None

    @classmethod
    def of(cls, settings: Settings, folder: RunFolder) -> Keep:
        """What the settings say; where they name no bound, half of what the folder's disk has for checkpoints."""
        bound = settings.max_bytes
        if bound is None:
            bound = (shutil.disk_usage(folder.path).free + checkpoint_bytes(folder)) // 2
        return cls(best=settings.keep_best, max_bytes=bound)


def hopeless(
    trials: Sequence[Trial], fidelity: Fidelity, objectives: Sequence[Objective], budget: int, always: int | None = None
) -> list[Trial]:
    """The paused trials that a budget of so many trials cannot promote any more.

    A rung promotes one of `eta` that reached it, and a trial only after all waiting ones that dominate it. One that
    runs on above may fail, and makes room then. (So may one that waits above: what takes its place trains anew.)
    `always` is the trial that goes on whatever its rank: the baseline.
    """
    found: list[Trial] = []
    room = budget
    for rung in range(fidelity.top):
        reached = [trial for trial in trials if trial.rung >= rung and trial.state not in ("failed", "infeasible")]
        waiting = [trial for trial in reached if trial.rung == rung and trial.state == "paused"]
        room = room // fidelity.eta + 1  # and the baseline, beside the quota
        gone = [trial for trial in reached if trial.rung > rung or trial.state == "complete"]
        left = room - len(gone)
        if waiting:
            beaten = dominates(minimised([trial.metrics for trial in waiting], objectives)).sum(axis=0)
            found += [trial for trial, by in zip(waiting, beaten, strict=True) if by >= left and trial.id != always]
    return found


class Retention:
    """Deletes the checkpoints of a run that are not to be kept, and knows how much is there."""

    def __init__(
        self, folder: RunFolder, keep: Keep, fidelity: Fidelity | None, objectives: Sequence[Objective], budget: int
    ) -> None:
        self.folder, self.keep, self.fidelity = folder, keep, fidelity
        self.objectives, self.budget = objectives, budget
        self._results = 0  # since the hopeless were last looked for
        self.sizes = {int(place.name): size for place in _folders(folder) if (size := _size(place))}

    @property
    def bytes(self) -> int:
        """Bytes of all checkpoints of the run."""
        return sum(self.sizes.values())

    def after(self, trial: Trial, trials: Sequence[Trial], *, told: bool, always: int | None = None) -> bool:
        """Clean up after a launch of a trial ended, with a result (`told`) or without; whether the bound is kept. What
        runs is left alone."""
        if trial.state in ("failed", "infeasible", "stopped"):
            self._drop(trial.id)
        elif trial.state == "paused" and told:
            self._reached(trial)
        self._measure(trial.id)
        if trial.state == "complete":
            self._keep_best(trials)
        self._results += told
        if self._results >= len(trials) * HOPELESS_EVERY and self.sizes:
            self._drop_hopeless(trials, always)
        if self.keep.max_bytes is None or self.bytes <= self.keep.max_bytes:
            return True
        return self._shrink(trials, self.keep.max_bytes)

    def _reached(self, trial: Trial) -> None:
        """At a rung, what was on the way to it is not needed any more."""
        place = self.folder.trial(trial.id)
        latest, before = latest_checkpoint(place), rung_checkpoint(place, trial.rung - 1)
        left = (path for name in (latest, before) for path in name.parent.glob(f"{name.name}.*"))  # by a kill
        for way in (*saves(latest), before, *left):
            shutil.rmtree(way, ignore_errors=True)

    def _drop_hopeless(self, trials: Sequence[Trial], always: int | None) -> None:
        self._results = 0
        if self.fidelity is not None:
            for one in hopeless(trials, self.fidelity, self.objectives, self.budget, always):
                self._drop(one.id)

    def _keep_best(self, trials: Sequence[Trial]) -> None:
        """Of complete trials, keep the final weights of the best, and nothing else."""
        complete = self._complete(trials)
        for trial in complete[self.keep.best :]:
            self._drop(trial.id)
        for trial in complete[: self.keep.best]:
            final = final_checkpoint(self.folder.trial(trial.id))
            for place in final.parent.glob("*"):
                if place != final:
                    shutil.rmtree(place, ignore_errors=True)
            self._measure(trial.id)

    def _by_promise(self, trials: Sequence[Trial]) -> list[Trial]:
        """The paused trials, those first that the largest share of all that reached their rung dominates."""
        shares: list[tuple[float, int, Trial]] = []
        for rung in {trial.rung for trial in trials if trial.state == "paused"}:
            told = [(trial, at.metrics) for trial in trials if (at := trial.at(rung)) is not None]
            beaten = dominates(minimised([metrics for _, metrics in told], self.objectives)).mean(axis=0)
            waits = [trial.state == "paused" and trial.rung == rung for trial, _ in told]
            shares += [(-share, rung, t) for (t, _), share, w in zip(told, beaten, waits, strict=True) if w]
        return [trial for *_, trial in sorted(shares, key=lambda one: one[:2])]

    def _complete(self, trials: Sequence[Trial]) -> list[Trial]:
        """Complete trials that keep something, the best first."""
        first = self.objectives[0]
        complete = [trial for trial in trials if trial.state == "complete" and trial.id in self.sizes]
        return sorted(complete, key=lambda trial: first.sign * trial.metrics[first.metric])

    def _shrink(self, trials: Sequence[Trial], bound: int) -> bool:
        """Delete until the bound holds: what is paused, the least promising first, then what was interrupted, then
        final weights, the worst first. Whether it holds then: what runs is not deleted."""
        order = [trial for trial in self._by_promise(trials) if trial.id in self.sizes]
        order += [trial for trial in trials if trial.state == "proposed" and trial.id in self.sizes]
        order += reversed(self._complete(trials))
        for trial in order:
            if self.bytes <= bound:
                break
            self._drop(trial.id)
        return self.bytes <= bound

    def _drop(self, trial: int) -> None:
        shutil.rmtree(self.folder.trial(trial) / "checkpoints", ignore_errors=True)
        self.sizes.pop(trial, None)

    def _measure(self, trial: int) -> None:
        size = _size(self.folder.trial(trial))
        if size:
            self.sizes[trial] = size
        else:
            self.sizes.pop(trial, None)


def checkpoint_bytes(folder: RunFolder) -> int:
    """Bytes of all checkpoints of a run, as they are now."""
    return sum(_size(place) for place in _folders(folder))


def _folders(folder: RunFolder) -> list[Path]:
    """The folders of trials that have checkpoints."""
    return [place.parent for place in folder.trials.glob("*/checkpoints") if place.parent.name.isdecimal()]


def _size(trial: Path) -> int:
    """Bytes of a trial's checkpoints; what vanishes while it is looked at counts for nothing."""
    total = 0
    for path in (trial / "checkpoints").rglob("*"):
        try:
            total += path.stat().st_size if path.is_file() else 0
        except OSError:
            continue
    return total
