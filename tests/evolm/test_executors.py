"""The contract that every executor keeps: jobs go in, outcomes come out, whatever happens to the job."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import time
from collections.abc import Iterator

import psutil
import pytest
from deeds import job, runner

from evolm.errors import ExecutorError
from evolm.executors import ray_cluster
from evolm.executors.base import Executor, Limits, Outcome, TrialProgress
from evolm.executors.inline import InlineExecutor
from evolm.executors.ray_actors import Needs, RayExecutor
from evolm.executors.ray_cluster import Head


def collect(executor: Executor, count: int) -> list[Outcome]:
    outcomes: list[Outcome] = []
    deadline = time.monotonic() + 60
    while len(outcomes) < count:
        outcomes += executor.wait(1.0)
        assert time.monotonic() < deadline
    return outcomes


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
def ray_executor() -> Iterator[RayExecutor]:
    executor = RayExecutor(runner, Needs(cpus=(os.cpu_count() or 1) / 2), slots=99)
    yield executor
    executor.close()


@pytest.mark.ray
@pytest.mark.xdist_group("ray")
class TestRay(ExecutorContract):
    @pytest.fixture
    def executor(self, ray_executor: RayExecutor) -> RayExecutor:
        return ray_executor

    def test_two_jobs_run_in_two_processes(self, executor: Executor) -> None:
        for slot in executor.idle():
            executor.submit(slot, job(slot + 1))
        pids = {outcome.metrics["pid"] for outcome in collect(executor, 2)}
        assert len(pids) == 2 and os.getpid() not in pids

    def test_running_jobs_are_watched_and_interrupted(self, executor: Executor) -> None:
        executor.submit(0, job(1, "work until told to stop"))
        heard: list[TrialProgress] = []
        deadline = time.monotonic() + 30
        while not any(progress.tokens for progress in heard):
            heard += executor.progress()
            assert time.monotonic() < deadline
        executor.interrupt()
        (outcome,) = collect(executor, 1)
        assert outcome.reason == "interrupted"

    @pytest.mark.parametrize(
        ("deed", "limits", "reason"),
        [
            ("die", Limits(), "lost"),
            ("die of a fault", Limits(), "crashed"),
            ("hang", Limits(seconds=0.3), "timeout"),
            ("eat memory", Limits(memory=200 * 2**20), "oom"),
        ],
    )
    def test_what_a_trial_does_to_itself_leaves_its_worker_alone(
        self, executor: Executor, deed: str, limits: Limits, reason: str
    ) -> None:
        before = executor.workers[0]["pid"]
        launch = job(1, deed, limits=limits)
        executor.submit(0, launch)
        (outcome,) = collect(executor, 1)
        assert (outcome.kind, outcome.reason, outcome.lease) == ("fail", reason, launch.lease)
        assert 0 in executor.idle() and executor.workers[0]["pid"] == before

    def test_a_worker_that_dies_is_replaced_as_often_as_it_takes_and_its_job_is_lost(self, executor: Executor) -> None:
        for _ in range(3):
            before = executor.workers[0]["pid"]
            executor.submit(0, job(1, "kill the worker"))
            (outcome,) = collect(executor, 1)
            assert (outcome.kind, outcome.reason) == ("fail", "lost") and outcome.message.startswith("worker 0 died: ")
            assert outcome.message.isprintable() and 0 not in executor.idle() and 1 in executor.idle()
            until_idle(executor, 0)
            assert executor.workers[0]["pid"] != before

    def test_an_idle_worker_that_dies_is_replaced_before_it_gets_a_job(self, executor: RayExecutor) -> None:
        before = executor.workers[0]["pid"]
        os.kill(before, signal.SIGKILL)
        deadline = time.monotonic() + 60
        while executor.workers[0]["pid"] == before or 0 not in executor.idle():
            executor.idle()
            assert executor.wait(0.1) == [] and time.monotonic() < deadline
        executor.submit(0, job(1))
        assert collect(executor, 1)[0].kind == "result"

    def test_a_worker_that_is_not_heard_any_more_is_replaced(self, executor: RayExecutor) -> None:
        before = executor.workers[0]["pid"]
        executor.submit(0, job(1, "stop the worker"))
        deadline = time.monotonic() + 30
        while psutil.Process(before).status() != psutil.STATUS_STOPPED:
            assert time.monotonic() < deadline
        executor.abandon(1)
        (outcome,) = executor.wait(1.0)
        assert (outcome.reason, outcome.message) == ("lost", "worker 0 was not heard any more")
        until_idle(executor, 0)
        assert executor.workers[0]["pid"] != before
        executor.submit(0, job(2))
        assert collect(executor, 1)[0].trial == 2
        with contextlib.suppress(ProcessLookupError):
            os.kill(before, signal.SIGKILL)

    def test_a_job_that_is_stopped_before_it_begins_ends_as_interrupted(self, executor: Executor) -> None:
        executor.submit(0, job(1, "work until told to stop"))
        executor.interrupt()
        (outcome,) = collect(executor, 1)
        assert outcome.reason == "interrupted"
        executor.submit(0, job(2))  # the next one does not hear of it
        assert collect(executor, 1)[0].kind == "result"

    def test_cancelled_jobs_end_at_once(self, executor: Executor) -> None:
        executor.submit(0, job(1, "hang"))
        executor.submit(1, job(2, "hang"))
        executor.cancel()
        assert {(outcome.trial, outcome.reason) for outcome in collect(executor, 2)} == {
            (1, "interrupted"),
            (2, "interrupted"),
        }

    def test_there_are_never_more_workers_than_fit(self, executor: RayExecutor) -> None:
        """The fixture asks for 99, each with half of the cores."""
        assert len(executor.workers) == 2
        assert executor.memory_share is not None and 0 < 2 * executor.memory_share < psutil.virtual_memory().total

    def test_workers_that_cannot_be_started_are_done_without_as_long_as_there_is_one(
        self, executor: RayExecutor
    ) -> None:
        """The last test of this class: it leaves no worker behind."""
        executor._runner = "no_such_module:runner"
        executor._path = 7  # type: ignore[assignment]  # no list of folders: the actor's constructor fails
        executor.submit(0, job(1, "kill the worker"))
        assert collect(executor, 1)[0].reason == "lost"
        executor.submit(1, job(2))
        assert collect(executor, 1)[0].metrics["answer"] == 2.0
        deadline = time.monotonic() + 60
        while executor._starting:
            assert executor.wait(1.0) == [] and time.monotonic() < deadline
        assert executor.idle() == [1]
        executor.submit(1, job(3, "kill the worker"))
        assert collect(executor, 1)[0].reason == "lost"
        with pytest.raises(ExecutorError, match=r"no worker could be started: "):
            while True:
                assert executor.wait(1.0) == [] and time.monotonic() < deadline


def until_idle(executor: Executor, slot: int) -> None:
    deadline = time.monotonic() + 60
    while slot not in executor.idle():
        assert executor.wait(1.0) == [] and time.monotonic() < deadline


@pytest.mark.parametrize("scheme", ["", "ray://"])
def test_an_address_where_nobody_listens_is_told_at_once(scheme: str) -> None:
    with socket.socket() as taken:  # bound, not listening: nobody else can be there
        taken.bind(("127.0.0.1", 0))
        address = f"{scheme}127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(ExecutorError, match=f"cannot reach the Ray cluster at {address}: .*; does `ray status"):
            RayExecutor(runner, address=address)


@pytest.mark.parametrize(
    ("needs", "node", "places"),
    [
        (Needs(cpus=1), {"CPU": 4.0}, 4),
        (Needs(cpus=3), {"CPU": 4.0}, 1),
        (Needs(cpus=1, gpus=0.25), {"CPU": 16.0, "GPU": 2.0}, 8),
        (Needs(cpus=1, gpus=0.2), {"CPU": 16.0, "GPU": 1.0}, 5),
        (Needs(cpus=0.1), {"CPU": 1.0}, 10),
        (Needs(cpus=1, gpus=1), {"CPU": 16.0}, 0),
        (Needs(cpus=1, memory=6), {"CPU": 16.0, "memory": 20.0}, 3),
        (Needs(cpus=0), {}, 1),
    ],
)
def test_places_on_a_node(needs: Needs, node: dict[str, float], places: int) -> None:
    assert needs.places(node) == places


def test_a_head_that_is_gone_is_told_before_ray_ends_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(ray_cluster.time, "monotonic", lambda: clock[0])
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        head = Head(f"127.0.0.1:{taken.getsockname()[1]}")
        for clock[0] in (5.0, 10.0, 15.0, 20.0):
            head.check()
        clock[0] = 25.0
        with pytest.raises(ExecutorError, match=r"the head of the Ray cluster at .* is gone"):
            head.check()


def test_a_process_that_was_away_itself_does_not_blame_the_head(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(ray_cluster.time, "monotonic", lambda: clock[0])
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        head = Head(f"127.0.0.1:{taken.getsockname()[1]}")
        clock[0] = 3600.0
        head.check()
