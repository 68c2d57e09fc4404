"""What a running search shows: one panel in place on a terminal, one plain line for each result elsewhere."""

from __future__ import annotations

import os
import sys
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, TextIO

from evolm.executors.base import TrialProgress
from evolm.search import Search
from fitness.trial import Trial
from search_spaces.genome import get
from search_spaces.quantities import format_count


def show(search: Search, trials: int, stream: TextIO | None = None) -> PlainView | LiveView:
    """The view that fits the stream (stderr): a panel on a terminal, lines elsewhere, with NO_COLOR, or in CI."""
    stream = stream or sys.stderr
    plain = not stream.isatty() or "NO_COLOR" in os.environ or "CI" in os.environ or os.environ.get("TERM") == "dumb"
    return PlainView(search, stream) if plain else LiveView(search, trials)


def summary(search: Search, trial: Trial, genes: int = 4) -> str:
    """A trial in one line: rung, objectives or the reason of its failure, and its first genes."""
    rungs = f"rung {trial.rung + 1}/{search.top + 1}"
    if trial.state in ("failed", "infeasible"):
        return f"trial {trial.id:4d}  {trial.reason or trial.state}: {trial.message}"
    if trial.message or not trial.rungs:  # a launch that came to nothing and will be tried again
        return f"trial {trial.id:4d}  {trial.message or trial.state}"
    values = "  ".join(f"{o.metric} {_number(trial.metrics[o.metric])}" for o in search.objectives)
    named = [f"{gene.path[-1]} {_gene(get(trial.genome, gene.path))}" for gene in search.space.genes[:genes]]
    return f"trial {trial.id:4d}  {rungs}  {values}  {trial.seconds:.0f} s  {', '.join(named)}"


def _number(value: float) -> str:
    return format_count(value) if abs(value) >= 1000 else f"{value:.4g}"


def _gene(value: Any) -> str:
    if isinstance(value, dict):
        return "/".join(
            f"{name} {weight:.2f}" if isinstance(weight, float) else str(name) for name, weight in value.items()
        )
    return f"{value:.3g}" if isinstance(value, float) else str(value)


class PlainView:
    """A line for each result."""

    def __init__(self, search: Search, stream: TextIO) -> None:
        self._search, self._stream = search, stream

    def __enter__(self) -> PlainView:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def told(self, trial: Trial) -> None:
        """Print the trial's line."""
        self._print(summary(self._search, trial))

    def _print(self, text: str) -> None:
        """A reader that has gone away does not end the search."""
        try:
            print(text, file=self._stream, flush=True)
        except (OSError, ValueError):  # a pipe without a reader, a terminal that was closed
            self._stream = open(os.devnull, "w")  # noqa: SIM115  # lives as long as the process

    def say(self, text: str) -> None:
        """Print what is no trial's."""
        self._print(text)

    def tick(self, running: Sequence[TrialProgress]) -> None:
        """Nothing changes between lines."""


class LiveView:
    """A panel that is drawn again in place: what is running, what was found, what it cost, how long it may take."""

    def __init__(self, search: Search, trials: int) -> None:
        from rich.console import Console
        from rich.live import Live

        self._search, self._wanted = search, trials
        self._began = time.monotonic()
        self._known = len(search.ledger.trials)
        self._running: Sequence[TrialProgress] = ()
        self._live = Live(console=Console(stderr=True), refresh_per_second=4, transient=True)

    def __enter__(self) -> LiveView:
        self._live.start()
        return self

    def __exit__(self, *error: object) -> None:
        with suppress(OSError):  # here and below: a terminal that was closed does not end the search
            self._live.stop()

    def told(self, trial: Trial) -> None:
        """Failures scroll by above the panel; results show in it."""
        if trial.state in ("failed", "infeasible"):
            self.say(summary(self._search, trial), style="yellow")
        self._draw()

    def say(self, text: str, style: str | None = None) -> None:
        """What is no trial's scrolls by above the panel."""
        with suppress(OSError):
            self._live.console.print(text, style=style, highlight=False, markup=False)

    def tick(self, running: Sequence[TrialProgress]) -> None:
        """Draw again."""
        self._running = running
        self._draw()

    def _draw(self) -> None:
        from rich.console import Group
        from rich.panel import Panel
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        running = Table.grid(padding=(0, 2))
        for progress in sorted(self._running, key=lambda one: one.trial):
            bar = ProgressBar(total=progress.total_tokens, completed=progress.tokens, width=24)
            rate = f"{progress.tokens_per_second / 1000:.1f}k tokens/s"
            running.add_row(f"trial {progress.trial}", bar, f"loss {progress.loss:.3f}", rate)
        front = Table(box=None, padding=(0, 2), header_style="dim")
        front.add_column("front", justify="right")
        for objective in self._search.objectives:
            front.add_column(objective.metric, justify="right")
        for trial in self._search.front()[:8]:
            front.add_row(str(trial.id), *(_number(trial.metrics[o.metric]) for o in self._search.objectives))
        with suppress(OSError):
            self._live.update(Panel(Group(Text(self._counts(), style="bold"), running, front), title="evolm search"))

    def _counts(self) -> str:
        trials = self._search.trials()
        states = Counter(trial.state for trial in trials)
        failures = Counter(trial.reason for trial in trials if trial.state == "failed")
        seconds = time.monotonic() - self._began
        done = len(trials) - self._known
        text = f"{len(trials)}/{self._wanted} trials, {states['complete']} complete, {seconds:.0f} s"
        if done > 2 and len(trials) < self._wanted:
            text += f", about {seconds / done * (self._wanted - len(trials)):.0f} s to the last launch"
        if failures:
            text += ", failed: " + ", ".join(f"{count} {reason}" for reason, count in failures.items())
        return text
