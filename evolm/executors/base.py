"""The seam between deciding and running: jobs go in, outcomes come out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from fitness.trial import Reason
from search_spaces.genome import Values


@dataclass(frozen=True, kw_only=True)
class Job:
    """One launch of a trial, as plain values: it travels to other processes and machines.

    `tokens` is how far to train from the very beginning; a rung continues from the checkpoint of the one below.
    """

    trial: int
    attempt: int
    rung: int
    top: bool
    tokens: int
    genome: Values
    seed: int
    folder: str
    context: Mapping[str, Any] = field(
        default_factory=dict
    )  # what all jobs of a run share; the runner knows what it is


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a launch ended.

    `fatal` ends the whole run: going on would fail every trial in the same way (a full disk, a corpus that changed).
    """

    trial: int
    rung: int
    kind: Literal["result", "fail", "infeasible", "fatal"]
    metrics: Mapping[str, float] = field(default_factory=dict)
    flops: float = 0.0
    seconds: float = 0.0
    reason: Reason | None = None
    message: str = ""
    error: Exception | None = None


@dataclass(frozen=True, kw_only=True)
class TrialProgress:
    """Where a running trial is."""

    trial: int
    tokens: int
    total_tokens: int
    loss: float
    tokens_per_second: float


Tell = Callable[[TrialProgress], bool]
"""Called by a runner as it goes; False asks it to save and to end as interrupted."""

Runner = Callable[[Job, Tell], Outcome]
"""Runs one job in the process in which it is called; a module-level function, so that workers can import it."""


class Executor(Protocol):
    """Runs jobs in slots, one job a slot."""

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
        """Where the running trials are, as far as known."""

    def interrupt(self) -> None:
        """Ask all running trials to save and end."""

    def close(self) -> None:
        """Let the workers go. What still runs is lost."""
