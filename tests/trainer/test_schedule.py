"""Guards the length and the step sizes of a run: what is before the decay is the same run to every horizon."""

import math
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
        sample += horizon.count(sample)


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


@pytest.mark.parametrize(
    ("schedule", "shape"),
    [
        ("cosine", lambda done: (1 + math.cos(math.pi * done)) / 2),
        ("linear", lambda done: 1 - done),
        ("polynomial", lambda done: (1 - done) ** 3),
    ],
)
@pytest.mark.parametrize("final", [0.0, 0.1])
def test_what_decays_from_the_start_has_no_trunk_and_falls_after_the_warmup(schedule_of, schedule, shape, final):
    train = {"schedule": schedule, "decay_power": 3.0, "final_fraction": final, "warmup_steps": 2}
    recipe, horizon = schedule_of(40, **train)
    assert horizon.trunk == 0
    falling = [final + (1 - final) * shape(step / 8) for step in range(8)]
    assert rates(recipe, horizon) == pytest.approx([0.5, 1.0, *falling])


@pytest.mark.parametrize("warmup", [10, 50])
def test_a_schedule_that_is_all_warmup_never_decays(schedule_of, warmup):
    found = rates(*schedule_of(40, schedule="cosine", warmup_steps=warmup))
    assert found == pytest.approx([(step + 1) / warmup for step in range(10)])


def test_wsd_ends_near_its_final_share(schedule_of):
    found = rates(*schedule_of(40, decay_fraction=0.5, final_fraction=0.2))
    assert found == pytest.approx([1, 1, 1, 1, 1, 1, 0.84, 0.68, 0.52, 0.36])


# --- growing batches and sequences ------------------------------------------------------------------------------------


def test_batches_double_over_the_ramp_in_whole_steps(schedule_of):
    """Batches of 1, 2 and 4 to one of 8 sequences: a third each of 48 sequences, to whole steps."""
    train = {"batch_tokens": 256, "batch_start_tokens": 32, "batch_ramp_tokens": 48 * 32, "schedule": "constant"}
    _, horizon = schedule_of(70, **train)
    assert [horizon.count(sample) for sample in starts(horizon)] == [1] * 16 + [2] * 8 + [4] * 4 + [8, 8, 6]
    assert horizon.trunk == 48 + 2 * 8


def test_the_last_doubling_stops_at_the_whole_batch(schedule_of):
    train = {"batch_tokens": 5 * 32, "batch_start_tokens": 2 * 32, "batch_ramp_tokens": 8 * 32}
    _, horizon = schedule_of(30, **train)
    assert [horizon.count(sample) for sample in starts(horizon)] == [2, 2, 4, 5, 5, 5, 5, 2]


def test_warmup_counts_steps_whatever_their_batch(schedule_of):
    train = {"batch_tokens": 128, "batch_start_tokens": 32, "batch_ramp_tokens": 8 * 32, "schedule": "constant"}
    recipe, horizon = schedule_of(32, warmup_steps=8, **train)
    assert [horizon.count(sample) for sample in starts(horizon)] == [1] * 4 + [2] * 2 + [4] * 6
    assert rates(recipe, horizon) == pytest.approx([min(1, (step + 1) / 8) for step in range(12)])


def test_a_decay_from_the_start_begins_after_the_warmup_in_a_ramp_too(schedule_of):
    train = {"batch_tokens": 128, "batch_start_tokens": 32, "batch_ramp_tokens": 8 * 32, "schedule": "linear"}
    found = rates(*schedule_of(32, warmup_steps=5, **train))  # five steps are six samples, 26 are left
    assert found[5:] == pytest.approx([left / 26 for left in (26, 24, 20, 16, 12, 8, 4)])


def test_sequences_double_over_their_ramp_between_steps(schedule_of):
    train = {"sequence_start": 8, "sequence_ramp_tokens": 18 * 32}
    _, horizon = schedule_of(40, **train)
    lengths = [horizon.length(sample) for sample in range(40)]
    assert lengths == [8] * 12 + [16] * 8 + [32] * 20  # at 9 and 18 samples, that is, with the next batch of four
    assert list(horizon.spans(0, 40)) == [(12, 8), (8, 16), (20, 32)]
    assert list(horizon.spans(5, 13)) == [(7, 8), (1, 16)]
    assert list(horizon.spans(21, 21)) == []


def test_a_ramp_shorter_than_a_step_is_over_with_it(schedule_of):
    _, horizon = schedule_of(40, sequence_start=8, sequence_ramp_tokens=32)
    assert [(phase.sample, phase.length) for phase in horizon.sequences] == [(0, 8), (4, 32)]


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
    assert [horizon.step(sample) for sample in steps[:-1]] == list(range(len(steps) - 1))
    assert all(0 < after - before <= horizon.batch for before, after in pairwise(steps))
    found = rates(recipe, horizon)
    assert all(0 < rate <= 1 + 1e-12 for rate in found)
    peak = found.index(max(found))
    assert found[peak:] == sorted(found[peak:], reverse=True)


RAMPS = st.fixed_dictionaries(
    {
        "batch_tokens": st.integers(32, 2_000),
        "warmup_steps": st.integers(0, 60),
        "decay_fraction": st.floats(0.01, 1),
    },
    optional={"batch": st.tuples(st.floats(0, 1), st.integers(1, 20_000)), "sequence": st.integers(1, 20_000)},
)


@settings(derandomize=True, deadline=None, max_examples=200)
@given(ramps=RAMPS, short=st.integers(1, 30_000), more=st.integers(0, 30_000))
def test_growing_runs_to_different_horizons_are_the_same_run_up_to_the_decay(recipe_of, ramps, short, more):
    train = {key: value for key, value in ramps.items() if key not in ("batch", "sequence")}
    if "batch" in ramps:
        share, ramp = ramps["batch"]
        start = 32 + int(share * (train["batch_tokens"] - 32))
        train |= {"batch_start_tokens": start, "batch_ramp_tokens": ramp}
    if "sequence" in ramps:
        train |= {"sequence_start": 4, "sequence_ramp_tokens": ramps["sequence"]}
    recipe = recipe_of(train=train)
    one, other = horizon_of(recipe, short), horizon_of(recipe, short + more)
    assert one.trunk <= other.trunk
    steps = [*starts(one)]
    assert one.trunk in {0, *steps, one.samples}
    assert [one.step(sample) for sample in steps] == list(range(len(steps)))
    common = [sample for sample in steps if sample < one.trunk]
    assert common == list(starts(other))[: len(common)]
    for sample in common:
        assert one.count(sample) == other.count(sample)
        assert one.length(sample) == other.length(sample)
        assert learning_rate(recipe, one, sample) == learning_rate(recipe, other, sample)
    assert sum(count for count, _ in one.spans(0, one.samples)) == one.samples
