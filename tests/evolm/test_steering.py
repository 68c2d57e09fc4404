"""Steering a run from another shell: stop it, bring a genome into it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from evolm.errors import EvolmError
from evolm.requests import pending
from evolm.run import load
from evolm.run_folder import RunFolder

RATE = "{train: {learning_rate: 0.0123}}"


@pytest.fixture
def copy(finished_run: Path, tmp_path: Path) -> Path:
    """A finished run of six trials."""
    return Path(shutil.copytree(finished_run, tmp_path / "copy"))


def test_stopping_what_does_not_run_says_so(evolm: Any, copy: Path) -> None:
    said = evolm("stop", copy)
    assert (said.code, said.out) == (0, "run copy is not running\n")
    assert list(pending(RunFolder(copy))) == []
    assert evolm("stop", "nobody").code == 2


def test_a_genome_that_is_brought_is_the_next_trial(evolm: Any, copy: Path, tmp_path: Path) -> None:
    said = evolm("enqueue", copy, RATE)
    assert said.code == 0 and said.out == f"trial 7 of run copy; run it with: evolm resume {copy}\n"
    assert evolm("resume", copy, "--executor", "inline").code == 0
    trial = load(copy).trials()[-1]
    assert (trial.id, trial.operator) == (7, "enqueued") and trial.rungs
    assert trial.genome["train"]["learning_rate"] == 0.0123
    said = evolm("enqueue", copy, RATE)
    assert said.code == 2 and "this genome is trial 7 already" in said.err
    (tmp_path / "genome.yaml").write_text("version: 1\nmodel:\n  d_model: 48\ntrain: {learning_rate: 0.002}\n")
    assert json.loads(evolm("enqueue", copy, tmp_path / "genome.yaml", "--json").out)["trial"] == 8
    assert evolm("replay", copy, "--verify").code == 0


@pytest.mark.parametrize(
    ("genome", "words"),
    [
        ("{train: {learning_rate: 7}}", "GENOME:1:25: train.learning_rate: must lie in"),
        ("{train: {learning_rat: 0.01}}", "learning_rat"),
        ("{train: [0.01", "GENOME:2:1: not valid YAML"),
        ("{model: 7}", "model"),
        ("no-such-file.yaml", "no-such-file.yaml"),
    ],
)
def test_a_genome_that_is_none_is_refused_in_words(evolm: Any, copy: Path, genome: str, words: str) -> None:
    said = evolm("enqueue", copy, genome)
    assert said.code == 2 and words in said.err, said.err
    assert len(load(copy).trials()) == 6


# --- a run that is at work --------------------------------------------------------------------------------------------


@pytest.fixture
def working(tmp_path: Path, space_file: Path, cache: Path) -> Iterator[tuple[RunFolder, subprocess.Popen[str]]]:
    """A search whose first trial would take minutes on its second rung, in another process."""
    text = space_file.read_text().replace("tokens: [512, 2048], eta: 4", "tokens: [512, 4M], eta: 8000")
    space_file.write_text(text)
    folder = RunFolder(tmp_path / "runs/first")
    words = ["search", space_file, "--executor", "inline", "--cache", cache, "--run", folder.path]
    process = subprocess.Popen(
        [sys.executable, "-m", "evolm", *map(str, words)], stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    until(lambda: folder.exists and any(t.attempts > 1 for t in load(folder.path).trials()), process)
    yield folder, process
    process.kill()
    process.communicate()


def until(condition: Callable[[], object], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while not _holds(condition):
        assert process.poll() is None and time.monotonic() < deadline, process.stderr and process.stderr.read()
        time.sleep(0.02)


def _holds(condition: Callable[[], object]) -> bool:
    try:
        return bool(condition())
    except EvolmError:  # not whole yet
        return False


def test_a_run_at_work_takes_genomes_and_is_stopped(
    evolm: Any, working: tuple[RunFolder, subprocess.Popen[str]], space_file: Path, cache: Path
) -> None:
    folder, process = working
    began = time.monotonic()
    said = evolm("search", space_file, "--executor", "inline", "--cache", cache, "--run", folder.path)
    assert said.code == 4 and f"is in use by process {process.pid} on " in said.err
    assert time.monotonic() - began < 2
    assert evolm("enqueue", folder.path, RATE).out == "trial 2 of run first is the next to be run\n"
    said = evolm("enqueue", folder.path, RATE)
    assert said.code == 2 and "this genome is trial 2 already" in said.err
    said = evolm("stop", folder.path)
    assert said.code == 0 and said.out == f"run first has ended; go on with: evolm resume {folder.path}\n"
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 130 and "asked to stop: running trials save and end" in errors
    trials = load(folder.path).trials()
    assert [(trial.state, trial.operator) for trial in trials] == [("paused", "baseline"), ("proposed", "enqueued")]
    assert (folder.trial(1) / "checkpoints/latest").is_dir()


def test_a_run_that_is_stopped_now_does_not_save(evolm: Any, working: tuple[RunFolder, subprocess.Popen[str]]) -> None:
    folder, process = working
    assert evolm("stop", folder.path, "--now").code == 0
    process.communicate(timeout=30)
    assert process.returncode == 130
    assert not (folder.trial(1) / "checkpoints/latest").exists()
    assert load(folder.path).trials()[0].message == "ended before it could save"
