"""What chaos.py does to a search: faults, when they happen, and which of its processes they hit."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

FAULTS = {"trial": 2, "worker": 2, "kill": 1, "term": 1, "raylet": 1, "gcs": 1}
"""Kinds of faults, and how likely each is: half of them leave the controller alone."""

OTHER_FAULTS = ("hang",)
"""Kinds that happen only when they are asked for."""

ENDING = ("kill", "term", "raylet", "gcs")
"""Kinds that take the controller with them, sooner or later."""

LOOK_SECONDS = 0.5
"""How often the processes of a search are counted."""

WorkerOf = Callable[[psutil.Process], psutil.Process | None]
"""The process of the Ray worker that a trial's process belongs to."""

_GONE = (psutil.NoSuchProcess, psutil.AccessDenied, OSError)


@dataclass(kw_only=True)
class Fault:
    """One fault: when it is due, in seconds from the beginning, what kind it is, and which of the processes in question
    it hits (a share of their number). `hit` is when it did; None where nothing was there to be hit."""

    due: float
    kind: str
    which: float
    hit: float | None = None
    process: int | None = None

    def as_dict(self) -> dict[str, Any]:
        return {name: round(value, 2) if isinstance(value, float) else value for name, value in vars(self).items()}


def schedule(kinds: Sequence[str], seconds: float, every: float, seed: int) -> list[Fault]:
    """A random fault about every so many seconds. Before the first one a search has that long to get going."""
    chance = random.Random(seed)
    weights = [FAULTS.get(kind, 1) for kind in kinds]
    faults = []
    for number in range(1, int(seconds / every)):
        due = every * (number + chance.uniform(-0.25, 0.25))
        faults.append(Fault(due=due, kind=chance.choices(kinds, weights)[0], which=chance.random()))
    return faults


def inject(fault: Fault, family: Family, worker_of: WorkerOf) -> psutil.Process | None:
    """Hit a process; None when there is none of the kind."""
    process = _target(fault, family, worker_of)
    number = {"term": signal.SIGTERM, "hang": signal.SIGSTOP}.get(fault.kind, signal.SIGKILL)
    if process is not None:
        try:
            process.send_signal(number)
        except _GONE:
            return None
    return process


def _target(fault: Fault, family: Family, worker_of: WorkerOf) -> psutil.Process | None:
    if fault.kind in ("kill", "term"):
        return family.first
    members = family.members()
    if fault.kind in ("raylet", "gcs"):
        name = {"raylet": "raylet", "gcs": "gcs_server"}[fault.kind]
        return next((member for member in members if _name(member) == name), None)
    training = [member for member in members if _trains(member)]
    if not training:
        return None
    chosen = training[int(fault.which * len(training))]
    return chosen if fault.kind == "trial" else worker_of(chosen)


def _name(process: psutil.Process) -> str:
    try:
        return process.name()
    except _GONE:
        return ""


def _trains(process: psutil.Process) -> bool:
    """Whether a process writes a trial's metrics.jsonl."""
    with contextlib.suppress(*_GONE):
        folder = Path(f"/proc/{process.pid}/fd")
        return any(entry.readlink().name == "metrics.jsonl" for entry in folder.iterdir())
    return False


class Family:
    """A controller and every process that descended from it, those included whose parents have died."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self.process = process
        self.first = psutil.Process(process.pid)
        self._known: dict[tuple[int, float], psutil.Process] = {}
        self._looked = 0.0
        self.ended: float | None = None
        self.gone: float | None = None  # when the last of its processes was

    def look(self) -> None:
        """Take note of who is there."""
        if time.monotonic() - self._looked < LOOK_SECONDS:
            return
        self._looked = time.monotonic()
        with contextlib.suppress(*_GONE):
            for one in (self.first, *self.first.children(recursive=True)):
                self._known[one.pid, one.create_time()] = one
        for left in self.alive():  # children of those whose own parents have died
            with contextlib.suppress(*_GONE):
                for one in left.children():
                    self._known[one.pid, one.create_time()] = one

    def members(self) -> list[psutil.Process]:
        """Its processes now, by number."""
        self._looked = 0.0
        self.look()
        return sorted((one for one in self.alive() if one.pid != self.first.pid), key=lambda one: one.pid)

    def alive(self) -> list[psutil.Process]:
        """The processes known of that live."""
        found = [one for one in self._known.values() if lives(one)]
        self._known = {(one.pid, one.create_time()): one for one in found}
        return found


def lives(process: psutil.Process) -> bool:
    """Whether a process is there and more than an entry in its parent's table."""
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except _GONE:
        return False


def marked(mark: str) -> Iterator[psutil.Process]:
    """The processes whose environment holds NAME=value."""
    name, _, value = mark.partition("=")
    for process in psutil.process_iter():
        with contextlib.suppress(*_GONE):
            if process.pid != os.getpid() and process.environ().get(name) == value:
                yield process


def told(process: psutil.Process) -> str:
    """A process in words."""
    try:
        return f"{process.pid} {process.name()} {' '.join(process.cmdline())[:120].strip()}"
    except _GONE:
        return str(process.pid)


def end(processes: Sequence[psutil.Process]) -> None:
    """SIGKILL for every one of them."""
    for one in processes:
        with contextlib.suppress(*_GONE):
            one.kill()
