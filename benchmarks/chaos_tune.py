"""The Ray Tune side of chaos.py: the same recipes, trained, saved and scored in the same way, by a Tuner.

    python benchmarks/chaos_tune.py PLAN.json

PLAN names the recipes, the folders and the intervals. An experiment that was begun is restored. Set up as Tune's guide
to fault tolerance has it, and as its own release test for it does: `max_failures=-1`, two checkpoints kept (which has
Tune write the state of the experiment anew after every second checkpoint, beside every ten seconds), unfinished and
errored trials resumed, SIGTERM turned into the interrupt after which Tune saves. Its last report of a trial carries a
checkpoint, too, so that a result that Tune forgets costs a scoring and no training. Exit code 0: all trials are done.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import tempfile
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ray import tune

from trainer.data.corpus import Corpus
from trainer.metrics_log import MetricsLog
from trainer.recipe import Data, Recipe

if TYPE_CHECKING:
    from trainer.records import Progress, Record

EXPERIMENT = "chaos"


def train_trial(config: dict[str, Any]) -> None:
    """One trial, from its last checkpoint to its result."""
    import torch

    from trainer.errors import Refused

    torch.set_num_threads(1)
    plan = json.loads(Path(config["plan"]).read_text())
    recipe = Recipe.model_validate(plan["recipes"][config["trial"] - 1])
    counts = Path(plan["counts"]) / str(config["trial"])
    counts.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(dir=plan["work"]))
    with MetricsLog(counts / "metrics.jsonl") as log:
        try:
            metrics = trained(recipe, plan, log, work)
            tune.report(metrics, checkpoint=tune.Checkpoint.from_directory(work / "final"))
        except Refused as error:
            tune.report({"failed": str(error)})


def trained(recipe: Recipe, plan: dict[str, Any], log: MetricsLog, work: Path) -> dict[str, Any]:
    """Train and score; the final checkpoint is left in `work`."""
    from fitness.loss import loss_metrics, score_domains
    from trainer.evaluate import TokenScorer

    corpus = open_corpus(recipe.model_dump_json(include={"data"}), plan["cache"])
    record = train_on(recipe, plan, corpus, Reporter(recipe, log, work / "latest"), work)
    metrics = loss_metrics(score_domains(TokenScorer(record.model, recipe), corpus.held_out("validation")))
    log.write({"rung": 0, "tokens": record.tokens, **metrics})
    return dict(metrics)


def train_on(recipe: Recipe, plan: dict[str, Any], corpus: Corpus, report: Reporter, work: Path) -> Record:
    """Train from the checkpoint that Tune hands over, or from the beginning where it cannot be used."""
    from trainer.errors import CheckpointError
    from trainer.loop import train
    from trainer.records import Checkpoints

    places = Checkpoints(latest=report.latest, final=work / "final", seconds=plan["checkpoint_seconds"])
    given = tune.get_checkpoint()
    for start in (*([Path(given.path)] if given else []), None):
        try:
            return train(
                recipe,
                report,
                corpus=corpus,
                tokens=plan["tokens"],
                seed=plan["seed"],
                start=start,
                checkpoints=places,
            )
        except CheckpointError:
            if start is None:
                raise
    raise AssertionError("training from the beginning needs no checkpoint")


class Reporter:
    """Counts into metrics.jsonl as evolm's worker does, and tells Tune of every checkpoint."""

    def __init__(self, recipe: Recipe, log: MetricsLog, latest: Path) -> None:
        from trainer.telemetry import Telemetry

        self.telemetry, self.latest = Telemetry(recipe, "cpu", log), latest
        self.told = 0

    def __call__(self, progress: Progress) -> bool:
        self.telemetry(progress)
        manifest = self.latest / "checkpoint.json"
        written = manifest.stat().st_mtime_ns if manifest.exists() else 0
        if written != self.told:
            self.told = written
            values = {"loss": progress.loss, "tokens": progress.tokens}
            tune.report(values, checkpoint=tune.Checkpoint.from_directory(self.latest))
        return True


@lru_cache(maxsize=64)
def open_corpus(data: str, cache: str) -> Corpus:
    """A corpus stays open between the trials of a worker."""
    return Corpus.open(Data.model_validate(json.loads(data)["data"]), Path(cache), [])


class Acknowledge(tune.Callback):
    """Writes down what Tune calls complete, at that moment."""

    def __init__(self, file: str) -> None:
        self.file = file

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        told = {"trial": trial.config["trial"], "bits_per_byte": trial.last_result.get("bits_per_byte")}
        with Path(self.file).open("a") as stream:
            stream.write(json.dumps(told) + "\n")


def tuner(plan_file: Path, plan: dict[str, Any]) -> tune.Tuner:
    """The experiment, begun anew or restored."""
    from chaos_tune import Acknowledge, train_trial  # this file, under a name by which other processes find it

    trainable = tune.with_resources(train_trial, {"cpu": 1})
    experiment = Path(plan["storage"]) / EXPERIMENT
    if tune.Tuner.can_restore(str(experiment)):
        return tune.Tuner.restore(str(experiment), trainable, resume_unfinished=True, resume_errored=True)
    return tune.Tuner(
        trainable,
        param_space={
            "trial": tune.grid_search(list(range(1, len(plan["recipes"]) + 1))),
            "plan": str(plan_file.absolute()),
        },
        tune_config=tune.TuneConfig(max_concurrent_trials=plan["workers"], reuse_actors=True),
        run_config=tune.RunConfig(
            name=EXPERIMENT,
            storage_path=plan["storage"],
            failure_config=tune.FailureConfig(max_failures=-1),
            checkpoint_config=tune.CheckpointConfig(num_to_keep=2),
            callbacks=[Acknowledge(plan["acknowledged"])],
            verbose=0,
        ),
    )


def main() -> None:
    import logging

    import ray

    plan_file = Path(sys.argv[1])
    plan = json.loads(plan_file.read_text())
    ray.init(
        address="local",
        num_cpus=plan["workers"],
        include_dashboard=False,
        object_store_memory=128 * 2**20,
        log_to_driver=False,
        logging_level=logging.ERROR,
    )
    signal.signal(signal.SIGTERM, lambda number, frame: os.kill(os.getpid(), signal.SIGINT))
    results = tuner(plan_file, plan).fit()
    done = sum("bits_per_byte" in (result.metrics or {}) for result in results)
    print(f"{done} of {len(plan['recipes'])} trials are done", flush=True)
    sys.exit(0 if done == len(plan["recipes"]) else 1)


if __name__ == "__main__":
    main()
