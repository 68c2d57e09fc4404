"""The seam between deciding and running: jobs go in, outcomes come out.

All of it is plain values: it travels to other processes and machines as JSON.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, Protocol, Self

from fitness.trial import Reason
from search_spaces.genome import Values

ENDED = "ended before it could save"
"""What is told of a job that was cancelled."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What one launch of a trial may take before it is ended: seconds in all, seconds without any progress, and bytes
    of memory of all its processes together. None is no limit."""

    seconds: float | None = None
    silent_seconds: float | None = None
    memory: int | None = None


@dataclass(frozen=True, kw_only=True)
class Job:
    """One launch of a trial.

    `lease` names this launch, and no other one of the run. `tokens` is how far to train from the very beginning; a
    rung continues from the checkpoint of the one below.
    """

    trial: int
    lease: int
    rung: int
    top: bool
    tokens: int
    genome: Values
    seed: int
    folder: str
    context: Mapping[str, Any] = field(
        default_factory=dict
    )  # what all jobs of a run share; the runner knows what it is
    limits: Limits = Limits()

    def as_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The inverse of `as_dict`."""
        return cls(**{**values, "limits": Limits(**values["limits"])})

    def told(self, metrics: Mapping[str, float], **more: Any) -> Outcome:
        """The outcome of a launch that reached its rung."""
        return Outcome(trial=self.trial, lease=self.lease, rung=self.rung, kind="result", metrics=metrics, **more)

    def failed(self, reason: Reason, message: str, **more: Any) -> Outcome:
        """The outcome of a launch that came to nothing."""
        return Outcome(
            trial=self.trial, lease=self.lease, rung=self.rung, kind="fail", reason=reason, message=message, **more
        )

    def infeasible(self, message: str, **more: Any) -> Outcome:
        """The outcome of a genome that cannot be trained at all."""
        return Outcome(trial=self.trial, lease=self.lease, rung=self.rung, kind="infeasible", message=message, **more)

    def fatal(self, what: Literal["storage", "data"], message: str) -> Outcome:
        """The outcome of a launch that met what every other one would meet too: it ends the run."""
        return Outcome(trial=self.trial, lease=self.lease, rung=self.rung, kind="fatal", fatal=what, message=message)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a launch ended.

    `fatal` ends the whole run: going on would fail every trial in the same way (a full disk, a corpus that changed).
    """

    trial: int
    lease: int
    rung: int
    kind: Literal["result", "fail", "infeasible", "fatal"]
    metrics: Mapping[str, float] = field(default_factory=dict)
    flops: float = 0.0
    seconds: float = 0.0
    reason: Reason | None = None
    message: str = ""
    fatal: Literal["storage", "data"] | None = None

    def as_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class TrialProgress:
    """Where a running trial is: `flops` are those of this launch, `prepared` counts steps before the first token. All
    are zero before it has said anything."""

    trial: int
    tokens: int = 0
    total_tokens: int = 0
    loss: float = 0.0
    tokens_per_second: float = 0.0
    flops: float = 0.0
    prepared: int = 0


Tell = Callable[[TrialProgress], bool]
"""Called by a runner as it goes; False asks it to save and to end as interrupted."""

Runner = Callable[[Job, Tell], Outcome]
"""Runs one job in the process in which it is called; a module-level function, so that other processes can import it."""


class Executor(Protocol):
    """Runs jobs in slots, one job a slot."""

    memory_share: int | None
    """Bytes of memory that each slot can have when all are at work; None where that is not known."""

    @property
    def workers(self) -> list[dict[str, Any]]:
        """The slots: `{"id", "pid", "node"}` each, ids counting from 0."""

    def idle(self) -> list[int]:
        """The ids of the slots that have nothing to do."""

    def submit(self, slot: int, job: Job) -> None:
        """Start a job in an idle slot."""

    def wait(self, seconds: float) -> list[Outcome]:
        """The outcomes that have come in; waits at most so long for the first, and not at all when nothing runs."""

    def progress(self) -> list[TrialProgress]:
        """Where running trials are: of every worker that was heard since this was last asked."""

    def interrupt(self) -> None:
        """Ask all running trials to save and end."""

    def cancel(self) -> None:
        """End all running trials now, without saving."""

    def abandon(self, trial: int) -> None:
        """Give up on a running trial whose worker is not heard any more, and give its slot another worker. Should the
        old one still tell an outcome, `wait` brings it."""

    def close(self) -> None:
        """Let the workers go. What still runs is lost."""
