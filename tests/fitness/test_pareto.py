"""Guards the Pareto maths: against closed forms, and against slow definitions on random points."""

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fitness import pareto
from fitness.pareto import (
    Normaliser,
    adds_most,
    as_ranks,
    best,
    contributions,
    crowding,
    hypervolume,
    knee,
    nondominated,
    ranks,
)

properties = settings(deadline=None, derandomize=True, max_examples=100)


def points(*rows):
    return np.array(rows, dtype=float).reshape(len(rows), -1)


def random_points(most, objectives=st.integers(1, 4)):
    """Up to `most` points on a coarse grid: ties and duplicates are common."""

    def rows(width):
        row = st.lists(st.integers(0, 6), min_size=width, max_size=width)
        return st.lists(row, min_size=1, max_size=most).map(lambda rows: np.array(rows, dtype=float))

    return objectives.flatmap(rows)


def dominates(one, other):
    return bool(np.all(one <= other) and np.any(one < other))


def volume(points, reference):
    """The volume of a union of boxes by inclusion and exclusion: exact, and slow."""
    total = 0.0
    for size in range(1, len(points) + 1):
        for chosen in combinations(points, size):
            sides = np.maximum(reference - np.max(chosen, axis=0), 0)
            total += (-1) ** (size + 1) * np.prod(sides)
    return total


# --- hypervolume ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "reference", "expected"),
    [
        ([[1]], [4], 3),
        ([[2], [1], [3]], [4], 3),
        ([[1, 2]], [4, 4], 3 * 2),
        ([[1, 3], [2, 2], [3, 1]], [4, 4], 1 + 2 + 3),
        ([[1, 2, 3]], [4, 4, 4], 3 * 2 * 1),
        ([[0, 0, 2], [2, 2, 0]], [3, 3, 3], 9 * 1 + 1 * 3 - 1),
        ([[0, 0.5, 0.5], [0.5, 0, 0.5], [0.5, 0.5, 0]], [1, 1, 1], 3 / 4 - 3 / 8 + 1 / 8),
        ([[-3, -2]], [0, 0], 6),
    ],
)
def test_the_volume_of_a_few_boxes(rows, reference, expected):
    assert hypervolume(points(*rows), reference) == pytest.approx(expected)


@pytest.mark.parametrize("steps", [1, 4, 50])
def test_the_volume_of_a_staircase_on_a_line(steps):
    """Points (i/n, 1 - i/n) cover the triangle above the line without half of each of the n steps."""
    x = np.arange(steps + 1) / steps
    assert hypervolume(np.column_stack([x, 1 - x]), [1, 1]) == pytest.approx((steps - 1) / (2 * steps))


@pytest.mark.parametrize("dimensions", [2, 3, 4, 5])
def test_the_volume_of_the_corners_of_a_simplex(dimensions):
    """Corner i has 0 in place i and 1/2 elsewhere: each box adds 2^-d to the cube of side 1/2 that all share."""
    corners = 0.5 * (1 - np.eye(dimensions))
    cube = 0.5**dimensions
    assert hypervolume(corners, [1] * dimensions) == pytest.approx(cube + dimensions * cube)


@properties
@given(random_points(most=6))
def test_the_volume_agrees_with_inclusion_and_exclusion(drawn):
    reference = np.full(drawn.shape[1], 5.0)
    assert hypervolume(drawn, reference) == pytest.approx(volume(drawn, reference))


@properties
@given(random_points(most=8))
def test_a_dominated_point_adds_no_volume(drawn):
    worse = drawn[:1] + 1
    reference = [10.0] * drawn.shape[1]
    assert hypervolume(np.vstack([drawn, worse]), reference) == pytest.approx(hypervolume(drawn, reference))


@properties
@given(random_points(most=8), st.randoms(use_true_random=False))
def test_the_order_of_points_does_not_matter(drawn, random):
    shuffled = drawn[random.sample(range(len(drawn)), len(drawn))]
    reference = [10.0] * drawn.shape[1]
    assert hypervolume(shuffled, reference) == pytest.approx(hypervolume(drawn, reference))


@pytest.mark.parametrize("rows", [[[5, 1]], [[4, 4]], [[1, 9], [9, 1]]])
def test_points_beyond_the_reference_add_nothing(rows):
    assert hypervolume(points(*rows), [4, 4]) == 0


def test_no_points_have_no_volume():
    assert hypervolume(np.zeros((0, 2)), [1, 1]) == 0


# --- fronts -----------------------------------------------------------------------------------------------------------


@properties
@given(random_points(most=12))
def test_the_front_is_what_nothing_dominates(drawn):
    expected = [not any(dominates(other, one) for other in drawn) for one in drawn]
    assert nondominated(drawn).tolist() == expected


@properties
@given(random_points(most=12))
def test_ranks_peel_one_front_after_the_other(drawn):
    front = ranks(drawn)
    for rank in range(front.max() + 1):
        left = drawn[front >= rank]
        assert nondominated(left).tolist() == (front[front >= rank] == rank).tolist()


def test_with_one_objective_the_ranks_are_its_order():
    assert ranks(points(3, 1, 2, 1)).tolist() == [2, 0, 1, 0]


def test_equal_points_are_on_the_front_together():
    assert nondominated(points([1, 2], [2, 1], [1, 2], [2, 2])).tolist() == [True, True, True, False]


def test_no_points_have_no_front():
    nothing = np.zeros((0, 3))
    assert (len(nondominated(nothing)), len(ranks(nothing)), len(contributions(nothing, [1, 1, 1]))) == (0, 0, 0)


# --- contributions ----------------------------------------------------------------------------------------------------


@properties
@given(random_points(most=6))
def test_a_contribution_to_a_front_is_the_volume_that_is_lost_with_the_point(drawn):
    front, reference = drawn[nondominated(drawn)], np.full(drawn.shape[1], 5.0)
    whole = volume(front, reference)
    lost = [whole - volume(np.delete(front, i, axis=0), reference) for i in range(len(front))]
    assert contributions(front, reference) == pytest.approx(lost)


@properties
@given(random_points(most=10, objectives=st.integers(2, 4)))
def test_dominated_points_contribute_nothing(drawn):
    assert not contributions(drawn, [10.0] * drawn.shape[1])[~nondominated(drawn)].any()


def test_contributions_to_a_staircase():
    assert contributions(points([1, 3], [2, 2], [3, 1], [3, 3]), [4, 4]).tolist() == [1, 1, 1, 0]


def test_with_one_objective_a_point_contributes_its_distance_to_the_reference():
    assert contributions(points(1), [4]).tolist() == [3]
    assert contributions(points(6), [4]).tolist() == [0]


# --- what to go on with, and the knee ---------------------------------------------------------------------------------


@properties
@given(random_points(most=10), random_points(most=10))
def test_what_adds_most_adds_most(taken, waiting):
    size = min(taken.shape[1], waiting.shape[1])
    both = as_ranks(np.vstack([taken[:, :size], waiting[:, :size]]))
    taken, waiting = both[: len(taken)], both[len(taken) :]
    if len(waiting) == 0:
        return
    chosen = adds_most(taken, waiting)
    reference = [1.1] * size
    gains = [hypervolume(np.vstack([taken, waiting[i : i + 1]]), reference) for i in range(len(waiting))]
    assert gains[chosen] == pytest.approx(max(gains))


def test_where_nothing_is_added_the_better_one_is_taken():
    assert adds_most(points([0.0, 0.0]), points([0.5, 0.5], [0.2, 0.3], [1.0, 0.1])) == 1


def test_with_one_objective_the_best_is_taken():
    assert adds_most(points(0.5), points(0.9, 0.7, 0.8)) == 1


@properties
@given(random_points(most=8))
def test_ranks_do_not_depend_on_units_and_keep_the_order(drawn):
    ranked = as_ranks(drawn)
    assert np.array_equal(ranked, as_ranks(drawn * 2.0 ** np.arange(drawn.shape[1])))
    assert np.all((ranked >= 0) & (ranked <= 1))
    for column in range(drawn.shape[1]):
        before, after = drawn[:, column], ranked[:, column]
        assert np.array_equal(before[:, None] < before, after[:, None] < after)


def test_the_knee_is_farthest_below_the_line_between_the_extremes():
    assert knee(points([0, 10], [2, 3], [5, 2], [10, 0], [11, 11])) == 1


def test_the_knee_does_not_depend_on_units():
    assert knee(points([0, 10], [2, 3], [5, 2], [10, 0]) * [1, 1e9]) == 1


@pytest.mark.parametrize("rows", [[[1, 2]], [[1, 2], [2, 1]], [[1, 1], [2, 2], [3, 3]]])
def test_a_front_of_less_than_three_has_no_knee(rows):
    assert knee(points(*rows)) is None


# --- crowding ---------------------------------------------------------------------------------------------------------


def test_who_dominates_whom():
    rows = np.random.default_rng(4).integers(0, 3, (20, 2)).astype(float)  # with ties
    table = pareto.dominates(rows)
    assert all(table[i, j] == dominates(rows[i], rows[j]) for i in range(20) for j in range(20))


def test_crowding_is_that_of_deap():
    from deap import base
    from deap.tools.emo import assignCrowdingDist

    rows = np.random.default_rng(5).random((40, 3))
    fitness = type("Fitness", (base.Fitness,), {"weights": (-1.0,) * 3})
    reference = []
    for row in rows:
        one = type("One", (), {})()
        one.fitness = fitness(tuple(row))
        reference.append(one)
    assignCrowdingDist(reference)
    expected = np.array([one.fitness.crowding_dist for one in reference]) * 3  # DEAP takes the mean over objectives
    np.testing.assert_allclose(crowding(rows), expected)


def test_crowding_of_points_that_are_all_alike_prefers_none():
    assert list(crowding(points([1, 2], [1, 2], [1, 2]))) == [0, 0, 0]
    assert len(crowding(np.zeros((0, 2)))) == 0


@pytest.mark.parametrize("count", [0, 1, 5, 17, 40, 60])
def test_the_best_are_whole_fronts_and_the_ends_of_the_last(count):
    rows = np.random.default_rng(6).random((40, 2))
    chosen, front = best(rows, count), ranks(rows)
    assert len(set(chosen)) == len(chosen) == min(count, 40)
    if 0 < count < 40:
        worst = front[chosen].max()
        assert set(np.flatnonzero(front < worst)) <= set(chosen)
        edge = [i for i in chosen if front[i] == worst]
        left = [i for i in np.flatnonzero(front == worst) if i not in set(chosen)]
        distance = dict(zip(np.flatnonzero(front == worst), crowding(rows[front == worst]), strict=True))
        assert all(distance[i] >= distance[j] for i in edge for j in left)


# --- bounds that do not move ------------------------------------------------------------------------------------------


def test_the_best_and_the_worst_of_the_first_points_become_0_and_1():
    normaliser = Normaliser(points([2, 10], [4, 1000]), log=[False, True])
    assert normaliser.hypervolume(points([2, 10])) == pytest.approx(1.1 * 1.1)
    assert normaliser.hypervolume(points([4, 1000])) == pytest.approx(0.1 * 0.1)
    assert normaliser.hypervolume(points([3, 100])) == pytest.approx(0.6 * 0.6)


def test_later_points_do_not_move_the_bounds():
    normaliser = Normaliser(points([0, 0], [1, 1]), log=[False, False])
    assert normaliser.hypervolume(points([-1, -1])) == pytest.approx(2.1 * 2.1)
    assert normaliser.hypervolume(points([2, -1])) == 0


def test_values_that_are_not_all_positive_stay_linear():
    normaliser = Normaliser(points([0], [10]), log=[True])
    assert normaliser.hypervolume(points([5])) == pytest.approx(0.6)


def test_an_objective_that_never_varied_is_neither_good_nor_bad():
    assert Normaliser(points([3, 1], [3, 2]), log=[False, False]).hypervolume(points([3, 1])) == pytest.approx(1.21)


def test_nothing_has_no_normalised_volume():
    assert Normaliser(points([1, 2]), log=[False, False]).hypervolume(np.zeros((0, 2))) == 0
