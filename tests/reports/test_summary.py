from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from fitness.objectives import Objective
from fitness.trial import REASONS, Rung, Trial
from reports.compare import best_first, change, results_at, telling_rung, top_rung
from reports.frame import RunData
from reports.reproduce import commands, promote, provenance
from reports.summary import MEANINGS, facts, failures, headline, picks, tiles
from reports.wording import counted, duration, moment, plain, scientific
from search_spaces.genome import Genome

Made = Callable[..., RunData]


def trial(number: int, *losses: float, state: str = "complete") -> Trial:
    rungs = tuple(
        Rung(rung=i, tokens=10.0**i, metrics={"loss": loss}, flops=1, seconds=1, seq=number * 10 + i)
        for i, loss in enumerate(losses)
    )
    return Trial(id=number, frozen=Genome.of({"x": number}), rungs=rungs, state=state)  # type: ignore[arg-type]


class TestCompare:
    def test_trials_compare_at_the_highest_rung_that_both_reached(self) -> None:
        found = change(trial(1, 3.0, 2.0), trial(2, 4.0), Objective("loss"))
        assert found is not None
        assert (found.value, found.other, found.verdict, found.text) == (3.0, 4.0, "better", "−25.0%")

    def test_there_is_no_comparison_without_a_common_rung(self) -> None:
        assert change(trial(1, 3.0), trial(2), Objective("loss")) is None

    @pytest.mark.parametrize(
        ("value", "other", "direction", "verdict", "text"),
        [
            (2.0, 2.0, "min", "same", "no difference"),
            (3.0, 2.0, "max", "better", "+50.0%"),
            (3.0, 1.0, "min", "worse", "+200%"),
            (1.5, 0.0, "min", "worse", "+1.5"),
            (-3.0, -2.0, "min", "better", "−50.0%"),
        ],
    )
    def test_words_of_a_change(self, value: float, other: float, direction: str, verdict: str, text: str) -> None:
        found = change(trial(1, value), trial(2, other), Objective("loss", direction))
        assert found is not None
        assert (found.verdict, found.text) == (verdict, text)

    def test_failed_trials_do_not_count(self, made_up: Made) -> None:
        data = made_up()
        lost = replace(data.trials[0], state="failed")
        assert top_rung(data) == 1
        assert len(results_at(replace(data, trials=[lost, *data.trials[1:]]), 1)) == len(results_at(data, 1)) - 1
        assert top_rung(replace(data, trials=[])) == telling_rung(replace(data, trials=[])) == -1

    def test_best_first_follows_the_direction(self, made_up: Made) -> None:
        results = results_at(made_up(), 1)
        losses = [result.metrics["params"] for result in best_first(results, Objective("params", "max"))]
        assert losses == sorted(losses, reverse=True)


class TestHead:
    def test_headline_of_a_search(self, made_up: Made) -> None:
        words = headline(made_up())
        assert "18 of 60 trials reached the highest rung, 4M tokens" in words
        assert "better than the baseline" in words

    def test_headline_before_anything_reached_the_highest_rung(self, run_of: Made, made_up: Made) -> None:
        begun = [replace(one, rungs=one.rungs[:1], state="paused") for one in made_up(9, failures=False).trials]
        assert "9 of 9 trials reached rung 1, the highest so far, 1M tokens" in headline(run_of(begun))

    def test_headlines_without_a_result(self, run_of: Made, made_up: Made) -> None:
        failed = [one for one in made_up().trials if one.state in ("failed", "infeasible")]
        assert headline(run_of([])) == "Nothing has been tried yet."
        assert headline(run_of(failed)) == "All 6 trials failed; there is no result."
        assert headline(run_of(failed[:1])) == "1 trial failed; there is no result."
        assert headline(run_of([replace(failed[0], state="running")])) == "1 trial so far, none with a result yet."

    def test_headline_when_nothing_beats_the_baseline(self, made_up: Made) -> None:
        assert "of trial 1, the baseline: nothing has beaten it yet." in headline(made_up(1))

    def test_headline_when_the_baseline_stayed_behind(self, made_up: Made) -> None:
        data = made_up()
        first = data.trials[0]
        paused = replace(first, rungs=first.rungs[:1], state="paused")
        words = headline(replace(data, trials=[paused, *data.trials[1:]]))
        assert "(compared at rung 1, the highest that both reached)." in words
        failed = replace(first, rungs=(), state="failed", reason="oom")
        assert "no result to compare it with" in headline(replace(data, trials=[failed, *data.trials[1:]]))

    def test_tiles_count_states_and_failures(self, made_up: Made) -> None:
        data = made_up()
        trials, failed, spent, reached = tiles(data)
        assert trials.lines == ("36 paused", "18 complete", "5 failed", "1 infeasible")
        assert sum(count for _, count in trials.shares) == 60
        assert failed.value == "6"
        assert spent.value == "1 h 33 min"
        assert reached.value == f"{data.hypervolumes[-1][1]:.4f}"

    def test_picks_that_are_one_trial_are_one_pick(self, made_up: Made) -> None:
        assert [pick.roles for pick in picks(made_up(1))] == [("Best", "Knee", "Baseline")]

    def test_picks_tell_what_differs_from_the_baseline(self, made_up: Made) -> None:
        data = made_up(1000)
        best, knee, baseline = picks(data)
        assert [pick.roles for pick in (best, knee, baseline)] == [("Best",), ("Knee",), ("Baseline",)]
        assert best.trial.id == data.front[0].id
        assert best.rows[0].change is not None
        assert best.rows[0].change.verdict == "better"
        assert best.command == f"evolm promote runs/made-up-1 {best.trial.id}"
        assert ("train.learning_rate", "0.0004 → 0.0003438") in best.genes
        assert ("train.learning_rate", "0.0004") in baseline.genes
        assert all(row.change is None for row in baseline.rows)

    def test_a_baseline_without_a_result_is_shown_with_its_reason(self, made_up: Made) -> None:
        data = made_up()
        failed = replace(data.trials[0], rungs=(), state="failed", reason="oom")
        (pick,) = [one for one in picks(replace(data, trials=[failed, *data.trials[1:]])) if "Baseline" in one.roles]
        assert pick.remark == "failed, no result: oom"

    def test_facts_leave_out_what_is_not_known(self, run_of: Made) -> None:
        assert facts(run_of([], settings={}, rungs=[0], began=None)) == ["bits_per_byte min, params min"]

    def test_failures_are_grouped_with_the_first_message(self, made_up: Made) -> None:
        found = {failure.reason: failure for failure in failures(made_up())}
        assert found["crashed"].first.message.startswith("Traceback")
        assert found["infeasible"].count == 1
        assert set(MEANINGS) == {*REASONS, "infeasible"}


class TestReproduce:
    def test_paths_are_quoted_for_the_shell(self, run_of: Made) -> None:
        data = run_of([], path="runs/it's; rm -rf x")
        assert promote(data, "best") == """evolm promote 'runs/it'"'"'s; rm -rf x' best"""
        assert all("rm -rf x" not in text.replace("""'runs/it'"'"'s; rm -rf x""", "") for _, text in commands(data))

    def test_commands_carry_seed_and_budget(self, made_up: Made) -> None:
        assert commands(made_up())[-1][1] == (
            "evolm search runs/made-up-1/space.yaml --algorithm auto --seed 7 --trials 200"
        )

    def test_provenance_leaves_out_places_and_what_is_missing(self, made_up: Made) -> None:
        found = dict(provenance(made_up()))
        assert found["tokenizer sha256"].startswith("894ed0c4")
        assert "479 documents" in found["source code"]
        assert not any("somebody" in value for value in found.values())
        assert provenance(made_up(1, meta={"corpus": None}, settings={})) == []


class TestWording:
    def test_names_lose_tags_entities_and_control_characters(self) -> None:
        assert plain("<b>a</b> & b\n\x1b[0m") == "&lt;b&gt;a&lt;/b&gt; &amp; b [0m"
        assert len(plain("x" * 500)) == 60

    def test_numbers(self) -> None:
        assert [scientific(value) for value in (0, 512, 6.43e12, 1e17)] == ["0", "512", "6.43 × 10¹²", "1 × 10¹⁷"]
        assert [duration(value) for value in (0.5, 93, 5580, 90000, 86400)] == [
            "0.5 s", "1 min 33 s", "1 h 33 min", "1 d 1 h", "1 d",
        ]  # fmt: skip
        assert moment(0) == "1970-01-01 00:00 UTC"
        assert [counted(1, "trial"), counted(2000, "trial")] == ["1 trial", "2,000 trials"]


def test_a_promotion_is_told_with_what_test_text_said(made_up: Made) -> None:
    data = made_up(9)
    assert "Losses are on validation text, by which the search chose, of one seed." in headline(data)
    told = {"trial": 3, "tokens": 2_000_000, "winner": {"test": {"bits_per_byte": 1.9}}}
    judged = replace(data, promotions=[{**told, "baseline": {"test": {"bits_per_byte": 2.0}}}])
    words = "Trial 3, trained on 2M tokens: 1.900 bits per byte on test text, the baseline 2.000 (-5.0%)."
    assert words in headline(judged)
    assert "(it is the baseline)" in headline(replace(data, promotions=[{**told, "baseline": None}]))
