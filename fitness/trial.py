"""A trial: one genome and everything that happened to it. Immutable; the ledger makes a new one of every event."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from search_spaces.genome import Genome, Values

State = Literal["proposed", "running", "paused", "complete", "failed", "infeasible", "stopped"]
Reason = Literal["diverged", "leak", "oom", "timeout", "crashed", "lost", "bad_metrics", "interrupted"]

STATES: tuple[State, ...] = ("proposed", "running", "paused", "complete", "failed", "infeasible", "stopped")
REASONS: tuple[Reason, ...] = (
    "diverged", "leak", "oom", "timeout", "crashed", "lost", "bad_metrics", "interrupted",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Rung:
    """What a trial told at one rung of the fidelity ladder. `seq` is the number of the event that told it."""

    rung: int
    tokens: float
    metrics: Mapping[str, float]
    flops: float
    seconds: float
    seq: int


@dataclass(frozen=True, kw_only=True, repr=False)
class Trial:
    """One genome's way through the search.

    `seen` is the number of the last event that its proposal knew. `attempts` counts launches, `failures` those that
    came to nothing since the last result, by reason, interrupted ones aside. `lease` is the number of the event that
    started the launch that runs now, None when none does. `flops` and `seconds` are those of all launches, failed and
    late ones included.
    """

    id: int
    frozen: Genome
    parents: tuple[int, ...] = ()
    operator: str = ""
    seen: int = 0
    state: State = "proposed"
    reason: Reason | None = None
    message: str = ""
    rungs: tuple[Rung, ...] = ()
    attempts: int = 0
    failures: Mapping[str, int] = field(default_factory=dict)
    lease: int | None = None
    flops: float = 0.0
    seconds: float = 0.0
    worker: Mapping[str, Any] | None = None
    ended: int | None = None  # number of the event that ended it

    def __repr__(self) -> str:
        metrics = ", ".join(f"{name}={value:.6g}" for name, value in list(self.metrics.items())[:4])
        return f"Trial({self.id}, {self.state}{f', {metrics}' if metrics else ''})"

    @property
    def genome(self) -> Values:
        """The genome as a plain nested dict."""
        return self.frozen.values()

    @property
    def digest(self) -> str:
        """The content id of the genome."""
        return self.frozen.digest

    @property
    def metrics(self) -> Mapping[str, float]:
        """The metrics of the highest rung reached; empty before the first."""
        return self.rungs[-1].metrics if self.rungs else {}

    @property
    def rung(self) -> int:
        """The highest rung reached; -1 before the first."""
        return self.rungs[-1].rung if self.rungs else -1

    def at(self, rung: int) -> Rung | None:
        """What it told at one rung; None where it has not, or where that was lost with a part of the ledger."""
        return next((told for told in self.rungs if told.rung == rung), None)

    @property
    def changed(self) -> int:
        """The number of the last event that told a result or its end; 0 before the first."""
        return self.ended or (self.rungs[-1].seq if self.rungs else 0)

    def as_of(self, seq: int) -> Trial:
        """The trial as proposals know it after event `seq`: by its results and its end alone.

        What comes and goes between them is the same at any time: a trial that has not ended is `paused`, or `proposed`
        before its first result; `flops` and `seconds` are those of its results; nothing is known of launches.
        """
        over = self.ended is not None and self.ended <= seq
        rungs = tuple(rung for rung in self.rungs if rung.seq <= seq)
        return self.but(
            rungs=rungs,
            state=self.state if over else "paused" if rungs else "proposed",
            reason=self.reason if over else None,
            ended=self.ended if over else None,
            flops=sum(rung.flops for rung in rungs),
            seconds=sum(rung.seconds for rung in rungs),
            message="",
            attempts=0,
            failures={},
            lease=None,
            worker=None,
        )

    def but(self, **changes: Any) -> Trial:
        """The trial with some fields changed: `dataclasses.replace` at a quarter of the time, of which a ledger that is
        opened needs one for each event."""
        other = object.__new__(Trial)
        other.__dict__.update(self.__dict__, **changes)
        return other

    def as_dict(self) -> dict[str, Any]:
        """The trial as one JSON object."""
        return {
            "id": self.id,
            "digest": self.digest,
            "genome": self.genome,
            "state": self.state,
            "reason": self.reason,
            "message": self.message or None,
            "metrics": dict(self.metrics),
            "rungs": [{"tokens": rung.tokens, "metrics": dict(rung.metrics)} for rung in self.rungs],
            "parents": list(self.parents),
            "operator": self.operator,
            "flops": self.flops,
            "seconds": self.seconds,
            "attempts": self.attempts,
        }
