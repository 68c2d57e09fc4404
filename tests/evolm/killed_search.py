"""A search without training, to be killed at any moment: `python killed_search.py FOLDER TRIALS`.

Each result is acknowledged by a line in FOLDER/acknowledged, after the ledger has it.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from evolm.controller import Budget, Controller
from evolm.executors.base import Job, Outcome, Tell, TrialProgress
from evolm.executors.inline import InlineExecutor
from evolm.run_folder import RunFolder
from evolm.search import Search
from fitness.ledger import Ledger
from fitness.trial import Trial
from search_spaces import Space

SPACE = {"x": {"float": [0, 1]}, "y": {"float": [0, 1]}, "kind": {"choice": ["a", "b", "c"]}}


class Acknowledging:
    def __init__(self, path: Path) -> None:
        self.file = os.open(path, os.O_CREAT | os.O_APPEND | os.O_WRONLY)

    def told(self, trial: Trial) -> None:
        if trial.rungs:
            os.write(self.file, f"{trial.id} {trial.rung} {trial.digest} {trial.metrics['loss']!r}\n".encode())

    def tick(self, running: Sequence[TrialProgress]) -> None:
        pass

    def say(self, text: str) -> None:
        pass


def work(job: Job, tell: Tell) -> Outcome:
    """A few milliseconds of a core, so that a kill may come in the middle."""
    total = 0.0
    for step in range(20_000):
        total += step * job.genome["x"]
    loss = (job.genome["x"] - 0.3) ** 2 + (job.genome["y"] - 0.7) ** 2 + "abc".index(job.genome["kind"])
    return job.told({"loss": loss / (1 + job.rung), "cost": job.genome["y"]}, flops=1.0, seconds=total * 0)


def search(folder: Path, trials: int) -> list[Trial]:
    """Begin, or go on, and run to the end."""
    place = RunFolder(folder)
    with place.locked():
        ledger = Ledger.open(place.ledger, write=True) if place.exists else Ledger.create(place.ledger, {})
        ledger.open_session({})
        objectives = {"loss": "min", "cost": "min"}
        found = Search(
            Space.from_dict(SPACE), objectives, algorithm="nsga2", fidelity={"tokens": [1, 4]}, ledger=ledger
        )
        view = Acknowledging(folder / "acknowledged")
        budget = Budget(trials=trials)
        Controller(place, found, InlineExecutor(work), budget=budget, seed=0, context={}, view=view).run()
        ledger.close_session("budget")
        ledger.close()
    return found.trials()


if __name__ == "__main__":
    search(Path(sys.argv[1]), int(sys.argv[2]))
