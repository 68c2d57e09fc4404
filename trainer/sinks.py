"""Where the numbers of a training run go besides its metrics.jsonl: TensorBoard, MLflow, Weights & Biases, or others'.

Others plug in through the entry point group `evolm.sinks`: a name, and a callable without arguments that gives a Sink.
No step waits for a sink and no run fails with one; the end of a run waits a few seconds at most. Each sink has a thread
of its own and a bounded queue; what fails, or does not keep up, is told in one line and dropped.
"""

from __future__ import annotations

import math
import queue
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

from search_spaces.errors import UsageError, nearest

WAITING = 256
"""Lines that wait for a slow sink; what comes when so many do is not given to it."""

FLUSH_SECONDS = 10.0
"""How long the end of a run waits for all its sinks together."""


@dataclass(frozen=True, kw_only=True)
class RunInfo:
    """What a sink is told of a run. It writes into `folder`, or, what all trials of a search share, into `home`."""

    folder: Path
    home: Path
    group: str
    name: str
    recipe: Mapping[str, Any] = field(default_factory=dict)


class Sink(Protocol):
    """Somewhere to write numbers. All calls come from one thread; what they raise ends the sink, not the run."""

    def open(self, run: RunInfo, /) -> None:
        """Begin, once, before anything is written."""

    def write(self, step: int, values: Mapping[str, float], /) -> None:
        """Take the numbers of an optimiser step; all are finite. A run that goes on after it was interrupted may
        repeat steps."""

    def close(self) -> None:
        """End, once, everything written before this returns."""


class TensorBoard:
    """Event files in the folder of the run: `tensorboard --logdir runs/NAME`."""

    def open(self, run: RunInfo, /) -> None:
        """Begin an event file."""
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(run.folder / "tensorboard"))

    def write(self, step: int, values: Mapping[str, float], /) -> None:
        """One scalar for each value."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Flush the file."""
        self._writer.close()


class MLflow:
    """A run of an MLflow experiment: in `mlflow.db` of the run folder, or where MLFLOW_TRACKING_URI says."""

    def open(self, run: RunInfo, /) -> None:
        """Begin a run, in an experiment named by the search."""
        import fcntl
        import os

        from mlflow.tracking import MlflowClient

        home = run.home.absolute()
        self._client = MlflowClient(os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{home / 'mlflow.db'}")
        with (home / "mlflow.lock").open("a") as lock:  # trials side by side would make the tables and name it twice
            fcntl.flock(lock, fcntl.LOCK_EX)
            found = self._client.get_experiment_by_name(run.group)
            experiment = (
                self._client.create_experiment(run.group, artifact_location=(home / "mlflow").as_uri())
                if found is None
                else found.experiment_id
            )
        self._run = self._client.create_run(experiment, run_name=run.name).info.run_id
        for name, value in _flat(run.recipe):
            self._client.log_param(self._run, name, value)

    def write(self, step: int, values: Mapping[str, float], /) -> None:
        """One metric for each value."""
        import time

        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        self._client.log_batch(self._run, metrics=[Metric(name, value, now, step) for name, value in values.items()])

    def close(self) -> None:
        """Mark the run as finished."""
        self._client.set_terminated(self._run)


_OURS: dict[str, str] = {}
"""Environment variables of W&B that an earlier run in this process was given, and not by its user."""


class WandB:
    """A run of Weights & Biases: offline in the run folder, unless WANDB_MODE says otherwise; `wandb sync` uploads."""

    def open(self, run: RunInfo, /) -> None:
        """Begin a run, in a project named by the search."""
        import os

        for name in ("CACHE", "CONFIG", "DATA"):  # it would write to the user's home
            variable = f"WANDB_{name}_DIR"
            if os.environ.get(variable) in (None, _OURS.get(variable)):
                os.environ[variable] = _OURS[variable] = str(run.home / "wandb" / name.lower())
        import wandb

        (run.home / "wandb").mkdir(exist_ok=True)
        self._run = wandb.init(
            mode=os.environ.get("WANDB_MODE", "offline"),  # type: ignore[arg-type,unused-ignore]
            dir=str(run.home),
            project=run.group,
            name=run.name,
            config=dict(run.recipe),
            reinit="create_new",
            settings=wandb.Settings(console="off", silent=True),
        )

    def write(self, step: int, values: Mapping[str, float], /) -> None:
        """One row of the history."""
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        """Write everything out."""
        self._run.finish()


BUILT_IN: dict[str, tuple[Callable[[], Sink], str, str]] = {
    "tensorboard": (TensorBoard, "tensorboard", "track"),
    "mlflow": (MLflow, "mlflow", "mlflow"),
    "wandb": (WandB, "wandb", "wandb"),
}
"""By name: the sink, the module that it needs, and evolm's extra that brings it."""


def sink_names() -> list[str]:
    """All sinks that can be asked for."""
    return sorted({*BUILT_IN, *(point.name for point in entry_points(group="evolm.sinks"))})


def unknown_sink(names: Iterable[str]) -> str | None:
    """What to say of the first name that is no sink's, or None."""
    strange = [name for name in names if name not in BUILT_IN]
    known = sink_names() if strange else []
    for name in strange:
        if name not in known:
            close = nearest(name, known)
            advice = f"did you mean '{close}'?" if close else f"there are {', '.join(known)}"
            return f"unknown sink '{name}'; {advice}"
    return None


def check_sinks(names: Iterable[str]) -> None:
    """Raise UsageError for a sink that does not exist or whose package is not installed."""
    names = list(names)
    if words := unknown_sink(names):
        raise UsageError(words)
    for name in names:
        if name in BUILT_IN:
            _, module, extra = BUILT_IN[name]
            if not _installed(module):
                raise UsageError(
                    f"sink '{name}' needs the package {module}, which is not installed: "
                    f"pip install {module} (it is in evolm's extra `{extra}`)"
                )


def _installed(module: str) -> bool:
    """Whether there is such a package. A plain folder of its name, as W&B leaves it where a run was, is none."""
    found = find_spec(module)
    return found is not None and found.origin is not None


def _make(name: str) -> Sink:
    """A sink by its name; called in the sink's own thread, as others' code may do anything when it is imported."""
    check_sinks([name])
    if name in BUILT_IN:
        return BUILT_IN[name][0]()
    (point, *_) = entry_points(group="evolm.sinks", name=name)
    sink: Sink = point.load()()
    return sink


class _Channel:
    """One sink in its thread."""

    def __init__(self, name: str, run: RunInfo, warn: Callable[[str], None]) -> None:
        self.name, self._run, self._warn = name, run, warn
        self._waiting: queue.Queue[tuple[int, Mapping[str, float]] | None] = queue.Queue(WAITING)
        self._missed = 0
        self._dropped = threading.Event()
        self._thread = threading.Thread(target=self._serve, name=f"sink {name}", daemon=True)
        self._thread.start()

    def offer(self, step: int, values: Mapping[str, float]) -> None:
        if self._dropped.is_set():
            return
        try:
            self._waiting.put_nowait((step, values))
        except queue.Full:
            self._missed += 1

    def end(self) -> None:
        """Ask for the end; a sink that is so far behind that its queue is full misses a line for it."""
        while True:
            try:
                self._waiting.put_nowait(None)
                return
            except queue.Full:
                self._missed += 1
                try:
                    self._waiting.get_nowait()
                except queue.Empty:
                    pass

    def join(self, seconds: float) -> None:
        self._thread.join(seconds)
        if self._thread.is_alive() and not self._dropped.is_set():
            self._dropped.set()
            self._warn(f"sink '{self.name}' did not end in time and is left behind; metrics.jsonl has everything")
        elif self._missed and not self._dropped.is_set():
            self._warn(f"sink '{self.name}' was too slow for {self._missed} lines; metrics.jsonl has them")

    def _serve(self) -> None:
        """Everything that the sink does. Whatever it raises is its own affair: it is told once, and nothing follows."""
        try:
            sink = _make(self.name)
            sink.open(self._run)
            while (line := self._waiting.get()) is not None:
                sink.write(*line)
            sink.close()
        except BaseException as error:  # also what would end a program: in a thread it would be silent
            if not self._dropped.is_set():
                self._dropped.set()
                words = " ".join(str(error).split())[:300]
                said = f"{type(error).__name__}: {words}" if words else type(error).__name__
                self._warn(f"sink '{self.name}' failed and is dropped: {said}; metrics.jsonl has everything")


class Sinks:
    """The sinks of one run. `warn` is called at most once for each, from any thread."""

    def __init__(self, names: Sequence[str], run: RunInfo, warn: Callable[[str], None]) -> None:
        self._channels = [_Channel(name, run, warn) for name in names]

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Hand on the finite numbers of a line. Returns at once."""
        if self._channels:
            numbers = {name: float(value) for name, value in values.items() if _finite(value)}
            for channel in self._channels:
                channel.offer(step, numbers)

    def close(self, seconds: float = FLUSH_SECONDS) -> None:
        """Let all sinks write what waits, for so long at most."""
        import time

        for channel in self._channels:
            channel.end()
        until = time.monotonic() + seconds
        for channel in self._channels:
            channel.join(max(0.0, until - time.monotonic()))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        killed = kind is not None and not issubclass(kind, Exception)  # a signal: nobody waits
        self.close(0.0 if killed else FLUSH_SECONDS)


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _flat(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """A recipe as names and short texts."""
    found: list[tuple[str, str]] = []
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            found += _flat(value, f"{name}.")
        elif value is not None:
            found.append((name, str(value)[:500]))
    return found
