"""The head of the report: what ran, how it ended, which trials to look at."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fitness.objectives import Objective
from fitness.trial import REASONS, STATES, Trial
from reports.compare import Change, change, common_rung, results_at, top_rung
from reports.frame import RunData
from reports.reproduce import promote
from reports.table import short
from reports.wording import counted, duration, moment, origin, scientific
from search_spaces.errors import dotted
from search_spaces.genome import get

MAX_GENES = 8
"""Genes that a pick lists; the rest are counted."""

MEANINGS = {
    "diverged": "the loss was no longer a finite number",
    "leak": "the loss was lower than an honest model can have: a later token was visible, or the data leaked",
    "oom": "memory ran out",
    "timeout": "it took longer than it was given",
    "crashed": "an exception ended it",
    "lost": "its worker vanished, and did so again on every retry",
    "bad_metrics": "it told something that is no finite number, or left an objective out",
    "interrupted": "the search ended while it ran",
    "infeasible": "the genome turned out to be impossible to train",
}


@dataclass(frozen=True, kw_only=True)
class Tile:
    """One number of the head, with what it is made of. `shares` are drawn as a bar: (state, count)."""

    title: str
    value: str
    lines: tuple[str, ...] = ()
    shares: tuple[tuple[str, int], ...] = ()


@dataclass(frozen=True, kw_only=True)
class Row:
    """One objective of a pick, and how it compares with the baseline."""

    metric: str
    value: str
    change: Change | None


@dataclass(frozen=True, kw_only=True)
class Pick:
    """A trial worth looking at, and the command that trains it for real. `genes` are those in which it differs from the
    baseline when it is `compared` with one, and otherwise all."""

    roles: tuple[str, ...]
    trial: Trial
    origin: str
    rows: tuple[Row, ...]
    remark: str
    compared: bool
    genes: tuple[tuple[str, str], ...]
    more_genes: int
    command: str


@dataclass(frozen=True, kw_only=True)
class Failure:
    """Trials that failed for one reason."""

    reason: str
    meaning: str
    count: int
    first: Trial


def by_number(data: RunData, number: int | None) -> Trial | None:
    """The trial of that number, if there is one."""
    return next((trial for trial in data.trials if trial.id == number), None)


def facts(data: RunData) -> list[str]:
    """What the search was told to do, and when it ran, in short phrases."""
    settings = data.settings
    found = [", ".join(f"{goal.metric} {goal.direction}" for goal in data.objectives)]
    if settings.get("algorithm"):
        found.append(f"algorithm {settings['algorithm']}")
    if settings.get("seed") is not None:
        found.append(f"seed {settings['seed']}")
    if any(data.rungs):
        found.append(f"{' → '.join(short(tokens) for tokens in data.rungs)} tokens")
    if data.began is not None:
        found.append(f"{moment(data.began)}, {duration(data.seconds)}")
    return found


def headline(data: RunData) -> str:
    """The outcome in a sentence or two."""
    if not data.trials:
        return "Nothing has been tried yet."
    if not data.front:
        failed = sum(trial.state in ("failed", "infeasible") for trial in data.trials)
        if failed == len(data.trials):
            return f"{'All ' if failed > 1 else ''}{counted(failed, 'trial')} failed; there is no result."
        return f"{counted(len(data.trials), 'trial')} so far, none with a result yet."
    best, goal = data.front[0], data.objectives[0]
    found = f"The best {goal.metric} is {short(best.metrics[goal.metric])}, of trial {best.id}"
    return f"{_reached(data, best)} {found}{_against(data, best, goal)}.{_judged(data)}"


def _judged(data: RunData) -> str:
    """What was found on test text; before there is a promotion, what the numbers are worth."""
    told = [_promoted(promotion) for promotion in data.promotions]
    return " " + (" ".join(told) or "Losses are on validation text, by which the search chose, of one seed.")


def _promoted(promotion: Mapping[str, Any]) -> str:
    winner, baseline = promotion["winner"], promotion["baseline"]
    loss = winner["test"]["bits_per_byte"]
    words = f"Trial {promotion['trial']}, trained on {short(promotion['tokens'])} tokens: "
    words += f"{loss:.3f} bits per byte on test text"
    if baseline is None:
        return f"{words} (it is the baseline)."
    other = baseline["test"]["bits_per_byte"]
    return f"{words}, the baseline {other:.3f} ({(loss - other) / other:+.1%})."


def _reached(data: RunData, best: Trial) -> str:
    """How many trials the front was chosen from, and how many are on it."""
    tokens, size = best.rungs[-1].tokens, len(data.front)
    rung = "the highest rung" if best.rung + 1 >= len(data.rungs) else f"rung {best.rung + 1}, the highest so far"
    words = f"{len(results_at(data, top_rung(data))):,} of {counted(len(data.trials), 'trial')} "
    words += f"reached {rung}, {short(tokens)} tokens" if tokens else "gave a result"
    if len(data.objectives) > 1:
        words += f"; {size} of them {'is' if size == 1 else 'are'} on the front"
    return f"{words}."


def _against(data: RunData, best: Trial, goal: Objective) -> str:
    baseline = by_number(data, data.baseline)
    if baseline is None:
        return ""
    if baseline.id == best.id:
        return ", the baseline: nothing has beaten it yet"
    gap = change(best, baseline, goal)
    if gap is None:
        return "; the baseline has no result to compare it with"
    words = gap.text if gap.verdict == "same" else f"{gap.text.lstrip('+−')} {gap.verdict} than the baseline"
    rung = common_rung(best, baseline)
    if rung is None or rung == best.rung:
        return f", {words}"
    return f", {words} (compared at rung {rung + 1}, the highest that both reached)"


def tiles(data: RunData) -> list[Tile]:
    """The numbers of the head."""
    states = Counter(trial.state for trial in data.trials)
    counts = tuple((state, states[state]) for state in STATES if states[state])
    failed = failures(data)
    flops = sum(trial.flops for trial in data.trials)
    return [
        Tile(
            title="Trials",
            value=f"{len(data.trials):,}",
            lines=tuple(f"{count:,} {state}" for state, count in counts),
            shares=counts,
        ),
        Tile(
            title="Failures",
            value=f"{sum(failure.count for failure in failed):,}",
            lines=tuple(f"{failure.count:,} {failure.reason}" for failure in failed) or ("none",),
        ),
        Tile(title="Spent", value=duration(data.seconds), lines=(f"{scientific(flops)} FLOPs", *_budget(data))),
        _outcome(data),
    ]


def _outcome(data: RunData) -> Tile:
    """How good the front is, in one number."""
    goal, size = data.objectives[0], f"{counted(len(data.front), 'trial')} on the front"
    if len(data.objectives) == 1:
        best = short(data.front[0].metrics[goal.metric]) if data.front else "none yet"
        return Tile(title=f"Best {goal.metric}", value=best, lines=(f"trial {data.front[0].id}",) if data.front else ())
    return Tile(
        title="Hypervolume", value=f"{data.hypervolumes[-1][1]:.4f}" if data.hypervolumes else "none yet", lines=(size,)
    )


def _budget(data: RunData) -> list[str]:
    trials, hours = data.settings.get("trials"), data.settings.get("hours")
    lines = [f"{len(data.trials):,} of {trials:,} trials" if trials else counted(len(data.trials), "trial")]
    return [*lines, f"of at most {hours:g} h"] if hours else lines


def failures(data: RunData) -> list[Failure]:
    """The trials that came to nothing, by reason, the most frequent reason first."""
    groups: dict[str, list[Trial]] = {}
    for trial in data.trials:
        if trial.state in ("failed", "infeasible"):
            groups.setdefault(str(trial.reason or ("crashed" if trial.state == "failed" else "infeasible")), []).append(
                trial
            )
    order = sorted(groups, key=lambda reason: (-len(groups[reason]), (*REASONS, "infeasible").index(reason)))
    return [
        Failure(reason=reason, meaning=MEANINGS[reason], count=len(groups[reason]), first=_first(groups[reason]))
        for reason in order
    ]


def _first(trials: list[Trial]) -> Trial:
    """The first that left a message, or else the first."""
    return next((trial for trial in trials if trial.message), trials[0])


def picks(data: RunData) -> list[Pick]:
    """The best trial, the knee and the baseline; one pick where they are the same trial."""
    chosen = {
        "Best": data.front[0].id if data.front else None,
        "Knee": data.knee if len(data.objectives) > 1 else None,
        "Baseline": data.baseline,
    }
    roles: dict[int, list[str]] = {}
    for role, number in chosen.items():
        if number is not None:
            roles.setdefault(number, []).append(role)
    return [_pick(data, tuple(names), trial) for number, names in roles.items() if (trial := by_number(data, number))]


def _pick(data: RunData, roles: tuple[str, ...], trial: Trial) -> Pick:
    baseline = by_number(data, data.baseline)
    other = baseline if baseline is not None and baseline.id != trial.id else None
    genes = _genes(data, trial, other)
    return Pick(
        roles=roles,
        trial=trial,
        origin=origin(trial),
        rows=tuple(
            Row(
                metric=goal.metric,
                value=short(trial.metrics.get(goal.metric)) if trial.rungs else "",
                change=change(trial, other, goal) if other is not None else None,
            )
            for goal in data.objectives
        ),
        remark=_remark(trial, other),
        compared=other is not None,
        genes=tuple(genes[:MAX_GENES]),
        more_genes=max(0, len(genes) - MAX_GENES),
        command=promote(data, trial.id),
    )


def _genes(data: RunData, trial: Trial, other: Trial | None) -> list[tuple[str, str]]:
    """(name, value) of a trial's genes; where there is another trial, (name, old and new value) of those that differ.
    Of a mix only the new weights are told: two of them would be too long to compare by eye."""
    new = trial.genome
    values = [(path, get(new, path)) for path in data.genes]
    if other is None:
        return [(dotted(path), short(value)) for path, value in values if value is not None]
    old = other.genome
    return [
        (dotted(path), short(value) if isinstance(value, dict) else f"{short(get(old, path))} → {short(value)}")
        for path, value in values
        if value != get(old, path)
    ]


def _remark(trial: Trial, baseline: Trial | None) -> str:
    """What the reader has to know about a pick's numbers."""
    if not trial.rungs:
        return f"{trial.state}, no result" + (f": {trial.reason}" if trial.reason else "")
    tokens = trial.rungs[-1].tokens
    words = f"at rung {trial.rung + 1}, {short(tokens)} tokens" if tokens else ""
    if baseline is None:
        return words
    rung = common_rung(trial, baseline)
    if rung is None:
        return f"{words}; the baseline has no result to compare it with"
    return words if rung == trial.rung else f"{words}; compared at rung {rung + 1}, the highest that both reached"
