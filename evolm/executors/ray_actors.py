"""Trials on Ray: long-lived actors that keep torch, data and kernels warm, one trial at a time each."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from evolm.errors import ExecutorError
from evolm.executors.base import Job, Outcome, Runner, TrialProgress
from evolm.packages import foreign_packages

CONNECT_SECONDS = 5.0
"""How long an address may take to answer at all."""

RESTARTS = 3
"""How often a slot's actor is replaced after its process died."""

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
        self._stop = threading.Event()

    def about(self) -> dict[str, Any]:
        """Who this is."""
        import socket

        return {"pid": os.getpid(), "node": socket.gethostname()}

    def run(self, job: Job) -> Outcome:
        """Run one job to its end."""
        self._progress = None
        self._stop.clear()
        try:
            return self._runner(job, self._tell)
        finally:
            self._progress = None

    def _tell(self, progress: TrialProgress) -> bool:
        self._progress = progress
        return not self._stop.is_set()

    def progress(self) -> TrialProgress | None:
        """Where the running job is."""
        return self._progress

    def stop(self) -> None:
        """Ask the running job to save and end."""
        self._stop.set()


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
        self._actors = [self._spawn() for _ in range(slots or self._places())]
        self._restarts = [0] * len(self._actors)
        abouts = self._get([actor.about.remote() for actor in self._actors])
        self._abouts = [{"id": i, **about} for i, about in enumerate(abouts)]
        self._jobs: dict[Any, tuple[int, Job]] = {}

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

    def _spawn(self) -> Any:
        return self._actor_class.options(num_cpus=self._cpus, num_gpus=self._gpus).remote(self._runner)

    def _get(self, references: list[Any]) -> list[Any]:
        try:
            results: list[Any] = self._ray.get(references, timeout=120)
        except self._ray.exceptions.RayError as error:
            raise ExecutorError(f"workers did not start: {str(error).strip().splitlines()[-1]}") from None
        return results

    @property
    def workers(self) -> list[dict[str, Any]]:
        """The actors: id, pid and node."""
        return self._abouts

    def idle(self) -> list[int]:
        """Slots without a job."""
        busy = {slot for slot, _ in self._jobs.values()}
        return [slot for slot in range(len(self._actors)) if slot not in busy]

    def submit(self, slot: int, job: Job) -> None:
        """Hand a job to a slot's actor."""
        self._jobs[self._actors[slot].run.remote(job)] = (slot, job)

    def wait(self, seconds: float) -> list[Outcome]:
        """Outcomes of jobs that ended; a job whose worker died comes back as lost and the worker is replaced."""
        if not self._jobs:
            return []
        ready, _ = self._ray.wait(list(self._jobs), num_returns=1, timeout=seconds)
        if ready:  # take along what else has come in
            ready, _ = self._ray.wait(list(self._jobs), num_returns=len(self._jobs), timeout=0)
        outcomes = []
        for reference in ready:
            slot, job = self._jobs.pop(reference)
            try:
                outcomes.append(self._ray.get(reference))
            except self._ray.exceptions.RayError as error:
                outcomes.append(self._lost(slot, job, error))
        return outcomes

    def _lost(self, slot: int, job: Job, error: Exception) -> Outcome:
        words = f"worker {slot} died: {str(error).splitlines()[0]}"
        if self._restarts[slot] >= RESTARTS:
            gone = ExecutorError(f"{words}; it was replaced {RESTARTS} times before")
            return Outcome(trial=job.trial, rung=job.rung, kind="fatal", message=words, error=gone)
        self._restarts[slot] += 1
        self._actors[slot] = self._spawn()
        self._abouts[slot] = {"id": slot, **self._get([self._actors[slot].about.remote()])[0]}
        return Outcome(trial=job.trial, rung=job.rung, kind="fail", reason="lost", message=words)

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
        for slot, _ in self._jobs.values():
            self._actors[slot].stop.remote()

    def close(self) -> None:
        """End the actors, and the Ray that we started."""
        for actor in self._actors:
            self._ray.kill(actor)
        if self._own:
            self._ray.shutdown()


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
