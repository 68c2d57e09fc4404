"""The loop that keeps workers busy: ask the search, hand to the executor, tell the search, until the budget is
spent."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol

from evolm.errors import BadMetrics, DataError, EvolmError, SpaceExhausted, StorageError, UsageError
from evolm.executors.base import Executor, Job, Limits, Outcome, TrialProgress
from evolm.requests import Request
from evolm.retention import Retention
from evolm.run_folder import RunFolder
from evolm.search import Asked, Search
from fitness.trial import Reason, Trial
from search_spaces.quantities import format_bytes

TICK = 0.5
"""Seconds between looks at signals, requests, leases and progress while nothing comes in."""

LEASE_SECONDS = 120.0
"""How long a worker may not be heard before its trial is given to another one."""

END_SECONDS = 60.0
"""How long running trials may take to save after something fatal, and to end after they were cancelled."""

RETRIES: Mapping[Reason, int] = {"lost": 5, "crashed": 1}
"""How often a trial is tried again, on its way from one rung to the next, after a failure for this reason. Not at all
for any other: it would fail again (`interrupted` is no failure: it goes on when the run does)."""

Why = Literal["budget", "exhausted", "interrupted"]


class View(Protocol):
    """Shows a search while it runs."""

    def told(self, trial: Trial) -> None:
        """A trial told something, or came to its end."""

    def tick(self, running: Sequence[TrialProgress]) -> None:
        """Time has passed."""

    def say(self, text: str) -> None:
        """Something happened that is no trial's."""


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What may be spent: genomes to try, and seconds from the start of this controller."""

    trials: int
    seconds: float | None = None


@dataclass(kw_only=True)
class Lease:
    """A trial that was handed out: renewed whenever its worker is heard, by this process's monotonic clock alone."""

    asked: Asked
    since: float = field(default_factory=time.monotonic)
    heard: float = field(default_factory=time.monotonic)
    progress: TrialProgress
    known: bool = False  # whether the worker was heard at all

    def renew(self, progress: TrialProgress) -> None:
        """Its worker was heard."""
        self.heard, self.progress, self.known = time.monotonic(), progress, True

    @property
    def seconds(self) -> float:
        """Seconds since it was handed out."""
        return time.monotonic() - self.since

    @property
    def expired(self) -> bool:
        """Whether its worker has not been heard for too long."""
        return time.monotonic() - self.heard > LEASE_SECONDS


class Controller:
    """Runs a search on an executor. One controller per run folder holds its lock."""

    def __init__(
        self,
        folder: RunFolder,
        search: Search,
        executor: Executor,
        *,
        budget: Budget,
        seed: int,
        context: Mapping[str, Any],
        view: View,
        limits: Limits = Limits(),
        retention: Retention | None = None,
        requests: Callable[[], Iterator[Request]] = lambda: iter(()),
    ) -> None:
        self.folder, self.search, self.executor = folder, search, executor
        self.budget, self.seed, self.context, self.view = budget, seed, context, view
        self.limits, self.retention, self.requests = limits, retention, requests
        self.running: dict[int, Lease] = {}
        self.exhausted = False
        self.stopping = self.cancelling = False
        self.fatal: EvolmError | None = None
        self._deadline = None if budget.seconds is None else time.monotonic() + budget.seconds
        self._end_by: float | None = None
        self._looked = time.monotonic()
        self._announced, self._within = False, True
        self._heard: set[Any] = set()

    # --- the loop -----------------------------------------------------------------------------------------------------

    def run(self) -> Why:
        """Work until nothing is left to do, the budget is spent, or `stop` was called. Raises what is fatal to the
        run, once running trials have ended."""
        for place in (self.folder.trials, self.folder.requests):  # made here: other users' shells leave requests
            place.mkdir(exist_ok=True)
        self.reclaim()
        while True:
            self.listen()
            self.announce()
            if not self.stopping and not self.overdue:
                self.launch()
            # Without idle workers and running trials, workers are being replaced: `wait` waits for them.
            if self.late or (not self.running and (self.executor.idle() or self.stopping or self.overdue)):
                break
            for outcome in self.executor.wait(TICK):
                self.take(outcome)
            self.watch()
        for lease in list(self.running.values()):
            spent: dict[str, Any] = {"flops": lease.progress.flops, "seconds": lease.seconds}
            self.view.told(self.search.fail(lease.asked, "interrupted", "abandoned", final=False, **spent))
        if self.fatal is not None:
            raise self.fatal
        if self.stopping:
            return "interrupted"
        return "exhausted" if self.exhausted else "budget"

    def stop(self) -> None:
        """Launch nothing more and let running trials save; called again, end them as they are."""
        if not self.stopping:
            self.stopping = True
            self.executor.interrupt()
        elif not self.cancelling:
            self.cancelling = True
            self._end_by = time.monotonic() + END_SECONDS
            self.executor.cancel()

    def announce(self) -> None:
        """Say once that a signal was heard: the handler itself may not write."""
        if self.stopping and not self._announced and self.fatal is None:
            self._announced = True
            if self.running:
                self.view.say("stopping: running trials save and end; Ctrl-C again does not wait for them")

    def end(self, error: EvolmError) -> None:
        """Stop because of what is fatal to the run."""
        if self.fatal is None:
            self.fatal = error
            self._end_by = time.monotonic() + END_SECONDS
            if not self.stopping:
                self.stop()

    @property
    def overdue(self) -> bool:
        """Whether the time is up."""
        return self._deadline is not None and time.monotonic() >= self._deadline

    @property
    def late(self) -> bool:
        """Whether trials that were told to end have taken too long about it."""
        return self._end_by is not None and time.monotonic() > self._end_by

    def reclaim(self) -> None:
        """Trials that an earlier controller left running were interrupted when it died."""
        for trial in self.search.ledger.in_state("running"):
            self.search.fail(trial, "interrupted", "its controller ended", final=False)

    # --- launching ----------------------------------------------------------------------------------------------------

    def launch(self) -> None:
        """Give every idle worker a trial, as long as there is one."""
        for slot in self.executor.idle():
            asked = None if self.stopping else self.next(self.executor.workers[slot])
            if asked is None:
                break
            self.running[asked.id] = Lease(asked=asked, progress=TrialProgress(trial=asked.id))
            self.executor.submit(slot, self.job(asked))
        if self.stopping:  # a signal came while a trial was handed over: it has not heard
            self.executor.interrupt()

    def next(self, worker: Mapping[str, Any]) -> Asked | None:
        """An interrupted or promoted trial, otherwise a new one while the budget lasts."""
        asked = self.search.ask_known(worker)
        if asked is not None or self.exhausted or len(self.search.ledger.trials) >= self.budget.trials:
            return asked
        try:
            return self.search.ask_new(worker)
        except SpaceExhausted:
            self.exhausted = True
            return None

    def job(self, asked: Asked) -> Job:
        """The job of a trial that was asked."""
        return Job(
            trial=asked.id,
            lease=asked.lease,
            rung=asked.rung,
            top=asked.rung >= self.search.top,
            tokens=asked.fidelity["tokens"] if asked.fidelity else 0,
            genome=asked.genome,
            seed=self.seed,
            folder=str(self.folder.trial(asked.id).absolute()),
            context=self.context,
            limits=self.limits,
        )

    # --- watching -----------------------------------------------------------------------------------------------------

    def watch(self) -> None:
        """Renew the leases of workers that were heard, and give up those that were not; see to the run's storage."""
        for progress in self.executor.progress():
            if progress.trial in self.running:
                self.running[progress.trial].renew(progress)
        for trial, lease in self.running.items():
            if lease.expired:
                self.executor.abandon(trial)
        self.view.tick([lease.progress for lease in self.running.values()])
        self.search.ledger.check_place()
        if self.search.ledger.full:
            place = self.folder.path
            self.end(StorageError(f"{place}: the disk is full; free some space, then run `evolm resume {place}`"))

    def heard_inline(self, progress: TrialProgress) -> bool:
        """The trial of this very process has moved: the moment to look at everything else, too."""
        now = time.monotonic()
        if now - self._looked > TICK:
            self._looked = now
            self.running[progress.trial].renew(progress)
            self.listen()
            self.watch()
        return True

    def listen(self) -> None:
        """Do what other processes ask of this run."""
        for request in self.requests():
            if request.file in self._heard:
                continue
            self._heard.add(request.file)  # should it not go away
            if request.kind == "enqueue":
                self.enqueue(request.genome or {})
            elif not self.stopping or (request.kind == "cancel" and not self.cancelling):
                self._announced = True
                self.view.say("asked to stop: running trials save and end")
                self.stop()
                if request.kind == "cancel":
                    self.stop()
            try:
                request.done()
            except StorageError as error:
                self.view.say(str(error))

    def enqueue(self, genome: Mapping[str, Any]) -> None:
        """Take a genome that somebody asked to be tried."""
        try:
            trial = self.search.enqueue(genome)
        except UsageError as error:
            self.view.say(f"not enqueued: {error}")
        else:
            self.view.say(f"enqueued as trial {trial.id}")

    # --- taking -------------------------------------------------------------------------------------------------------

    def take(self, outcome: Outcome) -> None:
        """Write down how a launch ended, then clean up behind it: never before it is written."""
        lease = self.running.get(outcome.trial)
        if lease is None or lease.asked.lease != outcome.lease:
            self.search.late(outcome.trial, outcome.lease, outcome.kind, flops=outcome.flops, seconds=outcome.seconds)
            return
        del self.running[outcome.trial]
        if outcome.kind == "fail" and outcome.flops == 0:  # nobody was left to tell what was spent
            outcome = replace(outcome, flops=lease.progress.flops, seconds=outcome.seconds or lease.seconds)
        trial = self.write(lease.asked, outcome)
        if self.retention is not None:
            baseline = self.search.ledger.numbers.get(self.search.space.baseline)
            told = outcome.kind == "result"
            kept = self.retention.after(trial, self.search.trials(), told=told, always=baseline)
            if not kept and self._within:
                self.view.say(f"checkpoints hold {format_bytes(self.retention.bytes)}, more than their bound allows")
            self._within = kept
        self.view.told(trial)

    def write(self, asked: Asked, outcome: Outcome) -> Trial:
        """The outcome as an event of the ledger."""
        spent: dict[str, Any] = {"flops": outcome.flops, "seconds": outcome.seconds}
        if outcome.kind == "infeasible":
            return self.search.refuse(asked, outcome.message)
        if outcome.kind == "fatal":
            self.end((StorageError if outcome.fatal == "storage" else DataError)(outcome.message))
            return self.search.fail(asked, "interrupted", outcome.message, **spent, final=False)
        if outcome.kind == "fail":
            assert outcome.reason is not None
            final = not self.again(asked.id, outcome.reason)
            return self.search.fail(asked, outcome.reason, outcome.message, **spent, final=final)
        try:
            return self.search.tell(asked, outcome.metrics, **spent)
        except BadMetrics as error:
            return self.search.fail(asked, "bad_metrics", str(error), **spent)

    def again(self, trial: int, reason: Reason) -> bool:
        """Whether a trial that failed now is to be tried again."""
        before = self.search.ledger.trials[trial].failures.get(reason, 0)
        return reason == "interrupted" or before < RETRIES.get(reason, 0)
