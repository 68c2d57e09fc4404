"""A process of its own for trials: what a trial does to it, it does to nobody else."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from deeds import job, runner

from evolm.executors.base import Limits
from evolm.executors.cell import MARK, Cell, name_of
from evolm.executors.processes import marked


@pytest.fixture(scope="module")
def shared() -> Iterator[Cell]:
    cell = Cell(name_of(runner))
    yield cell
    cell.close()


@pytest.fixture
def cell(shared: Cell) -> Cell:
    return shared


def left_of(mark: str) -> list[int]:
    return [process.pid for process in marked(mark) if process.status() != psutil.STATUS_ZOMBIE]


def until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        os.sched_yield()


def test_jobs_run_in_one_other_process(cell: Cell) -> None:
    first, second = cell.run(job(1)), cell.run(job(2))
    assert (first.kind, first.metrics["answer"], second.metrics["answer"]) == ("result", 1.0, 2.0)
    assert first.metrics["pid"] == second.metrics["pid"] == cell.pid != os.getpid()


@pytest.mark.parametrize(
    ("deed", "limits", "reason", "words"),
    [
        ("die", Limits(), "lost", "its process was killed"),
        ("die of a fault", Limits(), "crashed", "SIGSEGV"),
        ("leave", Limits(), "crashed", "exit code 7"),
        ("hang", Limits(seconds=0.3), "timeout", "took longer than 0.3 s"),
        ("hang", Limits(silent_seconds=0.3), "timeout", "no progress for 0.3 s"),
        ("work until told to stop", Limits(seconds=0.5, silent_seconds=0.3), "timeout", "took longer than 0.5 s"),
        ("eat memory", Limits(memory=200 * 2**20), "oom", "its limit is 200MiB"),
        ("tell no numbers", Limits(), "bad_metrics", "told what is no JSON"),
    ],
)
def test_what_a_trial_does_to_itself(cell: Cell, deed: str, limits: Limits, reason: str, words: str) -> None:
    launch = job(1, deed, limits=limits)
    outcome = cell.run(launch)
    assert (outcome.kind, outcome.reason, outcome.lease) == ("fail", reason, launch.lease)
    assert words in outcome.message
    assert cell.run(job(2)).kind == "result"  # the next trial does not notice


def test_what_was_spent_is_what_was_heard_last(cell: Cell) -> None:
    outcome = cell.run(job(1, "hang", limits=Limits(seconds=0.5)))
    assert outcome.flops == 21.0 and 0.5 <= outcome.seconds < 20


def test_nothing_that_a_trial_started_outlives_it(tmp_path: Path) -> None:
    cell = Cell(name_of(runner))
    mark = cell._family._mark
    launch = job(1, "fork and hang", folder=str(tmp_path))
    thread = threading.Thread(target=cell.run, args=[launch])
    thread.start()
    until((tmp_path / "forked").exists)
    assert len(left_of(mark)) == 4  # the cell and three children
    cell.cancel(launch.lease)
    thread.join()
    assert left_of(mark) == []
    cell.close()


def test_a_job_that_is_stopped_saves(cell: Cell) -> None:
    launch = job(1, "work until told to stop")
    cell.stop(launch.lease)  # also before it begins
    assert cell.run(launch).message == "saved"
    assert cell.run(job(2)).kind == "result"


def test_a_job_that_is_cancelled_ends_at_once(cell: Cell) -> None:
    launch = job(1, "hang")
    cell.cancel(launch.lease)
    outcome = cell.run(launch)
    assert (outcome.reason, outcome.message) == ("interrupted", "ended before it could save")


def test_a_cell_ends_with_the_process_that_made_it_and_takes_its_children_along(tmp_path: Path) -> None:
    program = f"""
import sys
sys.path[:0] = {sys.path!r}
from deeds import job, runner
from evolm.executors.cell import Cell, name_of
cell = Cell(name_of(runner))
print(cell._family._mark, flush=True)
cell.run(job(1, "fork and hang", folder={str(tmp_path)!r}))
"""
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    mark = process.stdout.readline().strip()
    until((tmp_path / "forked").exists)
    assert mark.startswith(MARK) and len(left_of(mark)) == 4
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    until(lambda: not left_of(mark))
