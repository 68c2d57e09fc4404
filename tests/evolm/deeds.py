"""Trials that do what their genome says, for tests of executors: other processes can import this module."""

from __future__ import annotations

import ctypes
import itertools
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from evolm.executors.base import Job, Limits, Outcome, Tell, TrialProgress

LEASES = itertools.count(1)


def runner(job: Job, tell: Tell) -> Outcome:
    deed = job.genome["deed"]
    return DEEDS[deed](job, tell)


def job(trial: int, deed: str = "answer", *, limits: Limits | None = None, folder: str = "unused") -> Job:
    genome = {"deed": deed, "n": float(trial)}
    return Job(
        trial=trial,
        lease=next(LEASES),
        rung=0,
        top=True,
        tokens=1,
        genome=genome,
        seed=0,
        folder=folder,
        limits=limits or Limits(),
    )


def answer(job: Job, tell: Tell) -> Outcome:
    return job.told({"answer": job.genome["n"], "pid": os.getpid()})


def work_until_told_to_stop(job: Job, tell: Tell) -> Outcome:
    steps = 0
    while True:
        steps += 1
        if not tell(TrialProgress(trial=job.trial, tokens=steps, total_tokens=9, loss=1.0, flops=7.0 * steps)):
            return job.failed("interrupted", "saved", seconds=1.0)
        time.sleep(0.001)


def work_longer(job: Job, tell: Tell) -> Outcome:
    return work_a_while(job, tell, 1.5)


def work_a_while(job: Job, tell: Tell, seconds: float = 0.5) -> Outcome:
    until, steps = time.monotonic() + seconds, 0
    while time.monotonic() < until:
        steps += 1
        tell(TrialProgress(trial=job.trial, tokens=steps, total_tokens=steps + 1, flops=float(steps)))
        time.sleep(0.01)
    return job.told({"loss": job.genome["n"]}, flops=float(steps), seconds=0.5)


def hang(job: Job, tell: Tell) -> Outcome:
    tell(TrialProgress(trial=job.trial, tokens=3, total_tokens=9, flops=21.0))
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    while True:
        signal.pause()


def die(job: Job, tell: Tell) -> Outcome:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError


def die_of_a_fault(job: Job, tell: Tell) -> Outcome:
    os.kill(os.getpid(), signal.SIGSEGV)
    raise AssertionError


def leave(job: Job, tell: Tell) -> Outcome:
    sys.exit(7)


def die_of_a_real_time_signal(job: Job, tell: Tell) -> Outcome:
    os.kill(os.getpid(), signal.SIGRTMIN + 6)
    raise AssertionError


def fork_and_leave(job: Job, tell: Tell) -> Outcome:
    """One child of Python's making, and one that Python does not know of: both hold what this process holds."""
    for fork in (os.fork, ctypes.PyDLL(None).fork):
        if fork() == 0:
            ctypes.PyDLL(None).pause()
    os._exit(7)


def tell_from_a_fork(job: Job, tell: Tell) -> Outcome:
    if (child := os.fork()) == 0:
        try:
            tell(TrialProgress(trial=job.trial, tokens=13))
        except OSError:
            os._exit(3)
        os._exit(0)
    return job.told({"child": os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])})


def leave_memory_behind(job: Job, tell: Tell) -> Outcome:
    LEFT.append(b"x" * (300 * 2**20))
    return job.told({"pid": os.getpid()})


LEFT: list[bytes] = []


def hide_and_hang(job: Job, tell: Tell) -> Outcome:
    """Children without parents or without our words, each in a session of its own."""
    python, bare = [sys.executable, "-S", "-E", "-c"], "env={}, start_new_session=True"
    hidden = "import os, signal; print(os.getpid(), flush=True); signal.pause()"
    hiding = f"import subprocess; subprocess.Popen({[*python, hidden]!r}, {bare})"
    with Path(job.folder, "hidden").open("w") as stream:
        subprocess.Popen([*python, hidden], env={}, start_new_session=True, stdout=stream)
        subprocess.run([*python, hiding], check=True, stdout=stream)
    return hang(job, tell)


def kill_the_worker(job: Job, tell: Tell) -> Outcome:
    """The process above the cell: the actor."""
    os.kill(os.getppid(), signal.SIGKILL)
    return hang(job, tell)


def stop_the_worker(job: Job, tell: Tell) -> Outcome:
    os.kill(os.getppid(), signal.SIGSTOP)
    return hang(job, tell)


def fork_and_hang(job: Job, tell: Tell) -> Outcome:
    """Children in every way of getting out of sight: in the group, in a session of their own, without parents."""
    stubborn = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); signal.pause()"
    python = [sys.executable, "-S", "-E", "-c"]
    subprocess.Popen([*python, stubborn])
    subprocess.Popen([*python, stubborn], start_new_session=True)
    orphaning = f"import subprocess, sys; subprocess.Popen([*{python!r}, {stubborn!r}], start_new_session=True)"
    subprocess.run([*python, orphaning], check=True)
    Path(job.folder, "forked").touch()
    return hang(job, tell)


def eat_memory(job: Job, tell: Tell) -> Outcome:
    eaten = []
    while True:
        eaten.append(b"x" * 2**20)
        tell(TrialProgress(trial=job.trial, tokens=len(eaten), total_tokens=2**16))


def tell_no_numbers(job: Job, tell: Tell) -> Outcome:
    return job.told({"answer": object()})  # type: ignore[dict-item]


DEEDS = {
    function.__name__.replace("_", " "): function
    for function in (
        answer,
        work_until_told_to_stop,
        work_a_while,
        work_longer,
        hang,
        die,
        die_of_a_fault,
        die_of_a_real_time_signal,
        leave,
        fork_and_leave,
        tell_from_a_fork,
        leave_memory_behind,
        hide_and_hang,
        kill_the_worker,
        stop_the_worker,
        fork_and_hang,
        eat_memory,
        tell_no_numbers,
    )
}
