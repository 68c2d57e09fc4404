"""Thousands of trials that do nothing: what the search itself takes, one algorithm beside the other.

    python benchmarks/many_trials.py [--trials 5000] [--rungs]

Everything runs inline in this process, with the ledger on a disk: every proposal, launch and result is durable before
the next step. Seconds are those of a wall clock and of this process's core; memory is what the process holds at a fifth
of the trials and at the end. `opened` is how long the finished ledger takes to open.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import psutil

from evolm.controller import Budget, Controller
from evolm.executors.base import Job, Outcome, Tell, TrialProgress
from evolm.executors.inline import InlineExecutor
from evolm.run_folder import RunFolder
from evolm.search import Search
from fitness.ledger import Ledger
from fitness.trial import Trial
from search_spaces import Space

SPACE = {"x": {"float": [0, 1]}, "y": {"float": [0, 1]}, "kind": {"choice": ["a", "b", "c"]}}


class Weighing:
    def __init__(self, every: int) -> None:
        self.every, self.bytes = every, [0]

    def told(self, trial: Trial) -> None:
        if trial.id % self.every == 0 and trial.rung == 0:
            self.bytes.append(psutil.Process().memory_info().rss)

    def tick(self, running: Sequence[TrialProgress]) -> None:
        pass

    def say(self, text: str) -> None:
        pass


def nothing(job: Job, tell: Tell) -> Outcome:
    x, y = job.genome["x"], job.genome["y"]
    return job.told({"loss": ((x - 0.3) ** 2 + (y - 0.5) ** 2) / (1 + job.rung), "cost": y}, flops=1.0)


def measure(algorithm: str, trials: int, rungs: bool, folder: Path) -> str:
    ledger = Ledger.create(folder / "ledger.db", {})
    search = Search(
        Space.from_dict(SPACE),
        {"loss": "min", "cost": "min"},
        algorithm=algorithm,
        ledger=ledger,
        fidelity={"tokens": [1, 4, 16]} if rungs else None,
    )
    view, budget = Weighing(max(1, trials // 5)), Budget(trials=trials)
    wall, core = time.perf_counter(), time.process_time()
    Controller(RunFolder(folder), search, InlineExecutor(nothing), budget=budget, seed=0, context={}, view=view).run()
    wall, core = time.perf_counter() - wall, time.process_time() - core
    ledger.close()
    began = time.perf_counter()
    Ledger.open(folder / "ledger.db").close()
    opened = time.perf_counter() - began
    grown = (view.bytes[-1] - view.bytes[1]) / 2**20
    return (
        f"{algorithm:8} {trials} trials: {wall:6.1f} s, {core:6.1f} s of a core, {1000 * wall / trials:5.2f} ms a trial"
        f", memory +{grown:.0f} MiB, opened in {opened:.2f} s"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=5000)
    parser.add_argument("--rungs", action="store_true", help="three rungs instead of one")
    options = parser.parse_args()
    for algorithm in ("random", "nsga2"):
        with tempfile.TemporaryDirectory() as name:
            print(measure(algorithm, options.trials, options.rungs, Path(name)), flush=True)


if __name__ == "__main__":
    main()
