"""Searches of thousands of trials that cost nothing: what is left is what the search itself takes."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import psutil
import pytest

from evolm.config import load_space
from evolm.controller import Budget, Controller
from evolm.executors.base import Job, Outcome, Tell, TrialProgress
from evolm.executors.inline import InlineExecutor
from evolm.run_folder import RunFolder
from evolm.search import Search
from fitness.ledger import Ledger
from fitness.trial import Trial
from search_spaces import Space

TRIALS = 5000


class Weighing:
    """A view that weighs this process every thousand trials."""

    def __init__(self) -> None:
        self.bytes: list[int] = []

    def told(self, trial: Trial) -> None:
        if trial.id % 1000 == 0:
            self.bytes.append(psutil.Process().memory_info().rss)

    def tick(self, running: Sequence[TrialProgress]) -> None:
        pass

    def say(self, text: str) -> None:
        pass


def nothing(job: Job, tell: Tell) -> Outcome:
    rate = job.genome["train"]["learning_rate"]
    return job.told({"bits_per_byte": 1 + rate, "params": float(job.genome["model"]["d_model"])}, flops=1.0)


@pytest.fixture(scope="module")
def large_run(finished_run: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float, list[int]]:
    """A run of 5,000 trials that did nothing, how long it took, and what this process held meanwhile."""
    folder = RunFolder(tmp_path_factory.mktemp("large") / "large")
    folder.path.mkdir()
    shutil.copy(RunFolder(finished_run).space, folder.space)
    meta = {
        key: value for key, value in Ledger.open(finished_run / "ledger.db").meta.items() if key != "schema_version"
    }
    ledger = Ledger.create(folder.ledger, meta)
    ledger.open_session({"settings": meta["settings"], "versions": {}})
    file, view = load_space(folder.space), Weighing()
    search = Search(file.space, file.settings.objectives, algorithm="random", ledger=ledger)
    budget = Budget(trials=TRIALS)
    began = time.monotonic()
    Controller(folder, search, InlineExecutor(nothing), budget=budget, seed=0, context={}, view=view).run()
    seconds = time.monotonic() - began
    ledger.close_session("budget")
    ledger.close()
    return folder.path, seconds, view.bytes


def test_five_thousand_trials_take_under_fifty_seconds_and_no_more_memory(
    large_run: tuple[Path, float, list[int]],
) -> None:
    _, seconds, held = large_run
    assert seconds < 50
    assert held[-1] - held[0] < 100 * 2**20


def test_the_status_of_five_thousand_trials_is_told_in_a_second(large_run: tuple[Path, float, list[int]]) -> None:
    folder, _, _ = large_run
    seconds = []
    for _ in range(3):  # the least of three: this machine does other things too
        began = time.monotonic()
        told = subprocess.run(
            [sys.executable, "-m", "evolm", "status", str(folder), "--json"], capture_output=True, check=True
        )
        seconds.append(time.monotonic() - began)
    assert json.loads(told.stdout)["trials"] == {"complete": TRIALS}
    assert min(seconds) < 1, seconds


def test_a_hundred_threads_report_at_once_and_none_is_lost() -> None:
    search = Search(Space.from_dict({"x": {"float": [0, 1]}}), ["loss"], algorithm="random")
    asked: list[int] = []
    start = threading.Barrier(100)

    def report() -> None:
        start.wait()
        for _ in range(5):
            trial = search.ask()
            asked.append(trial.id)
            search.tell(trial, {"loss": trial.genome["x"]})

    threads = [threading.Thread(target=report) for _ in range(100)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(asked) == list(range(1, 501))
    assert {trial.state for trial in search.trials()} == {"complete"}
    assert all(trial.metrics["loss"] == trial.genome["x"] for trial in search.trials())
