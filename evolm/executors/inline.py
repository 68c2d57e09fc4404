"""One trial at a time, in this process: for small searches, tests, and machines without Ray."""

from __future__ import annotations

import os
import socket
from typing import Any

from evolm.executors.base import Job, Outcome, Runner, Tell, TrialProgress


class InlineExecutor:
    """Runs a job while it is waited for; `on_progress` hears of it meanwhile."""

    def __init__(self, runner: Runner, on_progress: Tell | None = None) -> None:
        self._runner, self._on_progress = runner, on_progress
        self._job: Job | None = None
        self._progress: TrialProgress | None = None
        self._interrupted = False

    @property
    def workers(self) -> list[dict[str, Any]]:
        """One slot: this process."""
        return [{"id": 0, "pid": os.getpid(), "node": socket.gethostname()}]

    def idle(self) -> list[int]:
        """The slot, when it has no job."""
        return [] if self._job else [0]

    def submit(self, slot: int, job: Job) -> None:
        """Take a job; it runs in `wait`."""
        assert self._job is None and slot == 0
        self._job = job

    def wait(self, seconds: float) -> list[Outcome]:
        """Run the job to its end."""
        if self._job is None:
            return []
        try:
            return [self._runner(self._job, self._tell)]
        finally:
            self._job = self._progress = None

    def _tell(self, progress: TrialProgress) -> bool:
        self._progress = progress
        if self._on_progress is not None:
            self._on_progress(progress)
        return not self._interrupted

    def progress(self) -> list[TrialProgress]:
        """Where the job is."""
        return [self._progress] if self._progress else []

    def interrupt(self) -> None:
        """The job ends after its current step."""
        self._interrupted = True

    def close(self) -> None:
        """Nothing to let go of."""
