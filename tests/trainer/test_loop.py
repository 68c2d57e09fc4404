"""Guards the training loop: what a run does depends on recipe, corpus, seed and horizon, and on nothing else."""

import math
from itertools import pairwise

import pytest
import torch

from trainer.cost import costs
from trainer.data.corpus import Corpus
from trainer.errors import DataError, Diverged
from trainer.loop import train
from trainer.recipe_digest import recipe_digest
from trainer.records import Checkpoints

STEP = 128
"""Tokens of one step of the tiny recipe: four sequences of 32."""

TOKENS = 8 * STEP

GOLDEN = [5.793063, 5.730705, 5.620388, 5.340724, 5.149895, 4.913609, 4.821699, 4.677119]
"""Losses of the eight steps of the tiny recipe."""


@pytest.fixture
def run(corpus):
    """Train for some tokens; returns the record and the progress of each step."""

    def go(recipe, tokens=TOKENS, **options):
        steps = []
        record = train(recipe, lambda progress: steps.append(progress) or True, corpus=corpus, tokens=tokens, **options)
        return record, steps

    return go


def weights(record):
    return torch.cat([parameter.detach().flatten() for parameter in record.model.parameters()])


def losses(steps):
    return [step.loss for step in steps]


# --- learning ---------------------------------------------------------------------------------------------------------


def test_a_short_run_learns_what_it_learned_when_this_was_written(run, recipe):
    """Golden values: a change of them is a change of what every recipe means."""
    record, steps = run(recipe)
    assert losses(steps) == pytest.approx(GOLDEN, abs=1e-4)
    assert record.train_loss == pytest.approx(sum(GOLDEN) / len(GOLDEN), abs=1e-4)


def test_the_first_loss_is_that_of_guessing(run, recipe):
    _, steps = run(recipe, tokens=STEP)
    assert steps[0].loss == pytest.approx(math.log(320), abs=0.1)


def test_more_tokens_give_a_lower_loss(run, recipe):
    _, steps = run(recipe, tokens=60 * STEP)
    assert sum(losses(steps)[-5:]) < 0.75 * sum(losses(steps)[:5])


@pytest.mark.parametrize(
    "model",
    [
        {"n_layers": 1, "n_heads": 1},
        {"n_heads": [4, 2], "n_kv_heads": [1, 2], "head_dim": 8, "ffn_dim": [32, 64], "ffn": "relu2"},
        {"ffn": "gelu", "tie_embeddings": False, "qk_norm": False},
        {"ffn": "moe", "n_experts": 4},
    ],
    ids=["one layer", "per layer", "untied", "moe"],
)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_every_shape_learns_in_every_precision(run, recipe_of, model, precision):
    _, steps = run(recipe_of(model=model, train={"precision": precision}), tokens=12 * STEP)
    assert losses(steps)[-1] < losses(steps)[0] - 0.5


def test_bf16_follows_fp32(run, recipe_of):
    (_, exact), (_, rounded) = (run(recipe_of(train={"precision": precision})) for precision in ("fp32", "bf16"))
    assert losses(rounded) == pytest.approx(losses(exact), abs=0.03)
    assert losses(rounded) != losses(exact)


@pytest.mark.parametrize("length", [8, 128])
def test_sequences_may_be_short_or_as_long_as_a_batch(recipe_of, cache, length):
    recipe = recipe_of(data={"sequence_length": length})
    record = train(recipe, corpus=Corpus.open(recipe.data, cache), tokens=4 * STEP)
    assert record.finished
    assert record.tokens == 4 * STEP


# --- the seed ---------------------------------------------------------------------------------------------------------


def test_the_same_seed_gives_the_same_weights_bit_by_bit(run, recipe):
    (one, _), (same, _) = run(recipe), run(recipe)
    assert torch.equal(weights(one), weights(same))


def test_the_global_random_state_does_not_matter(run, recipe):
    torch.manual_seed(1)
    one, _ = run(recipe)
    torch.manual_seed(2)
    assert torch.equal(weights(run(recipe)[0]), weights(one))


def test_another_seed_gives_other_weights(run, recipe):
    assert not torch.equal(weights(run(recipe, seed=0)[0]), weights(run(recipe, seed=1)[0]))


def test_the_seed_of_the_recipe_is_used_where_none_is_given(run, recipe_of):
    in_recipe, _ = run(recipe_of(train={"seed": 5}))
    given, _ = run(recipe_of(train={"seed": 9}), seed=5)
    assert torch.equal(weights(in_recipe), weights(given))


# --- what a run is known by -------------------------------------------------------------------------------------------


def test_what_is_said_of_experts_counts_where_there_are_some(recipe_of):
    said = {"n_active_experts": 1, "balance_loss": 0.5}
    assert recipe_digest(recipe_of(model=said)) == recipe_digest(recipe_of())
    mixture = {"ffn": "moe", "n_experts": 4}
    changes = [{}, {"n_experts": 8}, *({key: value} for key, value in said.items())]
    assert len({recipe_digest(recipe_of(model={**mixture, **change})) for change in changes}) == 4


# --- accumulation -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sequences", [1, 2, 3], ids=lambda n: f"micro-batches of {n}")
@pytest.mark.parametrize("tokens", [4 * STEP, 4 * STEP + 64], ids=["whole batches", "ragged last batch"])
def test_the_size_of_micro_batches_changes_nothing(run, recipe_of, sequences, tokens):
    """Adam's epsilon is large here: it makes of a rounding error in a gradient near zero a step of full size."""
    whole, steps = run(recipe_of(train={"adam_eps": 1e-3}), tokens)
    parts, others = run(recipe_of(train={"adam_eps": 1e-3, "micro_batch_tokens": 32 * sequences}), tokens)
    assert losses(others) == pytest.approx(losses(steps), abs=1e-6)
    torch.testing.assert_close(weights(parts), weights(whole), atol=1e-6, rtol=1e-5)


GROWING = {
    "batch_start_tokens": 32,
    "batch_ramp_tokens": 512,
    "sequence_start": 8,
    "sequence_ramp_tokens": 640,
    "z_loss": 1e-3,
}


@pytest.mark.parametrize("sequences", [1, 3])
@pytest.mark.parametrize("model", [{}, {"ffn": "moe", "n_experts": 4, "balance_loss": 0.1}], ids=["dense", "moe"])
def test_nor_does_it_where_batches_and_sequences_grow(run, recipe_of, sequences, model):
    """Up to a ragged last batch."""
    whole, steps = run(recipe_of(model=model, train={"adam_eps": 1e-3, **GROWING}), 10 * STEP + 64)
    small = {"adam_eps": 1e-3, "micro_batch_tokens": 32 * sequences, **GROWING}
    parts, others = run(recipe_of(model=model, train=small), 10 * STEP + 64)
    assert losses(others) == pytest.approx(losses(steps), abs=1e-6)
    torch.testing.assert_close(weights(parts), weights(whole), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("idle", "telling"),
    [
        ({"model": {"window": 7}}, {"model": {"attention": "sliding"}}),
        ({"model": {"rope_theta": 7.0}}, {"model": {"positions": "rope"}}),
        ({"train": {"base_d_model": 64}}, {"train": {"parameterization": "completep"}}),
        ({"train": {"decay_fraction": 0.7}}, {"train": {"schedule": "wsd"}}),
        ({"train": {"adam_eps": 1e-3}}, {"train": {"optimizer": "adamw"}}),
    ],
    ids=str,
)
def test_what_means_nothing_beside_the_rest_makes_no_other_training(recipe_of, idle, telling):
    """And does where it means something."""
    without = {"model": {"positions": "none"}, "train": {"schedule": "constant", "optimizer": "adafactor"}}
    with_it = {section: {**without[section], **telling.get(section, {})} for section in without}

    def digests(around):
        changed = {section: {**around[section], **idle.get(section, {})} for section in around}
        return recipe_digest(recipe_of(**around)), recipe_digest(recipe_of(**changed))

    one, other = digests(without)
    assert one == other
    one, other = digests(with_it)
    assert one != other


def test_growing_batches_draw_the_same_samples(run, recipe_of, corpus):
    record, steps = run(recipe_of(train=GROWING), 10 * STEP + 64)
    taken = [after - before for before, after in pairwise([0, *(one.tokens for one in steps)])]
    assert taken == [32] * 8 + [64] * 4 + [128] * 6 + [64]
    assert record.tokens_by_source == corpus.loader(0).drawn(42)


def test_shorter_pieces_cost_less_attention(run, recipe_of):
    recipe, steps = recipe_of(train=GROWING), []
    record, steps = run(recipe, 10 * STEP)
    prices = {length: costs(recipe_of(data={"sequence_length": length})).flops_per_token for length in (8, 16, 32)}
    # Pieces of 8 for 10 samples, of 16 up to 20, each to the end of a step.
    assert record.flops == pytest.approx(32 * (10 * prices[8] + 10 * prices[16] + 20 * prices[32]))
    assert record.flops < record.tokens * prices[32]
    assert steps[0].flops == 32 * prices[8]


def test_batch_tokens_need_not_be_a_multiple_of_the_sequence_length(run, recipe_of):
    """A batch is then the whole sequences that fit into it."""
    odd, steps = run(recipe_of(train={"batch_tokens": STEP + 31}))
    even, _ = run(recipe_of(train={"batch_tokens": STEP}))
    assert len(steps) == 8
    assert torch.equal(weights(odd), weights(even))


def test_the_gradient_is_clipped(run, recipe_of):
    """AdamW's first step has the same size whatever the gradient; the second tells."""
    _, free = run(recipe_of(train={"grad_clip": 1e9, "warmup_steps": 0}))
    _, clipped = run(recipe_of(train={"grad_clip": 0.5, "warmup_steps": 0}))
    assert free[0].gradient_norm == clipped[0].gradient_norm > 0.5
    assert losses(free)[:1] == losses(clipped)[:1]
    assert losses(free)[3:] != losses(clipped)[3:]


# --- what is reported -------------------------------------------------------------------------------------------------


def test_every_step_is_reported(run, recipe):
    _, steps = run(recipe, tokens=10 * STEP)
    assert [step.tokens for step in steps] == [STEP * n for n in range(1, 11)]
    assert {step.total_tokens for step in steps} == {10 * STEP}
    assert [step.learning_rate for step in steps] == pytest.approx([0.005, *[0.01] * 8, 0.005])
    assert all(step.tokens_per_second > 0 and step.gradient_norm > 0 for step in steps)


def test_the_record_counts_tokens_flops_and_epochs(run, recipe, corpus):
    record, _ = run(recipe, tokens=10 * STEP + 1)
    assert record.finished
    assert record.tokens == 10 * STEP + 32
    assert record.flops == record.tokens * costs(recipe).flops_per_token
    assert record.seconds > 0
    assert record.trained_tokens == record.tokens
    assert (record.micro_batch_tokens, record.oom_backoffs, record.skipped_steps) == (128, 0, 0)
    assert record.tokens_by_source == corpus.loader(0).drawn(41)
    assert sum(record.tokens_by_source.values()) == record.tokens
    assert record.epochs_by_source == corpus.loader(0).epochs(41)


def test_the_loss_of_a_record_is_the_mean_of_the_last_steps(run, recipe):
    record, steps = run(recipe, tokens=30 * STEP)
    assert record.train_loss == pytest.approx(sum(losses(steps)[-20:]) / 20)


def test_a_run_of_one_token_is_one_sequence(run, recipe):
    record, steps = run(recipe, tokens=1)
    assert (record.tokens, len(steps)) == (32, 1)


def test_no_report_is_needed(recipe, corpus):
    assert train(recipe, corpus=corpus, tokens=STEP).finished


def test_a_report_that_says_no_stops_the_run(recipe, corpus):
    record = train(recipe, lambda progress: progress.tokens < 3 * STEP, corpus=corpus, tokens=TOKENS)
    assert not record.finished
    assert record.tokens == 3 * STEP


def test_a_no_after_the_last_step_comes_too_late(recipe, corpus):
    assert train(recipe, lambda progress: progress.tokens < 8 * STEP, corpus=corpus, tokens=TOKENS).finished


def test_only_the_checkpoints_that_are_wanted_are_written(run, recipe, tmp_path):
    run(recipe, checkpoints=Checkpoints(final=tmp_path / "final"))
    assert [path.name for path in tmp_path.iterdir()] == ["final"]


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_a_learning_rate_that_ruins_the_model_is_refused(run, recipe_of):
    recipe = recipe_of(train={"learning_rate": 1.0, "grad_clip": 1e9, "warmup_steps": 0, "schedule": "constant"})
    with pytest.raises(Diverged, match=r"step \d+: mean loss [\d.]+ of 20 steps is worse than guessing, 5.77") as error:
        run(recipe, tokens=200 * STEP)
    assert error.value.reason == "diverged"


def test_a_short_run_is_judged_at_its_end(run, recipe_of):
    recipe = recipe_of(train={"learning_rate": 1.0, "grad_clip": 1e9, "warmup_steps": 0, "schedule": "constant"})
    with pytest.raises(Diverged, match=r"step 8: mean loss [\d.]+ of 8 steps is worse than guessing"):
        run(recipe)


def test_what_is_no_number_is_refused_at_once(recipe_of, corpus):
    steps = []
    with pytest.raises(Diverged, match=r"step 1: loss .*, gradient norm nan"):
        train(recipe_of(model={"init_std": 1e38}), lambda p: steps.append(p) or True, corpus=corpus, tokens=TOKENS)
    assert steps == []


def test_a_diverged_run_leaves_no_final_checkpoint(run, recipe_of, tmp_path):
    with pytest.raises(Diverged):
        run(recipe_of(model={"init_std": 1e38}), checkpoints=Checkpoints(final=tmp_path / "final"))
    assert list(tmp_path.iterdir()) == []


def test_a_corpus_of_another_vocabulary_is_refused(run, recipe_of):
    with pytest.raises(DataError, match="the corpus has a vocabulary of 320 entries, the recipe one of 330"):
        run(recipe_of(data={"tokenizer": {"vocab_size": 330}}))
