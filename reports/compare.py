"""Which results may be compared: those of one rung, because a metric falls with the tokens that it was measured at."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from fitness.objectives import Objective
from fitness.trial import Rung, Trial
from reports.frame import RunData

ENOUGH = 12
"""Results of a rung from which it says more about genes than a lower rung with more of them."""

Verdict = Literal["better", "worse", "same"]


@dataclass(frozen=True, kw_only=True)
class Result:
    """What one trial told at one rung."""

    trial: Trial
    rung: Rung

    @property
    def metrics(self) -> Mapping[str, float]:
        """The metrics of the rung."""
        return self.rung.metrics


@dataclass(frozen=True, kw_only=True)
class Change:
    """One objective of one trial against the same objective of another, both at the same rung."""

    value: float
    other: float
    verdict: Verdict

    @property
    def text(self) -> str:
        """The change as a share of the other value, or as a difference where that is zero."""
        gap = self.value - self.other
        if self.verdict == "same":
            return "no difference"
        share = gap / abs(self.other) if self.other else None
        words = f"{gap:+.4g}" if share is None else f"{share:+.0%}" if abs(share) >= 1 else f"{share:+.1%}"
        return words.replace("-", "−")


def usable(trial: Trial) -> bool:
    """Whether a trial has results that count: a failed or impossible one has none, whatever it told before."""
    return bool(trial.rungs) and trial.state not in ("failed", "infeasible")


def top_rung(data: RunData) -> int:
    """The highest rung with a result that counts: the one on which the front stands; -1 without any."""
    return max((trial.rung for trial in data.trials if usable(trial)), default=-1)


def results_at(data: RunData, rung: int) -> list[Result]:
    """The results of one rung, also of trials that went on from there, by trial number."""
    return [
        Result(trial=trial, rung=told)
        for trial in data.trials
        if usable(trial)
        for told in trial.rungs
        if told.rung == rung
    ]


def telling_rung(data: RunData) -> int:
    """The highest rung with enough results to see a pattern in, or the one with the most; -1 without any."""
    counts = {rung: len(results_at(data, rung)) for rung in range(top_rung(data) + 1)}
    enough = [rung for rung, count in counts.items() if count >= ENOUGH]
    return max(enough) if enough else max(counts, key=lambda rung: (counts[rung], rung), default=-1)


def best_first(results: list[Result], objective: Objective) -> list[Result]:
    """The results by one objective, the best first."""
    return sorted(results, key=lambda result: objective.sign * result.metrics[objective.metric])


def common_rung(one: Trial, other: Trial) -> int | None:
    """The highest rung at which both trials told something; None when there is none."""
    return max({told.rung for told in one.rungs} & {told.rung for told in other.rungs}, default=None)


def change(trial: Trial, other: Trial, objective: Objective) -> Change | None:
    """How a trial compares with another at the highest rung that both reached; None when there is no such rung."""
    rung = common_rung(trial, other)
    if rung is None:
        return None
    value, before = (
        next(told.metrics[objective.metric] for told in one.rungs if told.rung == rung) for one in (trial, other)
    )
    gap = objective.sign * (value - before)
    return Change(value=value, other=before, verdict="same" if gap == 0 else "better" if gap < 0 else "worse")
