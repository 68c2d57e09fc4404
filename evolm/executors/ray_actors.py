"""Trials on Ray: long-lived actors, each with a cell in which its trials run."""

from __future__ import annotations

import os
import re
import sys
import threading
import time
from dataclasses import dataclass
from typing import Any

from evolm.errors import ExecutorError
from evolm.executors.base import Job, Outcome, Runner, TrialProgress
from evolm.executors.cell import Cell, name_of
from evolm.executors.ray_cluster import Head, connect
from evolm.packages import foreign_packages
from search_spaces.quantities import format_bytes

STARTS = 3
"""How often in a row a slot's worker may fail to start before the slot is given up."""

START_SECONDS = 120.0
"""How long a worker may take to start: Python and torch from a cold disk."""


FIRST_SECONDS = 10.0
"""How long the first workers are waited for together; then those begin that are there."""

AGAIN_SECONDS = 300.0
"""After how long a slot that was given up is tried again: a node may have come, or somebody's job have gone."""

GRAIN = 10_000
"""Ray counts resources in ten-thousandths."""


class _Worker:
    """What runs in an actor's process. `run` occupies one thread; the other methods answer in another."""

    def __init__(self, runner: str, sys_path: list[str], keeps_limits: bool) -> None:
        if foreign := foreign_packages():  # a worker's environment may not be the driver's
            raise RuntimeError(f"{os.uname().nodename}: {foreign[0]}")
        self._cell = Cell(runner, [*sys_path, *sys.path], keeps_limits=keeps_limits)

    def about(self) -> dict[str, Any]:
        """Who this is."""
        return {"pid": os.getpid(), "node": os.uname().nodename}

    def run(self, job: Job) -> Outcome:
        """Run one job to its end."""
        return self._cell.run(job)

    def progress(self) -> TrialProgress | None:
        """Where the running job is."""
        return self._cell.progress

    def live(self) -> None:
        """Answers never: that this question fails is how the death of a worker is heard, an idle one's too."""
        threading.Event().wait()

    def stop(self, lease: int) -> None:
        """Ask a job to save and end, also one that is about to begin."""
        self._cell.stop(lease)

    def cancel(self, lease: int) -> None:
        """End a job now, also one that is about to begin."""
        self._cell.cancel(lease)


@dataclass(frozen=True, kw_only=True)
class Needs:
    """What one worker takes of the cluster: processor cores, accelerators (fractions are allowed), bytes of memory."""

    cpus: float = 1
    gpus: float = 0
    memory: int | None = None

    def as_ray(self) -> dict[str, float]:
        """The same in Ray's words."""
        named = {"CPU": self.cpus, "GPU": self.gpus, "memory": float(self.memory or 0)}
        return {name: amount for name, amount in named.items() if amount > 0}

    def places(self, node: dict[str, float]) -> int:
        """How many workers a node with these resources can hold at once."""
        shares = (round(node.get(name, 0) * GRAIN) // round(amount * GRAIN) for name, amount in self.as_ray().items())
        return min(shares, default=1)


class RayExecutor:
    """Runs jobs in `slots` actors, each of which takes what it `needs`.

    Without an `address` a Ray of our own is started on this machine and ended by `close`; a cluster that was there
    before is left running. Raises ExecutorError when there is no such cluster or when it could never hold a worker.
    """

    def __init__(
        self, runner: Runner, needs: Needs | None = None, *, slots: int | None = None, address: str | None = None
    ) -> None:
        self._runner, self._path, self._needs = name_of(runner), list(sys.path), needs or Needs()
        self._keeps_limits = getattr(runner, "keeps_limits", False)
        self._own = address is None
        connect(address)
        import ray

        self._ray = ray
        self._actor_class = ray.remote(concurrency_groups={"control": 1, "life": 1})(_controlled(_Worker))
        self._jobs: dict[Any, tuple[int, Job]] = {}
        self._abandoned: dict[Any, Job] = {}  # jobs whose workers are not heard any more, should they tell after all
        self._starting: dict[Any, tuple[int, float]] = {}  # the first answer of a worker: its slot, and until when
        self._asked: dict[int, Any] = {}  # by slot, the question after progress that is not answered yet
        self._lives: dict[Any, tuple[int, Any]] = {}  # the question that fails when a worker dies: its slot and actor
        self._lost: list[Outcome] = []
        self._gone: dict[int, float] = {}  # slots that were given up, and when
        self._head = Head(ray.get_runtime_context().gcs_address)
        self._node = ray.get_runtime_context().get_node_id()
        count, self.memory_share = self._room(slots)
        self._actors: list[Any] = [None] * count
        self._places: list[Any] = [self._place() for _ in range(count)]
        self._failed_starts = [0] * count
        self._abouts: list[dict[str, Any]] = [{"id": slot} for slot in range(count)]
        for slot in range(count):
            self._start(slot)
        until = time.monotonic() + FIRST_SECONDS
        while self._starting and not (time.monotonic() > until and self.idle()):
            self._started(self._ray.wait(list(self._starting), timeout=0.5)[0])

    # --- workers ------------------------------------------------------------------------------------------------------

    def _room(self, wanted: int | None) -> tuple[int, int | None]:
        """How many workers there are to be, and the memory that each can have. Raises ExecutorError when none fits."""
        nodes: list[dict[str, float]] = [node["Resources"] for node in self._ray.nodes() if node["Alive"]]
        places = [self._needs.places(node) for node in nodes]
        if not sum(places):
            wanted_words = _amounts(self._needs.as_ray())
            largest = max(nodes, key=lambda node: node.get("GPU", 0) * 1e6 + node.get("CPU", 0), default={})
            offered = _amounts({name: largest.get(name, 0.0) for name in self._needs.as_ray()})
            raise ExecutorError(
                f"no worker fits: a trial needs {wanted_words}, the largest of {len(nodes)} nodes has {offered}; "
                "make `resources` smaller, or search on a larger cluster"
            )
        count = min(sum(places), wanted or sum(places))
        shares = [node.get("memory", 0.0) / min(n, count) for node, n in zip(nodes, places, strict=True) if n]
        return count, int(min(shares)) or None

    def _place(self) -> Any:
        """Room for one worker, which it keeps while it is being replaced."""
        if not self._needs.as_ray():
            return None
        from ray.util import placement_group

        return placement_group([self._needs.as_ray()], strategy="STRICT_PACK")

    def _start(self, slot: int) -> None:
        """Begin to start a slot's worker."""
        options: dict[str, Any] = {"num_cpus": self._needs.cpus, "num_gpus": self._needs.gpus}
        if self._needs.memory:
            options["memory"] = self._needs.memory
        if self._places[slot] is not None:
            from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

            options["scheduling_strategy"] = PlacementGroupSchedulingStrategy(self._places[slot])
        actor = self._actor_class.options(**options).remote(self._runner, self._path, self._keeps_limits)
        self._actors[slot] = actor
        self._asked.pop(slot, None)
        self._starting[actor.about.remote()] = (slot, time.monotonic() + START_SECONDS)

    def _started(self, ready: list[Any]) -> None:
        """Take note of workers that are there now; start those anew that failed to. Raises ExecutorError when no slot
        is left that could have one."""
        for reference in ready:
            slot, _ = self._starting.pop(reference)
            try:
                self._abouts[slot] = {"id": slot, **self._ray.get(reference)}
                self._failed_starts[slot] = 0
                self._lives[self._actors[slot].live.remote()] = (slot, self._actors[slot])
            except self._ray.exceptions.RayError as error:
                self._not_started(slot, _words(error, -1))
        for reference, (slot, until) in list(self._starting.items()):
            if time.monotonic() > until:
                del self._starting[reference]
                self._ray.kill(self._actors[slot])
                self._failed_starts[slot] = STARTS
                self._not_started(slot, f"no answer within {START_SECONDS:g} s; is there room for it?")

    def _not_started(self, slot: int, words: str) -> None:
        self._failed_starts[slot] += 1
        if self._failed_starts[slot] < STARTS:
            self._start(slot)
            return
        self._gone[slot] = time.monotonic()
        if len(self._gone) == len(self._actors):
            raise ExecutorError(f"no worker could be started: {words}")
        self._give_back(slot)

    def _give_back(self, slot: int) -> None:
        """Leave a slot's room to others."""
        if self._places[slot] is not None:
            from ray.util import remove_placement_group

            remove_placement_group(self._places[slot])
            self._places[slot] = None

    def _try_again(self) -> None:
        """Start workers in slots that were given up long ago."""
        for slot, since in list(self._gone.items()):
            if time.monotonic() - since > AGAIN_SECONDS:
                del self._gone[slot]
                self._failed_starts[slot] = STARTS - 1
                self._places[slot] = self._place()
                self._start(slot)

    def _replace_dead(self) -> None:
        """Start new workers in idle slots whose worker has died, before a job is handed to it."""
        if not self._lives:
            return
        busy = {slot for slot, _ in (*self._jobs.values(), *self._starting.values())} | set(self._gone)
        for reference in self._ray.wait(list(self._lives), num_returns=len(self._lives), timeout=0)[0]:
            slot, actor = self._lives.pop(reference)
            if self._actors[slot] is actor and slot not in busy:
                self._start(slot)

    @property
    def workers(self) -> list[dict[str, Any]]:
        """The actors: id, pid and node."""
        return self._abouts

    # --- jobs ---------------------------------------------------------------------------------------------------------

    def idle(self) -> list[int]:
        """Slots without a job, whose worker is there."""
        self._replace_dead()
        busy = {slot for slot, _ in (*self._jobs.values(), *self._starting.values())} | set(self._gone)
        return [slot for slot in range(len(self._actors)) if slot not in busy]

    def submit(self, slot: int, job: Job) -> None:
        """Hand a job to a slot's actor."""
        self._jobs[self._actors[slot].run.remote(job)] = (slot, job)

    def wait(self, seconds: float) -> list[Outcome]:
        """Outcomes of jobs that ended; a job whose worker died comes back as lost and the worker is replaced.

        Raises ExecutorError when no worker is left and none can be started, or when the cluster is gone.
        """
        lost, self._lost = self._lost, []
        awaited = [*self._jobs, *self._starting, *self._abandoned]
        if lost or not (self._jobs or self._starting):
            return lost
        ready, _ = self._ray.wait(awaited, num_returns=1, timeout=seconds)
        if ready:  # take along what else has come in
            ready, _ = self._ray.wait(awaited, num_returns=len(awaited), timeout=0)
        outcomes = [outcome for reference in ready for outcome in self._ended(reference)]
        if not outcomes:  # which have to be written down before anything may go wrong here
            if self._head.check() and self._starting:
                self._check_node()
            self._started([one for one in ready if one in self._starting])
            self._try_again()
        return outcomes

    def _check_node(self) -> None:
        """Raises ExecutorError when the node is gone through which this process speaks to the cluster."""
        if not any(node["NodeID"] == self._node and node["Alive"] for node in self._ray.nodes()):
            raise ExecutorError("the Ray node of this machine is gone: no worker can be started any more")

    def _ended(self, reference: Any) -> list[Outcome]:
        """What an answer says of its job, if it is a job's."""
        if reference in self._abandoned:
            job = self._abandoned.pop(reference)
            try:
                return [self._ray.get(reference)]  # with a lease that has expired
            except self._ray.exceptions.RayError:
                return []
        if reference not in self._jobs:
            return []
        slot, job = self._jobs.pop(reference)
        try:
            return [self._ray.get(reference)]
        except self._ray.exceptions.RayError as error:
            self._check_node()  # where the cluster itself is gone, no trial's worker was lost
            self._start(slot)
            return [job.failed("lost", f"worker {slot} died: {_words(error)}")]

    def progress(self) -> list[TrialProgress]:
        """Where running trials are, of the workers that have answered since; each is asked again when it has."""
        answers = list(self._asked.items())
        ready = (
            set(self._ray.wait([ref for _, ref in answers], num_returns=len(answers), timeout=0)[0]) if answers else ()
        )
        found = []
        for slot, reference in answers:
            if reference in ready:
                del self._asked[slot]
                try:
                    found.append(self._ray.get(reference))
                except self._ray.exceptions.RayError:
                    continue  # `wait` will tell of the worker's death
        for slot, _ in self._jobs.values():
            if slot not in self._asked:
                self._asked[slot] = self._actors[slot].progress.remote()
        running = {job.trial for _, job in self._jobs.values()}
        return [progress for progress in found if progress is not None and progress.trial in running]

    def interrupt(self) -> None:
        """Tell every running job to stop."""
        for slot, job in self._jobs.values():
            self._actors[slot].stop.remote(job.lease)

    def cancel(self) -> None:
        """Have every running job ended."""
        for slot, job in self._jobs.values():
            self._actors[slot].cancel.remote(job.lease)

    def abandon(self, trial: int) -> None:
        """Give a job up whose worker is not heard any more, and its slot another worker."""
        reference, (slot, job) = next(item for item in self._jobs.items() if item[1][1].trial == trial)
        del self._jobs[reference]
        self._abandoned[reference] = job
        self._ray.kill(self._actors[slot])
        self._give_back(slot)  # it may be on a node that is cut off
        self._places[slot] = self._place()
        self._start(slot)
        self._lost.append(job.failed("lost", f"worker {slot} was not heard any more"))

    def close(self) -> None:
        """End the actors, and the Ray that we started. Their places on a cluster end with this process: to give them
        back would wait for a head that may be gone."""
        for actor in self._actors:
            self._ray.kill(actor)
        if self._own:
            self._ray.shutdown()


def _amounts(resources: dict[str, float]) -> str:
    return ", ".join(
        f"{format_bytes(amount)} of memory" if name == "memory" else f"{amount:g} {name}"
        for name, amount in resources.items()
    )


def _words(error: Exception, line: int = 0) -> str:
    """The first (0) or last (-1) line of what Ray says, without its colours."""
    return re.sub(r"\x1b\[[0-9;]*m", "", str(error)).strip().splitlines()[line]


def _controlled(worker: type) -> type:
    """Mark the methods that answer while `run` works. Done here, so that importing this module does not import Ray."""
    import ray

    groups = {"about": "control", "progress": "control", "stop": "control", "cancel": "control", "live": "life"}
    for name, group in groups.items():
        setattr(worker, name, ray.method(concurrency_group=group)(getattr(worker, name)))
    return worker
