"""One trial at a time, in this process: for small searches, tests, and machines without Ray.

Nothing stands between a trial and this process: limits of time and memory are not kept, and a trial that hangs hangs
the search.
"""

from __future__ import annotations

import os
import socket
import time
from typing import Any

from evolm.executors.base import ENDED, Job, Outcome, Runner, Tell, TrialProgress


class _Cancelled(BaseException):
    """Raised by a signal in the middle of a trial; no trial's own handling of errors may catch it."""


class InlineExecutor:
    """Runs a job while it is waited for; `on_progress` hears of it meanwhile."""

    memory_share: int | None = None

    def __init__(self, runner: Runner, on_progress: Tell | None = None) -> None:
        self._runner, self.on_progress = runner, on_progress
        self._job: Job | None = None
        self._inside = self._interrupted = self._cancelled = False

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
        job, began = self._job, time.monotonic()
        try:
            self._inside = True
            if self._cancelled:
                raise _Cancelled
            return [self._runner(job, self._tell)]
        except _Cancelled:
            spent = time.monotonic() - began
            return [job.failed("interrupted", ENDED, seconds=spent)]
        finally:
            self._inside = False
            self._job = None

    def _tell(self, progress: TrialProgress) -> bool:
        if self.on_progress is not None:
            self.on_progress(progress)
        return not self._interrupted

    def progress(self) -> list[TrialProgress]:
        """Nothing: who asks is not in the middle of a job."""
        return []

    def interrupt(self) -> None:
        """The job ends after its current step."""
        self._interrupted = True

    def cancel(self) -> None:
        """The job ends where it is. Called by a signal's handler, while the job runs."""
        self._cancelled = True
        if self._inside:
            raise _Cancelled

    def abandon(self, trial: int) -> None:
        """No job is out of sight here."""
        raise NotImplementedError("a job in this process cannot be abandoned")

    def close(self) -> None:
        """Nothing to let go of."""
