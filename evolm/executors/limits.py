"""Whether a running trial keeps to what it may take."""

from __future__ import annotations

import math
import time

from evolm.executors.base import Limits
from evolm.executors.processes import Family
from fitness.trial import Reason
from search_spaces.quantities import format_bytes

COUNT_SECONDS = 1.0
"""How often memory is counted exactly, at most, while the quick count is above the limit."""


class Watch:
    """Holds one launch against its limits, by a clock that nobody sets."""

    def __init__(self, limits: Limits, family: Family) -> None:
        self._limits, self._family = limits, family
        self.began = self._moved = time.monotonic()
        self._counted = -math.inf

    def moved(self) -> None:
        """The trial has made some progress."""
        self._moved = time.monotonic()

    @property
    def seconds(self) -> float:
        """Seconds since the launch began."""
        return time.monotonic() - self.began

    def broken(self) -> tuple[Reason, str] | None:
        """The limit that the trial has passed, as a reason and in words."""
        limits, now = self._limits, time.monotonic()
        if limits.seconds is not None and now - self.began > limits.seconds:
            return "timeout", f"took longer than {_duration(limits.seconds)}"
        if limits.silent_seconds is not None and now - self._moved > limits.silent_seconds:
            return "timeout", f"no progress for {_duration(limits.silent_seconds)}"
        if limits.memory is not None and now - self._counted > COUNT_SECONDS and self._family.memory() > limits.memory:
            self._counted = now
            held = self._family.shared_memory_counted_once()
            if held > limits.memory:
                return "oom", f"held {format_bytes(held)} of memory, its limit is {format_bytes(limits.memory)}"
        return None


def _duration(seconds: float) -> str:
    return (
        f"{seconds / 3600:g} h" if seconds >= 3600 else f"{seconds / 60:g} min" if seconds >= 60 else f"{seconds:g} s"
    )
