"""A run, played again: whether its proposals follow from its ledger, and what another algorithm would have found in it.

Neither needs a worker, a lock or the data: a run may be looked at while it goes on.
"""

from __future__ import annotations

import math
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evolm import __version__
from evolm.algorithms import load_algorithm
from evolm.algorithms.base import Algorithm, History, Proposal
from evolm.errors import GateError, SpaceError, SpaceExhausted, UsageError
from evolm.run import SCHEMA_VERSION, Run
from evolm.search import ENQUEUED, Search, comparable
from fitness.objectives import Objective, minimised
from fitness.pareto import Normaliser, hypervolume
from fitness.trial import Trial
from search_spaces.distances import Distances
from search_spaces.genome import Genome, difference
from search_spaces.space import Space
from trainer import cost

Tick = Callable[[int, int], None]
"""Told how much of the work is done: so many steps, of so many."""


def _silent(done: int, of: int) -> None:
    pass


# --- the same proposals again -----------------------------------------------------------------------------------------

DECIDING = ("python", "evolm", "numpy", "deap", "moocore")
"""What a proposal is computed with; other versions of it may propose otherwise."""


@dataclass(frozen=True, kw_only=True)
class Different:
    """A trial that is not what is proposed now. `proposed` is None where nothing was left to propose."""

    trial: Trial
    proposed: Proposal | None

    @property
    def differences(self) -> list[str]:
        """What differs, from what the ledger has to what is proposed now, a line per value of the genome."""
        if self.proposed is None:
            return ["nothing is left to propose"]
        return [
            *difference(self.trial.genome, self.proposed.genome.values()),
            *difference(_origin(self.trial), _origin(self.proposed)),
        ]

    def as_dict(self) -> dict[str, Any]:
        """The trial as one JSON object."""
        return {
            "trial": self.trial.id,
            "differences": self.differences,
            "recorded": {"genome": self.trial.genome, **_origin(self.trial)},
            "proposed": self.proposed and {"genome": self.proposed.genome.values(), **_origin(self.proposed)},
        }


def _origin(one: Trial | Proposal) -> dict[str, Any]:
    return {"operator": one.operator, "parents": list(one.parents)}


@dataclass(frozen=True, kw_only=True)
class Verified:
    """How a run's proposals compare with those that its ledger leads to now.

    `equal` counts proposals, `enqueued` the trials that a user gave and nobody proposed, `unverifiable` the proposals
    that had seen an event which a repair of the ledger could not save. `versions` are those that the
    run was made with (in one of its sessions, if it had several) and that are others now: name, the run's, the present.
    """

    run: str
    equal: int
    enqueued: int
    unverifiable: int
    different: tuple[Different, ...]
    versions: Mapping[str, tuple[tuple[str, ...], str]]

    def as_dict(self) -> dict[str, Any]:
        """As one JSON object: what `evolm replay --verify --json` prints."""
        changed = {name: {"recorded": list(then), "present": now} for name, (then, now) in self.versions.items()}
        return {
            "schema_version": SCHEMA_VERSION,
            "run": self.run,
            "verified": self.equal,
            "enqueued": self.enqueued,
            "unverifiable": self.unverifiable,
            "different": [one.as_dict() for one in self.different],
            "changed_versions": changed,
        }

    def raise_if_different(self) -> None:
        """Raise GateError, with this as its `result`, when a proposal is not what it was."""
        if not self.different:
            return
        known = self.equal + len(self.different)
        named = ", ".join(str(one.trial.id) for one in self.different[:5]) + ", ..." * (len(self.different) > 5)
        changed = ", ".join(f"{name} {'/'.join(then)}, now {now}" for name, (then, now) in self.versions.items())
        why = (
            f"a likely cause: it was made with {changed}; with those versions it goes on as it began"
            if changed
            else "its ledger, its space or the algorithm is not what it was"
        )
        lost = f" ({self.unverifiable} more cannot be compared: events are lost)" if self.unverifiable else ""
        words = f"{len(self.different)} of {known} proposals differ (trial {named}){lost}"
        error = GateError(f"run '{self.run}': {words}; {why}")
        error.result = self
        raise error


def verify(run: Run, tick: Tick = _silent) -> Verified:
    """Propose every trial of a run again, from what its proposal had seen, and compare genome, operator and parents.

    Raises UsageError when the run's algorithm is not there.
    """
    settings, trials = run.settings, run.trials()
    search = Search(
        run.file.space,
        settings.objectives,
        algorithm=settings.algorithm,
        seed=settings.seed,
        fidelity=settings.fidelity,
        ledger=run.ledger,
    )
    different: list[Different] = []
    equal = enqueued = unverifiable = 0
    lost = min(run.ledger.missing, default=math.inf)
    for done, trial in enumerate(trials, 1):
        if trial.operator == ENQUEUED:
            enqueued += 1
        elif trial.seen >= lost:
            unverifiable += 1
        else:
            proposed = _proposed(search, trial)
            if proposed == Proposal(genome=trial.frozen, operator=trial.operator, parents=trial.parents):
                equal += 1
            else:
                different.append(Different(trial=trial, proposed=proposed))
        tick(done, len(trials))
    return Verified(
        run=run.name,
        equal=equal,
        enqueued=enqueued,
        unverifiable=unverifiable,
        different=tuple(different),
        versions=_changed_versions(run.ledger.sessions()),
    )


def _proposed(search: Search, trial: Trial) -> Proposal | None:
    try:
        return search.propose(trial.id, trial.seen)
    except SpaceExhausted:
        return None


def _changed_versions(sessions: Sequence[Mapping[str, Any]]) -> dict[str, tuple[tuple[str, ...], str]]:
    """The versions that sessions wrote down, of what decides proposals, that are not the ones here."""
    changed = {}
    for name in DECIDING:
        then = dict.fromkeys(str(one["versions"][name]) for one in sessions if name in one.get("versions", {}))
        now = _version(name)
        if others := tuple(one for one in then if one != now):
            changed[name] = (others, now)
    return changed


def _version(name: str) -> str:
    if name in ("python", "evolm"):
        return platform.python_version() if name == "python" else __version__
    try:
        return version(name)
    except PackageNotFoundError:
        return "missing"


# --- another algorithm ------------------------------------------------------------------------------------------------

SMALLEST_TABLE = 8
"""Trials below which an order says nothing."""

REPEATS = 20

SHARES = (0.9, 0.99)
"""Of the hypervolume of all trials: how soon an order gets there."""

BOUNDED = (
    "a bounded comparison: every order ends at the same trials, and these were chosen by the run's own algorithm; "
    "it tells who finds the good ones among them sooner, not who would find better ones elsewhere"
)


@dataclass(frozen=True, kw_only=True)
class Spread:
    """Quartiles over repeats, each of several values (one a trial, or one a share)."""

    low: tuple[float, ...]
    median: tuple[float, ...]
    high: tuple[float, ...]

    @classmethod
    def of(cls, rows: Sequence[Sequence[float]] | NDArray[np.float64]) -> Spread:
        """The quartiles of values of shape (repeats, values)."""
        low, median, high = np.quantile(np.asarray(rows, dtype=np.float64), [0.25, 0.5, 0.75], axis=0).tolist()
        return cls(low=tuple(low), median=tuple(median), high=tuple(high))


@dataclass(frozen=True, kw_only=True)
class Order:
    """What is found when the table's trials come in one algorithm's order.

    `hypervolume` (normalised) and `best` (of the first objective, as it was measured) are those after each trial;
    `trials_to` is the number of trials until each of `SHARES`. `stand_in` is the mean distance of the proposals from
    the trials that stood in for them, None where nothing was proposed.
    """

    name: str
    repeats: int
    hypervolume: Spread
    best: Spread
    trials_to: Spread
    stand_in: float | None = None


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """The orders of the run itself, of another algorithm and of chance, on the trials of one run.

    `trials` is their number, `tokens` what each was trained on, `after` the numbers of trials that a table shows: a
    quarter of them, a half, three quarters, all.
    """

    run: str
    algorithm: str
    seed: int
    repeats: int
    objective: Objective
    trials: int
    tokens: float
    after: tuple[int, ...]
    orders: tuple[Order, ...]

    def as_dict(self) -> dict[str, Any]:
        """As one JSON object: what `evolm replay --algorithm NAME --json` prints."""
        return {"schema_version": SCHEMA_VERSION, **asdict(self), "shares": list(SHARES), "note": BOUNDED}


def compare(
    run: Run, algorithm: str | Algorithm, seed: int | None = None, repeats: int = REPEATS, tick: Tick = _silent
) -> Comparison:
    """What another algorithm would have found in a run's table, beside the run's own order and a random one.

    The table are the trials with results at the highest rung that any trial reached. The algorithm proposes, the
    nearest trial of the table that was not taken yet (`search_spaces.distances`; a tie is drawn) stands in for its
    proposal, and the algorithm is told that trial's results. The hypervolume is normalised by the whole table.

    Repeats have the seeds `seed`, `seed + 1`, ...; from the one after the run's own where none is given, as with that
    one an algorithm that the run was made with proposes the very same genomes. Raises UsageError for an algorithm that
    is not there, a table of fewer than `SMALLEST_TABLE` trials, and fewer than one repeat.
    """
    name = algorithm if isinstance(algorithm, str) else type(algorithm).__name__
    player = load_algorithm(algorithm) if isinstance(algorithm, str) else algorithm
    if repeats < 1:
        raise UsageError(f"repeats must be at least 1, is {repeats}")
    table = _Table.of(run)
    first = run.settings.seed + 1 if seed is None else seed
    played = []
    for repeat in range(repeats):
        played.append(_played(player, table, first + repeat))
        tick(repeat + 1, repeats)
    # A generator of its own: that of the proposals also orders what is left, and the two are to be independent.
    shuffled = [np.random.default_rng(first + repeat).permutation(len(table.trials)) for repeat in range(repeats)]
    return Comparison(
        run=run.name,
        algorithm=name,
        seed=first,
        repeats=repeats,
        objective=table.objectives[0],
        trials=len(table.trials),
        tokens=table.trials[0].rungs[-1].tokens,
        after=tuple(math.ceil(len(table.trials) * quarter / 4) for quarter in (1, 2, 3, 4)),
        orders=(
            table.judged("the run", [np.arange(len(table.trials))]),
            table.judged(name, [order for order, _ in played], float(np.mean([moved for _, moved in played]))),
            table.judged("random order", shuffled),
        ),
    )


@dataclass(frozen=True, kw_only=True)
class _Table:
    """The trials of a run that compare, in the order of their results. `scaled` are their points on the scale of the
    normalised hypervolume, shape (trials, objectives)."""

    space: Space
    objectives: tuple[Objective, ...]
    trials: tuple[Trial, ...]
    distances: Distances
    scaled: NDArray[np.float64]

    @classmethod
    def of(cls, run: Run) -> _Table:
        trials = sorted(comparable(run.trials()), key=lambda trial: trial.rungs[-1].seq)
        if len(trials) < SMALLEST_TABLE:
            at = f" at its highest rung ({trials[0].rungs[-1].tokens:g} tokens)" if trials else ""
            raise UsageError(
                f"run '{run.name}' has {len(trials)} trials with results{at}; to compare orders takes at least "
                f"{SMALLEST_TABLE}: let it go on with `evolm resume {run.folder.path} --trials N`"
            )
        points = minimised([trial.metrics for trial in trials], run.objectives)
        costs = [objective.metric in cost.NAMES for objective in run.objectives]
        return cls(
            space=run.file.space,
            objectives=run.objectives,
            trials=tuple(trials),
            distances=Distances(run.file.space, [trial.frozen for trial in trials]),
            scaled=Normaliser(points, costs).normalised(points),
        )

    def judged(self, name: str, orders: Sequence[NDArray[np.int64]], stand_in: float | None = None) -> Order:
        """What is found in these orders, one a repeat."""
        objective = self.objectives[0]
        first = np.array([trial.metrics[objective.metric] for trial in self.trials])
        best = np.minimum if objective.direction == "min" else np.maximum
        volumes = np.array([self.volumes(order) for order in orders])
        reached = [[int(np.argmax(row >= share * row[-1])) + 1 for share in SHARES] for row in volumes]
        return Order(
            name=name,
            repeats=len(orders),
            hypervolume=Spread.of(volumes),
            best=Spread.of(np.array([best.accumulate(first[order]) for order in orders])),
            trials_to=Spread.of(reached),
            stand_in=stand_in,
        )

    def volumes(self, order: Sequence[int] | NDArray[np.int64]) -> list[float]:
        """The normalised hypervolume after each trial; computed when the front changes, which it seldom does."""
        front, volume, found = self.scaled[:0], 0.0, []
        for index in order:
            point = self.scaled[index]
            if not (front <= point).all(axis=1).any():
                front = np.vstack([front[~(point <= front).all(axis=1)], point])
                volume = hypervolume(front, [1.1] * len(point))
            found.append(volume)
        return found


def _played(algorithm: Algorithm, table: _Table, seed: int) -> tuple[NDArray[np.int64], float]:
    """The order in which an algorithm takes the table's trials, and the mean distance of its proposals from them.

    As in a search, the space's baselines come first, and each further proposal has a generator of its own.
    """
    left = _generator(seed, 0).permutation(len(table.trials)).tolist()  # in any order: the first of equals is any one
    given = _given(table.space)
    order: list[int] = []
    known: list[Trial] = []
    moved: list[float] = []
    while left:
        number = len(known) + 1
        history = History(space=table.space, objectives=table.objectives, trials=tuple(known))
        try:
            proposal = given.pop(0) if given else algorithm.propose(history, _generator(seed, number))
        except SpaceError:  # nothing feasible was found: any trial will do, as a search then takes any genome
            proposal, nearest = Proposal(genome=table.trials[left[0]].frozen, operator="random"), 0
        else:
            distances = np.round(table.distances.to(proposal.genome)[left], 12)  # equal ones are to be told as equal
            nearest = int(np.argmin(distances))
            moved.append(float(distances[nearest]))
        order.append(left.pop(nearest))
        known.append(_told(table.trials[order[-1]], proposal, number))
    return np.array(order), float(np.mean(moved)) if moved else 0.0


def _generator(seed: int, number: int) -> np.random.Generator:
    """The generator of a search's proposal; trials count from 1, so that 0 is free."""
    return np.random.Generator(np.random.Philox(key=[seed, number]))


def _given(space: Space) -> list[Proposal]:
    """What a search tries before any algorithm is asked."""
    genomes: dict[Genome, None] = dict.fromkeys([space.baseline, *space.baselines])
    return [Proposal(genome=genome, operator="given") for genome in genomes if not space.violations(genome)]


def _told(stand_in: Trial, proposal: Proposal, number: int) -> Trial:
    """The trial as an algorithm is to know it: under its own number, with nothing but the results that compare."""
    rung = replace(stand_in.rungs[-1], seq=number)
    return Trial(
        id=number,
        frozen=stand_in.frozen,
        parents=proposal.parents,
        operator=proposal.operator,
        seen=number - 1,
        state="complete",
        rungs=(rung,),
        attempts=1,
        flops=rung.flops,
        seconds=rung.seconds,
        ended=number,
    )
