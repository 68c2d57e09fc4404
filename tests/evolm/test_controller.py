"""The loop: budgets, retries, promotions, interruptions, and what it writes down about each."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest

from evolm import controller
from evolm.algorithms.fidelity import Fidelity
from evolm.controller import Budget, Controller, Lease
from evolm.errors import DataError, StorageError
from evolm.executors.base import Job, Outcome, Tell, TrialProgress
from evolm.executors.inline import InlineExecutor
from evolm.requests import Request, pending, send
from evolm.retention import Keep, Retention, hopeless
from evolm.run_folder import RunFolder, final_checkpoint, latest_checkpoint, rung_checkpoint
from evolm.search import Search
from fitness.ledger import Ledger
from fitness.objectives import read_objectives
from fitness.trial import Reason, Rung, State, Trial
from search_spaces import Space
from search_spaces.genome import Genome

Deed = Callable[[Job], Outcome]


def result(job: Job, loss: float = 1.0) -> Outcome:
    return job.told({"loss": loss}, flops=10.0, seconds=1.0)


def failure(job: Job, reason: Any) -> Outcome:
    return job.failed(reason, "why", flops=3.0)


class Heard:
    """A view that remembers."""

    def __init__(self) -> None:
        self.trials: list[Trial] = []
        self.said: list[str] = []

    def told(self, trial: Trial) -> None:
        self.trials.append(trial)

    def tick(self, running: Sequence[TrialProgress]) -> None:
        pass

    def say(self, text: str) -> None:
        self.said.append(text)


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
        place = RunFolder(folder)
        keep = Keep(best=options.pop("keep_best", 0), max_bytes=options.pop("max_bytes", None))
        self.controller = Controller(
            place,
            self.search,
            InlineExecutor(runner),
            budget=Budget(trials=trials, **options),
            seed=0,
            context={"shared": True},
            view=self.view,
            retention=Retention(place, keep, self.search.fidelity, self.search.objectives, trials),
            requests=lambda: pending(place),
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


def test_a_lost_trial_is_launched_six_times(tmp_path: Path) -> None:
    rig = Rig(tmp_path, lambda job: failure(job, "lost"), trials=1)
    rig.controller.run()
    (trial,) = rig.search.trials()
    assert (trial.state, trial.reason, trial.attempts) == ("failed", "lost", 6)


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
    rig = Rig(tmp_path, lambda job: job.infeasible("no text left"), trials=1)
    rig.controller.run()
    assert rig.search.trials()[0].state == "infeasible"


@pytest.mark.parametrize(("what", "error"), [("storage", StorageError), ("data", DataError)])
def test_what_is_fatal_ends_the_run_and_keeps_the_trial_for_later(
    tmp_path: Path, what: Literal["storage", "data"], error: type[Exception]
) -> None:
    rig = Rig(tmp_path, lambda job: job.fatal(what, "the disk is full"))
    with pytest.raises(error, match="the disk is full"):
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


def saving(job: Job) -> Outcome:
    """A trial that leaves the checkpoints of a real one, of 100 bytes each; its loss is its gene."""
    for place in (latest_checkpoint(job.folder), (final_checkpoint if job.top else rung_of(job))(job.folder)):
        place.mkdir(parents=True)
        (place / "weights").write_bytes(bytes(100))
    return result(job, loss=job.genome["x"])


def rung_of(job: Job) -> Callable[[str], Path]:
    return lambda folder: rung_checkpoint(folder, job.rung)


def kept(folder: Path) -> dict[int, set[str]]:
    """What is left in each trial's folder of checkpoints."""
    places = sorted(folder.glob("trials/*/checkpoints"))
    return {int(place.parent.name): {path.name for path in place.iterdir()} for place in places}


def test_checkpoints_stay_as_long_as_a_trial_may_be_promoted(tmp_path: Path) -> None:
    rig = Rig(tmp_path, saving, trials=7, fidelity={"tokens": [1, 4]})
    rig.controller.run()
    trials = rig.search.trials()
    assert [trial.state for trial in trials].count("complete") == 2  # of 7: the baseline, and one of four
    assert kept(tmp_path) == {}
    assert rig.controller.retention is not None and rig.controller.retention.bytes == 0


def at_rung(number: int, state: State, *losses: float) -> Trial:
    told = [Rung(rung=i, tokens=1, metrics={"loss": loss}, flops=0, seconds=0, seq=i) for i, loss in enumerate(losses)]
    return Trial(id=number, frozen=Genome.of({"x": number}), state=state, rungs=tuple(told))


def test_who_cannot_be_promoted_any_more() -> None:
    """A budget of 8 promotes two of rung 0, and the baseline."""
    ladder, loss = Fidelity((1, 4), eta=4), read_objectives(["loss"])
    paused = [at_rung(number, "paused", float(number)) for number in range(1, 6)]
    gone = [at_rung(6, "complete", 0.1, 0.1), at_rung(7, "running", 0.2)]  # on its way to rung 1, it may fail
    assert [trial.id for trial in hopeless([*paused, *gone], ladder, loss, 8)] == [3, 4, 5]
    gone[1] = at_rung(7, "complete", 0.2, 0.2)
    assert [trial.id for trial in hopeless([*paused, *gone], ladder, loss, 8)] == [2, 3, 4, 5]
    assert hopeless([*paused, *gone], ladder, loss, 80) == []
    assert [trial.id for trial in hopeless([*paused, *gone], ladder, loss, 8, always=4)] == [2, 3, 5]


def test_the_final_weights_of_the_best_are_kept(tmp_path: Path) -> None:
    rig = Rig(tmp_path, saving, trials=6, keep_best=2)
    rig.controller.run()
    best = sorted(rig.search.trials(), key=lambda trial: trial.metrics["loss"])[:2]
    assert kept(tmp_path) == {trial.id: {"final"} for trial in best}


def test_the_bound_on_checkpoints_takes_the_least_promising_first(tmp_path: Path) -> None:
    rig = Rig(tmp_path, saving, trials=40, max_bytes=350, fidelity={"tokens": [1, 4], "eta": 20})
    for x in (0.9, 0.1, 0.5, 0.2, 0.8):
        rig.search.enqueue({"x": x})
    while rig.search.ledger.in_state("proposed"):
        asked = rig.controller.next({})
        assert asked is not None
        rig.controller.folder.trials.mkdir(exist_ok=True)
        rig.controller.running[asked.id] = Lease(asked=asked, progress=TrialProgress(trial=asked.id))
        rig.controller.take(saving(rig.controller.job(asked)))
    assert set(kept(tmp_path)) == {2, 3, 4}  # of 0.1, 0.5 and 0.2


def test_a_bound_that_cannot_be_kept_is_told_once(tmp_path: Path) -> None:
    def deed(job: Job) -> Outcome:
        RunFolder(tmp_path).trial(99).joinpath("checkpoints").mkdir(parents=True, exist_ok=True)
        RunFolder(tmp_path).trial(99).joinpath("checkpoints/weights").write_bytes(bytes(500))
        assert rig.controller.retention is not None
        rig.controller.retention.sizes[99] = 500  # of a trial that runs
        return saving(job)

    rig = Rig(tmp_path, deed, trials=3, keep_best=1, max_bytes=300)
    rig.controller.run()
    assert rig.view.said == ["checkpoints hold 500B, more than their bound allows"]
    assert set(kept(tmp_path)) == {99}  # all that could be deleted was


def test_a_trial_that_is_interrupted_keeps_its_latest_save(tmp_path: Path) -> None:
    def deed(job: Job) -> Outcome:
        saving(job)
        rig.controller.stop()
        return failure(job, "interrupted")

    rig = Rig(tmp_path, deed, fidelity={"tokens": [1, 4]})
    rig.controller.run()
    assert kept(tmp_path) == {1: {"latest", "rung-0"}}


@pytest.mark.parametrize(
    ("reason", "attempts"),
    [("lost", 6), ("crashed", 2), ("oom", 1), ("timeout", 1), ("diverged", 1), ("leak", 1), ("bad_metrics", 1)],
)
def test_each_reason_has_its_own_number_of_retries(tmp_path: Path, reason: Reason, attempts: int) -> None:
    rig = Rig(tmp_path, lambda job: failure(job, reason), trials=1)
    rig.controller.run()
    (trial,) = rig.search.trials()
    assert (trial.state, trial.reason, trial.attempts) == ("failed", reason, attempts)
    assert trial.flops == 3.0 * attempts


def test_every_trial_that_fails_is_a_failure_and_none_ends_the_run(tmp_path: Path) -> None:
    bad: list[Any] = [float("nan"), float("inf"), float("-inf"), "low", None, [1.0], True]
    rig = Rig(tmp_path, lambda job: result(job, bad[job.trial - 1]), trials=len(bad))
    assert rig.controller.run() == "budget"
    assert {(trial.state, trial.reason) for trial in rig.search.trials()} == {("failed", "bad_metrics")}


# --- requests from other processes ------------------------------------------------------------------------------------


def asking(folder: Path, kind: Any, genome: Any = None, at: int = 2) -> Deed:
    """A trial during which somebody asks something of the run."""

    def deed(job: Job) -> Outcome:
        if job.trial == at:
            send(RunFolder(folder), Request(kind=kind, genome=genome))
        return result(job)

    return deed


@pytest.mark.parametrize("kind", ["stop", "cancel"])
def test_a_run_can_be_stopped_by_another_process(tmp_path: Path, kind: str) -> None:
    rig = Rig(tmp_path, asking(tmp_path, kind))
    assert rig.controller.run() == "interrupted"
    assert len(rig.search.trials()) == 2
    assert list(RunFolder(tmp_path).requests.iterdir()) == []


def test_a_genome_can_be_brought_into_a_running_search(tmp_path: Path) -> None:
    rig = Rig(tmp_path, asking(tmp_path, "enqueue", {"x": 0.125}))
    rig.controller.run()
    third = rig.search.trials()[2]
    assert (third.operator, third.genome, third.state) == ("enqueued", {"x": 0.125}, "complete")
    assert len(rig.search.trials()) == 5
    assert rig.view.said == ["enqueued as trial 3"]


@pytest.mark.parametrize("genome", [{"x": 7.0}, {"y": 0.5}, {"x": 0.5}])
def test_a_genome_that_cannot_be_tried_is_told_and_the_search_goes_on(tmp_path: Path, genome: Any) -> None:
    """Out of range, unknown, and the baseline, which is trial 1."""
    rig = Rig(tmp_path, asking(tmp_path, "enqueue", genome))
    assert rig.controller.run() == "budget"
    assert len(rig.view.said) == 1 and rig.view.said[0].startswith("not enqueued: ")


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "[" * 5000, '{"kind": "format the disk", "genome": null}', '{"kind": "stop"}']
)
def test_what_is_no_request_is_set_aside(tmp_path: Path, text: str) -> None:
    rig = Rig(tmp_path, result)
    (tmp_path / "requests").mkdir()
    (tmp_path / "requests" / "1.json").write_text(text)
    assert rig.controller.run() == "budget"
    assert [path.name for path in (tmp_path / "requests").iterdir()] == ["1.refused"]


# --- storage and clocks -----------------------------------------------------------------------------------------------


def test_a_disk_that_fills_ends_the_run_once_everything_is_written(tmp_path: Path) -> None:
    def deed(job: Job) -> Outcome:
        if job.trial == 2:
            rig.search.ledger.full = True  # the ballast was given up for the last event
        return result(job)

    rig = Rig(tmp_path, deed)
    with pytest.raises(StorageError, match=r"the disk is full; free some space, then run `evolm resume"):
        rig.controller.run()
    assert [trial.state for trial in rig.search.trials()] == ["complete", "complete"]


def test_a_folder_that_vanishes_ends_the_run(tmp_path: Path) -> None:
    def deed(job: Job) -> Outcome:
        if job.trial == 2:
            shutil.rmtree(tmp_path / "run")
        return result(job)

    (tmp_path / "run").mkdir()
    ledger = Ledger.create(tmp_path / "run" / "ledger.db", {})
    rig = Rig(tmp_path / "run", deed, ledger=ledger)
    with pytest.raises(StorageError, match=r"ledger\.db"):
        rig.controller.run()
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("days", [-1, 1])
def test_a_clock_that_jumps_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, days: int) -> None:
    def genomes(folder: Path, deed: Deed) -> list[tuple[Any, ...]]:
        folder.mkdir()
        rig = Rig(folder, deed, seconds=3600.0, ledger=Ledger.create(folder / "ledger.db", {}))
        rig.search.ledger.open_session({})
        assert rig.controller.run() == "budget"
        assert rig.search.ledger.sessions()[0]["seconds"] < 60
        return [(trial.genome, trial.state, trial.attempts) for trial in rig.search.trials()]

    def jumping(job: Job) -> Outcome:
        if job.trial == 3:
            now = time.time
            monkeypatch.setattr(time, "time", lambda: now() + days * 86400)
        return result(job)

    assert genomes(tmp_path / "jumps", jumping) == genomes(tmp_path / "steady", result)


# --- leases -----------------------------------------------------------------------------------------------------------


class Remote:
    """An executor of one slot whose worker answers what the test says, when it says so."""

    workers: ClassVar[list[dict[str, Any]]] = [{"id": 0}]
    memory_share = None

    def __init__(self) -> None:
        self.job: Job | None = None
        self.jobs: list[Job] = []
        self.outcomes: list[Outcome] = []
        self.heard = True
        self.ask: Callable[[Remote], None] = lambda remote: None

    def idle(self) -> list[int]:
        return [] if self.job else [0]

    def submit(self, slot: int, job: Job) -> None:
        self.job = job
        self.jobs.append(job)

    def wait(self, seconds: float) -> list[Outcome]:
        self.ask(self)
        outcomes, self.outcomes = self.outcomes, []
        if self.job is not None and any(outcome.lease == self.job.lease for outcome in outcomes):
            self.job = None
        return outcomes

    def progress(self) -> list[TrialProgress]:
        return [TrialProgress(trial=self.job.trial, tokens=1)] if self.job and self.heard else []

    def interrupt(self) -> None:
        pass

    def cancel(self) -> None:
        assert self.job is not None
        self.outcomes.append(failure(self.job, "interrupted"))

    def abandon(self, trial: int) -> None:
        assert self.job is not None and self.job.trial == trial
        self.outcomes.append(failure(self.job, "lost"))

    def close(self) -> None:
        pass


def remote(tmp_path: Path, ask: Callable[[Remote], None], trials: int = 2) -> tuple[Rig, Remote]:
    rig, executor = Rig(tmp_path, result, trials=trials), Remote()
    rig.controller.executor, executor.ask = executor, ask
    return rig, executor


def test_a_worker_that_is_not_heard_loses_its_lease_and_a_late_answer_is_dropped_and_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [0.0]
    monkeypatch.setattr(controller.time, "monotonic", lambda: clock[0])

    def ask(executor: Remote) -> None:
        assert executor.job is not None
        if len(executor.jobs) == 1:  # silent until its lease has expired
            executor.heard = False
            clock[0] += 50.0
        else:  # the second launch answers, and then the first one, too
            executor.heard = True
            executor.outcomes += [result(executor.jobs[-1], 2.0), result(executor.jobs[0], 1.0)]

    rig, executor = remote(tmp_path, ask, trials=1)
    rig.controller.run()
    (trial,) = rig.search.trials()
    assert (trial.state, trial.attempts, trial.metrics["loss"]) == ("complete", 2, 2.0)
    assert rig.search.ledger.late == 1
    assert clock[0] > controller.LEASE_SECONDS and executor.jobs[0].lease != executor.jobs[1].lease


def test_a_worker_that_is_heard_keeps_its_lease(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(controller.time, "monotonic", lambda: clock[0])

    def ask(executor: Remote) -> None:
        clock[0] += 50.0
        if clock[0] > 1000.0 and executor.job is not None:
            executor.outcomes.append(result(executor.job))

    rig, _ = remote(tmp_path, ask, trials=1)
    rig.controller.run()
    assert rig.search.trials()[0].attempts == 1


def test_a_second_stop_cancels_what_runs(tmp_path: Path) -> None:
    def ask(executor: Remote) -> None:
        rig.controller.stop()

    rig, _ = remote(tmp_path, ask)
    assert rig.controller.run() == "interrupted"
    assert [trial.state for trial in rig.search.trials()] == ["proposed"]


def test_trials_that_do_not_end_when_cancelled_are_left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(controller.time, "monotonic", lambda: clock[0])

    def ask(executor: Remote) -> None:
        rig.controller.stop()
        executor.outcomes.clear()
        clock[0] += 20.0

    rig, _ = remote(tmp_path, ask)
    assert rig.controller.run() == "interrupted"
    assert [(trial.state, trial.message) for trial in rig.search.trials()] == [("proposed", "abandoned")]


def test_losses_are_counted_from_rung_to_rung(tmp_path: Path) -> None:
    """Two workers die on the way to each of three rungs: the trial still arrives."""
    seen: dict[int, int] = {}

    def deed(job: Job) -> Outcome:
        seen[job.rung] = seen.get(job.rung, 0) + 1
        return failure(job, "lost") if seen[job.rung] <= 2 else result(job)

    rig = Rig(tmp_path, deed, trials=1, fidelity={"tokens": [1, 4, 16]})
    rig.controller.run()
    (trial,) = rig.search.trials()
    assert (trial.state, trial.attempts, trial.failures, len(trial.rungs)) == ("complete", 9, {}, 3)


class Two:
    """An executor of two slots whose jobs end when they are told to stop; the first submission brings a signal."""

    def __init__(self) -> None:
        self.jobs: dict[int, Job] = {}
        self.told: set[int] = set()
        self.controller: Controller | None = None

    workers: ClassVar[list[dict[str, Any]]] = [{"id": 0}, {"id": 1}]
    memory_share = None

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

    def cancel(self) -> None:
        raise AssertionError("a second submission")

    def abandon(self, trial: int) -> None:
        raise AssertionError("nobody was silent")

    def interrupt(self) -> None:
        self.told |= set(self.jobs)

    def close(self) -> None:
        pass


def test_a_signal_while_trials_are_handed_out_is_heard_by_all_and_launches_no_more(tmp_path: Path) -> None:
    rig, executor = Rig(tmp_path, result), Two()
    rig.controller.executor, executor.controller = executor, rig.controller
    assert rig.controller.run() == "interrupted"
    assert [trial.state for trial in rig.search.trials()] == ["proposed"]
