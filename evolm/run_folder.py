"""A run's folder: names, places, and the lock that keeps a second controller out."""

from __future__ import annotations

import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any

from evolm.errors import RunBusy, StorageError, UsageError
from search_spaces.errors import nearest
from trainer.recipe import NAME

RUNS = Path("runs")

LOCK_SECONDS = 0.5


@dataclass(frozen=True)
class RunFolder:
    """The places in a run's folder."""

    path: Path

    @property
    def name(self) -> str:
        """The run's name."""
        return self.path.name

    @property
    def space(self) -> Path:
        """The space file, frozen when the run began."""
        return self.path / "space.yaml"

    @property
    def ledger(self) -> Path:
        """Everything the search knows."""
        return self.path / "ledger.db"

    @property
    def report(self) -> Path:
        """The page that shows the run."""
        return self.path / "report.html"

    @property
    def requests(self) -> Path:
        """What other processes ask of the one that is at work here."""
        return self.path / "requests"

    @property
    def trials(self) -> Path:
        """The folders of all trials."""
        return self.path / "trials"

    def trial(self, number: int) -> Path:
        """The folder of one trial."""
        return self.trials / str(number)

    def promoted(self, number: int) -> Path:
        """The folder of a promoted trial."""
        return self.path / "promoted" / str(number)

    @property
    def exists(self) -> bool:
        """Whether a run has begun here."""
        return self.ledger.is_file()

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the run's lock; the kernel lets go of it when the process ends, however it ends. Raises RunBusy."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            stream = (self.path / "run.lock").open("ab+", buffering=0)  # nothing is left to be written at its end
        except OSError as error:
            raise StorageError(f"{self.path}: cannot be written: {error.strerror}") from None
        with stream:
            if not _locked(stream):
                owner = self.owner() or {}
                raise RunBusy(
                    f"run '{self.name}' is in use by process {owner.get('pid', '?')} on {owner.get('host', '?')} "
                    f"since {owner.get('since', '?')}; `evolm status {self.path}` shows it"
                )
            self._sign(stream)
            yield

    def _sign(self, stream: FileIO) -> None:
        """Write down who holds the lock, for those who are refused."""
        since = time.strftime("%Y-%m-%d %H:%M:%S")
        try:
            stream.truncate(0)
            stream.write(json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "since": since}).encode())
        except OSError as error:
            raise StorageError(
                f"{self.path}: cannot be written: {error.strerror}; free some space, then run the command again"
            ) from None

    def owner(self) -> dict[str, Any] | None:
        """Who holds the lock, as far as it was written down."""
        try:
            owner: dict[str, Any] = json.loads((self.path / "run.lock").read_text())
        except (OSError, ValueError):
            return None
        return owner

    @property
    def busy(self) -> bool:
        """Whether a controller is at work here now."""
        try:
            with (self.path / "run.lock").open("r") as stream:
                fcntl.flock(stream, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except FileNotFoundError:
            return False
        except OSError:
            return True
        return False


def _locked(stream: FileIO) -> bool:
    """Take the lock; somebody who merely looks holds it for an instant, so a refusal is believed after a while."""
    until = time.monotonic() + LOCK_SECONDS
    while True:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            if time.monotonic() > until:
                return False
            time.sleep(0.005)
        else:
            return True


def rung_checkpoint(trial: str | Path, rung: int) -> Path:
    """Where a trial keeps the state from which it can go on beyond a rung."""
    return Path(trial) / "checkpoints" / f"rung-{rung}"


def latest_checkpoint(trial: str | Path) -> Path:
    """Where a trial keeps the state of a rung that it has begun."""
    return Path(trial) / "checkpoints" / "latest"


def saves(checkpoint: Path) -> list[Path]:
    """Where the saves of a checkpoint may lie, the newest first."""
    return [checkpoint, *sorted(checkpoint.parent.glob(f"{checkpoint.name}-[1-9]"))]


def final_checkpoint(trial: str | Path) -> Path:
    """Where a complete trial keeps its final weights, while it is among those that are to be kept."""
    return Path(trial) / "checkpoints" / "final"


def new_or_named(run: str | None, name: str) -> RunFolder:
    """The folder of a run that is to be started: the one that was named, or `name` with the first free number."""
    if run is not None:
        return _place(run)
    number = 1
    while (RUNS / f"{name}-{number}").exists():
        number += 1
    return RunFolder(RUNS / f"{name}-{number}")


def existing(run: str) -> RunFolder:
    """The folder of a run that was started before. Raises UsageError, with the nearest name, when there is none."""
    folder = _place(run)
    if not folder.exists and RunFolder(Path(run).resolve()).exists:
        folder = RunFolder(Path(run).resolve())
    if folder.exists:
        return folder
    here = sorted(path.name for path in RUNS.glob("*") if RunFolder(path).exists)
    close = nearest(run, here)
    advice = f"did you mean '{close}'?" if close else f"runs here: {', '.join(here[:10]) or 'none'}"
    raise UsageError(f"no run '{run}'; {advice}")


def _place(run: str) -> RunFolder:
    path = Path(run).resolve() if os.sep in run else RUNS / run
    if not run or not NAME.fullmatch(path.name):
        raise UsageError(f"run name '{path.name if run else ''}' must match {NAME.pattern}")
    return RunFolder(path)
