"""The loop: budgets, retries, promotions, interruptions, and what it writes down about each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest

from evolm.controller import Budget, Controller
from evolm.errors import StorageError
from evolm.executors.base import Job, Outcome, Tell, TrialProgress
from evolm.executors.inline import InlineExecutor
from evolm.run_folder import RunFolder, rung_checkpoint
from evolm.search import Search
from fitness.ledger import Ledger
from fitness.trial import Trial
from search_spaces import Space

Deed = Callable[[Job], Outcome]


def result(job: Job, loss: float = 1.0) -> Outcome:
    return Outcome(trial=job.trial, rung=job.rung, kind="result", metrics={"loss": loss}, flops=10.0, seconds=1.0)


def failure(job: Job, reason: Any) -> Outcome:
    return Outcome(trial=job.trial, rung=job.rung, kind="fail", reason=reason, message="why", flops=3.0)


class Heard:
    """A view that remembers."""

    def __init__(self) -> None:
        self.trials: list[Trial] = []

    def told(self, trial: Trial) -> None:
        self.trials.append(trial)

    def tick(self, running: Sequence[TrialProgress]) -> None:
        pass


class Rig:
    """A controller with a search of one gene and a trial that does what the test says."""

    def __init__(self, folder: Path, deed: Deed, trials: int = 5, ledger: Ledger | None = None, **options: Any) -> None:
        def runner(job: Job, tell: Tell) -> Outcome:
            self.jobs.append(job)
            return deed(job)

        self.jobs: list[Job] = []
        self.view = Heard()
        fidelity = options.pop("fidelity", None)
        self.search = Search(
            Space.from_dict({"x": {"float": [0, 1]}}), ["loss"], algorithm="random", fidelity=fidelity, ledger=ledger
        )
        self.controller = Controller(
            RunFolder(folder),
            self.search,
            InlineExecutor(runner),
            budget=Budget(trials=trials, **options),
            seed=0,
            context={"shared": True},
            view=self.view,
        )


def test_spends_the_budget_and_stops(tmp_path: Path) -> None:
    rig = Rig(tmp_path, result)
    assert rig.controller.run() == "budget"
    assert [trial.state for trial in rig.search.trials()] == ["complete"] * 5
    assert [trial.id for trial in rig.view.trials] == [1, 2, 3, 4, 5]


def test_a_job_carries_all_that_a_worker_needs(tmp_path: Path) -> None:
    rig = Rig(tmp_path, result, trials=1, fidelity={"tokens": [8, 32]})
    rig.controller.run()
    first, second = rig.jobs
    assert (first.rung, first.top, first.tokens) == (0, False, 8)
    assert (second.rung, second.top, second.tokens) == (1, True, 32)
    assert first.folder == str(tmp_path / "trials" / "1") and first.context == {"shared": True}


def test_a_space_that_is_used_up_ends_the_search(tmp_path: Path) -> None:
    rig = Rig(tmp_path, result)
    rig.search.space = Space.from_dict({"x": {"choice": [1, 2]}})
    rig.search._given = []
    assert rig.controller.run() == "exhausted"
    assert len(rig.search.trials()) == 2


def test_no_time_left_launches_nothing(tmp_path: Path) -> None:
    rig = Rig(tmp_path, result, seconds=0.0)
    assert rig.controller.run() == "budget"
    assert rig.search.trials() == []


def test_failures_are_kept_and_the_search_goes_on(tmp_path: Path) -> None:
    rig = Rig(tmp_path, lambda job: failure(job, "diverged") if job.trial % 2 else result(job))
    rig.controller.run()
    assert [trial.state for trial in rig.search.trials()] == ["failed", "complete", "failed", "complete", "failed"]
    assert rig.search.trials()[0].reason == "diverged" and rig.search.trials()[0].flops == 3.0


def test_a_lost_trial_is_launched_three_times(tmp_path: Path) -> None:
    rig = Rig(tmp_path, lambda job: failure(job, "lost"), trials=1)
    rig.controller.run()
    (trial,) = rig.search.trials()
    assert (trial.state, trial.reason, trial.attempts) == ("failed", "lost", 3)


def test_metrics_that_are_none_fail_the_trial_by_name(tmp_path: Path) -> None:
    rig = Rig(tmp_path, lambda job: result(job, float("nan")), trials=1)
    rig.controller.run()
    (trial,) = rig.search.trials()
    assert (trial.state, trial.reason, trial.message) == (
        "failed",
        "bad_metrics",
        "metric 'loss' must be finite, is nan",
    )


def test_an_infeasible_trial_is_a_state_of_its_own(tmp_path: Path) -> None:
    rig = Rig(
        tmp_path, lambda job: Outcome(trial=job.trial, rung=0, kind="infeasible", message="no text left"), trials=1
    )
    rig.controller.run()
    assert rig.search.trials()[0].state == "infeasible"


def test_what_is_fatal_ends_the_run_and_keeps_the_trial_for_later(tmp_path: Path) -> None:
    full = StorageError("the disk is full")
    rig = Rig(tmp_path, lambda job: Outcome(trial=job.trial, rung=0, kind="fatal", message="full", error=full))
    with pytest.raises(StorageError, match="the disk is full"):
        rig.controller.run()
    assert [trial.state for trial in rig.search.trials()] == ["proposed"]


def test_a_stop_lets_the_running_trial_save(tmp_path: Path) -> None:
    def deed(job: Job) -> Outcome:
        if job.trial == 3:
            rig.controller.stop()
            return failure(job, "interrupted")
        return result(job)

    rig = Rig(tmp_path, deed)
    assert rig.controller.run() == "interrupted"
    assert [trial.state for trial in rig.search.trials()] == ["complete", "complete", "proposed"]


def test_what_a_dead_controller_left_running_is_run_again(tmp_path: Path) -> None:
    ledger = Ledger.create(None, {})
    dead = Rig(tmp_path, result, ledger=ledger)
    asked = dead.search.ask()
    rig = Rig(tmp_path, result, ledger=ledger)
    rig.controller.run()
    trial = rig.search.trials()[0]
    assert trial.id == asked.id and (trial.state, trial.attempts) == ("complete", 2)


def test_checkpoints_are_deleted_when_nobody_can_need_them(tmp_path: Path) -> None:
    def deed(job: Job) -> Outcome:
        if not job.top:
            rung_checkpoint(job.folder, job.rung).mkdir(parents=True)
        return result(job, loss=job.genome["x"])

    rig = Rig(tmp_path, deed, trials=4, fidelity={"tokens": [1, 4]})
    rig.controller.run()
    for trial in rig.search.trials():
        kept = rung_checkpoint(RunFolder(tmp_path).trial(trial.id), 0).exists()
        assert kept == (trial.state == "paused")


def test_losses_are_counted_from_rung_to_rung(tmp_path: Path) -> None:
    """Two workers die on the way to each of three rungs: the trial still arrives."""
    seen: dict[int, int] = {}

    def deed(job: Job) -> Outcome:
        seen[job.rung] = seen.get(job.rung, 0) + 1
        return failure(job, "lost") if seen[job.rung] <= 2 else result(job)

    rig = Rig(tmp_path, deed, trials=1, fidelity={"tokens": [1, 4, 16]})
    rig.controller.run()
    (trial,) = rig.search.trials()
    assert (trial.state, trial.attempts, trial.lost, len(trial.rungs)) == ("complete", 9, 0, 3)


class Two:
    """An executor of two slots whose jobs end when they are told to stop; the first submission brings a signal."""

    def __init__(self) -> None:
        self.jobs: dict[int, Job] = {}
        self.told: set[int] = set()
        self.controller: Controller | None = None

    workers: ClassVar[list[dict[str, Any]]] = [{"id": 0}, {"id": 1}]

    def idle(self) -> list[int]:
        return [slot for slot in (0, 1) if slot not in self.jobs]

    def submit(self, slot: int, job: Job) -> None:
        assert self.controller is not None
        self.controller.stop()
        self.jobs[slot] = job

    def wait(self, seconds: float) -> list[Outcome]:
        ended = [slot for slot in self.jobs if slot in self.told]
        assert ended, "a job runs on that was never told to stop"
        return [failure(self.jobs.pop(slot), "interrupted") for slot in ended]

    def progress(self) -> list[TrialProgress]:
        return []

    def interrupt(self) -> None:
        self.told |= set(self.jobs)

    def close(self) -> None:
        pass


def test_a_signal_while_trials_are_handed_out_is_heard_by_all_and_launches_no_more(tmp_path: Path) -> None:
    rig, executor = Rig(tmp_path, result), Two()
    rig.controller.executor, executor.controller = executor, rig.controller
    assert rig.controller.run() == "interrupted"
    assert [trial.state for trial in rig.search.trials()] == ["proposed"]
