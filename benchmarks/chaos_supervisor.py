"""What chaos.py sees of a search: a supervisor that starts it anew whenever it ends, and counts taken from the lines
that training writes. The same for every search that is watched."""

from __future__ import annotations

import contextlib
import json
import math
import os
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import psutil
from chaos_faults import ENDING, Family, Fault, end, inject, lives, marked, told

TICK = 0.2
"""Seconds between looks."""

STALL_SECONDS = 120.0
"""After so long without a step of training anywhere, the supervisor kills the controller."""

END_SECONDS = 90.0
"""How long a search may take to end in order when its time is up."""

GONE_SECONDS = 90.0
"""How long its processes may take to go after that; what is left then are orphans. (Ray's own agents try to reach a
head that is gone for 60 s.)"""

HOPELESS = 5
"""Controllers in a row that end by themselves without having trained anything: the search cannot go on."""


class Side(Protocol):
    """A search that is watched."""

    name: str
    env: dict[str, str]
    mark: str  # NAME=value in the environment of all of its processes

    def command(self) -> list[str]:
        """What starts it, or has it go on."""

    def counts(self) -> list[Path]:
        """The metrics.jsonl of every trial so far, in folders named by the trial's number."""

    def acknowledged(self, output: str) -> dict[int, float]:
        """The trials that it has called complete since it was last asked, and their bits per byte; `output` is what its
        controller has printed since."""

    def known(self) -> dict[int, float | None]:
        """The trials that are done in its state on the disk, and their bits per byte; None for those that failed."""

    def worker(self, trial: psutil.Process) -> psutil.Process | None:
        """The process of the Ray worker that a trial's process belongs to."""


# --- counts ---------------------------------------------------------------------------------------------------------


@dataclass(kw_only=True)
class Launch:
    """One launch of a trial, as its lines tell of it: FLOPs and tokens up to its last line, and when it was scored."""

    trial: int
    began: float
    flops: float = 0.0
    tokens: int = 0
    total_tokens: int = 0
    scored: float | None = None
    speeds: list[float] = field(default_factory=list)


class Tally:
    """Reads what is new in metrics.jsonl files. Times are those of `clock`."""

    def __init__(self, clock: Callable[[], float], flops_per_token: Sequence[float]) -> None:
        self._clock, self._costs = clock, flops_per_token
        self._read: dict[Path, int] = {}
        self._open: dict[Path, Launch] = {}
        self.launches: list[Launch] = []
        self.times: list[float] = []
        """When lines were found."""

    def look(self, files: Sequence[Path]) -> None:
        """Read on."""
        for file in files:
            position = self._read.get(file, 0)
            with contextlib.suppress(OSError):
                if file.stat().st_size <= position:
                    continue
                with file.open("rb") as stream:
                    stream.seek(position)
                    new = stream.read()
                whole = new[: new.rfind(b"\n") + 1]
                self._read[file] = position + len(whole)
                for line in whole.splitlines():
                    self._take(file, line)

    def _take(self, file: Path, line: bytes) -> None:
        try:
            values = json.loads(line)
        except ValueError:  # torn by a kill
            return
        now = self._clock()
        self.times.append(now)
        launch = self._open.get(file)
        fresh = launch is None or launch.scored is not None or values.get("flops", math.inf) <= launch.flops
        if fresh:
            launch = self._open[file] = Launch(trial=int(file.parent.name), began=now)
            self.launches.append(launch)
        if "rung" not in values:
            launch.flops, launch.total_tokens = values["flops"], values["total_tokens"]
            launch.speeds.append(values["tokens_per_second"])
        else:
            launch.scored, launch.total_tokens = now, values["tokens"]
            if not fresh:  # what was trained after the line before
                launch.flops += (values["tokens"] - launch.tokens) * self._costs[launch.trial - 1]
        launch.tokens = values["tokens"]


# --- the supervisor -------------------------------------------------------------------------------------------------


@dataclass(kw_only=True)
class Session:
    """One controller: when it began and ended, how, what was done to it, and what it left."""

    began: float
    output: Path
    ended: float | None = None
    code: int | None = None
    faults: list[str] = field(default_factory=list)
    processes_gone: float | None = None

    @property
    def unasked(self) -> bool:
        """Whether it ended although nothing was done to it that ends a controller."""
        return self.code is not None and self.code != 0 and not set(self.faults) & {*ENDING, "stall", "end"}

    @property
    def outlived(self) -> float:
        """Seconds by which its processes outlived it; infinite for those that never went."""
        if self.ended is None:
            return 0.0
        return math.inf if self.processes_gone is None else self.processes_gone - self.ended

    def as_dict(self) -> dict[str, Any]:
        return {**vars(self), "output": self.output.name}


@dataclass(kw_only=True)
class Story:
    """What happened to a search. Times are seconds from its beginning, without those between its rounds.

    `acknowledged` are (when, trial, bits per byte), `forgotten` those of them that the state on the disk did not know
    when a controller had ended, `missing` those that it does not know in the end; `outages` are (when, how long, after
    which faults).
    """

    faults: list[Fault]
    sessions: list[Session] = field(default_factory=list)
    acknowledged: list[tuple[float, int, float]] = field(default_factory=list)
    forgotten: list[tuple[float, int]] = field(default_factory=list)
    missing: list[int] = field(default_factory=list)
    launches: list[Launch] = field(default_factory=list)
    outages: list[tuple[float, float, str]] = field(default_factory=list)
    stalls: int = 0
    hopeless: str = ""
    finished: float | None = None
    orphans: list[str] = field(default_factory=list)
    ended_in_order: bool = True
    load: float = 0.0
    seconds: float = 0.0


class Supervisor:
    """Runs a search for a time, starts it anew whenever it ends, and does the faults to it."""

    def __init__(self, side: Side, faults: list[Fault], folder: Path, flops_per_token: Sequence[float]) -> None:
        self.side, self.folder = side, folder
        self.env = {**os.environ, **side.env}
        self.story = Story(faults=faults)
        self.waiting = list(faults)
        self.began = 0.0
        self.tally = Tally(lambda: self.now, flops_per_token)
        self.families: list[Family] = []
        self.heard = 0  # bytes of the present controller's output
        self.loads: list[float] = []
        self.trusted: dict[int, float] = {}  # acknowledged, and not found to be forgotten since

    @property
    def now(self) -> float:
        return time.monotonic() - self.began

    def run(self, until: float, say: Callable[[str], None]) -> None:
        """One round: from a start of the search until it has been at work for so many seconds in all, and its end."""
        self.began = time.monotonic() - self.story.seconds
        try:
            self._start()
            while self.now < until and not self.done:
                self._look()
                if self.families[-1].process.poll() is not None:
                    self._ended(say)
                self._hit(say)
                self._unstick(say)
                time.sleep(TICK)
            self.story.seconds = self.now
            self._end(say)
        finally:
            self._clear()

    @property
    def done(self) -> bool:
        """Whether there is nothing left to do, or nothing that can be done."""
        return bool(self.story.hopeless) or self.story.finished is not None

    def tell(self) -> Story:
        """What happened in all rounds."""
        self.story.launches = self.tally.launches
        self.story.outages = outages(self.story, self.tally.times)
        self.story.load = statistics.fmean(self.loads) if self.loads else 0.0
        return self.story

    # --- controllers --------------------------------------------------------------------------------------------------

    def _start(self) -> None:
        session = Session(began=self.now, output=self.folder / f"controller-{len(self.families) + 1}.log")
        self.heard = 0
        with session.output.open("wb") as stream:
            process = subprocess.Popen(
                self.side.command(),
                cwd=self.folder,
                env=self.env,
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.families.append(Family(process))
        self.story.sessions.append(session)

    def _ended(self, say: Callable[[str], None]) -> None:
        """The controller has ended: what does the state on the disk know, and on it goes."""
        session, family = self.story.sessions[-1], self.families[-1]
        session.ended, session.code = self.now, family.process.returncode
        family.ended = time.monotonic()
        self._look()
        say(f"the controller ended with code {session.code} after {session.ended - session.began:.0f} s")
        if session.code == 0:
            self.story.finished = self.now
            return
        self._compare()
        idle = 0
        for one in reversed(self.story.sessions):
            if not one.unasked or any(one.began < launch.began for launch in self.tally.launches):
                break
            idle += 1
        if idle >= HOPELESS:
            self.story.hopeless = f"{idle} controllers in a row ended by themselves (code {session.code})"
        else:
            self._start()

    def _compare(self) -> None:
        """Note which acknowledged results the state on the disk does not know."""
        known = self.side.known()
        for number in unknown(self.trusted, known):
            del self.trusted[number]
            self.story.forgotten.append((self.now, number))

    # --- looking ------------------------------------------------------------------------------------------------------

    def _look(self) -> None:
        self.tally.look(self.side.counts())
        for family, session in zip(self.families, self.story.sessions, strict=True):
            if session.processes_gone is None:
                family.look()
                if session.ended is not None and not family.alive():
                    session.processes_gone = self.now
        session = self.story.sessions[-1]
        with session.output.open("rb") as stream:
            stream.seek(self.heard)
            new = stream.read()
        whole = new[: new.rfind(b"\n") + 1]
        self.heard += len(whole)
        for number, value in self.side.acknowledged(whole.decode(errors="replace")).items():
            self.story.acknowledged.append((self.now, number, value))
            self.trusted[number] = value
        self.loads.append(os.getloadavg()[0])

    # --- faults -------------------------------------------------------------------------------------------------------

    def _hit(self, say: Callable[[str], None]) -> None:
        """Do the faults that are due. One that finds nothing to hit is tried again until the next one is due."""
        while len(self.waiting) > 1 and self.waiting[1].due <= self.now:
            say(f"nothing was there for '{self.waiting.pop(0).kind}'")
        if not self.waiting or self.waiting[0].due > self.now or self.story.finished is not None:
            return
        fault, family = self.waiting[0], self.families[-1]
        process = inject(fault, family, self.side.worker)
        if process is None:
            return
        fault.hit, fault.process = self.now, process.pid
        self.waiting.pop(0)
        self.story.sessions[-1].faults.append(fault.kind)
        say(f"fault: {fault.kind} (process {process.pid})")

    def _unstick(self, say: Callable[[str], None]) -> None:
        """Kill a controller under which nothing moves any more."""
        session = self.story.sessions[-1]
        since = max([session.began, *self.tally.times[-1:]])
        if session.ended is None and self.now - since > STALL_SECONDS:
            say(f"no step of training for {STALL_SECONDS:g} s: the controller is killed")
            self.story.stalls += 1
            session.faults.append("stall")
            self.families[-1].process.kill()

    # --- the end ------------------------------------------------------------------------------------------------------

    def _end(self, say: Callable[[str], None]) -> None:
        """Ask it to end, wait for it, and look who is left."""
        session, family = self.story.sessions[-1], self.families[-1]
        if family.process.poll() is None:
            session.faults.append("end")
            family.process.terminate()
            try:
                family.process.wait(END_SECONDS)
            except subprocess.TimeoutExpired:
                self.story.ended_in_order = False
                say(f"did not end within {END_SECONDS:g} s: it is killed")
                family.process.kill()
                family.process.wait()
            session.ended, session.code = self.now, family.process.returncode
            family.ended = time.monotonic()
        self._look()
        until = time.monotonic() + GONE_SECONDS
        while time.monotonic() < until and any(one.alive() for one in self.families):
            self._look()
            time.sleep(TICK)
        self._look()
        left = {one.pid: one for family in self.families for one in family.alive()}
        left |= {one.pid: one for one in marked(self.side.mark) if lives(one)}
        self.story.orphans += [told(one) for one in left.values()]
        acknowledged = {number: value for _, number, value in self.story.acknowledged}
        self.story.missing = unknown(acknowledged, self.side.known())

    def _clear(self) -> None:
        """Kill what is left of all controllers."""
        for _ in range(3):
            left = [one for family in self.families for one in family.alive()]
            left += [one for one in marked(self.side.mark) if lives(one)]
            if not left:
                break
            end(left)
            time.sleep(0.5)
        for family in self.families:
            with contextlib.suppress(subprocess.TimeoutExpired):
                family.process.wait(10)


def unknown(told: Mapping[int, float], known: Mapping[int, float | None]) -> list[int]:
    """The trials that were told complete and are not known as that, or with another result than was printed."""
    return sorted(
        number
        for number, value in told.items()
        if (there := known.get(number)) is None or not math.isclose(there, value, rel_tol=1e-3)
    )


def outages(story: Story, times: Sequence[float]) -> list[tuple[float, float, str]]:
    """(when, how long, after which faults): the times without training between the last line under one controller and
    the first launch under a later one. Controllers under which nothing was trained are part of the time between."""
    found: list[tuple[float, float, str]] = []
    since: float | None = None
    faults: list[str] = []
    for session, following in zip(story.sessions, [*story.sessions[1:], None], strict=True):
        until = story.seconds if following is None else following.began
        first = min((one.began for one in story.launches if session.began + 1 < one.began <= until), default=None)
        if since is not None and first is not None:
            found.append((since, first - since, " ".join(faults)))
        if first is not None or since is None:
            since, faults = max((when for when in times if when <= until), default=until), []
        faults += session.faults
    if since is not None and story.finished is None and until - since > 5:
        found.append((since, until - since, " ".join(faults)))
    return found
