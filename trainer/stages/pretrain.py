"""Pretraining as a stage: a recipe trained to the end in a folder of its own, resumable at any time.

The folder holds `recipe.json`, `metrics.jsonl`, `checkpoints/latest` while it trains, and at the end `final/` (a
checkpoint) and `record.json`, which is written last: where it stands, the stage is done.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from trainer.checkpoint import load_weights, read_state
from trainer.data.corpus import Corpus
from trainer.engines import Setup
from trainer.errors import CheckpointError, DataError
from trainer.loop import train
from trainer.metrics_log import MetricsLog
from trainer.model import EvolmForCausalLM, build_model
from trainer.recipe import Recipe
from trainer.recipe_digest import recipe_digest
from trainer.records import Checkpoints, Progress, Record, Report
from trainer.sinks import RunInfo, Sinks
from trainer.telemetry import Telemetry

METRICS_EVERY = 0.01
"""Share of a run's tokens between lines of metrics.jsonl."""


class Stage:
    """The folder of one training run."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.recipe_file = folder / "recipe.json"
        self.record_file = folder / "record.json"
        self.latest = folder / "checkpoints" / "latest"
        self.final = folder / "final"

    def record(self) -> dict[str, Any] | None:
        """What the finished stage wrote, or None while it is not finished."""
        if not self.record_file.is_file():
            return None
        values: dict[str, Any] = json.loads(self.record_file.read_text())
        return values

    def begun(self) -> dict[str, Any] | None:
        """The recipe, length and seed that this folder was claimed for, or None."""
        if not self.recipe_file.is_file():
            return None
        values: dict[str, Any] = json.loads(self.recipe_file.read_text())
        return values

    def begin(self, recipe: Recipe, tokens: int, seed: int) -> None:
        """Claim the folder for one recipe, length and seed. Raises DataError when it belongs to another."""
        self.folder.mkdir(parents=True, exist_ok=True)
        mine = {"recipe": recipe.model_dump(mode="json"), "tokens": tokens, "seed": seed}
        theirs = self.begun()
        if theirs is not None:
            if theirs != json.loads(json.dumps(mine)):
                rule = "holds another recipe, length or seed; give this one another folder (--out)"
                raise DataError(f"{self.folder}: {rule}")
            return
        write_json(self.recipe_file, mine)

    def finish(self, record: Mapping[str, Any]) -> None:
        """Write down that the stage is done, and drop what only an unfinished one needs."""
        write_json(self.record_file, record)
        shutil.rmtree(self.latest.parent, ignore_errors=True)


def pretrain(
    recipe: Recipe,
    corpus: Corpus,
    folder: Path,
    *,
    tokens: int,
    seed: int,
    device: str = "cpu",
    report: Report = lambda progress: True,
    checkpoint_seconds: float = 120.0,
    roots: Sequence[Path] = (),
    setup: Setup | None = None,
    sinks: Sequence[str] = (),
    warn: Callable[[str], None] = lambda text: None,
) -> Record | None:
    """Train a recipe to the end, or go on where this folder stopped; None when it was finished before.

    The names of `sinks` say where its numbers go besides metrics.jsonl; `warn` hears of those that fail. A stopped run
    returns a record that is not finished. Raises what `train` raises, and DataError for a folder of another recipe. Of
    the ranks of a `setup`, which all call this, the first one writes.
    """
    stage, setup = Stage(folder), setup or Setup()

    def begin() -> tuple[bool, str | None]:
        stage.begin(recipe, tokens, seed)
        start = _usable(stage.final) or _usable(stage.latest)
        return stage.record() is not None, None if start is None else str(start)

    done, start = setup.ranks.tell(begin)
    if done:
        return None
    first = setup.ranks.first
    about = RunInfo(folder=folder, home=folder, group="evolm", name=folder.name, recipe=recipe.model_dump(mode="json"))
    with (
        MetricsLog(folder / "metrics.jsonl" if first else None) as log,
        Sinks(sinks if first else (), about, warn) as others,
    ):
        telemetry = Telemetry(recipe, device, log, others, every=METRICS_EVERY, devices=setup.ranks.world)

        def report_and_log(progress: Progress) -> bool:
            telemetry(progress)
            return report(progress)

        return train(
            recipe,
            report_and_log,
            corpus=corpus,
            tokens=tokens,
            seed=seed,
            start=None if start is None else Path(start),
            checkpoints=Checkpoints(latest=stage.latest, final=stage.final, seconds=checkpoint_seconds),
            device=device,
            roots=roots,
            setup=setup,
        )


def _usable(checkpoint: Path) -> Path | None:
    """A checkpoint that is whole, or None: training then begins anew."""
    try:
        read_state(checkpoint)
    except CheckpointError:
        return None
    return checkpoint


def load_final(stage: Stage, recipe: Recipe, device: str = "cpu") -> EvolmForCausalLM:
    """The trained model of a finished stage. Raises CheckpointError when its weights are not those of this recipe."""
    model = build_model(recipe, 0, device)
    state = load_weights(stage.final, model)
    if state.recipe != recipe_digest(recipe):
        raise CheckpointError(f"{stage.final}: is of another recipe")
    model.eval()
    return model


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Write JSON that is there whole or not at all."""
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_text(json.dumps(values, indent=1) + "\n")
    temporary.replace(path)
