"""Promotion: the winner's recipe trained for real, beside the baseline at the same budget, judged on text that no
search saw."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from evolm.errors import DataError, EvolmError, GateError, Interrupted, UsageError
from evolm.run import Run
from evolm.run_folder import RunFolder
from evolm.scale import Scale, at_scale, keep_scale, length_of, scale_of
from evolm.signals import ENDING, on_signals
from evolm.training import export_stage
from fitness.trial import Trial
from search_spaces.genome import Values
from search_spaces.quantities import format_count
from trainer.data.corpus import Corpus
from trainer.metrics_log import read_metrics
from trainer.recipe import Recipe

LABELS = {"pretrain": "winner", "baseline": "baseline"}
"""What the folders of a promotion hold."""

Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Promotion:
    """A finished promotion. `winner` and `baseline` are the records of their training; the latter is None when the
    winner is the baseline. `scale` is None when both were trained as they are. `export` is the receipt of the exported
    folder."""

    trial: int
    scale: Scale | None
    folder: Path
    winner: dict[str, Any]
    baseline: dict[str, Any] | None
    export: dict[str, Any] | None

    @property
    def better(self) -> bool:
        """Whether the winner is ahead of the baseline on the test split."""
        return self.baseline is None or _judged(self.winner) < _judged(self.baseline)


def _judged(record: dict[str, Any]) -> float:
    return float(record["test"]["bits_per_byte"])


def promote(
    run: Run,
    trial: Trial,
    *,
    tokens: int | None = None,
    width: int | None = None,
    depth: int | None = None,
    cache: Path | None = None,
    force: bool = False,
    say: Say = lambda text: None,
) -> Promotion:
    """Train a trial's recipe and the baseline's from scratch, compare them on test text, export the winner.

    With `width` or `depth` both are made so many times as wide and deep first (`trainer.scaling.scaled`); without
    `tokens` they are then trained on as many tokens for each parameter as in the search's last rung.

    Goes on where an earlier promotion of this trial stopped. Raises GateError, after everything is written but without
    an export, when the baseline is no worse (`force` exports all the same); DataError when the corpus is no longer the
    run's; UsageError when it was not evolm that trained.
    """
    folder = run.folder.promoted(trial.id)
    if run.settings.command is not None:
        raise UsageError(
            f"run '{run.folder.name}' was trained by a `trial.command`, and only that can train its recipes at length; "
            f"`evolm show {run.folder.path} {trial.id}` has the recipe, and `checkpoints: {{keep_best: 1}}` in a space "
            "keeps what the best trial saved (trials/ID/checkpoints/final)"
        )
    scale = scale_of(run, folder, width, depth)
    length = length_of(run, trial, folder, tokens, scale)
    genomes = {"pretrain": trial.genome}
    if trial.frozen != run.file.space.baseline:
        genomes["baseline"] = run.file.space.baseline.values()
    recipes = {name: at_scale(genome, scale, length) for name, genome in genomes.items()}
    where = Path(cache or run.ledger.meta["cache"])
    corpus = _same_corpus(run, trial, where)
    with RunFolder(folder).locked():
        keep_scale(folder, scale)
        if scale is not None:
            say(f"at {scale.words} that the search had")
        if "baseline" not in recipes:
            say(f"trial {trial.id} is the baseline itself: there is nothing to compare it with")
        say(f"training on {format_count(length)} tokens each: {' and '.join(LABELS[name] for name in recipes)}")
        records = _train_all(run, recipes, folder, length, where, say)
        baseline = records.get("baseline")
        promotion = Promotion(
            trial=trial.id, scale=scale, folder=folder, winner=records["pretrain"], baseline=baseline, export=None
        )
        if promotion.better or force:
            receipt = _export(run, promotion, trial, recipes["pretrain"], corpus)
            promotion = Promotion(**{**promotion.__dict__, "export": receipt})
        _write(promotion, run, length)
    if not promotion.better and not force:
        assert baseline is not None
        refused = GateError(
            f"trial {trial.id} is not better than the baseline on the test split: {_judged(promotion.winner):.4f} "
            f"against {_judged(baseline):.4f} bits per byte; nothing was exported (--force exports it all the same)"
        )
        refused.result = promotion
        raise refused
    return promotion


def _same_corpus(run: Run, trial: Trial, cache: Path) -> Corpus:
    """The trial's corpus, refused when the text has changed since the search: the comparison would mean nothing."""
    recipe = Recipe.model_validate(trial.genome)
    corpus = Corpus.open(recipe.data, cache, [Path(root) for root in run.ledger.meta["roots"]])
    pinned = run.ledger.meta["corpus"]["sources"]
    for name, documents in corpus.documents.items():
        if documents.digest != pinned[name]["digest"]:
            raise DataError(f"source '{name}' is not what it was when the run began; restore it, or search anew")
    return corpus


# --- training ---------------------------------------------------------------------------------------------------------


def _train_all(
    run: Run, recipes: dict[str, Values], folder: Path, tokens: int, cache: Path, say: Say
) -> dict[str, dict[str, Any]]:
    """Train every recipe in a process of its own, or in as many as a trial had: side by side where those are single
    processes on CPUs, one after the other otherwise."""
    device, cores, ranks = "cuda" if run.settings.gpus > 0 else "cpu", os.cpu_count() or 1, run.settings.ranks
    together = device == "cpu" and ranks == 1 and cores >= len(recipes)
    threads = max(1, cores // (len(recipes) if together else ranks))
    batches = [list(recipes)] if together else [[name] for name in recipes]
    for batch in batches:
        processes = {}
        for name in batch:
            stage = folder / name
            stage.mkdir(parents=True, exist_ok=True)
            recipe = {"version": 1, "name": LABELS[name], **recipes[name]}
            (stage / "recipe.yaml").write_text(json.dumps(recipe, indent=1))  # JSON is YAML
            processes[name] = _launch(run, stage, tokens, device, threads, cache)
        _wait(processes, folder, say)
    return {name: json.loads((folder / name / "record.json").read_text()) for name in recipes}


def _launch(run: Run, stage: Path, tokens: int, device: str, threads: int, cache: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "evolm", "train", str(stage / "recipe.yaml"), "--out", str(stage)]
    command += ["--tokens", str(tokens), "--seed", str(run.settings.seed), "--device", device]
    command += ["--threads", str(threads), "--cache", str(cache), "--test", "--no-export"]
    command += [word for root in run.ledger.meta["roots"] for word in ("--root", root)]
    command += [word for name in run.settings.sinks for word in ("--sink", name)]
    if run.settings.ranks > 1:
        command += ["--processes", str(run.settings.ranks)]
    if run.settings.engine is not None:
        command += ["--engine", run.settings.engine]
    if run.settings.target:
        command += ["--target", json.dumps(run.settings.target)]
    with (stage / "log.txt").open("ab") as log:
        return subprocess.Popen(command, stdout=log, stderr=log)


def _wait(processes: dict[str, subprocess.Popen[bytes]], folder: Path, say: Say) -> None:
    """Wait for all. Raises the error of one that failed, and Interrupted after a signal, once the others have saved and
    ended."""
    received: list[int] = []
    with on_signals(received.append):
        try:
            _watch(processes, folder, say, received)
        finally:
            for process in processes.values():
                if process.poll() is None:
                    process.terminate()  # it saves, so that the next promotion goes on from there
            for process in processes.values():
                process.wait()
    _refuse_failed(processes, folder)


def _watch(processes: dict[str, subprocess.Popen[bytes]], folder: Path, say: Say, received: list[int]) -> None:
    """Tell now and then how far they are, until all have ended."""
    told = 0.0
    while any(process.poll() is None for process in processes.values()):
        time.sleep(0.2)
        if received:
            raise Interrupted(received[0])
        if time.monotonic() - told > 15:
            told = time.monotonic()
            say("  ".join(f"{LABELS[name]} {_progress(folder / name)}" for name in processes))
        _refuse_failed(processes, folder)


def _refuse_failed(processes: dict[str, subprocess.Popen[bytes]], folder: Path) -> None:
    for name, process in processes.items():
        code = process.poll()
        if code and (-code if code < 0 else code - 128) in ENDING:
            raise Interrupted(-code if code < 0 else code - 128)
        if code:
            lines = (folder / name / "log.txt").read_text(errors="replace").strip().splitlines()
            last = next((line for line in reversed(lines) if line.startswith("error:")), lines[-1] if lines else "")
            error = EvolmError(
                f"training the {LABELS[name]} failed: {last.removeprefix('error: ')} (see {folder / name}/log.txt)"
            )
            error.exit_code = code if 0 < code < 7 else 1
            raise error


def _progress(stage: Path) -> str:
    lines = list(read_metrics(stage / "metrics.jsonl"))
    if not lines:
        return "is starting"
    values = lines[-1]
    return f"{100 * values['tokens'] / values['total_tokens']:.0f}% loss {values['loss']:.3f}"


# --- results ----------------------------------------------------------------------------------------------------------


def _export(run: Run, promotion: Promotion, trial: Trial, recipe: Values, corpus: Corpus) -> dict[str, Any]:
    from trainer.stages.pretrain import Stage

    about = {"run": run.name, "trial": trial.id, "digest": trial.digest, "scale": _told(promotion), **promotion.winner}
    return export_stage(
        Stage(promotion.folder / "pretrain"),
        Recipe.model_validate(recipe),
        corpus,
        promotion.folder / "export" / "hf",
        about,
    )


def _told(promotion: Promotion) -> dict[str, Any] | None:
    return None if promotion.scale is None else asdict(promotion.scale)


def _write(promotion: Promotion, run: Run, tokens: int) -> None:
    from trainer.stages.pretrain import write_json

    write_json(
        promotion.folder / "promotion.json",
        {
            "run": run.name,
            "trial": promotion.trial,
            "tokens": tokens,
            "scale": _told(promotion),
            "winner": promotion.winner,
            "baseline": promotion.baseline,
            "better": promotion.better,
            "export": promotion.export,
        },
    )
