"""Ask and tell: the search itself, without workers, clocks or models.

Everything that is known stands in the ledger. What is proposed is a function of the space, the ledger, the seed and the
trial's number, so a search that is opened again goes on as if it had never been closed.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from evolm.algorithms import load_algorithm
from evolm.algorithms.base import Algorithm, History, Proposal
from evolm.algorithms.fidelity import Fidelity, next_promotion, read_fidelity
from evolm.errors import SpaceExhausted, UsageError
from fitness.ledger import Ledger
from fitness.objectives import Objective, check_metrics, minimised, read_objectives
from fitness.pareto import hypervolume, nondominated
from fitness.trial import Reason, Trial
from search_spaces.errors import SpaceError
from search_spaces.genes import Rng
from search_spaces.genome import Genome, Values
from search_spaces.space import Space

ENQUEUED = "enqueued"
"""The operator of trials that a user named."""

TRIES = 100
"""Proposals of one algorithm that may turn out to be known already, before others are looked for."""


@dataclass(frozen=True, kw_only=True)
class Asked:
    """A trial to be run: `genome` is a plain nested dict, `fidelity` how far to train (None when there is no such
    thing).

    The same trial is asked again, under the same id, for its next rung. `lease` names this one asking: an answer counts
    only while it has not been asked again.
    """

    id: int
    genome: Values
    fidelity: dict[str, int] | None
    rung: int
    lease: int


class Search:
    """Proposes genomes of a space and learns from what is told about them. Threads may share one.

    `objectives` names metrics and their direction. `exact` gives objectives (or metrics) that are known before
    training, as functions of the genome. `fidelity` is a ladder such as `{"tokens": [1e6, 4e6]}`. Raises UsageError.
    """

    def __init__(
        self,
        space: Space,
        objectives: Mapping[str, str] | Sequence[str],
        *,
        algorithm: str | Algorithm = "auto",
        seed: int = 0,
        exact: Mapping[str, Callable[[Values], float]] | None = None,
        fidelity: Mapping[str, Any] | Fidelity | None = None,
        ledger: Ledger | None = None,
    ) -> None:
        self.space, self.seed = space, seed
        self.objectives: tuple[Objective, ...] = read_objectives(objectives)
        self.algorithm = load_algorithm(algorithm) if isinstance(algorithm, str) else algorithm
        self.fidelity = fidelity if isinstance(fidelity, Fidelity) else read_fidelity(fidelity)
        self.exact = {**space.exact, **(exact or {})}
        self.ledger = ledger if ledger is not None else Ledger.create(None, {"seed": seed})
        self._lock = threading.RLock()
        self._given = list(dict.fromkeys([*self._feasible_baseline(), *space.baselines]))

    def _feasible_baseline(self) -> list[Genome]:
        return [] if self.space.violations(self.space.baseline) else [self.space.baseline]

    @property
    def top(self) -> int:
        """The number of the last rung; 0 without a ladder."""
        return self.fidelity.top if self.fidelity else 0

    # --- asking -------------------------------------------------------------------------------------------------------

    def ask(self, worker: Mapping[str, Any] | None = None) -> Asked:
        """The next trial to run: one that was interrupted, one that is promoted, or a new one.

        Raises SpaceExhausted when nothing is left to try.
        """
        with self._lock:
            asked = self.ask_known(worker)
            return asked if asked is not None else self.ask_new(worker)

    def ask_known(self, worker: Mapping[str, Any] | None = None) -> Asked | None:
        """A trial that was interrupted or is promoted; None when only a new one could be asked."""
        with self._lock:
            waiting = self.ledger.in_state("proposed")
            if waiting:
                return self._start(waiting[0], worker)
            if self.fidelity is not None and self.fidelity.top > 0:
                baseline = self.ledger.numbers.get(self.space.baseline)
                promoted = next_promotion(self.trials(), self.fidelity, self.objectives, baseline)
                if promoted is not None:
                    return self._start(promoted, worker)
            return None

    def ask_new(self, worker: Mapping[str, Any] | None = None) -> Asked:
        """A trial with a genome that was never tried. Raises SpaceExhausted when there is none."""
        with self._lock:
            seen = self.ledger.seq
            proposal = self.propose(len(self.ledger.trials) + 1, seen)
            trial = self.ledger.propose(
                proposal.genome, parents=proposal.parents, operator=proposal.operator, seen=seen
            )
            return self._start(trial, worker)

    def enqueue(self, genome: Mapping[str, Any]) -> Trial:
        """Have a genome tried before anything else is: the given values, and the baseline's for the rest.

        Raises SpaceError for one that is not of this space, UsageError for one that is a trial already.
        """
        frozen = self.space.complete(genome)
        self.space.validate(frozen)
        with self._lock:
            known = self.ledger.numbers.get(frozen)
            if known is not None:
                raise UsageError(f"this genome is trial {known} already ({self.ledger.trials[known].state})")
            return self.ledger.propose(frozen, operator=ENQUEUED, seen=self.ledger.seq)

    def _start(self, trial: Trial, worker: Mapping[str, Any] | None) -> Asked:
        rung = trial.rung + 1
        started = self.ledger.start(trial.id, rung, worker or {})
        return Asked(
            id=trial.id,
            genome=trial.genome,
            fidelity={"tokens": self.fidelity.rungs[rung]} if self.fidelity else None,
            rung=rung,
            lease=started.lease or 0,
        )

    # --- proposing ----------------------------------------------------------------------------------------------------

    def propose(self, number: int, seen: int) -> Proposal:
        """What the search proposes as trial `number` when it knows the events up to `seen`; writes nothing."""

        def known(genome: Genome) -> bool:
            return self.ledger.numbers.get(genome, number) < number

        for genome in self._given:
            if not known(genome):
                operator = "baseline" if genome == self.space.baseline else "given"
                return Proposal(genome=genome, operator=operator)
        trials = self.ledger.as_of(seen, number)
        history = History(space=self.space, objectives=self.objectives, trials=trials)
        rng = np.random.Generator(np.random.Philox(key=[self.seed, number]))
        for _ in range(TRIES):
            try:
                proposal = self.algorithm.propose(history, rng)
            except SpaceError:
                break  # nothing feasible but what the search below may still find
            if not known(proposal.genome):
                return proposal
        return self._any_unknown(known, trials, rng)

    def _any_unknown(self, known: Callable[[Genome], bool], trials: Sequence[Trial], rng: Rng) -> Proposal:
        """A random genome that was never tried or, where few are left, a neighbour of one that was."""
        for _ in range(TRIES):
            try:
                genome = self.space.sample(rng)
            except SpaceError:
                break
            if not known(genome):
                return Proposal(genome=genome, operator="random")
        for index in rng.permutation(len(trials)):
            parent = trials[int(index)]
            for genome in self.space.neighbours(parent.frozen):
                if not known(genome):
                    return Proposal(genome=genome, operator="neighbour", parents=(parent.id,))
        raise SpaceExhausted(f"all {len(trials)} feasible genomes of the space that could be found have been tried")

    # --- telling ------------------------------------------------------------------------------------------------------

    def tell(
        self,
        trial: Asked | Trial | int,
        metrics: Mapping[str, float],
        parts: Mapping[str, Mapping[str, float]] | None = None,
        *,
        flops: float = 0.0,
        seconds: float = 0.0,
    ) -> Trial:
        """What a trial measured at the rung that it was asked for.

        `parts` splits a metric by domain or task and is kept as `metric/part`. Exact objectives are added. Raises
        BadMetrics for a metric that is not finite or is missing, UsageError for a trial that is not running.
        """
        with self._lock:
            return self._tell(self._running(trial), metrics, parts or {}, flops, seconds)

    def _tell(
        self,
        running: Trial,
        metrics: Mapping[str, float],
        parts: Mapping[str, Mapping[str, float]],
        flops: float,
        seconds: float,
    ) -> Trial:
        told = dict(metrics)
        for metric, values in parts.items():
            told |= {f"{metric}/{part}": value for part, value in values.items()}
        told |= {name: function(running.genome) for name, function in self.exact.items()}
        checked = check_metrics(told, self.objectives)
        rung = running.rung + 1
        tokens = self.fidelity.rungs[rung] if self.fidelity else 0
        written = self.ledger.result(
            running.id,
            rung,
            tokens=tokens,
            metrics=checked,
            flops=flops,
            seconds=seconds,
            top=rung >= self.top,
            lease=running.lease,
        )
        assert written is not None
        return written

    def fail(
        self,
        trial: Asked | Trial | int,
        reason: Reason = "crashed",
        message: str = "",
        *,
        flops: float = 0.0,
        seconds: float = 0.0,
        final: bool = True,
    ) -> Trial:
        """A trial that came to nothing, with the reason; one that is not `final` is asked again."""
        with self._lock:
            running = self._running(trial)
            failed = self.ledger.fail(
                running.id, reason, message, flops=flops, seconds=seconds, final=final, lease=running.lease
            )
        assert failed is not None
        return failed

    def refuse(self, trial: Asked | Trial | int, message: str) -> Trial:
        """A trial whose genome turned out to be impossible to train."""
        with self._lock:
            running = self._running(trial)
            refused = self.ledger.infeasible(running.id, message, lease=running.lease)
        assert refused is not None
        return refused

    def late(self, trial: int, lease: int, kind: str, *, flops: float = 0.0, seconds: float = 0.0) -> None:
        """An answer to an asking that is over: it is counted, and nothing else becomes of it."""
        with self._lock:
            spent: dict[str, Any] = {"flops": flops, "seconds": seconds}
            if kind == "result":
                self.ledger.result(trial, 0, tokens=0, metrics={}, top=False, lease=lease, **spent)
            else:
                self.ledger.fail(trial, "lost", f"a late {kind}", lease=lease, **spent)

    def _running(self, trial: Asked | Trial | int) -> Trial:
        identity = trial if isinstance(trial, int) else trial.id
        if identity not in self.ledger.trials:
            raise UsageError(f"there is no trial {identity}; there are {len(self.ledger.trials)}")
        known = self.ledger.trials[identity]
        if known.state != "running":
            raise UsageError(f"trial {identity} is {known.state}, not running: it was told before, or never asked")
        if isinstance(trial, Asked) and trial.lease != known.lease:
            raise UsageError(f"trial {identity} has been asked again since: this answer is of an earlier launch")
        return known

    # --- looking ------------------------------------------------------------------------------------------------------

    def trials(self) -> list[Trial]:
        """All trials, by number."""
        return list(self.ledger.trials.values())

    def front(self) -> list[Trial]:
        """The trials that no other dominates, by the first objective; only those of the highest rung that any
        reached."""
        return front_of(self.trials(), self.objectives)

    def hypervolume(self, reference: Sequence[float]) -> float:
        """The hypervolume of the front in raw units, up to the caller's reference point (one number an objective)."""
        if len(reference) != len(self.objectives):
            raise UsageError(f"the reference needs {len(self.objectives)} numbers, has {len(reference)}")
        signs = [objective.sign for objective in self.objectives]
        points = minimised([trial.metrics for trial in self.front()], self.objectives)
        return hypervolume(points, [sign * value for sign, value in zip(signs, reference, strict=True)])


def comparable(trials: Sequence[Trial]) -> list[Trial]:
    """The trials whose metrics compare: those at the highest rung that any trial reached and that have not failed."""
    told = [trial for trial in trials if trial.rungs and trial.state not in ("failed", "infeasible")]
    highest = max((trial.rung for trial in told), default=0)
    return [trial for trial in told if trial.rung == highest]


def front_of(trials: Sequence[Trial], objectives: Sequence[Objective]) -> list[Trial]:
    """The Pareto front among the trials that compare, by the first objective."""
    members = comparable(trials)
    points = minimised([trial.metrics for trial in members], objectives)
    front = [trial for trial, keep in zip(members, nondominated(points), strict=True) if keep]
    return sorted(front, key=lambda trial: objectives[0].sign * trial.metrics[objectives[0].metric])
