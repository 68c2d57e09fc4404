"""What it costs to hand out a trial: our controller and Ray executor beside Ray Tune, with trials that do nothing.

    python benchmarks/dispatch.py [--trials 200] [--tune-trials 24] [--json]

Both run two trials side by side on a Ray of their own. A figure is wall-clock time from the first proposal to the last
result, over the number of trials; starting Ray and the first workers is not counted for ours, and is for Tune only as
far as its second experiment in the same process still has to. Ours is given with the ledger in memory (no commits) and
on disk (every proposal, launch and result durable before the next step).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from evolm.controller import Budget, Controller
from evolm.executors.base import Job, Outcome, Tell, TrialProgress
from evolm.executors.inline import InlineExecutor
from evolm.executors.ray_actors import RayExecutor
from evolm.run_folder import RunFolder
from evolm.search import Search
from fitness.ledger import Ledger
from fitness.trial import Trial
from search_spaces import Space

SPACE = {"x": {"float": [0, 1]}, "y": {"float": [0, 1]}, "z": {"choice": ["a", "b", "c"]}}


def nothing(job: Job, tell: Tell) -> Outcome:
    """A trial that does nothing."""
    return job.told({"loss": job.genome["x"]})


class Silent:
    def told(self, trial: Trial) -> None:
        pass

    def tick(self, running: Sequence[TrialProgress]) -> None:
        pass

    def say(self, text: str) -> None:
        pass


def ours(executor: Any, trials: int, folder: Path, *, durable: bool) -> float:
    """Seconds per trial."""
    ledger = Ledger.create(folder / "ledger.db" if durable else None, {})
    search = Search(Space.from_dict(SPACE), {"loss": "min"}, algorithm="random", ledger=ledger)
    controller = Controller(
        RunFolder(folder), search, executor, budget=Budget(trials=trials), seed=0, context={}, view=Silent()
    )
    began = time.perf_counter()
    controller.run()
    seconds = time.perf_counter() - began
    assert sum(trial.state == "complete" for trial in search.trials()) == trials
    return seconds / trials


def tune(trials: int, *, reuse: bool) -> float:
    """Seconds per trial of Ray Tune's function interface (class interface where actors are reused)."""
    from ray import tune as ray_tune

    class Nothing(ray_tune.Trainable):
        def setup(self, config: dict[str, Any]) -> None:
            self.x = config["x"]

        def step(self) -> dict[str, Any]:
            return {"loss": self.x, "done": True}

        def reset_config(self, config: dict[str, Any]) -> bool:
            self.x = config["x"]
            return True

        def save_checkpoint(self, folder: str) -> None:
            pass

    with tempfile.TemporaryDirectory() as storage:
        tuner = ray_tune.Tuner(
            Nothing,
            param_space={"x": ray_tune.uniform(0, 1)},
            tune_config=ray_tune.TuneConfig(num_samples=trials, max_concurrent_trials=2, reuse_actors=reuse),
            run_config=ray_tune.RunConfig(storage_path=storage, verbose=0),
        )
        began = time.perf_counter()
        results = tuner.fit()
        seconds = time.perf_counter() - began
    assert len(results) == trials and not results.errors
    return seconds / trials


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=200)
    parser.add_argument("--tune-trials", type=int, default=24)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--json", action="store_true", help="print the last line only")
    options = parser.parse_args()
    os.environ["RAY_AIR_NEW_OUTPUT"] = "0"
    os.environ["TUNE_DISABLE_AUTO_CALLBACK_LOGGERS"] = "1"
    measured: dict[str, list[float]] = {}
    from dispatch import nothing as importable  # this file, under a name by which other processes find it
    from ray.util import remove_placement_group

    executor = RayExecutor(importable, slots=2)
    with tempfile.TemporaryDirectory() as name:
        ours(executor, 20, Path(name), durable=False)
        for pair in range(options.pairs):
            folder = Path(name) / str(pair)
            folder.mkdir()
            (folder / "inline").mkdir()
            figures = {
                "ours on Ray": ours(executor, options.trials, folder, durable=False),
                "ours on Ray, commits counted": ours(executor, options.trials, folder, durable=True),
                "ours inline": ours(InlineExecutor(nothing), options.trials, folder, durable=False),
                "ours inline, commits counted": ours(
                    InlineExecutor(nothing), options.trials, folder / "inline", durable=True
                ),
            }
            for label, value in figures.items():
                measured.setdefault(label, []).append(value)
    for actor, place in zip(executor._actors, executor._places, strict=True):  # Tune needs the processors
        executor._ray.kill(actor)
        remove_placement_group(place)
    for _ in range(options.pairs):
        measured.setdefault("Tune, actors reused", []).append(tune(options.tune_trials, reuse=True))
        measured.setdefault("Tune", []).append(tune(options.tune_trials, reuse=False))
    executor.close()
    milliseconds = {label: round(1000 * statistics.median(values), 3) for label, values in measured.items()}
    base = milliseconds["ours on Ray, commits counted"]
    if not options.json:
        for label, value in milliseconds.items():
            print(f"{label:32} {value:9.2f} ms a trial   {value / base:8.1f} x ours with commits")
    print(json.dumps({"milliseconds": milliseconds}))


if __name__ == "__main__":
    main()
