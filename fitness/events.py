"""What an event makes of a trial.

Each fold takes a trial to its next state by the event alone, whatever came before: a ledger that was repaired may know
of a result and not of the launch that told it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

from fitness.trial import Rung, State, Trial

Body = Mapping[str, Any]


def fold(trial: Trial, seq: int, kind: str, rung: int | None, body: Body) -> Trial:
    """The trial after event `seq`. Raises KeyError for a kind or a body that no event has."""
    return _FOLDS[kind](trial, seq, rung, body)


def _started(trial: Trial, seq: int, rung: int | None, body: Body) -> Trial:
    return trial.but(
        state="running",
        attempts=trial.attempts + 1,
        lease=seq,
        worker=body["worker"],
        reason=None,
        message="",
        ended=None,
    )


def _resulted(trial: Trial, seq: int, rung: int | None, body: Body) -> Trial:
    told = Rung(
        rung=cast(int, rung),
        tokens=body["tokens"],
        metrics=body["metrics"],
        flops=body["flops"],
        seconds=body["seconds"],
        seq=seq,
    )
    return trial.but(
        state="complete" if body["top"] else "paused",
        failures={},
        rungs=(*trial.rungs, told),
        flops=trial.flops + told.flops,
        seconds=trial.seconds + told.seconds,
        lease=None,
        worker=None,
        reason=None,
        message="",
        ended=seq if body["top"] else None,
    )


def _failed(trial: Trial, seq: int, rung: int | None, body: Body) -> Trial:
    again: State = "paused" if trial.rungs else "proposed"
    reason, failures = body["reason"], trial.failures
    if reason != "interrupted":
        failures = {**failures, reason: failures.get(reason, 0) + 1}
    return trial.but(
        state="failed" if body["final"] else again,
        failures=failures,
        reason=reason if body["final"] else None,
        message=body["message"],
        flops=trial.flops + body["flops"],
        seconds=trial.seconds + body["seconds"],
        lease=None,
        worker=None,
        ended=seq if body["final"] else None,
    )


def _infeasible(trial: Trial, seq: int, rung: int | None, body: Body) -> Trial:
    return trial.but(state="infeasible", message=body["message"], lease=None, worker=None, ended=seq)


def _stopped(trial: Trial, seq: int, rung: int | None, body: Body) -> Trial:
    return trial.but(state="stopped", lease=None, worker=None, ended=seq)


def _late(trial: Trial, seq: int, rung: int | None, body: Body) -> Trial:
    return trial.but(flops=trial.flops + body["flops"], seconds=trial.seconds + body["seconds"])


_FOLDS: dict[str, Callable[[Trial, int, int | None, Body], Trial]] = {
    "start": _started,
    "result": _resulted,
    "fail": _failed,
    "infeasible": _infeasible,
    "stop": _stopped,
    "late": _late,
}

ENDS = ("result", "fail", "infeasible", "stop")
"""The events that end a launch."""
