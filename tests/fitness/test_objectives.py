"""Guards what a search optimises: directions, their misspellings, and metrics that are no finite number."""

import math

import numpy as np
import pytest

from fitness.errors import BadMetrics
from fitness.objectives import Objective, check_metrics, minimised, read_objectives
from search_spaces.errors import UsageError

LOSS, PARAMS, SPEED = Objective("loss"), Objective("params"), Objective("tokens_per_second", "max")


def test_a_mapping_names_metrics_and_directions():
    assert read_objectives({"loss": "min", "tokens_per_second": "max"}) == (LOSS, SPEED)


def test_a_list_of_metrics_is_minimised():
    assert read_objectives(["loss", "params"]) == (LOSS, PARAMS)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({}, "objectives: at least one is needed, such as {bits_per_byte: min}"),
        ([], "objectives: at least one is needed, such as {bits_per_byte: min}"),
        ({"loss": "down"}, "objectives.loss: must be min or max, is 'down'"),
        ({"loss": "MIN"}, "objectives.loss: must be min or max, is 'MIN'; did you mean 'min'?"),
        ({"loss": "minimise"}, "objectives.loss: must be min or max, is 'minimise'; did you mean 'min'?"),
        ({"loss": "maximize"}, "objectives.loss: must be min or max, is 'maximize'; did you mean 'max'?"),
        ({"loss": None}, "objectives.loss: must be min or max, is 'None'"),
    ],
)
def test_what_is_no_objective_is_told_in_these_words(given, words):
    with pytest.raises(UsageError) as caught:
        read_objectives(given)
    assert str(caught.value) == words


def test_with_signs_smaller_is_better():
    table = minimised([{"loss": 3, "tokens_per_second": 100}, {"loss": 2, "tokens_per_second": 50}], [LOSS, SPEED])
    assert table.tolist() == [[3, -100], [2, -50]]


@pytest.mark.parametrize("count", [1, 3])
def test_the_table_of_no_trials_has_its_columns(count):
    assert minimised([], [LOSS] * count).shape == (0, count)


def test_good_metrics_become_floats():
    checked = check_metrics({"loss": np.float32(0.5), "params": 7, "seconds": np.int64(3)}, [LOSS])
    assert checked == {"loss": 0.5, "params": 7.0, "seconds": 3.0}
    assert {type(value) for value in checked.values()} == {float}


@pytest.mark.parametrize(
    ("metrics", "words"),
    [
        ({"loss": math.nan}, "metric 'loss' must be finite, is nan"),
        ({"loss": 1, "speed": math.inf}, "metric 'speed' must be finite, is inf"),
        ({"loss": -math.inf}, "metric 'loss' must be finite, is -inf"),
        ({"loss": np.float64("nan")}, "metric 'loss' must be finite, is nan"),
        ({"loss": "low"}, "metric 'loss' must be a number, is 'low'"),
        ({"loss": None}, "metric 'loss' must be a number, is None"),
        ({"loss": [1.0]}, "metric 'loss' must be a number, is [1.0]"),
        ({}, "objective 'loss' is missing from the metrics"),
        ({"los": 3}, "objective 'loss' is missing from the metrics; did you mean 'los'?"),
        ({"accuracy": 3}, "objective 'loss' is missing from the metrics"),
    ],
)
def test_a_bad_metric_is_named(metrics, words):
    with pytest.raises(BadMetrics) as caught:
        check_metrics(metrics, [LOSS])
    assert str(caught.value) == words


def test_a_bad_metric_is_also_a_value_error():
    with pytest.raises(ValueError, match="must be finite"):
        check_metrics({"loss": math.nan}, [LOSS])
