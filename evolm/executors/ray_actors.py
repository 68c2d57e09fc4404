"""Trials on Ray: long-lived actors that keep torch, data and kernels warm, one trial at a time each."""

from __future__ import annotations

import os
import re
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from evolm.errors import ExecutorError
from evolm.executors.base import Job, Outcome, Runner, TrialProgress
from evolm.packages import foreign_packages

CONNECT_SECONDS = 5.0
"""How long an address may take to answer at all."""

STARTS = 3
"""How often in a row a slot's worker may fail to start before the slot is given up."""

START_SECONDS = 120.0
"""How long a worker may take to start: Python and torch from a cold disk."""

_QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # the default of a coming Ray: CPU actors keep the devices they see
    "TOKENIZERS_PARALLELISM": "false",
}


class _Worker:
    """What runs in an actor's process. `run` occupies one thread; the other methods answer in another."""

    def __init__(self, runner: Runner) -> None:
        if foreign := foreign_packages():  # a worker's environment may not be the driver's
            raise RuntimeError(f"{os.uname().nodename}: {foreign[0]}")
        self._runner = runner
        self._progress: TrialProgress | None = None
        self._stopped: tuple[int, int] | None = None
        self._running: tuple[int, int] | None = None

    def about(self) -> dict[str, Any]:
        """Who this is."""
        import socket

        return {"pid": os.getpid(), "node": socket.gethostname()}

    def run(self, job: Job) -> Outcome:
        """Run one job to its end."""
        self._progress, self._running = None, (job.trial, job.attempt)
        try:
            return self._runner(job, self._tell)
        finally:
            self._progress = self._running = None

    def _tell(self, progress: TrialProgress) -> bool:
        self._progress = progress
        return self._stopped != self._running

    def progress(self) -> TrialProgress | None:
        """Where the running job is."""
        return self._progress

    def stop(self, trial: int, attempt: int) -> None:
        """Ask a job to save and end, also one that is about to begin."""
        self._stopped = (trial, attempt)


class RayExecutor:
    """Runs jobs in `slots` actors with `cpus` and `gpus` each (fractions are allowed).

    Without an `address` a Ray of our own is started on this machine and ended by `close`; a cluster that was there
    before is left running. Raises ExecutorError when there is no such cluster or when it could never hold a worker.
    """

    def __init__(
        self, runner: Runner, *, cpus: float = 1, gpus: float = 0, slots: int | None = None, address: str | None = None
    ) -> None:
        self._runner, self._cpus, self._gpus = runner, cpus, gpus
        self._own = address is None
        _connect(address)
        import ray

        self._ray = ray
        self._actor_class = ray.remote(concurrency_groups={"control": 1})(_controlled(_Worker))
        self._jobs: dict[Any, tuple[int, Job]] = {}
        self._starting: dict[Any, tuple[int, float]] = {}  # the first answer of a worker: its slot, and until when
        self._gone: set[int] = set()
        places = self._places()
        count = min(places, slots or places)
        self._actors: list[Any] = [None] * count
        self._failed_starts = [0] * count
        self._abouts: list[dict[str, Any]] = [{"id": slot} for slot in range(count)]
        for slot in range(count):
            self._start(slot)
        while self._starting:
            self._started(self._ray.wait(list(self._starting), timeout=1.0)[0])

    def _places(self) -> int:
        """How many workers the cluster can hold at once."""
        have = self._ray.cluster_resources()
        needs = {"CPU": self._cpus, "GPU": self._gpus}
        fits = [int(have.get(name, 0) // need) for name, need in needs.items() if need > 0]
        places = min(fits, default=1)
        if places < 1:
            wanted = ", ".join(f"{need:g} {name}" for name, need in needs.items() if need > 0)
            offered = ", ".join(f"{have.get(name, 0):g} {name}" for name, need in needs.items() if need > 0)
            raise ExecutorError(f"no worker fits: a trial needs {wanted}, the cluster has {offered} in all")
        return places

    def _start(self, slot: int) -> None:
        """Begin to start a slot's worker."""
        actor = self._actor_class.options(num_cpus=self._cpus, num_gpus=self._gpus).remote(self._runner)
        self._actors[slot] = actor
        self._starting[actor.about.remote()] = (slot, time.monotonic() + START_SECONDS)

    def _started(self, ready: list[Any]) -> None:
        """Take note of workers that are there now; start those anew that failed to. Raises ExecutorError when no slot
        is left that could have one."""
        for reference in ready:
            slot, _ = self._starting.pop(reference)
            try:
                self._abouts[slot] = {"id": slot, **self._ray.get(reference)}
                self._failed_starts[slot] = 0
            except self._ray.exceptions.RayError as error:
                self._not_started(slot, _words(error, -1))
        for reference, (slot, until) in list(self._starting.items()):
            if time.monotonic() > until:
                del self._starting[reference]
                self._ray.kill(self._actors[slot])
                self._failed_starts[slot] = STARTS
                self._not_started(slot, f"no answer within {START_SECONDS:g} s; is there room for it?")

    def _not_started(self, slot: int, words: str) -> None:
        self._failed_starts[slot] += 1
        if self._failed_starts[slot] < STARTS:
            self._start(slot)
            return
        self._gone.add(slot)
        if len(self._gone) == len(self._actors):
            raise ExecutorError(f"no worker could be started: {words}")

    @property
    def workers(self) -> list[dict[str, Any]]:
        """The actors: id, pid and node."""
        return self._abouts

    def idle(self) -> list[int]:
        """Slots without a job, whose worker is there."""
        busy = {slot for slot, _ in self._jobs.values()} | {slot for slot, _ in self._starting.values()} | self._gone
        return [slot for slot in range(len(self._actors)) if slot not in busy]

    def submit(self, slot: int, job: Job) -> None:
        """Hand a job to a slot's actor."""
        self._jobs[self._actors[slot].run.remote(job)] = (slot, job)

    def wait(self, seconds: float) -> list[Outcome]:
        """Outcomes of jobs that ended; a job whose worker died comes back as lost and the worker is replaced.

        Raises ExecutorError when no worker is left and none can be started.
        """
        awaited = [*self._jobs, *self._starting]
        if not awaited:
            return []
        ready, _ = self._ray.wait(awaited, num_returns=1, timeout=seconds)
        if ready:  # take along what else has come in
            ready, _ = self._ray.wait(awaited, num_returns=len(awaited), timeout=0)
        outcomes = []
        for reference in [one for one in ready if one in self._jobs]:
            slot, job = self._jobs.pop(reference)
            try:
                outcomes.append(self._ray.get(reference))
            except self._ray.exceptions.RayError as error:
                words = f"worker {slot} died: {_words(error)}"
                outcomes.append(Outcome(trial=job.trial, rung=job.rung, kind="fail", reason="lost", message=words))
                self._start(slot)
        if not outcomes:  # which have to be written down before anything may go wrong here
            self._started([one for one in ready if one in self._starting])
        return outcomes

    def progress(self) -> list[TrialProgress]:
        """Where running trials are; a worker that does not answer at once is left out."""
        asked = [self._actors[slot].progress.remote() for slot, _ in self._jobs.values()]
        if not asked:
            return []
        ready, _ = self._ray.wait(asked, num_returns=len(asked), timeout=0.2)
        found = []
        for reference in ready:
            try:
                found.append(self._ray.get(reference))
            except self._ray.exceptions.RayError:
                continue  # `wait` will tell of the worker's death
        return [progress for progress in found if progress is not None]

    def interrupt(self) -> None:
        """Tell every running job to stop."""
        for slot, job in self._jobs.values():
            self._actors[slot].stop.remote(job.trial, job.attempt)

    def close(self) -> None:
        """End the actors, and the Ray that we started."""
        for actor in self._actors:
            self._ray.kill(actor)
        if self._own:
            self._ray.shutdown()


def _words(error: Exception, line: int = 0) -> str:
    """The first (0) or last (-1) line of what Ray says, without its colours."""
    return re.sub(r"\x1b\[[0-9;]*m", "", str(error)).strip().splitlines()[line]


def _controlled(worker: type) -> type:
    """Mark the methods that answer while `run` works. Done here, so that importing this module does not import Ray."""
    import ray

    for name in ("about", "progress", "stop"):
        setattr(worker, name, ray.method(concurrency_group="control")(getattr(worker, name)))
    return worker


def _connect(address: str | None) -> None:
    """Start a Ray of our own, or join the one at `address`."""
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    if address is not None:
        _someone_listens(address)
        _use_token()
    import logging

    import ray

    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if address is None:
        options |= {"address": "local", "include_dashboard": False, "object_store_memory": 128 * 2**20}
    else:
        options["address"] = address
    start: Callable[..., Any] = ray.init
    try:
        start(**options)
    except (ConnectionError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        where = "a local Ray" if address is None else f"the Ray cluster at {address}"
        token = "" if address is None or _token_there() else "; if it wants a token, set RAY_AUTH_TOKEN_PATH"
        raise ExecutorError(f"cannot reach {where}: {str(error).splitlines()[0]}{token}") from None


def _someone_listens(address: str) -> None:
    """Ray itself tries for minutes before it tells that nobody is at an address."""
    host, colon, port = address.rpartition("://")[2].rpartition(":")
    if not colon or not port.isdecimal():
        return  # 'auto', or what Ray makes of it
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise ExecutorError(
            f"cannot reach the Ray cluster at {address}: {error}; does `ray status --address {address}` find it?"
        ) from None


def _token_there() -> bool:
    file = os.environ.get("RAY_AUTH_TOKEN_PATH") or str(Path.home() / ".ray" / "auth_token")
    return bool(os.environ.get("RAY_AUTH_TOKEN")) or Path(file).is_file()


def _use_token() -> None:
    """Ray refuses clients that have a token but were not told to use it, and says only that it could not connect."""
    if "RAY_AUTH_MODE" not in os.environ and _token_there():
        os.environ["RAY_AUTH_MODE"] = "token"
