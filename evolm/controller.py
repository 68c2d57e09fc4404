"""The loop that keeps workers busy: ask the search, hand to the executor, tell the search, until the budget is
spent."""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from evolm.errors import BadMetrics, SpaceExhausted
from evolm.executors.base import Executor, Job, Outcome, TrialProgress
from evolm.run_folder import RunFolder, latest_checkpoint, rung_checkpoint
from evolm.search import Asked, Search
from fitness.trial import Trial

TICK = 0.5
"""Seconds between looks at signals, deadlines and progress while nothing comes in."""

LOSSES = 3
"""How many workers a trial may lose on its way to one rung: a genome that kills its worker is given up."""

Why = Literal["budget", "exhausted", "interrupted"]


class View(Protocol):
    """Shows a search while it runs."""

    def told(self, trial: Trial) -> None:
        """A trial told something, or came to its end."""

    def tick(self, running: Sequence[TrialProgress]) -> None:
        """Time has passed."""


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What may be spent: genomes to try, and seconds of wall clock from the start of this controller."""

    trials: int
    seconds: float | None = None


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
    ) -> None:
        self.folder, self.search, self.executor = folder, search, executor
        self.budget, self.seed, self.context, self.view = budget, seed, context, view
        self.running: dict[int, Asked] = {}
        self.exhausted = False
        self.stopping = self.abandoning = False
        self._deadline = None if budget.seconds is None else time.monotonic() + budget.seconds

    # --- the loop -----------------------------------------------------------------------------------------------------

    def run(self) -> Why:
        """Work until nothing is left to do, the budget is spent, or `stop` was called. Raises what is fatal to the
        run."""
        self.reclaim()
        while True:
            if not self.stopping and not self.overdue:
                self.launch()
            # Without idle workers and running trials, workers are being replaced: `wait` waits for them.
            if self.abandoning or (not self.running and (self.executor.idle() or self.stopping or self.overdue)):
                break
            for outcome in self.executor.wait(TICK):
                self.take(outcome)
            self.view.tick(self.executor.progress())
        for asked in list(self.running.values()):
            self.view.told(self.search.fail(asked, "interrupted", "abandoned", final=False))
        if self.stopping:
            return "interrupted"
        return "exhausted" if self.exhausted else "budget"

    def stop(self) -> None:
        """Launch nothing more and let running trials save; called again, do not wait for them."""
        self.abandoning = self.stopping
        self.stopping = True
        self.executor.interrupt()

    @property
    def overdue(self) -> bool:
        """Whether the time is up."""
        return self._deadline is not None and time.monotonic() >= self._deadline

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
            self.running[asked.id] = asked
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
            attempt=asked.attempt,
            rung=asked.rung,
            top=asked.rung >= self.search.top,
            tokens=asked.fidelity["tokens"] if asked.fidelity else 0,
            genome=asked.genome,
            seed=self.seed,
            folder=str(self.folder.trial(asked.id).absolute()),
            context=self.context,
        )

    # --- taking -------------------------------------------------------------------------------------------------------

    def take(self, outcome: Outcome) -> None:
        """Write down how a launch ended, then clean up behind it: never before it is written."""
        asked = self.running.pop(outcome.trial)
        if outcome.kind == "fatal":
            self.search.fail(asked, "interrupted", outcome.message, final=False)
            assert outcome.error is not None
            raise outcome.error
        trial = self.write(asked, outcome)
        self.clean(trial, outcome)
        self.view.told(trial)

    def write(self, asked: Asked, outcome: Outcome) -> Trial:
        """The outcome as an event of the ledger."""
        flops, seconds = outcome.flops, outcome.seconds
        if outcome.kind == "infeasible":
            return self.search.ledger.infeasible(asked.id, outcome.message)
        if outcome.kind == "fail":
            assert outcome.reason is not None
            lost = self.search.ledger.trials[asked.id].lost + 1  # with this one
            again = outcome.reason == "interrupted" or (outcome.reason == "lost" and lost < LOSSES)
            return self.search.fail(
                asked, outcome.reason, outcome.message, flops=flops, seconds=seconds, final=not again
            )
        try:
            return self.search.tell(asked, outcome.metrics, flops=flops, seconds=seconds)
        except BadMetrics as error:
            return self.search.fail(asked, "bad_metrics", str(error), flops=flops, seconds=seconds)

    def clean(self, trial: Trial, outcome: Outcome) -> None:
        """Delete the checkpoints that this trial can no longer need."""
        place = self.folder.trial(trial.id)
        if trial.state in ("complete", "failed", "infeasible"):
            shutil.rmtree(place / "checkpoints", ignore_errors=True)
        elif outcome.kind == "result":
            shutil.rmtree(latest_checkpoint(place), ignore_errors=True)
            shutil.rmtree(rung_checkpoint(place, outcome.rung - 1), ignore_errors=True)
