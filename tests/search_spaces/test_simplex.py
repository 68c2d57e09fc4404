"""Guards the weights of a mix: they sum to one between their floors and ceilings, are drawn evenly, and never by trial
and error.
"""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from search_spaces.simplex import draw, project, rounded, step

properties = settings(deadline=None, derandomize=True, max_examples=80)

MILLI = 1000  # bounds of the random simplices below are whole thousandths


@st.composite
def bounds(draw):
    """Floors and ceilings around a random mix of 1 to 30 parts, from wide open to leaving a single point."""
    parts = draw(st.integers(1, 30))
    cuts = sorted(draw(st.lists(st.integers(0, MILLI), min_size=parts - 1, max_size=parts - 1)))
    centre = np.diff([0, *cuts, MILLI])
    down = np.array([draw(st.integers(0, int(share))) for share in centre])
    up = np.array([draw(st.integers(0, MILLI - int(share))) for share in centre])
    return (centre - down) / MILLI, (centre + up) / MILLI


def generator(seed=0):
    return np.random.default_rng(seed)


def assert_legal(weights, floor, ceiling):
    assert weights.sum() == pytest.approx(1, abs=1e-9)
    assert np.all(weights >= floor - 1e-12)
    assert np.all(weights <= ceiling + 1e-12)


def off(sample, distribution):
    """The Kolmogorov-Smirnov distance to a distribution function, as a multiple of its 0.1 % critical value."""
    values = distribution(np.sort(np.asarray(sample, dtype=float)))
    n = len(values)
    gap = max(np.max(np.arange(1, n + 1) / n - values), np.max(values - np.arange(n) / n))
    return gap / (1.95 / math.sqrt(n))


# --- drawing ----------------------------------------------------------------------------------------------------------


@properties
@given(bounds(), st.integers(0, 2**32 - 1))
def test_what_is_drawn_is_legal(limits, seed):
    assert_legal(draw(generator(seed), *limits), *limits)


@pytest.mark.parametrize("parts", [2, 3, 5, 30])
def test_without_ceilings_each_part_is_beta_distributed_above_its_floor(parts):
    """The marginals of Dirichlet(1, ..., 1) over n parts are Beta(1, n - 1)."""
    floor = np.linspace(0, 1 / parts, parts)
    free = 1 - floor.sum()
    rng = generator(parts)
    sample = np.array([draw(rng, floor, np.ones(parts)) for _ in range(1500)])
    for part in range(parts):
        share = (sample[:, part] - floor[part]) / free
        assert off(share, lambda t: 1 - (1 - np.clip(t, 0, 1)) ** (parts - 1)) < 1


def test_two_parts_are_as_independent_as_they_can_be():
    """Given the first part, the share of the second in the rest is uniform for three parts."""
    rng = generator()
    sample = np.array([draw(rng, np.zeros(3), np.ones(3)) for _ in range(3000)])
    share = sample[:, 1] / (1 - sample[:, 0])
    assert off(share, lambda t: t) < 1
    assert abs(np.corrcoef(share, sample[:, 0])[0, 1]) < 0.05


def test_with_ceilings_two_parts_are_drawn_evenly_from_what_is_left():
    rng, floor, ceiling = generator(), np.array([0.1, 0.1]), np.array([0.6, 0.7])
    first = [draw(rng, floor, ceiling)[0] for _ in range(2000)]
    assert off(first, lambda x: np.clip((x - 0.3) / 0.3, 0, 1)) < 1


def test_with_ceilings_no_part_is_favoured():
    rng = generator()
    sample = np.array([draw(rng, np.full(8, 0.05), np.full(8, 0.2)) for _ in range(4000)])
    error = sample.std(axis=0) / math.sqrt(len(sample))
    assert np.all(np.abs(sample.mean(axis=0) - 1 / 8) < 4 * error)


def test_with_ceilings_the_whole_range_is_reached():
    rng = generator()
    sample = np.array([draw(rng, np.zeros(3), np.full(3, 0.5)) for _ in range(2000)])
    assert sample.min() < 0.005
    assert sample.max() > 0.495


def test_a_single_point_is_found():
    floor = np.array([0.5, 0.3, 0.2])
    assert draw(generator(), floor, np.ones(3)).tolist() == [0.5, 0.3, 0.2]


def test_the_same_seed_gives_the_same_weights():
    one, other = (draw(generator(7), np.zeros(9), np.ones(9)) for _ in range(2))
    assert one.tolist() == other.tolist()


class Counting(np.random.Generator):
    """A generator that counts the uniform numbers it gave."""

    uniforms = 0

    def random(self, *arguments, **options):
        self.uniforms += 1
        return super().random(*arguments, **options)


@properties
@given(bounds(), st.integers(0, 2**32 - 1))
def test_nothing_is_ever_rejected(limits, seed):
    rng = Counting(np.random.PCG64(seed))
    draw(rng, *limits)
    assert rng.uniforms < len(limits[0])


def test_thirty_domains_with_floors_and_ceilings_need_29_numbers_a_draw():
    rng = Counting(np.random.PCG64(0))
    floor, ceiling = np.linspace(0.001, 0.02, 30), np.linspace(0.2, 0.05, 30)
    for _ in range(300):
        assert_legal(draw(rng, floor, ceiling), floor, ceiling)
    assert rng.uniforms == 300 * 29


# --- moving -----------------------------------------------------------------------------------------------------------


@properties
@given(bounds(), st.integers(0, 2**32 - 1), st.floats(0.01, 10))
def test_a_step_stays_legal(limits, seed, scale):
    rng = generator(seed)
    assert_legal(step(rng, draw(rng, *limits), *limits, scale), *limits)


def test_a_small_step_stays_near():
    start = np.array([0.5, 0.3, 0.2])
    moved = np.array([step(generator(seed), start, np.zeros(3), np.ones(3), 0.1) for seed in range(200)])
    assert 0.01 < np.abs(moved - start).max(axis=1).mean() < 0.08


def test_a_step_can_wake_a_part_that_has_no_weight():
    assert step(generator(), np.array([0.0, 1.0]), np.zeros(2), np.ones(2), 0.5)[0] > 0


@properties
@given(bounds(), st.lists(st.floats(0, 1e6), min_size=30, max_size=30))
def test_any_weights_can_be_projected(limits, weights):
    assert_legal(project(np.array(weights[: len(limits[0])]), *limits), *limits)


def test_a_projection_keeps_the_ratios_between_parts_that_touch_no_bound():
    weights = project(np.array([1.0, 2.0, 4.0, 100.0]), np.zeros(4), np.array([1, 1, 1, 0.3]))
    assert weights == pytest.approx([0.1, 0.2, 0.4, 0.3], abs=1e-6)


def test_a_projection_lifts_what_is_below_its_floor():
    assert project(np.array([0.0, 1.0, 1.0]), np.full(3, 0.1), np.ones(3)) == pytest.approx([0.1, 0.45, 0.45])


@properties
@given(bounds(), st.integers(0, 2**32 - 1))
def test_what_is_legal_is_projected_to_itself(limits, seed):
    weights = draw(generator(seed), *limits)
    assert project(weights, *limits) == pytest.approx(weights, abs=2e-6)


# --- rounding ---------------------------------------------------------------------------------------------------------


@properties
@given(bounds(), st.integers(0, 2**32 - 1))
def test_rounding_keeps_millionths(limits, seed):
    weights = draw(generator(seed), *limits)
    assert np.abs(weights * 1e6 - np.round(weights * 1e6)).max() < 1e-5


@properties
@given(bounds(), st.integers(0, 2**32 - 1))
def test_rounding_again_changes_nothing(limits, seed):
    weights = draw(generator(seed), *limits)
    assert rounded(weights, *limits).tolist() == weights.tolist()


def test_rounding_a_third_gives_the_rest_to_one_part():
    assert sorted(rounded(np.full(3, 1 / 3), np.zeros(3), np.ones(3)).tolist()) == [0.333333, 0.333333, 0.333334]
