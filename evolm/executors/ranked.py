"""One trial over several devices of a machine: a cell for each of its ranks.

The process that has the job starts the cells, which train together, and watches them: the first rank's progress and
outcome are the trial's. They are new ones for each trial, as process groups do not survive a failure.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace

from evolm.executors.base import Job, Limits, Outcome, Runner, Tell
from evolm.executors.cell import Cell, name_of
from evolm.ranks import free_port, rank_environment
from trainer.sinks import FLUSH_SECONDS

LOOK_SECONDS = 0.05

LAST_SECONDS = 5.0
"""How long the other ranks may take to end by themselves once one has come to nothing."""

SINK_SECONDS = FLUSH_SECONDS + 5.0
"""The same once one was stopped, or noticed that another one had gone: the first rank may be waiting for its sinks."""

Blames = Callable[[Outcome], bool]
"""Whether an outcome is of a rank that only noticed that another one had gone."""


def run_over_ranks(runner: Runner, job: Job, tell: Tell, world: int, blames: Blames) -> Outcome:
    """Run a job in `world` cells at once; the outcome of the first rank, or of the one that is why it came to nothing.

    `runner` finds its place in the environment, as torchrun tells it.
    """
    port, name, alone = free_port(), name_of(runner), replace(job, limits=Limits())
    outcomes: dict[int, Outcome] = {}
    with ExitStack() as stack:
        cells = [Cell(name, env=rank_environment(rank, world, port)) for rank in range(world)]
        for cell in cells:
            stack.callback(cell.close)

        def run(rank: int) -> None:
            try:
                outcomes[rank] = cells[rank].run(alone)
            except Exception as error:  # in a thread, nobody else would hear of it
                outcomes[rank] = alone.failed("crashed", f"{type(error).__name__}: {error}")

        threads = [threading.Thread(target=run, args=(rank,), daemon=True) for rank in range(world)]
        for thread in threads:
            thread.start()
        _watch(cells, threads, outcomes, job, tell, blames)
        for thread in threads:
            thread.join()
    return _verdict(outcomes, blames)


def _watch(
    cells: list[Cell],
    threads: list[threading.Thread],
    outcomes: dict[int, Outcome],
    job: Job,
    tell: Tell,
    blames: Blames,
) -> None:
    """Pass the first rank's progress on, and requests to stop to all; once a rank has come to nothing, end the rest."""
    until, stopped, ended = float("inf"), False, set[int]()
    while any(thread.is_alive() for thread in threads):
        progress = cells[0].progress
        if progress is not None and not tell(progress) and not stopped:
            stopped = True
            for cell in cells:
                cell.stop(job.lease)
        for rank, outcome in list(outcomes.items()):
            if outcome.kind != "result" and rank not in ended:
                ended.add(rank)
                innocent = outcome.reason == "interrupted" or blames(outcome)
                until = min(until, time.monotonic() + (SINK_SECONDS if innocent else LAST_SECONDS))
        if time.monotonic() > until:
            for cell in cells:
                cell.cancel(job.lease)
        time.sleep(LOOK_SECONDS)


def _verdict(outcomes: dict[int, Outcome], blames: Blames) -> Outcome:
    """The first rank's outcome, unless another rank is why it came to nothing. What was spent is the first one's."""
    first = outcomes[0]
    failed = {rank: outcome for rank, outcome in outcomes.items() if outcome.kind != "result"}
    own = {rank: outcome for rank, outcome in failed.items() if not blames(outcome)}
    if not failed or 0 in own:
        return first
    rank = min(own or failed)
    words = f"rank {rank}: {failed[rank].message}" if rank else failed[rank].message
    return replace(failed[rank], message=words, flops=first.flops, seconds=first.seconds)
