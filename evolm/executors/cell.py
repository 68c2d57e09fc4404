"""A cell: a process of its own in which trials run, one after the other, with torch, data and kernels kept warm.

What a trial does to its cell it does to nobody else: when it crashes, hangs, takes too long or too much memory, the
cell is ended with everything that it started, and a new one takes the next trial. The two sides speak in lines of JSON
over a socket; the cell ends itself when the other side is gone.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from evolm.executors.base import ENDED, Job, Limits, Outcome, Runner, TrialProgress
from evolm.executors.limits import Watch
from evolm.executors.processes import (
    Family,
    adopt_orphans,
    how_it_ended,
    kill_descendants,
    kill_marked,
    memory_kills,
)

MARK = "EVOLM_CELL"

SAY_SECONDS = 60.0
"""How long a cell may take to read its job."""

LOOK_SECONDS = 0.1
"""How often a running trial is held against its limits."""

LATE_SECONDS = 60.0
"""How much longer than its limit a trial may take whose runner ends it itself, and lets it save."""

LEFT = 0.25
"""A cell that holds more than this share of a trial's memory when the trial is to begin is renewed: it holds what
earlier trials left, and a trial is not ended for what others did."""

TELL_SECONDS = 0.1
"""How often a cell tells of its trial's progress, at most."""


def name_of(runner: Runner) -> str:
    """What a cell needs to find a runner: `module:function`. Raises ValueError for one that cannot be imported."""
    if runner.__module__ == "__main__" or "." in runner.__qualname__:
        raise ValueError(f"{runner.__qualname__}: other processes can only import a function of a module")
    return f"{runner.__module__}:{runner.__qualname__}"


# --- the side that hands out trials ---------------------------------------------------------------------------------


class Cell:
    """The handle of a cell. One thread calls `run`; any thread may call the others meanwhile."""

    def __init__(
        self,
        runner: str,
        sys_path: list[str] | None = None,
        *,
        keeps_limits: bool = False,
        env: Mapping[str, str] | None = None,
    ) -> None:
        """`keeps_limits` says that the runner itself ends what passes them: the cell is then ended only if it does
        not. `env` is added to its environment."""
        self._env = dict(env or {})
        self._runner, self._path = runner, sys.path if sys_path is None else sys_path
        self._keeps_limits = keeps_limits
        self._stop: int | None = None  # the lease that is to be saved and ended
        self._cancel: int | None = None  # the lease that is to be ended now
        self.progress: TrialProgress | None = None
        self._start()

    def _start(self) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            command = [sys.executable, "-m", "evolm.executors.cell", str(theirs.fileno()), self._runner]
            env = {
                "OMP_WAIT_POLICY": "passive",
                **os.environ,
                **self._env,
                "PYTHONPATH": os.pathsep.join(filter(None, self._path)),
            }
            self._family = Family(command, mark=MARK, env=env, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL)
        self._socket, self._lines = ours, _Lines(ours)
        self._used = False

    def _say(self, message: dict[str, Any]) -> None:
        with contextlib.suppress(OSError):  # a cell that has died is met where its answer is awaited
            self._socket.settimeout(SAY_SECONDS)
            self._socket.sendall(json.dumps(message).encode() + b"\n")

    @property
    def pid(self) -> int:
        """The process in which trials run at present."""
        return self._family.pid

    def run(self, job: Job) -> Outcome:
        """Run one job to its end, whatever end that is."""
        if self._worn(job.limits):
            self._renew()
        self._used, self._kills = True, memory_kills()
        watch = Watch(_later(job.limits) if self._keeps_limits else job.limits, self._family)
        self.progress = TrialProgress(trial=job.trial)
        try:
            self._say({"job": job.as_dict()})
            outcome = self._outcome(job, watch)
        finally:
            last, self.progress = self.progress, None
        if outcome.seconds == 0:  # nobody was left to tell what was spent
            return replace(outcome, flops=last.flops, seconds=watch.seconds)
        return outcome

    def _worn(self, limits: Limits) -> bool:
        """Whether what earlier trials did to the cell would be a new one's fault."""
        if self._family.ended(0):
            return True
        return self._used and limits.memory is not None and self._family.memory() > LEFT * limits.memory

    def _outcome(self, job: Job, watch: Watch) -> Outcome:
        stopped = False
        while True:
            dead = self._family.ended(0)
            if dead:  # its children may hold the socket open, and even speak
                self._family.kill()
            for message in self._lines.read(LOOK_SECONDS):
                if "progress" in message:
                    progress = TrialProgress(**message["progress"])
                    if progress != self.progress:
                        watch.moved()
                    self.progress = progress
                elif "outcome" in message:
                    return Outcome(**message["outcome"])
            if self._lines.ended or (dead and self._lines.silent):
                return self._died(job)
            if self._stop == job.lease and not stopped:
                self._say({"stop": job.lease})
                stopped = True
            broken = watch.broken()
            if self._cancel == job.lease:
                broken = ("interrupted", ENDED)
            if broken is not None:
                self._renew()
                return job.failed(*broken)

    def _died(self, job: Job) -> Outcome:
        """The cell ended while a job ran."""
        self._family.kill()
        code = self._family.process.returncode
        if self._family.killed_by_the_system(self._kills):
            outcome = job.failed("oom", "the system ended it for want of memory")
        elif code == -signal.SIGKILL:
            outcome = job.failed("lost", "its process was killed")
        else:
            outcome = job.failed("crashed", f"its process {how_it_ended(code)}")
        self._renew()
        return outcome

    def _renew(self) -> None:
        """End the cell with all that it started; the next one begins to warm up."""
        self.close()
        self._start()

    def stop(self, lease: int) -> None:
        """Ask a job to save and to end, also one that is about to begin."""
        self._stop = lease

    def cancel(self, lease: int) -> None:
        """End a job now, also one that is about to begin."""
        self._cancel = lease

    def close(self) -> None:
        """End the cell with all that it started."""
        self._family.kill()
        self._socket.close()


def _later(limits: Limits) -> Limits:
    """Limits for a runner that keeps them itself."""
    seconds = None if limits.seconds is None else limits.seconds + LATE_SECONDS
    return Limits(seconds=seconds, memory=None if limits.memory is None else 2 * limits.memory)


class _Lines:
    """Messages from a socket."""

    def __init__(self, stream: socket.socket) -> None:
        self._stream, self._rest = stream, b""
        self.ended = self.silent = False

    def read(self, seconds: float | None) -> Iterator[dict[str, Any]]:
        """The messages that have come in; waits at most so long for the first (None: as long as it takes)."""
        self._stream.settimeout(seconds)
        self.silent = False
        try:
            got = self._stream.recv(2**16)
        except TimeoutError:
            self.silent = True
            return
        except OSError:
            got = b""
        self.ended = not got
        *lines, self._rest = (self._rest + got).split(b"\n")
        for line in lines:
            yield json.loads(line)


# --- the side that runs them ----------------------------------------------------------------------------------------


class _Inmate:
    """The cell's own process."""

    def __init__(self, stream: socket.socket) -> None:
        self._socket, self._lines = stream, _Lines(stream)
        self._jobs: queue.SimpleQueue[Job] = queue.SimpleQueue()
        self._stopped: int | None = None
        self._lease: int | None = None
        self._told = 0.0

    def listen(self) -> None:
        """Take jobs and requests to stop; when the other side is gone, end everything that was started here."""
        while not self._lines.ended:
            for message in self._lines.read(None):
                if "job" in message:
                    self._jobs.put(Job.from_dict(message["job"]))
                elif "stop" in message:
                    self._stopped = message["stop"]
        _end_all()

    def serve(self, runner: str) -> None:
        """Run jobs as they come."""
        module, _, name = runner.partition(":")
        run: Runner = getattr(importlib.import_module(module), name)
        while True:
            job = self._jobs.get()
            self._lease, self._told = job.lease, 0.0
            self._say("outcome", run(job, self._tell), job)

    def _tell(self, progress: TrialProgress) -> bool:
        now = time.monotonic()
        if now - self._told > TELL_SECONDS:
            self._told = now
            self._say("progress", progress)
        return self._stopped != self._lease

    def _say(self, what: str, said: Any, job: Job | None = None) -> None:
        values = said.as_dict() if job is not None else vars(said)
        try:
            line = json.dumps({what: values})
        except (TypeError, ValueError) as error:
            if job is None:
                raise
            outcome = job.failed(
                "bad_metrics", f"told what is no JSON: {error}", flops=said.flops, seconds=said.seconds
            )
            line = json.dumps({what: outcome.as_dict()})
        self._socket.sendall(line.encode() + b"\n")


def _end_all() -> None:
    """End every process that descends from this one, and this one."""
    kill_descendants()
    kill_marked(f"{MARK}={os.environ[MARK]}")
    os.killpg(0, signal.SIGKILL)


def main() -> None:
    """Be a cell: `python -m evolm.executors.cell FD MODULE:FUNCTION`."""
    _, descriptor, runner = sys.argv
    stream = socket.socket(fileno=int(descriptor))
    stream.set_inheritable(False)  # who else held it would hide that the cell has ended
    os.register_at_fork(after_in_child=stream.close)
    adopt_orphans()
    inmate = _Inmate(stream)
    threading.Thread(target=inmate.listen, daemon=True).start()
    inmate.serve(runner)


if __name__ == "__main__":
    main()
