"""A run played again: proposals that follow from the ledger, and what other orders find in a table of results."""

from __future__ import annotations

import json
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import evolm as package
from evolm.algorithms import BUILT_IN
from evolm.algorithms.base import History, Proposal
from evolm.config import load_space
from evolm.errors import GateError, Problem, SpaceError, UsageError
from evolm.replay import SHARES, Comparison, compare, verify
from evolm.run import Run
from evolm.run_folder import RunFolder
from evolm.search import Search
from fitness.ledger import Ledger
from fitness.objectives import minimised
from fitness.pareto import Normaliser
from fitness.repair import repair
from search_spaces import Genome, Space
from search_spaces.genes import Rng
from trainer import cost

Change = Callable[[int, Proposal], Proposal]
"""What is written down as a trial, in place of what was proposed."""


def loss(run_space: Space, genome: Genome) -> float:
    """Smooth: how far a genome is from the best one."""
    return 1 + run_space.distance(genome, best_of(run_space))


def best_of(space: Space) -> Genome:
    return space.complete({"train": {"learning_rate": 2e-2}, "data": {"mix": {"web": 0.05, "code": 0.95}}})


def made(
    folder: Path,
    text: str,
    trials: int,
    *,
    algorithm: str = "random",
    metrics: Callable[[Space, int, Genome], dict[str, float]] = lambda space, _, g: {"bits_per_byte": loss(space, g)},
    change: Change = lambda number, proposal: proposal,
    versions: dict[str, str] | None = None,
    on_disk: bool = False,
) -> Run:
    """A run of one rung whose results are made up."""
    folder.mkdir()
    (folder / "space.yaml").write_text(
        text.replace("[512, 2048], eta: 4", "512").replace(
            "version: 1", f"version: 1\nsearch: {{algorithm: {algorithm}}}"
        )
    )
    file = load_space(folder / "space.yaml")
    ledger = Ledger.create(folder / "ledger.db" if on_disk else None, {"settings": file.settings.as_dict()})
    ledger.open_session({"versions": versions or {}})
    search = Search(
        file.space, file.settings.objectives, algorithm=algorithm, fidelity=file.settings.fidelity, ledger=ledger
    )
    for number in range(1, trials + 1):
        seen = ledger.seq
        proposal = change(number, search.propose(number, seen))
        trial = ledger.propose(proposal.genome, parents=proposal.parents, operator=proposal.operator, seen=seen)
        ledger.start(trial.id, 0, {})
        search.tell(trial.id, metrics(file.space, number, trial.frozen))
    return Run(folder=RunFolder(folder), ledger=ledger, file=file, settings=file.settings)


def other_rate(number: int, proposal: Proposal) -> Proposal:
    """Trial 5 with a learning rate that nobody proposed."""
    if number != 5:
        return proposal
    values = proposal.genome.values()
    values["train"]["learning_rate"] = 0.012345
    return Proposal(genome=Genome.of(values), operator=proposal.operator)


def given_by_hand(number: int, proposal: Proposal) -> Proposal:
    """Trials 3 and 6 as a user gives them to a live run."""
    changed = other_rate(5, proposal) if number == 3 else proposal
    return Proposal(genome=changed.genome, operator="enqueued") if number in (3, 6) else proposal


# --- verify -----------------------------------------------------------------------------------------------------------


def test_every_proposal_of_a_finished_run_follows_from_its_ledger(finished_run: Path) -> None:
    ticks: list[tuple[int, int]] = []
    found = verify(package.load(finished_run), lambda done, of: ticks.append((done, of)))
    assert (found.run, found.equal, found.enqueued, found.different) == ("first", 6, 0, ())
    assert ticks == [(done, 6) for done in range(1, 7)]
    found.raise_if_different()


@pytest.mark.parametrize("algorithm", ["random", "nsga2"])
def test_every_proposal_of_an_algorithm_follows_from_its_ledger(tmp_path, space_text: str, algorithm: str) -> None:
    found = verify(made(tmp_path / "run", space_text, 30, algorithm=algorithm))
    assert (found.equal, found.different) == (30, ())


def test_a_genome_that_was_not_proposed_is_told_with_its_difference(tmp_path: Path, space_text: str) -> None:
    run = made(tmp_path / "run", space_text, 8, change=other_rate)
    found = verify(run)
    assert found.equal == 7
    (one,) = found.different
    assert one.trial.id == 5 and one.proposed is not None
    proposed = one.proposed.genome.values()["train"]["learning_rate"]
    assert one.differences == [f"train.learning_rate: 0.012345 -> {proposed}"]
    with pytest.raises(
        GateError, match=r"1 of 8 proposals differ \(trial 5\); its ledger, its space or the alg"
    ) as told:
        found.raise_if_different()
    assert told.value.result is found


def test_operator_and_parents_are_compared_too(tmp_path: Path, space_text: str) -> None:
    def change(number: int, proposal: Proposal) -> Proposal:
        return Proposal(genome=proposal.genome, operator="mutation", parents=(2,)) if number == 4 else proposal

    (one,) = verify(made(tmp_path / "run", space_text, 6, change=change)).different
    assert (one.trial.id, one.differences) == (4, ['operator: "mutation" -> "random"', "parents: [2] -> []"])
    assert one.as_dict()["recorded"]["parents"] == [2] and one.as_dict()["proposed"]["operator"] == "random"


def test_what_a_user_enqueued_is_no_proposal(tmp_path: Path, space_text: str) -> None:
    found = verify(made(tmp_path / "run", space_text, 8, change=given_by_hand))
    assert (found.equal, found.enqueued, found.different) == (6, 2, ())


def test_proposals_that_had_seen_what_is_lost_are_counted_apart(tmp_path: Path, space_text: str, evolm) -> None:
    run = made(tmp_path / "run", space_text, 8, algorithm="nsga2", on_disk=True)
    run.ledger.close()
    with sqlite3.connect(tmp_path / "run" / "ledger.db") as connection:
        connection.execute("DELETE FROM events WHERE seq = 9")  # what trial 4 told
    connection.close()
    repair(tmp_path / "run" / "ledger.db")
    found = verify(package.load(tmp_path / "run"))
    assert (found.equal, found.unverifiable, found.different) == (4, 4, ())
    assert found.as_dict()["unverifiable"] == 4
    assert evolm("replay", tmp_path / "run", "--verify").code == 0
    (different,) = verify(made(tmp_path / "other", space_text, 8, change=other_rate)).different
    with pytest.raises(GateError, match=r"differ \(trial 5\) \(4 more cannot be compared: events are lost\); "):
        replace(found, different=(different,)).raise_if_different()


def test_a_trial_that_nobody_could_have_proposed(tmp_path: Path, space_text: str) -> None:
    text = space_text.replace("{float: [1e-3, 2e-2], log: true, baseline: 5e-3}", "5e-3")
    text = text.replace("{simplex: {web: 0.5, code: 0.5}, floor: 0.05}", "{web: 1, code: 1}")
    run = made(tmp_path / "run", text, 3, metrics=lambda *_: {"bits_per_byte": 1.0})  # the space holds three genomes
    run.ledger.propose(Genome.of({"from": "elsewhere"}), operator="random", seen=run.ledger.seq)
    (one,) = verify(run).different
    assert (one.trial.id, one.differences) == (4, ["nothing is left to propose"])
    assert one.as_dict()["proposed"] is None


def test_other_versions_are_named_as_the_likely_cause(tmp_path: Path, space_text: str) -> None:
    versions = {"numpy": "1.0.0", "torch": "0.1", "evolm": package.__version__}
    found = verify(made(tmp_path / "run", space_text, 5, change=other_rate, versions=versions))
    assert found.versions == {"numpy": (("1.0.0",), np.__version__)}  # torch proposes nothing
    with pytest.raises(GateError, match=rf"a likely cause: it was made with numpy 1\.0\.0, now {np.__version__}"):
        found.raise_if_different()
    verify(made(tmp_path / "same", space_text, 5, versions=versions)).raise_if_different()  # alone they are no fault


# --- compare ----------------------------------------------------------------------------------------------------------


class Wise:
    """Knows the best genome, and proposes nothing else."""

    def propose(self, history: History, rng: Rng, /) -> Proposal:
        return Proposal(genome=best_of(history.space), operator="wise")


class Stubborn:
    """Proposes the baseline, always."""

    def propose(self, history: History, rng: Rng, /) -> Proposal:
        return Proposal(genome=history.space.baseline, operator="stubborn")


class Helpless:
    """Finds nothing feasible."""

    def propose(self, history: History, rng: Rng, /) -> Proposal:
        raise SpaceError(Problem(path=(), rule="nothing feasible"))


class Interrupting:
    """Ctrl-C, in the middle of the work."""

    def propose(self, history: History, rng: Rng, /) -> Proposal:
        raise KeyboardInterrupt


class Listening:
    """Draws at random, and writes down what it was told."""

    def __init__(self) -> None:
        self.heard: list[History] = []

    def propose(self, history: History, rng: Rng, /) -> Proposal:
        self.heard.append(history)
        return Proposal(genome=history.space.sample(rng), operator="random")


@pytest.fixture
def one_objective(space_text: str) -> str:
    return space_text.replace("{bits_per_byte: min, params: min}", "{bits_per_byte: min}")


def columns(found: Comparison) -> tuple[Any, Any, Any]:
    """The run's own order, the algorithm's, and the random one."""
    return found.orders  # type: ignore[return-value]


def test_who_knows_the_best_genome_beats_a_random_order(tmp_path: Path, one_objective: str) -> None:
    run = made(tmp_path / "run", one_objective, 40)
    own, wise, chance = columns(compare(run, Wise(), repeats=9))
    # The baseline comes first, then the trial nearest to the best genome: here that is the best trial.
    assert wise.trials_to.median == (2, 2) and wise.trials_to.low == wise.trials_to.high
    assert chance.trials_to.median[1] > 5
    assert all(a >= b for a, b in zip(wise.hypervolume.median[1:], chance.hypervolume.median[1:], strict=True))
    assert wise.best.median[1] == min(trial.metrics["bits_per_byte"] for trial in run.trials())
    # All orders end at the same set.
    assert own.hypervolume.median[-1] == wise.hypervolume.median[-1] == chance.hypervolume.median[-1]
    assert (own.name, wise.name, chance.name) == ("the run", "Wise", "random order")


def test_an_algorithm_is_told_what_stood_in_for_its_proposals(tmp_path: Path, space_text: str) -> None:
    run = made(tmp_path / "run", space_text, 12)
    listening = Listening()
    found = compare(run, listening, repeats=1)
    assert [len(history.trials) for history in listening.heard] == list(range(1, 12))  # the baseline needs no proposal
    known = {trial.frozen: trial.metrics for trial in run.trials()}
    told = listening.heard[-1].trials
    assert [trial.id for trial in told] == list(range(1, 12)) and len({trial.frozen for trial in told}) == 11
    assert all(trial.metrics == known[trial.frozen] and trial.state == "complete" for trial in told)
    assert told[0].frozen == run.file.space.baseline
    stand_in = columns(found)[1].stand_in
    assert stand_in is not None and 0 < stand_in < 0.5


def test_hypervolumes_are_those_of_the_trials_so_far_on_the_scale_of_all(tmp_path: Path, space_text: str) -> None:
    run = made(tmp_path / "run", space_text, 16)
    points = minimised([trial.metrics for trial in run.trials()], run.objectives)
    whole = Normaliser(points, [objective.metric in cost.NAMES for objective in run.objectives])
    expected = [whole.hypervolume(points[: i + 1]) for i in range(16)]
    own, _, chance = columns(compare(run, "random", repeats=3))
    assert own.hypervolume.median == pytest.approx(expected)
    assert own.trials_to.median == tuple(1 + int(np.argmax(np.array(expected) >= s * expected[-1])) for s in SHARES)
    assert list(own.best.median) == pytest.approx(np.minimum.accumulate(points[:, 0]))
    for order in (own, chance):
        assert all(a <= b + 1e-12 for a, b in zip(order.hypervolume.low, order.hypervolume.high, strict=True))
        assert np.all(np.diff(order.hypervolume.median) >= -1e-12)


def test_an_objective_that_is_made_large(tmp_path: Path, space_text: str) -> None:
    text = space_text.replace("{bits_per_byte: min, params: min}", "{tokens_per_second: max}")
    speeds = [3.0, 1.0, 4.0, 1.0, 5.0, 9.0, 2.0, 6.0, 5.0, 3.0]
    run = made(tmp_path / "run", text, 10, metrics=lambda space, number, _: {"tokens_per_second": speeds[number - 1]})
    own, asked, _ = columns(compare(run, "nsga2", repeats=2))
    assert own.best.median == tuple(np.maximum.accumulate(speeds))
    assert asked.best.median[-1] == 9.0


def test_equally_near_trials_are_drawn(tmp_path: Path, one_objective: str) -> None:
    """Were the first of them taken, who proposes nothing of use would follow the order of the run."""
    text = one_objective.replace(
        "learning_rate: {float: [1e-3, 2e-2], log: true, baseline: 5e-3}", "learning_rate: 5e-3"
    )
    text = text.replace("{simplex: {web: 0.5, code: 0.5}, floor: 0.05}", "{web: 1, code: 1}")
    text = text.replace("d_model: {int: [16, 48], step: 16, baseline: 32}", "d_model: 32")
    text = text.replace("batch_tokens: 128", f"batch_tokens: {{choice: {[32 * i for i in range(1, 21)]}}}")
    run = made(tmp_path / "run", text, 20, metrics=lambda space, number, _: {"bits_per_byte": 1.0 - (number == 20)})
    own, asked, _ = columns(compare(run, Stubborn(), repeats=9))
    assert own.trials_to.median[1] == 20
    assert asked.trials_to.median[1] < 20 and asked.trials_to.low[1] < asked.trials_to.high[1]


def test_who_finds_nothing_feasible_takes_what_chance_brings(tmp_path: Path, space_text: str) -> None:
    run = made(tmp_path / "run", space_text, 12)
    _, asked, _ = columns(compare(run, Helpless(), repeats=5))
    assert asked.stand_in == 0  # of the baseline, which needs no proposal
    assert asked.hypervolume.low[5] < asked.hypervolume.high[5]


def test_only_the_highest_rung_and_what_did_not_fail_is_compared(tmp_path: Path, space_text: str) -> None:
    run = made(tmp_path / "run", space_text, 9)
    search = Search(run.file.space, run.settings.objectives, algorithm="random", ledger=run.ledger)
    search.fail(search.ask(), "diverged")
    search.ask()
    assert compare(run, "random", repeats=1).trials == 9


def test_the_same_seeds_give_the_same_comparison_and_the_runs_own_is_passed_over(tmp_path, space_text: str) -> None:
    run = made(tmp_path / "run", space_text, 12)
    found = compare(run, "random", repeats=3)
    assert found == compare(run, "random", seed=run.settings.seed + 1, repeats=3)
    assert found != compare(run, "random", seed=7, repeats=3)
    # With the run's own seed the run's own algorithm proposes the run itself.
    own, again, _ = columns(compare(run, "random", seed=run.settings.seed, repeats=1))
    assert again.hypervolume == own.hypervolume and again.stand_in == 0


def test_what_cannot_be_compared_is_refused(tmp_path: Path, space_text: str, finished_run: Path) -> None:
    run = made(tmp_path / "run", space_text, 7)
    with pytest.raises(
        UsageError, match=r"run 'run' has 7 trials with results at its .* \(512 tokens\); .* at least 8"
    ):
        compare(run, "random")
    with pytest.raises(UsageError, match="unknown algorithm 'randon'; did you mean 'random'"):
        compare(run, "randon")
    with pytest.raises(UsageError, match="repeats must be at least 1, is 0"):
        compare(run, "random", repeats=0)


# --- the command ------------------------------------------------------------------------------------------------------


def test_a_run_that_is_at_work_may_be_verified(evolm, finished_run: Path) -> None:
    before = (finished_run / "ledger.db").read_bytes()
    with RunFolder(finished_run).locked():
        said = evolm("replay", finished_run, "--verify")
    assert (said.code, said.out) == (0, "run first: 6 of 6 proposals are the same again\n")
    assert (finished_run / "ledger.db").read_bytes() == before


def test_a_difference_ends_with_six(evolm, tmp_path: Path, space_text: str) -> None:
    made(tmp_path / "wrong", space_text, 8, change=other_rate, on_disk=True).ledger.close()
    said = evolm("replay", tmp_path / "wrong", "--verify")
    assert said.code == 6
    head, trial, line = said.out.splitlines()
    assert head == "run wrong: 7 of 8 proposals are the same again"
    assert trial == "trial 5, recorded -> proposed now:" and line.startswith("  train.learning_rate: 0.012345 -> ")
    assert "error: run 'wrong': 1 of 8 proposals differ (trial 5)" in said.err and "Traceback" not in said.err


def test_a_verification_as_json(evolm, tmp_path: Path, space_text: str) -> None:
    made(tmp_path / "wrong", space_text, 8, change=other_rate, on_disk=True).ledger.close()
    said = evolm("replay", tmp_path / "wrong", "--verify", "--json")
    body = json.loads(said.out)
    assert said.code == 6
    assert (body["schema_version"], body["run"], body["verified"], body["enqueued"]) == (1, "wrong", 7, 0)
    assert [one["trial"] for one in body["different"]] == [5] and len(body["different"][0]["differences"]) == 1

    made(tmp_path / "byhand", space_text, 8, change=given_by_hand, on_disk=True).ledger.close()
    said = evolm("replay", tmp_path / "byhand", "--verify", "--json")
    body = json.loads(said.out)
    assert (said.code, body["verified"], body["enqueued"], body["different"]) == (0, 6, 2, [])
    assert (
        "6 of 6 proposals are the same again; 2 were enqueued" in evolm("replay", tmp_path / "byhand", "--verify").out
    )


def test_a_comparison_is_a_table_and_says_its_bounds(evolm, monkeypatch, tmp_path: Path, one_objective: str) -> None:
    monkeypatch.setitem(BUILT_IN, "wise", Wise)
    made(tmp_path / "table", one_objective, 30, on_disk=True).ledger.close()
    said = evolm("replay", tmp_path / "table", "--algorithm", "wise", "--repeats", 5)
    assert said.code == 0
    lines = said.out.splitlines()
    assert lines[0] == "run table: 30 trials of 512 tokens, in other orders"
    assert all(name in lines[1] for name in ("the run", "wise, 5 times", "random order, 5 times"))
    assert [line.split("  ")[0] for line in map(str.strip, lines[2:12])] == [
        *(f"hypervolume after {n}" for n in (8, 15, 23, 30)),
        *("trials to 90% of it", "trials to 99% of it"),
        *(f"bits_per_byte after {n}" for n in (8, 15, 23, 30)),
    ]
    assert "2 (2 to 2)" in lines[7]
    assert lines[-1].startswith("a bounded comparison: every order ends at the same trials")


def test_a_comparison_as_json(evolm, tmp_path: Path, space_text: str) -> None:
    made(tmp_path / "table", space_text, 10, on_disk=True).ledger.close()
    said = evolm("replay", tmp_path / "table", "--algorithm", "nsga2", "--seed", 3, "--repeats", 2, "--json")
    body = json.loads(said.out)
    assert (body["run"], body["algorithm"], body["seed"], body["repeats"]) == ("table", "nsga2", 3, 2)
    assert (body["trials"], body["after"], body["shares"]) == (10, [3, 5, 8, 10], [0.9, 0.99])
    assert body["objective"] == {"metric": "bits_per_byte", "direction": "min"}
    assert [order["name"] for order in body["orders"]] == ["the run", "nsga2", "random order"]
    assert all(len(order["hypervolume"]["median"]) == 10 for order in body["orders"])


def test_a_comparison_can_be_interrupted(evolm, monkeypatch, tmp_path: Path, space_text: str) -> None:
    monkeypatch.setitem(BUILT_IN, "slow", Interrupting)
    made(tmp_path / "table", space_text, 8, on_disk=True).ledger.close()
    said = evolm("replay", tmp_path / "table", "--algorithm", "slow")
    assert (said.code, said.out) == (130, "") and "Traceback" not in said.err


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ((), "needs --verify (propose every trial again and compare) or --algorithm NAME"),
        (("--verify", "--algorithm", "random"), "ask one at a time"),
        (("--verify", "--seed", "1"), "--seed and --repeats belong to --algorithm"),
        (("--verify", "--repeats", "2"), "--seed and --repeats belong to --algorithm"),
        (("--algorithm", "randon"), "unknown algorithm 'randon'; did you mean 'random'?"),
        (("--algorithm", "random"), "to compare orders takes at least 8"),
        (("--algorithm", "random", "--repeats", "0"), "--repeats"),
    ],
)
def test_what_is_asked_wrongly(evolm, finished_run: Path, words: Sequence[str], expected: str) -> None:
    said = evolm("replay", finished_run, *words)
    assert said.code == 2 and expected in " ".join(said.err.split()) and "Traceback" not in said.err
    assert not said.out


def test_an_unknown_run(evolm, tmp_path: Path) -> None:
    said = evolm("replay", tmp_path / "nowhere", "--verify")
    assert said.code == 2 and "no run" in said.err


def test_replaying_needs_neither_torch_nor_ray() -> None:
    script = "import sys, evolm.replay; print([m for m in ('torch', 'ray', 'transformers') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "[]"
