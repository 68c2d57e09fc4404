"""Clusters that lose what a search needs of them: it completes, or ends with words and a line that resumes it. Real
processes; some seconds each."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import psutil
import pytest
from deeds import runner

from evolm.controller import Budget, Controller
from evolm.executors import ray_actors
from evolm.executors.base import TrialProgress
from evolm.executors.processes import marked
from evolm.executors.ray_actors import Needs, RayExecutor
from evolm.run_folder import RunFolder
from evolm.search import Search
from fitness.errors import StorageError
from fitness.ledger import Ledger
from fitness.trial import Trial
from search_spaces import Space

pytestmark = [pytest.mark.ray, pytest.mark.xdist_group("ray")]


class Silent:
    def __init__(self, then: Callable[[Sequence[TrialProgress]], None]) -> None:
        self.then = then

    def told(self, trial: Trial) -> None:
        pass

    def tick(self, running: Sequence[TrialProgress]) -> None:
        self.then(running)

    def say(self, text: str) -> None:
        pass


def test_a_node_that_is_removed_costs_its_trials_a_launch_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    second = cluster.add_node(num_cpus=1)
    executor = RayExecutor(runner, Needs(cpus=1), address=cluster.address)
    try:
        assert len(executor.workers) == 2
        monkeypatch.setattr(ray_actors, "START_SECONDS", 6.0)  # until the slot of the node is done without
        search = Search(Space.from_dict({"deed": "work longer", "n": {"float": [0, 1]}}), ["loss"], algorithm="random")

        removed: list[bool] = []

        def remove(running: Sequence[TrialProgress]) -> None:
            """Both nodes are in the middle of a trial."""
            if not removed and len(running) == 2 and all(0 < progress.tokens < 100 for progress in running):
                removed.append(True)
                cluster.remove_node(second)

        controller = Controller(
            RunFolder(tmp_path), search, executor, budget=Budget(trials=8), seed=0, context={}, view=Silent(remove)
        )
        assert controller.run() == "budget"
    finally:
        executor.close()
        executor._ray.shutdown()
        cluster.shutdown()
    trials = search.trials()
    assert [trial.state for trial in trials] == ["complete"] * 8
    assert sum(trial.attempts for trial in trials) == 9  # one launch was lost with the node


# --- whole commands ---------------------------------------------------------------------------------------------------


@pytest.fixture
def token() -> Iterator[str]:
    """A mark in the environment of everything that a test starts, Ray's own processes too; none is left behind."""
    mark = f"EVOLM_TEST={uuid.uuid4().hex}"
    yield mark
    for process in marked(mark):
        process.kill()


Launch = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def launch(tmp_path: Path, token: str) -> Launch:
    def start(*words: object, head_seconds: float = 20.0) -> subprocess.Popen[str]:
        name, _, value = token.partition("=")
        program = (
            f"from evolm.executors import ray_cluster; ray_cluster.HEAD_SECONDS = {head_seconds}\n"
            "from evolm.cli import main; main()"
        )
        return subprocess.Popen(
            [sys.executable, "-c", program, *map(str, words)],
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
            env={**os.environ, name: value},
        )

    return start


@pytest.fixture
def long_space(space_file: Path) -> Path:
    """A space of which the second rung of the first trial would take minutes."""
    text = space_file.read_text().replace("tokens: [512, 2048], eta: 4", "tokens: [512, 4M], eta: 8000")
    space_file.write_text(text + "resources: {max_concurrent: 1}\ncheckpoints: {minutes: 0.01}\n")
    return space_file


def ledger(folder: Path) -> dict[int, Trial]:
    try:
        found = Ledger.open(folder / "ledger.db")
    except StorageError:
        return {}
    trials = dict(found.trials)
    found.close()
    return trials


def under_way(folder: Path, process: subprocess.Popen[str], attempts: int = 2) -> None:
    """Wait until the first trial is on its way to the second rung."""
    deadline = time.monotonic() + 120
    saved = folder / "trials/1/checkpoints/latest/checkpoint.json"
    while not (saved.is_file() and 1 in ledger(folder) and ledger(folder)[1].attempts >= attempts):
        assert process.poll() is None and time.monotonic() < deadline, process.stdout and process.stdout.read()
        time.sleep(0.05)


def own(token: str, name: str) -> list[psutil.Process]:
    """Living processes of this test whose command line has a word."""
    found = []
    for process in marked(token):
        try:
            if process.status() != psutil.STATUS_ZOMBIE and any(name in word for word in process.cmdline()):
                found.append(process)
        except psutil.NoSuchProcess:
            continue
    return found


def test_a_controller_that_is_killed_leaves_no_trial_running_and_is_soon_back(
    tmp_path: Path, launch: Launch, long_space: Path, cache: Path, token: str
) -> None:
    folder = tmp_path / "runs/first"
    process = launch("search", long_space, "--run", "first", "--cache", cache)
    under_way(folder, process)
    process.kill()
    process.communicate()
    deadline = time.monotonic() + 30
    while own(token, "evolm.executors.cell"):
        assert time.monotonic() < deadline, "a trial runs on whose controller is dead"
        time.sleep(0.05)
    began = time.monotonic()
    process = launch("resume", "first")
    while ledger(folder)[1].attempts < 3:
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    assert time.monotonic() - began < 20
    under_way(folder, process, attempts=3)
    stopped = launch("stop", "first", "--wait", 60)
    said, _ = stopped.communicate(timeout=90)
    assert stopped.returncode == 0 and "has ended; go on with: evolm resume runs/first" in said
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130 and "stopped and saved" in output
    trial = ledger(folder)[1]
    assert (trial.state, trial.rung, trial.flops > trial.rungs[0].flops) == ("paused", 0, True)


def test_a_head_that_is_killed_ends_the_search_with_words(
    tmp_path: Path, launch: Launch, long_space: Path, cache: Path, token: str
) -> None:
    process = launch("search", long_space, "--run", "first", "--cache", cache, head_seconds=3.0)
    under_way(tmp_path / "runs/first", process)
    (server,) = own(token, "gcs_server")
    server.kill()
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 1, output
    assert "error: the head of the Ray cluster at" in output and "go on with: evolm resume runs/first" in output
    assert "Traceback" not in output


def test_a_node_of_our_own_that_is_killed_ends_the_search_and_costs_no_trial_a_retry(
    tmp_path: Path, launch: Launch, long_space: Path, cache: Path, token: str
) -> None:
    process = launch("search", long_space, "--run", "first", "--cache", cache)
    under_way(tmp_path / "runs/first", process)
    (raylet,) = own(token, "raylet/raylet")
    raylet.kill()
    output, _ = process.communicate(timeout=100)
    assert process.returncode == 1, output
    assert "error: the Ray node of this machine is gone" in output and "go on with: evolm resume runs/first" in output
    assert ledger(tmp_path / "runs/first")[1].failures == {}


def test_a_second_interrupt_ends_trials_that_do_not_hear(
    tmp_path: Path, launch: Launch, long_space: Path, cache: Path, token: str
) -> None:
    """The trial's process is stopped, so it cannot save; the first Ctrl-C waits for it, the second does not."""
    folder = tmp_path / "runs/first"
    process = launch("search", long_space, "--run", "first", "--cache", cache)
    under_way(folder, process)
    (cell,) = own(token, "evolm.executors.cell")
    cell.send_signal(signal.SIGSTOP)
    process.send_signal(signal.SIGINT)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(1.5)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130 and "ended before it could save" in output
    assert own(token, "evolm.executors.cell") == []
    assert ledger(folder)[1].state == "paused"
