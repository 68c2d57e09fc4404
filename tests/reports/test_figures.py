from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import plotly.graph_objects as go
import pytest
from plotly.utils import PlotlyJSONEncoder

from fitness.objectives import Objective
from fitness.trial import Rung, Trial
from reports.figures import FIGURES
from reports.figures.curves import POINTS, read_curve
from reports.figures.front import front, views
from reports.figures.genes import genes
from reports.figures.mix import MAX_BARS, mixes, triangle
from reports.figures.progress import over_flops, over_results, spent
from reports.figures.style import MAX_POINTS, objective_axis, outside, thin, wants_log, words_of
from reports.frame import RunData
from search_spaces.genome import Genome

Made = Callable[..., RunData]


def traces(figure: go.Figure) -> dict[str, Any]:
    return {trace.name: trace for trace in figure.data if trace.name}


def with_genomes(data: RunData, change: Callable[[dict[str, Any], int], None]) -> RunData:
    """The same run with other genomes."""

    def changed(trial: Trial) -> Trial:
        genome = trial.genome
        change(genome, trial.id)
        return replace(trial, frozen=Genome.of(genome))

    trials = {trial.id: changed(trial) for trial in data.trials}
    return replace(data, trials=list(trials.values()), front=[trials[trial.id] for trial in data.front])


@pytest.mark.parametrize("name", FIGURES)
def test_every_figure_is_valid_json_and_needs_no_webgl(name: str, made_up: Made) -> None:
    for data in (made_up(), made_up(1), made_up(30, objectives={"params": "min"})):
        figure = FIGURES[name](data)
        written = json.loads(figure.to_json())
        assert written["layout"]["template"]["layout"]["paper_bgcolor"]
        assert not any(trace["type"].endswith("gl") for trace in written["data"])


@pytest.mark.parametrize("name", FIGURES)
def test_a_run_without_results_has_words_instead_of_figures(name: str, run_of: Made, made_up: Made) -> None:
    failed = [trial for trial in made_up().trials if trial.state in ("failed", "infeasible")]
    for data in (run_of([]), run_of(failed, baseline=None)):
        figure = FIGURES[name](data)
        assert not figure.data
        assert words_of(figure) == figure.layout.annotations[0].text


def test_figures_do_not_depend_on_anything_but_the_data(made_up: Made) -> None:
    for draw in FIGURES.values():
        assert draw(made_up()).to_json() == draw(made_up()).to_json()


class TestFront:
    def test_trials_of_lower_rungs_are_apart_from_dominated_ones(self, made_up: Made) -> None:
        data = made_up()
        drawn = traces(front(data))
        promoted = [trial for trial in data.trials if trial.rung == 1]
        told = [trial for trial in data.trials if trial.rungs]
        assert len(drawn["front"].x) == len(data.front)
        assert len(drawn["front"].x) + len(drawn["dominated"].x) == len(promoted)
        assert len(drawn["lower rungs"].x) == len(told) - len(promoted)
        assert drawn["lower rungs"].marker.symbol == "circle-open"
        assert list(drawn["front"].y) == [trial.metrics["bits_per_byte"] for trial in data.front]
        assert list(drawn["front"].x) == [trial.metrics["params"] for trial in data.front]

    def test_no_result_lies_beyond_the_line(self, made_up: Made) -> None:
        for objectives in (
            {"bits_per_byte": "min", "params": "min"},
            {"bits_per_byte": "min", "tokens_per_second": "max"},
        ):
            data = made_up(objectives=objectives)
            line = front(data).data[1]
            across = data.objectives[1]
            corners = [(across.sign * x, y) for x, y in zip(line.x, line.y, strict=True)]
            for trial in data.trials:
                if trial.rung == 1:
                    point = (across.sign * trial.metrics[across.metric], trial.metrics["bits_per_byte"])
                    assert any(x <= point[0] and y <= point[1] for x, y in corners)
                    assert not any(x > point[0] and y > point[1] for x, y in corners[2:-2:2])

    def test_the_line_and_its_labels_turn_with_the_directions(self, made_up: Made) -> None:
        places = {
            ("min", "min"): "bottom left",
            ("min", "max"): "bottom right",
            ("max", "min"): "top left",
            ("max", "max"): "top right",
        }
        for (up, across), place in places.items():
            data = made_up(objectives={"tokens_per_second": up, "kv_bytes_per_token": across})
            assert traces(front(data))["front"].textposition == place

    def test_params_get_a_logarithmic_axis_and_losses_do_not(self, made_up: Made) -> None:
        figure = front(made_up())
        assert figure.layout.xaxis.type == "log"
        assert figure.layout.yaxis.type == "linear"

    def test_hovering_tells_the_trial_its_objectives_and_genes(self, made_up: Made) -> None:
        data = made_up()
        text = traces(front(data))["front"].hovertext[0]
        best = data.front[0]
        for words in (f"trial {best.id}", "bits_per_byte", "params", "model.d_model", best.operator):
            assert words in text

    def test_labels_leave_room_and_name_the_best_and_the_knee(self, made_up: Made) -> None:
        data = made_up(400)
        labels = [text for text in traces(front(data))["front"].text if text]
        assert {str(data.front[0].id), str(data.knee)} <= set(labels)
        assert len(labels) < len(data.front)

    def test_one_objective_gives_ranks_of_the_highest_rung(self, made_up: Made) -> None:
        data = made_up(objectives={"bits_per_byte": "min"})
        drawn = traces(front(data))
        ranks = sorted(rank for trace in ("best", "others") for rank in drawn[trace].x)
        assert ranks == list(range(1, 1 + sum(trial.rung == 1 for trial in data.trials)))
        assert drawn["best"].y[0] == min(drawn["others"].y.min(), drawn["best"].y[0])

    def test_views_have_every_pair_with_as_many_values_as_points(self, made_up: Made) -> None:
        data = made_up(objectives={"bits_per_byte": "min", "params": "min", "tokens_per_second": "max"})
        given = json.loads(json.dumps(views(data), cls=PlotlyJSONEncoder))
        _, bound, *layers = front(data).data
        assert sorted(given["lines"]) == ["0,1", "0,2", "1,0", "1,2", "2,0", "2,1"]
        assert given["lines"]["1,0"]["x"] == list(bound.x)
        for objective in given["objectives"]:
            assert [len(values) for values in objective["values"]] == [len(layer.x) for layer in layers]


class TestProgress:
    def test_the_line_is_the_hypervolume_after_each_result(self, made_up: Made) -> None:
        data = made_up()
        line = over_results(data).data[0]
        assert list(line.y) == [volume for _, volume in data.hypervolumes]
        assert list(line.x) == list(range(1, len(data.hypervolumes) + 1))
        assert line.line.shape == "hv"

    def test_flops_of_lower_rungs_and_of_failures_are_counted(self, run_of: Made) -> None:
        def trial(number: int, *rungs: Rung, **changes: Any) -> Trial:
            return Trial(id=number, frozen=Genome.of({"x": number}), rungs=rungs, **changes)

        def rung(level: int, flops: float, seq: int) -> Rung:
            metrics = {"bits_per_byte": 2.0 - seq / 100, "params": 1e6}
            return Rung(rung=level, tokens=1, metrics=metrics, flops=flops, seconds=1, seq=seq)

        trials = [
            trial(1, rung(0, 1.0, 3), rung(1, 4.0, 9), state="complete", flops=7.0, ended=9),  # a launch of 2 was lost
            trial(2, rung(0, 10.0, 5), state="paused", flops=10.0),
            trial(3, state="failed", reason="oom", flops=100.0, ended=7),
            trial(4, rung(0, 1000.0, 11), rung(1, 1.0, 12), state="complete", flops=1001.0, ended=12),
        ]
        data = run_of(trials, genes=[("x",)], baseline=None)
        assert spent(data).tolist() == [1 + 10 + 100 + 4 + 2, 1 + 10 + 100 + 4 + 2 + 1001]
        assert "10³" in over_flops(data).layout.xaxis.title.text

    def test_one_objective_shows_its_best_value(self, made_up: Made) -> None:
        for direction, best in (("min", np.minimum), ("max", np.maximum)):
            data = made_up(objectives={"tokens_per_second": direction})
            told = [trial.metrics["tokens_per_second"] for trial, _ in data.hypervolumes]
            assert over_results(data).data[0].y.tolist() == best.accumulate(told).tolist()


class TestCurves:
    def test_a_promoted_trial_gives_two_pieces(self, made_up: Made) -> None:
        data = made_up()
        curve = read_curve(data.curves[1])
        gaps = np.flatnonzero(np.isnan(curve[:, 0]))
        assert len(gaps) == 1
        assert curve[gaps[0] + 1, 0] < curve[gaps[0] - 1, 0]

    def test_what_is_no_number_is_a_gap_or_is_left_out(self) -> None:
        lines: list[dict[str, Any]] = [
            {"tokens": 1, "loss": 3.0},
            {"tokens": 2, "loss": math.nan},
            {"tokens": 3, "loss": "high"},
            {"tokens": "many", "loss": 2.0},
            {"tokens": 4, "loss": 2.5},
            {"rung": 0, "tokens": 4, "bits_per_byte": 1.0},
            {"tokens": 5, "loss": True},
        ]
        curve = read_curve(lines)
        assert curve[:, 0].tolist() == [1, 2, 3, 4, 5]
        assert np.isnan(curve[:, 1]).tolist() == [False, True, True, False, True]
        assert len(read_curve([{"tokens": 1, "loss": math.inf}])) == 0
        assert len(read_curve([])) == 0

    def test_long_curves_are_thinned_but_keep_their_ends_and_gaps(self, made_up: Made) -> None:
        data = made_up(300, lines=500)
        figure = FIGURES["curves"](data)
        assert sum(len(trace.x) for trace in figure.data) < 3 * POINTS
        drawn = traces(figure)["baseline"]
        assert drawn.x[0] == data.curves[1][0]["tokens"]
        assert 4_000_000 in drawn.x
        assert np.isnan(drawn.x).sum() == 2

    def test_one_line_is_drawn_as_a_point(self, made_up: Made) -> None:
        data = made_up(1, curves={1: [{"tokens": 5, "loss": 2.0}]})
        assert traces(FIGURES["curves"](data))["baseline"].mode == "markers"


class TestMix:
    def test_bars_are_sorted_and_add_up_to_one(self, made_up: Made) -> None:
        data = made_up()
        figure = mixes(data)
        bars = [trace for trace in figure.data if trace.type == "bar"]
        assert [bar.name for bar in bars] == ["books", "code", "web"]
        assert np.allclose(sum(bar.y for bar in bars), 1, atol=1e-5)
        losses = {str(trial.id): trial.metrics["bits_per_byte"] for trial in data.trials if trial.rung == 1}
        assert list(bars[0].x) == sorted(losses, key=lambda number: losses[number])
        assert set(traces(figure)["front"].x) == {str(trial.id) for trial in data.front}

    def test_only_the_best_are_drawn(self, made_up: Made) -> None:
        assert len(mixes(made_up(600)).data[0].x) == MAX_BARS

    def test_a_triangle_needs_three_parts(self, made_up: Made) -> None:
        assert triangle(made_up()).data[0].type == "scatterternary"
        assert "three" in str(words_of(triangle(made_up(sources=("a", "b")))))

    def test_more_parts_than_colours_get_patterns(self, made_up: Made) -> None:
        bars = [trace for trace in mixes(made_up(sources=[f"s{i}" for i in range(12)])).data if trace.type == "bar"]
        looks = {(bar.marker.color, bar.marker.pattern.shape) for bar in bars}
        assert len(looks) == 12

    def test_a_conditional_mix_is_drawn_where_it_is_there(self, made_up: Made) -> None:
        def drop(genome: dict[str, Any], number: int) -> None:
            if number % 2:
                genome["data"]["mix"] = None

        figure = mixes(with_genomes(made_up(), drop))
        assert all(int(number) % 2 == 0 for number in figure.data[0].x)

    def test_a_group_of_settings_is_no_mix(self, made_up: Made) -> None:
        def group(genome: dict[str, Any], number: int) -> None:
            genome["data"]["mix"] = {"depth": 4 + number % 2, "width": 64}

        data = with_genomes(made_up(), group)
        assert words_of(mixes(data)) is not None
        assert any("data.mix" in note.text for note in genes(data).layout.annotations)


class TestGenes:
    def test_a_panel_for_each_gene_that_changes(self, made_up: Made) -> None:
        titles = [note.text for note in genes(made_up()).layout.annotations]
        assert titles == [
            "data.tokenizer.vocab_size",
            "model.d_model",
            "model.n_layers",
            "mean of model.n_heads",
            "model.ffn",
            "train.learning_rate",
            "train.batch_tokens",
        ]

    def test_a_gene_that_never_changes_is_left_out(self, made_up: Made) -> None:
        def fix(genome: dict[str, Any], number: int) -> None:
            genome["model"]["ffn"] = "swiglu"

        titles = [note.text for note in genes(with_genomes(made_up(), fix)).layout.annotations]
        assert "model.ffn" not in titles

    def test_trials_without_a_value_are_left_out_of_the_panel(self, made_up: Made) -> None:
        def drop(genome: dict[str, Any], number: int) -> None:
            if number % 2:
                genome["train"]["learning_rate"] = None

        assert "train.learning_rate" in [note.text for note in genes(with_genomes(made_up(), drop)).layout.annotations]

    def test_few_results_of_the_highest_rung_give_way_to_many_of_a_lower_one(self, made_up: Made) -> None:
        few, many = genes(made_up(24)), genes(made_up(60))
        count = [sum(len(trace.x) for trace in figure.data if trace.xaxis == "x") for figure in (few, many)]
        assert count == [sum(bool(trial.rungs) for trial in made_up(24).trials), 18]


class TestAxes:
    def test_logarithmic_for_wide_positive_values_and_for_counts(self) -> None:
        assert wants_log(np.array([1.0, 20.0]))
        assert not wants_log(np.array([1.5, 20.0]))
        assert wants_log(np.array([1.5, 200.0]))
        assert not wants_log(np.array([-1.0, 1000.0]))
        assert not wants_log(np.array([]))

    @pytest.mark.parametrize("direction", ["min", "max"])
    def test_a_trial_that_is_far_off_stays_outside_the_first_view(self, direction: str) -> None:
        goal = Objective("loss", direction)
        values = np.append(np.linspace(2, 3, 50), [60.0 if direction == "min" else -60.0])
        axis = objective_axis(goal, values)
        assert outside(axis, values) == 1
        assert outside(objective_axis(goal, values[:-1]), values[:-1]) == 0
        assert axis["range"][0] < axis["range"][1]
        assert outside(objective_axis(goal, values, values[-1:]), values) == 0

    def test_a_few_values_beside_many_equal_ones_are_not_cut_off(self) -> None:
        assert "range" not in objective_axis(Objective("loss"), np.array([1.0] * 50 + [1.5, 1.6]))

    def test_equal_values_have_room_around_them(self) -> None:
        assert objective_axis(Objective("loss"), np.array([2.0, 2.0]))["range"] == [1.8, 2.2]
        assert objective_axis(Objective("loss"), np.array([0.0]))["range"] == [-1.0, 1.0]

    def test_thinning_keeps_the_ends(self) -> None:
        assert thin([1, 2, 3]) == [1, 2, 3]
        kept = thin(list(range(10_000)))
        assert len(kept) == MAX_POINTS == len(set(kept))
        assert (kept[0], kept[-1]) == (0, 9999)
