"""Guards what a micro-batch is trained on: sequences cut into pieces, and dropout from a stream of its own."""

import pytest
import torch
from torch.nn import functional

from trainer.loop import train
from trainer.loss import load_imbalance
from trainer.model import build_model
from trainer.objective import dropout_stream, training_loss
from trainer.records import Checkpoints

STEP = 128
CPU = torch.device("cpu")
MOE = {"ffn": "moe", "n_experts": 4, "balance_loss": 0.25}


# --- pieces -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [32, 16, 8])
@pytest.mark.parametrize("model", [{}, MOE], ids=["dense", "moe"])
def test_pieces_are_sequences_of_their_own_that_predict_the_same_tokens(recipe_of, corpus, length, model):
    recipe = recipe_of(model=model)
    trained, batch = build_model(recipe, 0), torch.from_numpy(corpus.loader(0).batch(0, 3))
    found = training_loss(trained, recipe, batch, length=length)
    expected, balance = 0, 0
    for row in batch:
        for start in range(0, 32, length):
            output = trained.model(row[None, start : start + length], output_router_logits=bool(model))
            logits = trained.lm_head(output.last_hidden_state)[0]
            expected += functional.cross_entropy(logits, row[start + 1 : start + length + 1], reduction="sum")
            balance += 0.25 * load_imbalance(output.router_logits, 2) if model else 0
    torch.testing.assert_close(found.nats.sum(), expected)
    torch.testing.assert_close(found.objective.detach(), expected)
    if model:
        torch.testing.assert_close(found.balance, balance)


# --- dropout ----------------------------------------------------------------------------------------------------------

DROPPING = {"attention_dropout": 0.5, "dropout": 0.2}


def drawn(recipe, seed=0, sample=0):
    with dropout_stream(recipe, seed, sample, CPU):
        return torch.rand(4)


def test_a_stream_depends_on_seed_and_position_alone(recipe_of):
    recipe = recipe_of(model=DROPPING)
    torch.manual_seed(1)
    one = drawn(recipe)
    torch.manual_seed(2)
    assert torch.equal(drawn(recipe), one)
    assert not torch.equal(drawn(recipe, seed=1), one)
    assert not torch.equal(drawn(recipe, sample=1), one)


def test_the_global_random_state_is_left_as_it_was(recipe_of):
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    drawn(recipe_of(model=DROPPING))
    assert torch.equal(torch.rand(4), expected)


def weights(folder):
    return (folder / "model.safetensors").read_bytes()


@pytest.mark.parametrize("train_section", [{}, {"gradient_checkpointing": True}], ids=["plain", "recomputed"])
def test_a_run_with_dropout_that_goes_on_is_the_same_run(recipe_of, corpus, tmp_path, train_section):
    recipe = recipe_of(model=DROPPING, train={"micro_batch_tokens": 64, **train_section})
    torch.manual_seed(1)
    train(recipe, corpus=corpus, tokens=6 * STEP, checkpoints=Checkpoints(final=tmp_path / "whole"))
    torch.manual_seed(2)
    latest = Checkpoints(latest=tmp_path / "latest")
    train(recipe, lambda p: p.tokens < 3 * STEP, corpus=corpus, tokens=6 * STEP, checkpoints=latest)
    parts = Checkpoints(final=tmp_path / "parts")
    train(recipe, corpus=corpus, tokens=6 * STEP, start=tmp_path / "latest", checkpoints=parts)
    assert weights(tmp_path / "parts") == weights(tmp_path / "whole")


def test_recomputed_blocks_drop_the_same_again(recipe_of, corpus, tmp_path):
    for on in (False, True):
        recipe = recipe_of(model=DROPPING, train={"gradient_checkpointing": on})
        train(recipe, corpus=corpus, tokens=3 * STEP, checkpoints=Checkpoints(final=tmp_path / str(on)))
    assert weights(tmp_path / "True") == weights(tmp_path / "False")


def test_dropout_is_at_work_and_of_the_seed(recipe_of, corpus):
    first = {}
    for seed in (0, 0, 1):
        told = first.setdefault(seed, set())
        train(
            recipe_of(model=DROPPING),
            lambda p, told=told: told.add(p.loss) or False,
            corpus=corpus,
            tokens=STEP,
            seed=seed,
        )
    plain = set()
    train(recipe_of(), lambda p: plain.add(p.loss) or False, corpus=corpus, tokens=STEP)
    assert len(first[0]) == 1
    assert len({*first[0], *first[1], *plain}) == 3
