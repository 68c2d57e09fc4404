"""Sinks and the bound of logs as a search has them: asked for in a space, refused before anything is launched, harmless
when they fail."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from evolm import worker
from evolm.config import load_space
from evolm.errors import SpaceError
from evolm.executors.base import Job
from evolm.settings import Settings
from evolm.worker import Context, run_recipe
from reports.figures.curves import read_curve
from trainer import sinks
from trainer.metrics_log import read_metrics


class Clock:
    """The real one, which can be put forward."""

    def __init__(self) -> None:
        self.ahead, self.real = 0.0, time.perf_counter

    def __call__(self) -> float:
        return self.real() + self.ahead

    def forward(self, seconds: float) -> None:
        self.ahead += seconds


class Failing:
    """Fails at the third line."""

    def open(self, run: sinks.RunInfo) -> None:
        self.lines = 0

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self.lines += 1
        if self.lines == 3:
            raise ConnectionError("the server is gone")

    def close(self) -> None:
        raise AssertionError("it was dropped")


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sinks.BUILT_IN, "failing", (Failing, "json", "none"))


def job(folder: Path, words: Path, cache: Path, **context: Any) -> Job:
    genome = {
        "data": {
            "sources": {name: {"path": str(words / name)} for name in ("web", "code")},
            "tokenizer": {"vocab_size": 300},
            "sequence_length": 32,
            "held_out": {"max_bytes": 2048},
        },
        "model": {"d_model": 16, "n_layers": 1, "n_heads": 1},
        "train": {"batch_tokens": 128, "learning_rate": 5e-3, "warmup_steps": 2},
    }
    shared = Context(cache=str(cache), roots=[], documents={}, target=None, **context).as_dict()
    return Job(
        trial=1, lease=1, rung=0, top=True, tokens=60 * 128, genome=genome, seed=0, folder=str(folder), context=shared
    )


def test_a_sink_that_fails_costs_a_trial_nothing_and_is_noted_once(
    failing: None, tmp_path: Path, words_corpus: Path, cache: Path
) -> None:
    plain = run_recipe(job(tmp_path / "1", words_corpus, cache), lambda progress: True)
    watched = run_recipe(job(tmp_path / "2", words_corpus, cache, sinks=["failing"]), lambda progress: True)
    assert watched.kind == "result" and watched.metrics["bits_per_byte"] == plain.metrics["bits_per_byte"]
    note = "sink 'failing' failed and is dropped: ConnectionError: the server is gone; metrics.jsonl has everything\n"
    assert (tmp_path / "2" / "sinks.log").read_text() == note
    lengths = [len(list(read_metrics(tmp_path / name / "metrics.jsonl"))) for name in ("1", "2")]
    assert lengths[0] == lengths[1] > 20


def test_what_a_sink_takes_at_the_end_is_no_time_of_the_trials(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, words_corpus: Path, cache: Path
) -> None:
    clock = Clock()
    monkeypatch.setattr(worker.time, "perf_counter", clock)
    monkeypatch.setattr(worker.Sinks, "close", lambda self, seconds=0.0: clock.forward(1000.0))
    outcome = run_recipe(job(tmp_path / "1", words_corpus, cache), lambda progress: True)
    assert outcome.kind == "result" and 0 < outcome.seconds < 1000


def test_a_trials_log_keeps_its_bound_and_its_whole_curve(tmp_path: Path, words_corpus: Path, cache: Path) -> None:
    outcome = run_recipe(job(tmp_path / "1", words_corpus, cache, log_bytes=9_000), lambda progress: True)
    log = tmp_path / "1" / "metrics.jsonl"
    lines = list(read_metrics(log))
    assert log.stat().st_size <= 9_000 and lines[0]["step"] == 1 and lines[-2]["step"] == 60
    assert lines[-1]["bits_per_byte"] == outcome.metrics["bits_per_byte"]
    curve = read_curve(lines)  # as the report reads it
    assert len(curve) == len(lines) - 1 and (curve[1:, 0] > curve[:-1, 0]).all()


# --- in a space -------------------------------------------------------------------------------------------------------


def test_a_space_says_where_numbers_go(space_file: Path) -> None:
    assert (load_space(space_file).settings.sinks, load_space(space_file).settings.log_bytes) == ((), 4 * 2**20)
    with space_file.open("a") as file:
        file.write("telemetry: {sinks: [tensorboard, wandb], max_bytes: 1MiB}\n")
    settings = load_space(space_file).settings
    assert (settings.sinks, settings.log_bytes) == (("tensorboard", "wandb"), 2**20)
    kept = json.loads(json.dumps(settings.as_dict()))
    assert Settings.from_dict(kept) == settings
    old = {key: value for key, value in kept.items() if key not in ("sinks", "log_bytes")}  # a run of an older evolm
    assert Settings.from_dict(old).sinks == ()


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ("{sinks: [tensorbord]}", "unknown sink 'tensorbord'; did you mean 'tensorboard'?"),
        ("{sinks: [wandb, wandb]}", "names a sink twice"),
        ("{sinks: wandb}", "telemetry.sinks: must be a list"),
        ("{max_bytes: 1KiB}", "telemetry.max_bytes: must be >= 65536, is 1024"),
        ("{sink: [wandb]}", "telemetry.sink: unknown key 'sink'"),
    ],
)
def test_what_is_wrong_with_telemetry_is_told_at_its_place(space_file: Path, said: str, words: str) -> None:
    with space_file.open("a") as file:
        file.write(f"telemetry: {said}\n")
    with pytest.raises(SpaceError) as refused:
        load_space(space_file)
    assert words in str(refused.value)


def test_another_trainer_writes_its_own_numbers(tmp_path: Path) -> None:
    (tmp_path / "s.yaml").write_text(
        "version: 1\ntrial: {command: [python]}\ntrain: {x: {float: [0, 1]}}\nobjectives: {loss: min}\n"
        "fidelity: {tokens: 1K}\ntelemetry: {sinks: [wandb]}\n"
    )
    with pytest.raises(SpaceError, match="telemetry: is about evolm's own trainer"):
        load_space(tmp_path / "s.yaml")


# --- before anything is launched --------------------------------------------------------------------------------------


def missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sinks, "find_spec", lambda package: None)


def test_a_search_with_a_missing_sink_ends_before_it_begins(
    evolm: Any, space_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    missing(monkeypatch)
    monkeypatch.chdir(tmp_path)
    with space_file.open("a") as file:
        file.write("telemetry: {sinks: [tensorboard]}\n")
    said = evolm("search", space_file, "--executor", "inline", "--run", "first")
    assert said.code == 2 and "pip install tensorboard" in said.err and not (tmp_path / "first").exists()
    assert not (tmp_path / "runs").exists()


def test_training_with_a_missing_sink_ends_before_it_begins(
    evolm: Any, tmp_path: Path, words_corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    missing(monkeypatch)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "r.yaml").write_text(f"version: 1\ndata: {{sources: {{web: {{path: {words_corpus}/web}}}}}}\n")
    said = evolm("train", "r.yaml", "--tokens", "1K", "--sink", "mlflow")
    assert said.code == 2 and "pip install mlflow" in said.err and not (tmp_path / "runs").exists()
    said = evolm("train", "r.yaml", "--tokens", "1K", "--sink", "nowhere")
    assert said.code == 2 and "unknown sink 'nowhere'" in said.err


def test_training_goes_on_when_a_sink_fails(
    failing: None, evolm: Any, tmp_path: Path, words_corpus: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "r.yaml").write_text(
        f"version: 1\ndata: {{sources: {{web: {{path: {words_corpus}/web}}}}, tokenizer: {{vocab_size: 300}}, "
        "sequence_length: 32, held_out: {max_bytes: 2KiB}}\n"
        "model: {d_model: 16, n_layers: 1, n_heads: 1}\ntrain: {batch_tokens: 128}\n"
    )
    said = evolm("train", "r.yaml", "--tokens", "2K", "--sink", "failing", "--no-export", "--cache", cache)
    assert said.code == 0, said.err
    assert said.err.count("warning: sink 'failing' failed and is dropped: ConnectionError") == 1
