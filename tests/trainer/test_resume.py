"""Guards going on: a run that was stopped and continued, or taken on to a longer horizon, is the same run bit by
bit."""

from hashlib import blake2b
from itertools import count

import pytest
import torch

from trainer.checkpoint import load_checkpoint, read_state
from trainer.data.corpus import Corpus
from trainer.data.documents import side_of
from trainer.errors import CheckpointError
from trainer.loop import train
from trainer.model import build_model
from trainer.optim import build_optimizer
from trainer.records import Checkpoints

STEP = 128
TOKENS = 8 * STEP

DECAYING = {"decay_fraction": 0.25}
"""Six steps of trunk and two of decay."""


def stop_after(steps):
    return lambda progress: progress.tokens < steps * STEP


def content(folder):
    """Weights and moments of a checkpoint, byte by byte."""
    return {file.name: file.read_bytes() for file in sorted(folder.glob("*.safetensors"))}


@pytest.fixture
def stopped(corpus, tmp_path):
    """Train a recipe and stop it after some steps; returns where it is kept."""

    def go(recipe, steps=4, tokens=TOKENS, **options):
        checkpoints = Checkpoints(latest=tmp_path / "latest", trunk=tmp_path / "trunk")
        train(recipe, stop_after(steps), corpus=corpus, tokens=tokens, checkpoints=checkpoints, **options)
        return tmp_path / "latest"

    return go


# --- the same run -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "options"),
    [
        ({}, {}),
        ({}, {"precision": "bf16"}),
        ({"n_heads": [4, 2], "n_kv_heads": [1, 2], "head_dim": 8, "ffn_dim": [32, 64], "tie_embeddings": False}, {}),
        ({"ffn": "relu2"}, {"schedule": "constant", "micro_batch_tokens": 32}),
        ({"ffn": "moe", "n_experts": 4}, {"optimizer": "muon"}),
        ({}, {"optimizer": "adafactor"}),
        ({}, {"optimizer": "lion"}),
        ({}, {"optimizer": "soap"}),
        ({"tie_embeddings": False}, {"optimizer": "adan"}),
        ({}, {"optimizer": "ademamix"}),
        ({}, {"ema": 0.9, "schedule": "cosine"}),
        ({}, {"skip_spikes": 3.0, "z_loss": 1e-3}),
        ({}, {"batch_start_tokens": 32, "batch_ramp_tokens": 512, "sequence_start": 8, "sequence_ramp_tokens": 600}),
        ({}, {"gradient_checkpointing": True}),
    ],
    ids=[
        "plain",
        "bf16",
        "per layer, untied",
        "constant, accumulated",
        "muon, experts",
        "adafactor",
        "lion",
        "soap",
        "adan, untied",
        "ademamix",
        "mean of weights, cosine",
        "spikes, z-loss",
        "growing batches and sequences",
        "gradient checkpointing",
    ],
)
def test_eight_steps_are_four_and_four(recipe_of, corpus, tmp_path, model, options):
    recipe = recipe_of(model=model, train={**DECAYING, **options})
    whole, first, second = [], [], []
    train(
        recipe,
        lambda progress: whole.append(progress.loss) or True,
        corpus=corpus,
        tokens=TOKENS,
        checkpoints=Checkpoints(final=tmp_path / "whole"),
    )
    train(
        recipe,
        lambda progress: first.append(progress.loss) or len(first) < 4,
        corpus=corpus,
        tokens=TOKENS,
        checkpoints=Checkpoints(latest=tmp_path / "latest"),
    )
    record = train(
        recipe,
        lambda progress: second.append(progress.loss) or True,
        corpus=corpus,
        tokens=TOKENS,
        start=tmp_path / "latest",
        checkpoints=Checkpoints(final=tmp_path / "parts"),
    )
    assert first + second == whole
    assert len(first) == 4
    assert record.finished
    assert content(tmp_path / "parts") == content(tmp_path / "whole")


@pytest.mark.parametrize("steps", [1, 5, 6, 7], ids=lambda n: f"after {n} of 6 + 2 steps")
def test_it_does_not_matter_where_a_run_was_stopped(recipe_of, corpus, stopped, tmp_path, steps):
    recipe = recipe_of(train=DECAYING)
    train(recipe, corpus=corpus, tokens=TOKENS, checkpoints=Checkpoints(final=tmp_path / "whole"))
    start = stopped(recipe, steps)
    train(recipe, corpus=corpus, tokens=TOKENS, start=start, checkpoints=Checkpoints(final=tmp_path / "parts"))
    assert content(tmp_path / "parts") == content(tmp_path / "whole")


@pytest.mark.parametrize("model", [{}, {"ffn": "moe", "n_experts": 2}], ids=["dense", "moe"])
def test_soap_goes_on_with_the_bases_that_it_had(recipe_of, corpus, stopped, tmp_path, model):
    """Past the tenth step, at which they turn: how a matrix lies in memory decides how its products round."""
    recipe = recipe_of(model=model, train={"optimizer": "soap"})
    train(recipe, corpus=corpus, tokens=16 * STEP, checkpoints=Checkpoints(final=tmp_path / "whole"))
    start = stopped(recipe, 12, 16 * STEP)
    train(recipe, corpus=corpus, tokens=16 * STEP, start=start, checkpoints=Checkpoints(final=tmp_path / "parts"))
    assert content(tmp_path / "parts") == content(tmp_path / "whole")


def test_a_run_may_be_stopped_after_every_step(recipe_of, corpus, tmp_path):
    recipe, latest = recipe_of(train=DECAYING), tmp_path / "latest"
    train(recipe, corpus=corpus, tokens=TOKENS + 40, checkpoints=Checkpoints(final=tmp_path / "whole"))
    for _ in range(20):
        record = train(
            recipe,
            lambda progress: False,
            corpus=corpus,
            tokens=TOKENS + 40,
            start=latest if latest.exists() else None,
            checkpoints=Checkpoints(latest=latest, final=tmp_path / "parts"),
        )
        if record.finished:
            break
    assert content(tmp_path / "parts") == content(tmp_path / "whole")


def test_a_run_that_died_goes_on_from_what_it_saved_on_the_way(recipe_of, corpus, tmp_path):
    recipe, checkpoints = recipe_of(train=DECAYING), Checkpoints(latest=tmp_path / "latest", seconds=0.0)

    def die(progress):
        if progress.tokens == 5 * STEP:
            raise KeyboardInterrupt
        return True

    with pytest.raises(KeyboardInterrupt):
        train(recipe, die, corpus=corpus, tokens=TOKENS, checkpoints=checkpoints)
    assert read_state(tmp_path / "latest").samples == 4 * 4
    train(recipe, corpus=corpus, tokens=TOKENS, checkpoints=Checkpoints(final=tmp_path / "whole"))
    train(
        recipe,
        corpus=corpus,
        tokens=TOKENS,
        start=tmp_path / "latest",
        checkpoints=Checkpoints(final=tmp_path / "parts"),
    )
    assert content(tmp_path / "parts") == content(tmp_path / "whole")


def test_a_continued_run_counts_its_own_flops_and_all_tokens(recipe_of, corpus, stopped):
    recipe = recipe_of(train=DECAYING)
    whole = train(recipe, corpus=corpus, tokens=TOKENS)
    rest = train(recipe, corpus=corpus, tokens=TOKENS, start=stopped(recipe, 6))
    assert rest.tokens == whole.tokens == TOKENS
    assert rest.flops == whole.flops / 4
    assert rest.tokens_by_source == whole.tokens_by_source
    assert rest.epochs_by_source == whole.epochs_by_source


def test_a_checkpoint_knows_what_went_before(recipe_of, corpus, stopped, tmp_path):
    recipe = recipe_of(train=DECAYING)
    whole = train(recipe, corpus=corpus, tokens=TOKENS)
    before = read_state(stopped(recipe, 6))
    final = Checkpoints(final=tmp_path / "final")
    train(recipe, corpus=corpus, tokens=TOKENS, start=tmp_path / "latest", checkpoints=final)
    after = read_state(tmp_path / "final")
    assert (before.samples, after.samples) == (24, 32)
    assert (before.flops, after.flops) == (0.75 * whole.flops, whole.flops)
    assert after.seconds > before.seconds > 0


# --- longer horizons --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("longer", [12 * STEP, 16 * STEP, 17 * STEP + 1])
def test_the_trunk_leads_to_any_longer_horizon(recipe_of, corpus, tmp_path, longer):
    recipe = recipe_of(train=DECAYING)
    train(recipe, corpus=corpus, tokens=TOKENS, checkpoints=Checkpoints(trunk=tmp_path / "trunk"))
    assert read_state(tmp_path / "trunk").samples == 6 * 4
    train(
        recipe,
        corpus=corpus,
        tokens=longer,
        start=tmp_path / "trunk",
        checkpoints=Checkpoints(final=tmp_path / "continued"),
    )
    train(recipe, corpus=corpus, tokens=longer, checkpoints=Checkpoints(final=tmp_path / "uninterrupted"))
    assert content(tmp_path / "continued") == content(tmp_path / "uninterrupted")


def test_a_constant_run_leads_on_from_its_end(recipe_of, corpus, tmp_path):
    recipe = recipe_of(train={"schedule": "constant"})
    train(recipe, corpus=corpus, tokens=TOKENS, checkpoints=Checkpoints(trunk=tmp_path / "trunk"))
    train(
        recipe,
        corpus=corpus,
        tokens=2 * TOKENS,
        start=tmp_path / "trunk",
        checkpoints=Checkpoints(final=tmp_path / "continued"),
    )
    train(recipe, corpus=corpus, tokens=2 * TOKENS, checkpoints=Checkpoints(final=tmp_path / "uninterrupted"))
    assert content(tmp_path / "continued") == content(tmp_path / "uninterrupted")


def test_a_run_that_decays_from_its_first_step_has_no_trunk_to_keep(recipe_of, corpus, tmp_path):
    recipe = recipe_of(train={"decay_fraction": 1.0})
    train(recipe, corpus=corpus, tokens=TOKENS, checkpoints=Checkpoints(trunk=tmp_path / "trunk"))
    assert not (tmp_path / "trunk").exists()


def test_a_finished_run_has_nothing_left_to_do(recipe, corpus, tmp_path):
    train(recipe, corpus=corpus, tokens=TOKENS, checkpoints=Checkpoints(final=tmp_path / "final"))
    steps = []
    again = train(recipe, lambda p: steps.append(p) or True, corpus=corpus, tokens=TOKENS, start=tmp_path / "final")
    assert again.finished
    assert (again.tokens, again.flops, steps) == (TOKENS, 0, [])


# --- checkpoints of another run ---------------------------------------------------------------------------------------


def refusal(recipe, corpus, start, tokens=TOKENS, **options):
    steps = []
    with pytest.raises(CheckpointError) as error:
        train(recipe, lambda p: steps.append(p) or True, corpus=corpus, tokens=tokens, start=start, **options)
    assert steps == []
    assert str(error.value).startswith(str(start))
    return str(error.value)


@pytest.mark.parametrize(
    "change", [{"learning_rate": 0.02}, {"batch_tokens": 64}, {"weight_decay": 0.0}, {"decay_fraction": 0.5}]
)
def test_a_checkpoint_of_another_recipe_is_refused(recipe_of, corpus, stopped, change):
    start = stopped(recipe_of(train=DECAYING))
    assert "is of another recipe" in refusal(recipe_of(train={**DECAYING, **change}), corpus, start)


def test_a_checkpoint_of_another_shape_is_refused(recipe_of, corpus, stopped):
    words = refusal(recipe_of(model={"n_layers": 3}), corpus, stopped(recipe_of()))
    assert "does not fit this model" in words or "is of another recipe" in words


def test_a_checkpoint_of_another_seed_is_refused(recipe, corpus, stopped):
    words = refusal(recipe, corpus, stopped(recipe, seed=1), seed=2)
    assert words.endswith("is of another seed (1, this run's is 2)")


def test_length_and_seed_in_the_recipe_do_not_make_it_another(recipe_of, corpus, stopped):
    start = stopped(recipe_of(train={"seed": 3, "tokens": 5}), seed=1)
    assert train(recipe_of(train={"seed": 4}), corpus=corpus, tokens=TOKENS, seed=1, start=start).finished


def a_line_of(split, held_out):
    """A text of many new words that the split by content puts on this side."""
    lines = (f"line {number}" + 1000 * " zzz" for number in count())
    return next(line for line in lines if side_of(blake2b(line.encode(), digest_size=16).digest(), held_out) == split)


@pytest.mark.parametrize(("split", "field"), [("validation", "corpus"), ("train", "tokenizer")])
def test_a_checkpoint_of_another_corpus_is_refused(recipe_of, cache, tmp_path, domains, split, field):
    """The recipe names the same files, but one has a document more."""
    for name, texts in domains.items():
        (tmp_path / name).write_text("".join(text + "\n" for text in texts))
    recipe = recipe_of(data={"sources": {name: {"path": name, "document": "line"} for name in domains}})
    before = Corpus.open(recipe.data, cache, [tmp_path])
    train(recipe, stop_after(4), corpus=before, tokens=TOKENS, checkpoints=Checkpoints(latest=tmp_path / "latest"))
    with (tmp_path / "tales").open("a") as stream:
        stream.write(a_line_of(split, recipe.data.held_out))
    after = Corpus.open(recipe.data, cache, [tmp_path])
    assert f"is of another {field}" in refusal(recipe, after, tmp_path / "latest")


def test_a_run_that_has_begun_to_decay_has_one_horizon(recipe_of, corpus, stopped):
    recipe = recipe_of(train=DECAYING)
    words = refusal(recipe, corpus, stopped(recipe, 7), tokens=2 * TOKENS)
    assert words.endswith("has begun to decay towards 32 sequences and cannot go on to 64")


def test_a_run_cannot_be_made_shorter_than_it_is(recipe, corpus, stopped):
    words = refusal(recipe, corpus, stopped(recipe, 4), tokens=3 * STEP)
    assert words.endswith("is already beyond 12 sequences")


def test_a_checkpoint_that_is_not_there_is_refused(recipe, corpus, tmp_path):
    assert "not a complete checkpoint" in refusal(recipe, corpus, tmp_path / "latest")


def test_the_final_checkpoint_holds_the_model_that_was_returned(recipe, corpus, tmp_path):
    record = train(recipe, corpus=corpus, tokens=TOKENS, checkpoints=Checkpoints(final=tmp_path / "final"))
    model = build_model(recipe, 5)
    load_checkpoint(tmp_path / "final", model, build_optimizer(model, recipe))
    pairs = zip(model.parameters(), record.model.parameters(), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)
