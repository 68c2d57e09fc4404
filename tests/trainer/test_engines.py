"""Guards the engines: whoever holds the model, it is the same training, and its checkpoints are everybody's.

Two ranks train all cases of this file in one go; what one process trains is the reference.
"""

import json
import os
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from search_spaces.errors import UsageError
from trainer.checkpoint import read_state
from trainer.engines import Setup
from trainer.extras import refuse_untrainable
from trainer.loop import train
from trainer.records import Checkpoints

SCRIPT = Path(__file__).with_name("rank_cases.py")
STEP = 128
TOKENS = 4 * STEP + 32
"""Four steps of four sequences and one of one: a rank has nothing to do in the last."""

STOP = 2
"""Steps after which runs are stopped that go on elsewhere."""

ENGINES = {
    "ddp": {"engine": "ddp"},
    "fsdp": {"engine": "fsdp"},
    "zero1": {"engine": "deepspeed", "zero_stage": 1},
    "zero2": {"engine": "deepspeed", "zero_stage": 2},
    "zero3": {"engine": "deepspeed", "zero_stage": 3},
    "offload": {"engine": "deepspeed", "zero_stage": 2, "offload": True},
}
PLAIN = {"train": {"micro_batch_tokens": 32}}
RECIPES = {
    "plain": PLAIN,
    "untied": {"model": {"tie_embeddings": False, "n_heads": [2, 1], "head_dim": 16}, "train": {"grad_clip": 0.1}},
    "moe": {"model": {"ffn": "moe", "n_experts": 3, "ffn_dim": 16, "balance_loss": 0.1}, **PLAIN},
    "bias": {"model": {"ffn": "moe", "n_experts": 4, "ffn_dim": 16, "balance": "bias", "balance_rate": 0.02}, **PLAIN},
    "bf16": {"train": {"precision": "bf16"}},
    "muon": {"train": {"optimizer": "muon"}},
    "mean": {
        "train": {
            "ema": 0.5,
            "skip_spikes": 20.0,
            "gradient_checkpointing": True,
            "sequence_start": 16,
            "sequence_ramp_tokens": 2 * STEP,
        }
    },
}
OTHERS = [
    *((model, engine) for model in ("untied", "moe") for engine in ("fsdp", "zero3")),
    ("moe", "ddp"),
    *(("bias", engine) for engine in ("ddp", "fsdp", "zero2", "zero3")),
    ("bf16", "fsdp"),
    ("bf16", "zero3"),
    ("muon", "ddp"),
    ("mean", "fsdp"),
]
ROUGH = {"bf16": 2e-3, "muon": 1e-3}
"""Differences of losses where rounding is in bf16, muon's own included."""

MOVES = (("single", "ddp"), ("single", "zero3"), ("ddp", "fsdp"), ("fsdp", "zero2"), ("zero3", "fsdp"))


def free_port():
    with socket.socket() as stream:
        stream.bind(("127.0.0.1", 0))
        return stream.getsockname()[1]


def rank_env(rank, world, port):
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return {**os.environ, **{key: str(value) for key, value in place.items()}}


def together(cases, folder, world=2):
    """Train cases in `world` processes; what the first rank wrote down."""
    folder.mkdir(exist_ok=True)
    (folder / "cases.json").write_text(json.dumps(cases))
    port = free_port()
    command = [sys.executable, str(SCRIPT), str(folder / "cases.json"), str(folder / "results.json")]
    started = [
        subprocess.Popen(
            command, env=rank_env(rank, world, port), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        for rank in range(world)
    ]
    said = [process.communicate(timeout=240)[0] for process in started]
    assert [process.returncode for process in started] == [0] * world, "\n".join(said)
    return json.loads((folder / "results.json").read_text()), said


@dataclass
class World:
    """What two ranks did, and what one process does of the same."""

    folder: Path
    results: dict
    said: list
    recipes: dict
    corpora: dict

    def alone(self, model, **options):
        losses = []
        train(
            self.recipes[model],
            lambda progress: losses.append(progress.loss) or True,
            corpus=self.corpora[model],
            tokens=TOKENS,
            **options,
        )
        return losses


@pytest.fixture(scope="module")
def world(recipe_of, corpus, cache, tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    recipes = {name: recipe_of(**changes) for name, changes in RECIPES.items()}
    plain = recipes["plain"]
    stopped = Checkpoints(latest=folder / "single")
    train(plain, lambda progress: progress.tokens < STOP * STEP, corpus=corpus, tokens=TOKENS, checkpoints=stopped)

    def case(model, engine, **more):
        dumped = recipes[model].model_dump(mode="json")
        return {"recipe": dumped, "cache": str(cache), "tokens": TOKENS, "setup": ENGINES[engine], **more}

    cases = {}
    for engine in ENGINES:
        place = {key: str(folder / engine / key) for key in ("latest", "final", "again")}
        cases[engine] = case("plain", engine, final=place["final"])
        cases[f"{engine} first"] = case("plain", engine, latest=place["latest"], stop_by=1, stop_after=STOP)
        cases[f"{engine} second"] = case("plain", engine, start=place["latest"], final=place["again"])
    for model, engine in OTHERS:
        cases[f"{model} {engine}"] = case(model, engine, final=str(folder / model / engine))
    for before, after in MOVES:
        start = folder / "single" if before == "single" else folder / before / "latest"
        cases[f"{before} to {after}"] = case("plain", after, start=str(start))
    results, said = together(cases, folder / "run")
    return World(folder, results, said, recipes, dict.fromkeys(recipes, corpus))


@pytest.fixture(scope="module")
def reference(world):
    return {model: world.alone(model) for model in RECIPES}


def near(losses, expected, tolerance=1e-5):
    assert len(losses) == len(expected)
    assert losses == pytest.approx(expected, abs=tolerance)


@pytest.mark.parametrize("engine", ENGINES)
def test_two_ranks_train_what_one_process_trains(world, reference, engine):
    near(world.results[engine]["losses"], reference["plain"])


@pytest.mark.parametrize(("model", "engine"), OTHERS)
def test_so_they_do_with_other_models_and_precisions(world, reference, model, engine):
    near(world.results[f"{model} {engine}"]["losses"], reference[model], ROUGH.get(model, 1e-5))


@pytest.mark.parametrize("engine", ENGINES)
def test_a_run_that_one_rank_stopped_goes_on_bit_by_bit(world, engine):
    whole, first, second = (world.results[name] for name in (engine, f"{engine} first", f"{engine} second"))
    assert (first["finished"], second["finished"]) == (False, True)
    assert first["losses"] + second["losses"] == whole["losses"]
    assert first["norms"] + second["norms"] == whole["norms"]
    for name in ("model.safetensors", "optimizer.safetensors"):
        again = (world.folder / engine / "again" / name).read_bytes()
        assert again == (world.folder / engine / "final" / name).read_bytes()


@pytest.mark.parametrize(("before", "after"), MOVES)
def test_a_run_goes_on_under_another_engine_and_number_of_ranks(world, reference, before, after):
    near(world.results[f"{before} to {after}"]["losses"], reference["plain"][STOP:])


@pytest.mark.parametrize("engine", ENGINES)
def test_a_run_of_two_ranks_goes_on_in_one_process(world, reference, engine):
    near(world.alone("plain", start=world.folder / engine / "latest"), reference["plain"][STOP:])


PLACES = [
    *(("plain", f"{engine}/final") for engine in ENGINES),
    ("mean", "fsdp"),
    *(("bias", engine) for engine in ("ddp", "fsdp", "zero2", "zero3")),
]


@pytest.mark.parametrize(("model", "place"), PLACES)
def test_checkpoints_are_those_of_one_process(world, tmp_path, model, place):
    world.alone(model, checkpoints=Checkpoints(final=tmp_path))
    theirs = world.folder / (place if model == "plain" else f"{model}/{place}")
    assert sorted(path.name for path in theirs.iterdir()) == sorted(path.name for path in tmp_path.iterdir())
    assert read_state(theirs).samples == read_state(tmp_path).samples
    for path in tmp_path.glob("*.safetensors"):
        ours, found = load_file(path), load_file(theirs / path.name)
        assert found.keys() == ours.keys()
        for key, value in ours.items():
            assert found[key].dtype == value.dtype
            torch.testing.assert_close(found[key], value, atol=1e-4, rtol=1e-3)


def test_nobody_says_anything(world):
    assert [text for text in world.said if text.strip()] == []


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"optimizer": "muon"}, "engine fsdp cuts matrices over the ranks and trains with adamw; muon needs them"),
        ({"precision": "fp16"}, "engine fsdp trains in fp32 or bf16"),
        ({"compile": "always"}, "engine fsdp does not compile blocks"),
    ],
)
def test_what_cannot_be_cut_is_refused(recipe_of, changes, words):
    with pytest.raises(UsageError, match=words):
        refuse_untrainable(recipe_of(train=changes), "fsdp")
    refuse_untrainable(recipe_of(train=changes), "ddp")


@pytest.mark.parametrize("field", ["ema", "skip_spikes"])
def test_what_deepspeed_has_not_is_refused(recipe_of, field):
    with pytest.raises(UsageError, match=rf"engine deepspeed has no train\.{field}, which is 0\.5"):
        refuse_untrainable(recipe_of(train={field: 0.5}), "deepspeed")
    refuse_untrainable(recipe_of(train={field: 0.5}), "fsdp")


@pytest.mark.parametrize(
    ("setup", "words"),
    [
        (Setup(engine="ddp"), "--engine ddp needs ranks: give --processes, or start it by torchrun"),
        (Setup(offload=True), "--offload is for --engine deepspeed, not single"),
    ],
)
def test_what_an_engine_cannot_do_is_refused(recipe, corpus, setup, words):
    with pytest.raises(UsageError, match=words):
        train(recipe, corpus=corpus, tokens=STEP, setup=setup)
