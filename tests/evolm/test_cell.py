"""A process of its own for trials: what a trial does to it, it does to nobody else."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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
        ("die of a real time signal", Limits(), "crashed", "its process ended with signal "),
        ("leave", Limits(), "crashed", "exit code 7"),
        ("fork and leave", Limits(seconds=20), "crashed", "exit code 7"),
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
    cell.run(job(0))  # so that it has started
    outcome = cell.run(job(1, "hang", limits=Limits(seconds=0.5)))
    assert outcome.flops == 21.0 and 0.5 <= outcome.seconds < 20


def test_a_fork_does_not_speak_for_the_cell(cell: Cell) -> None:
    outcome = cell.run(job(1, "tell from a fork"))
    assert (outcome.kind, outcome.metrics) == ("result", {"child": 3})


def test_a_cell_that_died_meanwhile_is_no_failure_of_the_next_trial(cell: Cell) -> None:
    cell.run(job(1))
    os.kill(cell.pid, signal.SIGKILL)
    until(lambda: cell._family.ended(0))
    assert cell.run(job(2)).kind == "result"


def test_what_a_trial_left_in_the_cell_is_not_billed_to_the_next_one(cell: Cell) -> None:
    first = cell.run(job(1, "leave memory behind"))
    outcome = cell.run(job(2, "work a while", limits=Limits(memory=300 * 2**20)))
    assert outcome.kind == "result", outcome.message
    assert cell.pid != first.metrics["pid"]


def test_a_cell_that_holds_little_is_kept(cell: Cell) -> None:
    limits = Limits(memory=2**34)
    first, second = cell.run(job(1, "leave memory behind", limits=limits)), cell.run(job(2, limits=limits))
    assert first.metrics["pid"] == second.metrics["pid"]


def hidden(folder: Path) -> list[int]:
    """The numbers of what hides, once all do."""
    until(lambda: (folder / "hidden").is_file() and (folder / "hidden").read_text().count("\n") == 2)
    return [int(pid) for pid in (folder / "hidden").read_text().split()]


def lives(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel of Linux gives orphans to the cell")
def test_nothing_that_hides_outlives_its_trial(tmp_path: Path) -> None:
    cell = Cell(name_of(runner))
    launch = job(1, "hide and hang", folder=str(tmp_path))
    thread = threading.Thread(target=cell.run, args=[launch])
    thread.start()
    pids = hidden(tmp_path)
    assert all(map(lives, pids))
    cell.cancel(launch.lease)
    thread.join()
    assert not any(map(lives, pids))
    cell.close()


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


PARENT = """
import sys
sys.path[:0] = {path!r}
from deeds import job, runner
from evolm.executors.cell import Cell, name_of
cell = Cell(name_of(runner))
print(cell._family._mark, flush=True)
cell.run(job(1, {deed!r}, folder={folder!r}))
"""


@contextmanager
def parent(deed: str, folder: Path) -> Iterator[str]:
    """A process that has a cell, whose mark is given; it is killed at the end."""
    program = PARENT.format(path=sys.path, deed=deed, folder=str(folder))
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield process.stdout.readline().strip()
        finally:
            process.kill()


def test_a_cell_ends_with_the_process_that_made_it_and_takes_its_children_along(tmp_path: Path) -> None:
    with parent("fork and hang", tmp_path) as mark:
        until((tmp_path / "forked").exists)
        assert mark.startswith(MARK) and len(left_of(mark)) == 4
    until(lambda: not left_of(mark))


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel of Linux gives orphans to the cell")
def test_also_those_that_hide(tmp_path: Path) -> None:
    with parent("hide and hang", tmp_path) as mark:
        pids = hidden(tmp_path)
        assert all(map(lives, pids))
    until(lambda: not left_of(mark) and not any(map(lives, pids)))
