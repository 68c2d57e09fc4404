"""Promotion: both recipes trained for real, judged on test text, exported, generated from."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import evolm as package
from evolm.errors import DataError, GateError
from evolm.promote import _train_all, promote
from evolm.run_folder import RunFolder
from trainer.recipe import Recipe
from trainer.scaling import scaling_params


@pytest.fixture
def run(finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the finished run, to be promoted from."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(finished_run, tmp_path / "first")
    return tmp_path / "first"


@pytest.fixture(scope="module")
def promoted(tmp_path_factory: pytest.TempPathFactory, finished_run: Path) -> Path:
    """A run whose best trial was promoted through the real command line, once for all tests that look at it."""
    folder = tmp_path_factory.mktemp("promoted") / "first"
    shutil.copytree(finished_run, folder)
    command = [sys.executable, "-m", "evolm", "promote", str(folder), "best", "--tokens", "8K", "--force"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder.parent)
    assert done.returncode == 0, done.stderr
    assert "test split" in done.stdout and "exported as Qwen3ForCausalLM" in done.stdout
    return folder / "promoted" / str(package.load(folder).trial("best").id)


def test_winner_and_baseline_are_judged_alike(promoted: Path) -> None:
    told = json.loads((promoted / "promotion.json").read_text())
    assert told["winner"]["tokens"] == told["baseline"]["tokens"] == 8000
    assert told["winner"]["corpus"]["sources"] == told["baseline"]["corpus"]["sources"]
    for record in (told["winner"], told["baseline"]):
        assert {"bits_per_byte", "bits_per_byte/web", "bits_per_byte/code", "perplexity"} == set(record["test"])
    ahead = told["winner"]["test"]["bits_per_byte"] < told["baseline"]["test"]["bits_per_byte"]
    assert told["better"] == ahead


def test_the_receipt_says_how_close_the_export_is(promoted: Path) -> None:
    receipt = json.loads((promoted / "export/hf/parity.json").read_text())
    assert max(receipt["max_logit_difference"].values()) <= 1e-5 < receipt["disturbed"]
    about = json.loads((promoted / "export/hf/evolm.json").read_text())
    assert about["recipe"]["model"]["d_model"] and about["corpus"]["tokenizer"]["sha256"] == receipt["tokenizer"]


def test_transformers_loads_it_without_any_code_of_ours(promoted: Path) -> None:
    script = (
        "import sys, torch\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1]).eval()\n"
        "ids = AutoTokenizer.from_pretrained(sys.argv[1])('aeio', return_tensors='pt').input_ids\n"
        "assert not any(name.split('.')[0] in ('evolm', 'trainer') for name in sys.modules)\n"
        "print(type(model).__name__, ids[0, 0].item(), tuple(model(ids).logits.shape))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(promoted / "export/hf")], capture_output=True, text=True, cwd=promoted
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("Qwen3ForCausalLM 1 (1, ")


def test_it_continues_a_text(promoted: Path, evolm) -> None:
    options = ("--prompt", "aeio", "--max-tokens", "8", "--temperature", "0")
    first = evolm("generate", promoted / "export/hf", *options)
    assert first.code == 0 and first.out.startswith("aeio") and len(first.out) > 5
    assert evolm("generate", promoted / "export/hf", *options).out == first.out


def test_a_finished_promotion_is_not_trained_again(promoted: Path, evolm) -> None:
    before = (promoted / "pretrain/metrics.jsonl").stat().st_mtime_ns
    said = evolm("promote", promoted.parents[1], promoted.name, "--tokens", "8K", "--force")
    assert said.code == 0 and (promoted / "pretrain/metrics.jsonl").stat().st_mtime_ns == before


def test_another_length_needs_another_folder(promoted: Path, evolm) -> None:
    said = evolm("promote", promoted.parents[1], promoted.name, "--tokens", "16K", "--force")
    assert said.code == 2 and "holds a promotion on 8,000 tokens, not 16,000; leave --tokens out" in said.err


def record(loss: float) -> dict[str, Any]:
    return {"test": {"bits_per_byte": loss}, "params": 1}


@pytest.mark.parametrize(
    ("resources", "side_by_side", "flags"),
    [
        ({}, True, []),
        ({"gpus": 1.0}, False, []),
        ({"processes": 2, "engine": "fsdp"}, False, ["--processes", "2", "--engine", "fsdp"]),
        ({"gpus": 4.0, "engine": "deepspeed"}, False, ["--processes", "4", "--engine", "deepspeed"]),
    ],
)
def test_a_promotion_trains_over_as_many_processes_as_a_trial(
    run: Path, monkeypatch: pytest.MonkeyPatch, resources: dict[str, Any], side_by_side: bool, flags: list[str]
) -> None:
    loaded, commands, waits = package.load(run), [], []
    loaded = dataclasses.replace(loaded, settings=dataclasses.replace(loaded.settings, **resources))
    monkeypatch.setattr("evolm.promote.os.cpu_count", lambda: 8)
    monkeypatch.setattr("evolm.promote.subprocess.Popen", lambda command, **_: commands.append(command))
    monkeypatch.setattr("evolm.promote._wait", lambda processes, *_: waits.append(len(processes)))
    recipes = {name: loaded.trial("2").genome for name in ("pretrain", "baseline")}
    for name in recipes:
        (run / name).mkdir()
        (run / name / "record.json").write_text("{}")
    _train_all(loaded, recipes, run, 1000, run, lambda text: None)
    assert waits == ([2] if side_by_side else [1, 1])
    for command in commands:
        words = command[command.index("--no-export") + 1 :]
        assert [word for word in words if word in flags or word in ("--processes", "--engine")] == flags
        threads = int(command[command.index("--threads") + 1])
        assert threads * (2 if side_by_side else loaded.settings.ranks) == 8


@pytest.mark.parametrize("stage", ["pretrain", "baseline"])
def test_a_promotion_is_begun_once_either_stage_is(run: Path, evolm, stage: str) -> None:
    folder = run / "promoted/2"
    (folder / stage).mkdir(parents=True)
    (folder / stage / "recipe.json").write_text('{"recipe": {}, "tokens": 1000, "seed": 0}')
    (folder / "scale.json").write_text('{"width": 2, "depth": 1, "tuned_at": 2048}')
    said = evolm("promote", run, "2", "--width", "3")
    assert said.code == 2 and "holds a promotion at 2 times the width" in said.err
    assert json.loads((folder / "scale.json").read_text())["width"] == 2
    said = evolm("promote", run, "2", "--tokens", "2K")
    assert said.code == 2 and "holds a promotion on 1,000 tokens, not 2,000" in said.err


def test_a_winner_that_is_not_ahead_is_not_exported(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("evolm.promote._train_all", lambda *_: {"pretrain": record(2.0), "baseline": record(2.0)})
    loaded = package.load(run)
    with pytest.raises(GateError, match=r"is not better than the baseline on the test split: 2\.0000 against 2\.0000"):
        promote(loaded, loaded.trial("2"))
    assert json.loads((run / "promoted/2/promotion.json").read_text())["better"] is False
    assert not (run / "promoted/2/export").exists()


def test_a_corpus_that_changed_is_refused(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = package.load(run)
    loaded.ledger.meta["corpus"]["sources"]["web"]["digest"] = "0" * 32
    with pytest.raises(DataError, match="source 'web' is not what it was when the run began"):
        promote(loaded, loaded.trial("best"))


def test_training_that_fails_is_told_with_its_log(run: Path, monkeypatch: pytest.MonkeyPatch, evolm) -> None:
    """The child's own words and exit code reach the user."""
    (run / "promoted/2/pretrain").mkdir(parents=True)
    (run / "promoted/2/pretrain/recipe.json").write_text('{"recipe": {}, "tokens": 1000, "seed": 0}')
    said = evolm("promote", run, "2", "--tokens", "1K")
    assert said.code == 2 and "training the winner failed:" in said.err and "log.txt" in said.err


def test_a_recipe_is_trained_exported_and_gone_on_with(
    tmp_path: Path, words_corpus: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, evolm
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("recipe.yaml").write_text(
        f"version: 1\nname: small\n"
        f"data: {{sources: {{web: {{path: {words_corpus}/web}}}}, tokenizer: {{vocab_size: 300}},"
        f" sequence_length: 32}}\n"
        f"model: {{d_model: 16, n_layers: 1, n_heads: 1, ffn: relu2}}\n"
        f"train: {{batch_tokens: 128, tokens: 1K}}\n"
    )
    said = evolm("train", "recipe.yaml", "--cache", cache)
    assert said.code == 0 and "validation: bits_per_byte" in said.out
    assert "exported as EvolmForCausalLM: runs/small/export/hf" in said.out
    again = evolm("train", "recipe.yaml", "--cache", cache)
    assert again.code == 0 and "validation: bits_per_byte" in again.out
    assert evolm("train", "recipe.yaml", "--cache", cache, "--tokens", "2K").code == 2
    assert evolm("train", "recipe.yaml", "--tokens", "few").code == 2
    assert evolm("generate", "runs/small/export/hf", "--prompt", "aeio", "--max-tokens", "4").code == 0


def test_without_tokens_a_promotion_that_was_begun_goes_on(promoted: Path, evolm) -> None:
    said = evolm("promote", promoted.parents[1], promoted.name, "--force")
    assert said.code == 0 and "training on 8K tokens each" in said.err


def test_a_winner_that_loses_is_shown_beside_the_baseline(run: Path, monkeypatch: pytest.MonkeyPatch, evolm) -> None:
    corpus = {"corpus": {"tokenizer": 1}}
    records = {"pretrain": {**record(2.1), **corpus}, "baseline": {**record(2.0), **corpus}}
    monkeypatch.setattr("evolm.promote._train_all", lambda *_: records)
    said = evolm("promote", run, "2")
    assert said.code == 6 and "+5.0%" in said.out and "nothing was exported" in said.err


def test_a_signal_ends_both_trainings_and_the_same_command_goes_on(run: Path) -> None:
    command = [sys.executable, "-m", "evolm", "promote", str(run), "best", "--tokens", "3M"]
    best = run / "promoted" / str(package.load(run).trial("best").id)
    logs = [best / name / "metrics.jsonl" for name in ("pretrain", "baseline")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 90
        while not all(log.is_file() and log.stat().st_size for log in logs):
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.05)
        process.terminate()
        _, said = process.communicate(timeout=60)
    assert process.returncode == 143 and "everything is saved; the same command goes on" in said
    for name in ("pretrain", "baseline"):
        assert (best / name / "checkpoints/latest/checkpoint.json").is_file()
        assert not RunFolder(best / name).busy  # nobody trains on behind our back


# --- at a larger size -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def larger(tmp_path_factory: pytest.TempPathFactory, finished_run: Path) -> Path:
    """A run whose best trial was promoted to twice the width and depth, once for all tests that look at it."""
    folder = tmp_path_factory.mktemp("larger") / "first"
    shutil.copytree(finished_run, folder)
    command = [sys.executable, "-m", "evolm", "promote", str(folder), "best", "--width", "2", "--depth", "2", "--force"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder.parent)
    assert done.returncode == 0, done.stderr
    assert "at 2 times the width and 2 times the depth that the search had" in done.stderr
    return folder / "promoted" / str(package.load(folder).trial("best").id)


def test_winner_and_baseline_grow_alike_from_their_own_shapes(larger: Path) -> None:
    trial = package.load(larger.parents[1]).trial("best")
    searched = {"pretrain": trial.genome, "baseline": package.load(larger.parents[1]).file.space.baseline.values()}
    for name, genome in searched.items():
        trained = json.loads((larger / name / "recipe.json").read_text())["recipe"]
        width = genome["model"]["d_model"]
        assert (trained["model"]["d_model"], trained["model"]["n_layers"]) == (2 * width, 2)
        assert (trained["model"]["n_heads"], trained["model"]["head_dim"]) == (2, 16)
        assert trained["train"]["parameterization"] == "completep"
        assert (trained["train"]["base_d_model"], trained["train"]["base_n_layers"]) == (width, 1)


def test_the_promotion_says_what_was_scaled_and_how(larger: Path) -> None:
    told = json.loads((larger / "promotion.json").read_text())
    assert told["scale"] == {"width": 2, "depth": 2, "tuned_at": 2048, "parameterization": "completep"}
    assert json.loads((larger / "export/hf/evolm.json").read_text())["scale"] == told["scale"]


def test_a_larger_model_sees_as_many_tokens_for_each_parameter(larger: Path) -> None:
    trial = package.load(larger.parents[1]).trial("best")
    trained = json.loads((larger / "pretrain/recipe.json").read_text())
    small, large = (scaling_params(Recipe.model_validate(one)) for one in (trial.genome, trained["recipe"]))
    assert trained["tokens"] == round(2048 * large / small) > 4 * 2048


def test_a_larger_promotion_goes_on_as_it_was_begun_and_not_otherwise(larger: Path, evolm) -> None:
    run, trial = larger.parents[1], larger.name
    assert evolm("promote", run, trial, "--force").code == 0
    assert evolm("promote", run, trial, "--force", "--width", "2", "--depth", "2").code == 0
    said = evolm("promote", run, trial, "--force", "--width", "3")
    assert said.code == 2 and "holds a promotion at 2 times the width and 2 times the depth, not" in said.err
    assert "at 3 times the width and 1 times the depth; leave --width and --depth out" in said.err
    said = evolm("promote", run, trial, "--force", "--width", "1")
    assert said.code == 2 and "not at the size of the search" in said.err


def test_a_promotion_at_the_size_of_the_search_does_not_grow_later(promoted: Path, evolm) -> None:
    said = evolm("promote", promoted.parents[1], promoted.name, "--depth", "2", "--force")
    assert said.code == 2 and "holds a promotion at the size of the search, not at 1 times the width" in said.err


def test_a_size_that_no_recipe_has_is_refused_before_anything_is_trained(run: Path, evolm) -> None:
    said = evolm("promote", run, "2", "--depth", "2000")
    assert said.code == 2 and "model.n_layers: must be <= 1024, is 2000" in said.err
    assert not (run / "promoted/2/pretrain").exists()
