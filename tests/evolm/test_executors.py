"""The contract that every executor keeps: jobs go in, outcomes come out, whatever happens to the job."""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
from collections.abc import Iterator
from typing import Any

import pytest

from evolm.errors import ExecutorError
from evolm.executors.base import Executor, Job, Outcome, Tell, TrialProgress
from evolm.executors.inline import InlineExecutor


def runner(job: Job, tell: Tell) -> Outcome:
    """A trial that does what its genome says."""
    deed = job.genome["deed"]
    steps = 0
    if deed == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    while deed == "work until told to stop":
        steps += 1
        if not tell(TrialProgress(trial=job.trial, tokens=steps, total_tokens=9, loss=1.0, tokens_per_second=1.0)):
            return Outcome(trial=job.trial, rung=job.rung, kind="fail", reason="interrupted", message=f"{steps > 0}")
        time.sleep(0.001)
    return Outcome(
        trial=job.trial, rung=job.rung, kind="result", metrics={"answer": job.genome["n"], "pid": os.getpid()}
    )


def job(trial: int, deed: str = "answer") -> Job:
    genome = {"deed": deed, "n": float(trial)}
    return Job(trial=trial, attempt=1, rung=0, top=True, tokens=1, genome=genome, seed=0, folder="unused")


def collect(executor: Executor, count: int) -> list[Outcome]:
    outcomes: list[Outcome] = []
    deadline = time.monotonic() + 60
    while len(outcomes) < count:
        outcomes += executor.wait(1.0)
        assert time.monotonic() < deadline
    return outcomes


class Unloadable:
    """A runner that no worker can load."""

    def __reduce__(self) -> Any:
        return refuse, ()


def refuse() -> None:
    raise RuntimeError("cannot be loaded here")


class ExecutorContract:
    """Inherit, and give a fixture `executor`."""

    def test_a_job_comes_back_with_its_outcome(self, executor: Executor) -> None:
        executor.submit(executor.idle()[0], job(7))
        (outcome,) = collect(executor, 1)
        assert (outcome.trial, outcome.kind, outcome.metrics["answer"]) == (7, "result", 7.0)

    def test_a_slot_is_idle_until_it_has_a_job_and_after_it_is_done(self, executor: Executor) -> None:
        slot = executor.idle()[0]
        executor.submit(slot, job(1))
        assert slot not in executor.idle()
        collect(executor, 1)
        assert slot in executor.idle()

    def test_many_jobs_each_come_back_once(self, executor: Executor) -> None:
        told: list[int] = []
        waiting = list(range(1, 31))
        while waiting or len(told) < 30:
            for slot in executor.idle():
                if waiting:
                    executor.submit(slot, job(waiting.pop(0)))
            told += [outcome.trial for outcome in executor.wait(1.0)]
        assert sorted(told) == list(range(1, 31))

    def test_nothing_runs_nothing_comes(self, executor: Executor) -> None:
        began = time.monotonic()
        assert executor.wait(5.0) == [] and executor.progress() == []
        assert time.monotonic() - began < 1

    def test_workers_say_who_they_are(self, executor: Executor) -> None:
        for number, worker in enumerate(executor.workers):
            assert worker["id"] == number and worker["pid"] > 0 and worker["node"]


class TestInline(ExecutorContract):
    @pytest.fixture
    def executor(self) -> Executor:
        return InlineExecutor(runner)

    def test_progress_is_heard_while_it_runs_and_an_interrupt_ends_it(self) -> None:
        heard: list[TrialProgress] = []

        def listen(progress: TrialProgress) -> bool:
            heard.append(progress)
            if len(heard) == 3:
                executor.interrupt()
            return True

        executor = InlineExecutor(runner, listen)
        executor.submit(0, job(1, "work until told to stop"))
        (outcome,) = executor.wait(1.0)
        assert outcome.reason == "interrupted" and len(heard) == 3


@pytest.fixture(scope="module")
def ray_executor() -> Iterator[Executor]:
    from ray import cloudpickle

    from evolm.executors.ray_actors import RayExecutor

    cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import a test module
    executor = RayExecutor(runner, cpus=(os.cpu_count() or 1) / 2, slots=99)
    yield executor
    executor.close()


@pytest.mark.ray
@pytest.mark.xdist_group("ray")
class TestRay(ExecutorContract):
    @pytest.fixture
    def executor(self, ray_executor: Executor) -> Executor:
        return ray_executor

    def test_two_jobs_run_in_two_processes(self, executor: Executor) -> None:
        for slot in executor.idle():
            executor.submit(slot, job(slot + 1))
        pids = {outcome.metrics["pid"] for outcome in collect(executor, 2)}
        assert len(pids) == 2 and os.getpid() not in pids

    def test_running_jobs_are_watched_and_interrupted(self, executor: Executor) -> None:
        executor.submit(0, job(1, "work until told to stop"))
        deadline = time.monotonic() + 30
        while not executor.progress():
            assert time.monotonic() < deadline
        executor.interrupt()
        (outcome,) = collect(executor, 1)
        assert outcome.reason == "interrupted"

    def test_a_worker_that_dies_is_replaced_as_often_as_it_takes_and_its_job_is_lost(self, executor: Executor) -> None:
        for _ in range(5):
            before = executor.workers[0]["pid"]
            executor.submit(0, job(1, "die"))
            (outcome,) = collect(executor, 1)
            assert (outcome.kind, outcome.reason) == ("fail", "lost") and outcome.message.startswith("worker 0 died: ")
            assert outcome.message.isprintable() and 0 not in executor.idle() and 1 in executor.idle()
            deadline = time.monotonic() + 60
            while 0 not in executor.idle():
                assert executor.wait(1.0) == [] and time.monotonic() < deadline
            assert executor.workers[0]["pid"] != before

    def test_a_job_that_is_stopped_before_it_begins_ends_as_interrupted(self, executor: Executor) -> None:
        executor.submit(0, job(1, "work until told to stop"))
        executor.interrupt()
        (outcome,) = collect(executor, 1)
        assert outcome.reason == "interrupted"
        executor.submit(0, job(2))  # the next one does not hear of it
        assert collect(executor, 1)[0].kind == "result"

    def test_there_are_never_more_workers_than_fit(self, executor: Executor) -> None:
        """The fixture asks for 99, each with half of the cores."""
        assert len(executor.workers) == 2

    def test_workers_that_cannot_be_started_are_done_without_as_long_as_there_is_one(self, executor: Executor) -> None:
        """The last test of this class: it leaves no worker behind."""
        executor._runner = Unloadable()  # type: ignore[attr-defined]
        executor.submit(0, job(1, "die"))
        assert collect(executor, 1)[0].reason == "lost"
        executor.submit(1, job(2))
        assert collect(executor, 1)[0].metrics["answer"] == 2.0
        deadline = time.monotonic() + 60
        while executor._starting:  # type: ignore[attr-defined]
            assert executor.wait(1.0) == [] and time.monotonic() < deadline
        assert executor.idle() == [1]
        executor.submit(1, job(3, "die"))
        assert collect(executor, 1)[0].reason == "lost"
        with pytest.raises(ExecutorError, match=r"no worker could be started: .*cannot be loaded here"):
            while True:
                assert executor.wait(1.0) == [] and time.monotonic() < deadline


@pytest.mark.parametrize("scheme", ["", "ray://"])
def test_an_address_where_nobody_listens_is_told_at_once(scheme: str) -> None:
    from evolm.executors.ray_actors import RayExecutor

    with socket.socket() as taken:  # bound, not listening: nobody else can be there
        taken.bind(("127.0.0.1", 0))
        address = f"{scheme}127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(ExecutorError, match=f"cannot reach the Ray cluster at {address}: .*; does `ray status"):
            RayExecutor(runner, address=address)
