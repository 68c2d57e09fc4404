"""Guards the length and the step sizes of a run: what is before the decay is the same run to every horizon."""

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.schedule import horizon_of, learning_rate

PEAK = 0.01


@pytest.fixture
def schedule_of(recipe_of):
    """A recipe of batches of four sequences of 32 tokens, and its run of so many samples."""

    def build(samples, **train):
        recipe = recipe_of(train={"learning_rate": PEAK, "warmup_steps": 0, **train})
        return recipe, horizon_of(recipe, 32 * samples)

    return build


def starts(horizon):
    """The first sample of each step, as the loop takes them."""
    sample = 0
    while sample < horizon.samples:
        yield sample
        end = horizon.trunk if sample < horizon.trunk else horizon.samples
        sample += min(horizon.batch, end - sample)


def rates(recipe, horizon):
    """The learning rate of each step, as shares of the largest."""
    return [learning_rate(recipe, horizon, sample) / PEAK for sample in starts(horizon)]


# --- length -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tokens", "samples"), [(1, 1), (31, 1), (32, 1), (33, 2), (1280, 40), (1281, 41)], ids=lambda value: str(value)
)
def test_tokens_are_rounded_up_to_whole_sequences(recipe, tokens, samples):
    horizon = horizon_of(recipe, tokens)
    assert horizon.samples == samples
    assert horizon.tokens == 32 * samples


@pytest.mark.parametrize(("batch_tokens", "batch"), [(32, 1), (63, 1), (64, 2), (128, 4), (130, 4)])
def test_a_batch_is_whole_sequences(recipe_of, batch_tokens, batch):
    assert horizon_of(recipe_of(train={"batch_tokens": batch_tokens}), 3200).batch == batch


@pytest.mark.parametrize(
    ("samples", "decay_fraction", "trunk"),
    [(40, 0.25, 28), (40, 0.3, 28), (40, 0.5, 20), (40, 1.0, 0), (41, 0.2, 32), (5, 0.2, 4), (3, 0.2, 0), (1, 0.5, 0)],
)
def test_the_trunk_is_whole_batches_and_leaves_at_least_the_decay(schedule_of, samples, decay_fraction, trunk):
    _, horizon = schedule_of(samples, decay_fraction=decay_fraction)
    assert horizon.trunk == trunk
    assert horizon.samples - trunk >= samples * decay_fraction


def test_a_constant_schedule_is_trunk_all_the_way(schedule_of):
    _, horizon = schedule_of(40, schedule="constant")
    assert horizon.trunk == horizon.samples == 40


# --- step sizes -------------------------------------------------------------------------------------------------------


def test_warmup_is_linear_and_ends_at_the_peak(schedule_of):
    found = rates(*schedule_of(40, warmup_steps=4, schedule="constant"))
    assert found == pytest.approx([0.25, 0.5, 0.75, 1, 1, 1, 1, 1, 1, 1])


def test_decay_is_linear_towards_zero(schedule_of):
    found = rates(*schedule_of(40, decay_fraction=0.5))
    assert found == pytest.approx([1, 1, 1, 1, 1, 1, 0.8, 0.6, 0.4, 0.2])


def test_a_run_may_decay_from_its_first_step(schedule_of):
    assert rates(*schedule_of(16, decay_fraction=1.0)) == pytest.approx([1, 0.75, 0.5, 0.25])


def test_a_constant_rate_stays(schedule_of):
    assert rates(*schedule_of(41, schedule="constant")) == [1] * 11


def test_a_warmup_longer_than_the_run_never_reaches_the_peak(schedule_of):
    assert rates(*schedule_of(12, warmup_steps=100, schedule="constant")) == pytest.approx([0.01, 0.02, 0.03])


def test_warmup_that_reaches_into_the_decay_is_multiplied_with_it(schedule_of):
    found = rates(*schedule_of(16, warmup_steps=4, decay_fraction=0.5))
    assert found == pytest.approx([0.25, 0.5, 0.75 * 1, 1 * 0.5])


def test_the_last_batch_may_be_smaller(schedule_of):
    recipe, horizon = schedule_of(42, decay_fraction=0.5)
    assert list(starts(horizon))[-1] == 40
    assert rates(recipe, horizon)[-1] == pytest.approx(2 / (42 - 20))


# --- horizons ---------------------------------------------------------------------------------------------------------


def test_runs_to_different_horizons_are_the_same_run_up_to_the_decay(schedule_of):
    train = {"warmup_steps": 3, "decay_fraction": 0.25}
    short, long = schedule_of(42, **train), schedule_of(160, **train)
    common = [sample for sample in starts(short[1]) if sample < short[1].trunk]
    assert common == list(starts(long[1]))[: len(common)]
    assert rates(*short)[: len(common)] == rates(*long)[: len(common)]


@settings(derandomize=True, deadline=None, max_examples=200)
@given(
    tokens=st.integers(1, 50_000),
    batch_tokens=st.integers(32, 2_000),
    warmup=st.integers(0, 60),
    decay=st.floats(1e-9, 1),
)
def test_every_schedule_visits_every_sample_once_with_a_legal_rate(recipe_of, tokens, batch_tokens, warmup, decay):
    train = {"batch_tokens": batch_tokens, "warmup_steps": warmup, "decay_fraction": decay, "learning_rate": PEAK}
    recipe = recipe_of(train=train)
    horizon = horizon_of(recipe, tokens)
    assert horizon.trunk % horizon.batch == 0
    steps = [*starts(horizon), horizon.samples]
    assert all(0 < after - before <= horizon.batch for before, after in pairwise(steps))
    found = rates(recipe, horizon)
    assert all(0 < rate <= 1 + 1e-12 for rate in found)
    peak = found.index(max(found))
    assert found[peak:] == sorted(found[peak:], reverse=True)
