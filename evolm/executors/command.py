"""Somebody else's trainer: a program that is given a recipe, a number of tokens and a folder for its checkpoint.

The program is told where everything is by environment variables and by `{...}` in its arguments:

    {recipe}      EVOLM_RECIPE       file with the genome as JSON
    {tokens}      EVOLM_TOKENS       how far to train, from the very beginning
    {checkpoint}  EVOLM_CHECKPOINT   folder to go on from where something is in it, and to save to
    {metrics}     EVOLM_METRICS      file to append lines of JSON to
    {seed}        EVOLM_SEED         seed of the run

It runs where `evolm search` was begun, and `python` is the Python of evolm.

A line of metrics with `tokens` is progress. The last line that has all objectives is the result; `flops` is what this
launch has cost. A line with `failed` (a reason, and `message`) is a failure with that reason. At a rung below the
highest the program saves and exits with 0; it is started again with more tokens if the trial is promoted. SIGTERM asks
it to save and exit. Whatever it started is ended with it.
"""

from __future__ import annotations

import json
import math
import os
import re
import select
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import IO, Any

from evolm.errors import Problem, SpaceError
from evolm.executors.base import Job, Outcome, Tell, TrialProgress
from evolm.executors.fence import Held, fenced, storage_words
from evolm.executors.limits import Watch
from evolm.executors.processes import Family, die_with_parent, how_it_ended, kill_marked, memory_kills
from evolm.run_folder import final_checkpoint
from fitness.trial import Reason
from search_spaces.errors import nearest
from search_spaces.yaml_source import Document
from trainer.metrics_log import MetricsLog

MARK = "EVOLM_COMMAND"

TOLD = ("recipe", "tokens", "checkpoint", "metrics", "seed")
"""What the program is told: `{name}` in its arguments, `EVOLM_NAME` in its environment."""

FAILURES: tuple[Reason, ...] = ("diverged", "leak", "oom", "timeout", "crashed", "bad_metrics")
"""Reasons that a program may give for its failure, besides `infeasible`. The others are not its own to know."""

LOOK_SECONDS = 0.1
"""How often the program, its metrics and its limits are looked at."""

GRACE_SECONDS = 30.0
"""How long the program may take to save after SIGTERM."""

ENOUGH = 0.9
"""Of the tokens that were asked for, a result has to be of so many: programs train whole batches."""

LOG_BYTES = 4 * 2**20
"""Of what the program prints, `output.log` and `output.log.1` keep so much of the end, at least, and twice that at
most."""

LINE_BYTES = 2**20
"""How long a line of metrics may be."""

PROBE_BYTES = 2**20
"""What must fit on the disk for a failure to be the program's own."""

_PYTHONS = ("python", "python3")


@dataclass(frozen=True, kw_only=True)
class Command:
    """What all jobs of a run share: the program and its arguments, the metrics that it has to tell, the folders that
    were current when the run began, and the PYTHONPATH of then (workers have one of their own)."""

    command: list[str]
    objectives: list[str]
    roots: list[str]
    python_path: str | None = field(default_factory=lambda: os.environ.get("PYTHONPATH"))

    def as_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return asdict(self)


def check_command(command: Sequence[str], cwd: Path, document: Document) -> None:
    """Refuse a program that could not be started in `cwd`, before any trial is. Raises SpaceError, with its line in
    the space file."""
    problems = [
        *_not_runnable(command, cwd),
        *(problem for index, argument in enumerate(command) for problem in _misspelt(index, argument)),
    ]
    if problems:
        raise SpaceError(document.locate(problems))


def run_command(job: Job, tell: Tell) -> Outcome:
    """Run the program for one job. Never raises."""
    folder, began = Path(job.folder), time.monotonic()
    try:
        with fenced(folder):
            outcome = _run(job, tell, folder, Command(**job.context))
    except Held as error:
        outcome = job.failed("lost", str(error))
    except (OSError, subprocess.SubprocessError) as error:
        if words := storage_words(folder, error):
            return job.fatal("storage", words)
        outcome = job.failed("crashed", _words(error))
    return replace(outcome, seconds=time.monotonic() - began)


# --- starting ---------------------------------------------------------------------------------------------------------


def _run(job: Job, tell: Tell, folder: Path, shared: Command) -> Outcome:
    # Cleaning up behind trials knows the folder of a complete one: it keeps that of the best, and deletes the others.
    checkpoint = final_checkpoint(folder)
    told = {
        "recipe": str(folder / "recipe.json"),
        "tokens": str(job.tokens),
        "checkpoint": str(checkpoint),
        "metrics": str(folder / "metrics.jsonl"),
        "seed": str(job.seed),
    }
    kill_marked(f"EVOLM_METRICS={told['metrics']}")  # an earlier launch, whose supervisor was killed
    checkpoint.mkdir(parents=True, exist_ok=True)
    Path(told["recipe"]).write_text(json.dumps(job.genome, indent=1) + "\n")
    metrics, kills = _Metrics(Path(told["metrics"]), shared.objectives), memory_kills()
    with _Output(folder / "output.log") as output:
        arguments = _arguments(shared.command, told)
        output.keep(f"evolm: rung {job.rung}, {job.tokens} tokens: {' '.join(arguments)}\n".encode())
        family = Family(
            arguments,
            mark=MARK,
            env=environment(shared.python_path) | {f"EVOLM_{name.upper()}": value for name, value in told.items()},
            cwd=shared.roots[0],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            preexec_fn=partial(die_with_parent, os.getpid()),
        )
        try:
            output.follow(family.process.stdout)
            cut = _attend(job, tell, family, metrics)
        finally:
            family.kill()
    metrics.read(last=True)
    outcome = replace(_judge(job, cut, family, metrics, output, kills), flops=metrics.flops)
    if outcome.reason in ("crashed", "bad_metrics"):
        _probe(folder)
    return outcome


run_command.keeps_limits = True  # type: ignore[attr-defined]  # a cell need not end itself for them


def environment(python_path: str | None) -> dict[str, str]:
    """That of this process, in which programs of evolm's own Python are found first, also when it is not activated."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    found = {"PYTHONUNBUFFERED": "1", **os.environ, "PATH": path}
    found.pop("PYTHONPATH", None)  # a worker's leads to the packages of evolm, which another Python must not see
    return found if python_path is None else {**found, "PYTHONPATH": python_path}


def _arguments(command: Sequence[str], told: Mapping[str, str]) -> list[str]:
    names = re.compile("{(" + "|".join(told) + ")}")
    program, *rest = [names.sub(lambda found: told[found[1]], argument) for argument in command]
    return [sys.executable if program in _PYTHONS else program, *rest]


def _not_runnable(command: Sequence[str], cwd: Path) -> list[Problem]:
    """What is wrong with a program, or with the script that a Python is to run."""
    program, path = command[0], ("trial", "command")
    if program not in _PYTHONS:
        place = cwd / program
        if os.sep not in program:
            found = shutil.which(program, path=environment(None)["PATH"]) is not None
            rule, help = f"there is no program '{program}'", "is it installed, and in a folder of PATH?"
        else:
            found = place.is_file() and os.access(place, os.X_OK)
            rule = f"cannot be run: {place}" if place.exists() else f"there is no file {place}"
            help = f"chmod +x {place}" if place.is_file() else f"paths are looked up from {cwd}"
        return [] if found else [Problem(path=(*path, 0), rule=rule, value=program, help=help)]
    script = command[1] if len(command) > 1 else ""
    if script.endswith(".py") and not script.startswith("-") and not (cwd / script).is_file():
        help = f"paths are looked up from {cwd}, where `evolm search` was called"
        return [Problem(path=(*path, 1), rule=f"there is no file {cwd / script}", value=script, help=help)]
    return []


def _misspelt(index: int, argument: str) -> list[Problem]:
    """Names in braces that are nearly one of ours; other braces are the program's own business."""
    return [
        Problem(
            path=("trial", "command", index), rule=f"unknown name '{{{name}}}'", help=f"did you mean '{{{close}}}'?"
        )
        for name in re.findall(r"(?<!\$){(\w+)}", argument)
        if name not in TOLD and (close := nearest(name, TOLD))
    ]


def _words(error: OSError | subprocess.SubprocessError) -> str:
    if isinstance(error, OSError) and error.filename is not None:
        return f"{os.fsdecode(error.filename)}: {error.strerror} (on {os.uname().nodename})"
    return f"the program could not be started: {error}"


# --- staying with it --------------------------------------------------------------------------------------------------


def _attend(job: Job, tell: Tell, family: Family, metrics: _Metrics) -> tuple[Reason, str] | None:
    """Stay with the program until it has ended or is to be ended; None where it did so unasked."""
    watch, asked = Watch(job.limits, family), 0.0
    while not family.ended(LOOK_SECONDS):
        if metrics.read():
            watch.moved()
        if asked:
            if time.monotonic() - asked > GRACE_SECONDS:
                return "interrupted", f"did not end within {GRACE_SECONDS:g} s of SIGTERM, and was killed"
        elif broken := watch.broken():
            return broken
        keep_going = tell(metrics.progress(job))
        if not keep_going and not asked:
            asked = time.monotonic()
            family.ask_to_end()
    return ("interrupted", "asked to save and to end") if asked else None


def _judge(
    job: Job, cut: tuple[Reason, str] | None, family: Family, metrics: _Metrics, output: _Output, kills: int | None
) -> Outcome:
    """What a program that has ended has come to: by its own word, by the limits, by its exit code, by its metrics."""
    code, tokens = family.process.returncode, metrics.result_tokens
    if metrics.failure is not None:
        reason, message = metrics.failure
        return job.infeasible(message) if reason == "infeasible" else job.failed(reason, message)
    reached = tokens is not None and tokens >= job.tokens
    if cut is not None and cut[0] == "timeout" and metrics.problem is None and (reached or metrics.had_the_last_word):
        assert metrics.result is not None
        return job.told(metrics.result, message=f"had told its result, but did not end: {cut[1]}")
    if cut is not None and not (cut[0] == "interrupted" and code == 0 and reached):
        return job.failed(*cut)
    if code != 0:
        if family.killed_by_the_system(kills):
            return job.failed("oom", "the system ended it for want of memory")
        return job.failed("crashed", f"{how_it_ended(code)}: {output.last_line or 'it printed nothing'}")
    if metrics.problem is not None:
        return job.failed("bad_metrics", metrics.problem)
    if metrics.result is None:
        missing = ", ".join(metrics.objectives)
        return job.failed("bad_metrics", f"{metrics.path}: no line of this launch has {missing}")
    if tokens is not None and tokens < ENOUGH * job.tokens:
        return job.failed("bad_metrics", f"its last result is of {tokens:,.0f} tokens, asked for were {job.tokens:,}")
    return job.told(metrics.result)


def _probe(folder: Path) -> None:
    """Raises OSError when the trial's folder cannot be written to: what one program met there, all others will."""
    place = folder / "probe"
    try:
        with place.open("wb") as stream:
            stream.write(bytes(PROBE_BYTES))
            stream.flush()
            os.fsync(stream.fileno())
    finally:
        with suppress(OSError):
            place.unlink()


# --- what it says -----------------------------------------------------------------------------------------------------


class _Metrics:
    """The lines that the program appends to its file, from where this launch began."""

    def __init__(self, path: Path, objectives: list[str]) -> None:
        self.path, self.objectives = path, objectives
        self.result: dict[str, Any] | None = None
        self.result_tokens: float | None = None
        self.had_the_last_word = False  # a result that does not say how far it is: it came once, and nothing after it
        self.failure: tuple[Any, str] | None = None
        self.problem: str | None = None
        self._numbers: dict[str, float] = {}
        with MetricsLog(path):  # a line that an earlier launch left torn is none of this one
            pass
        self._at = path.stat().st_size
        with path.open("rb") as stream:
            self._before = self._just_before(stream)

    def _just_before(self, stream: IO[bytes]) -> bytes:
        """The last bytes that were read, or that an earlier launch wrote."""
        stream.seek(max(0, self._at - 64))
        return stream.read(self._at - stream.tell())

    def read(self, *, last: bool = False) -> bool:
        """Take the whole lines that have come; whether there were any. The `last` time, also a line that has no
        end."""
        if not self.path.is_file():
            return False
        began = self._at
        with self.path.open("rb") as stream:
            if self._before and self._just_before(stream) != self._before:  # the program wrote the file anew
                self._at, began = 0, -1
            self._before = b""
            self._take_all(stream, os.fstat(stream.fileno()).st_size, last)
            self._before = self._just_before(stream)
        return self._at > began

    def _take_all(self, stream: IO[bytes], end: int, last: bool) -> None:
        while self._at < end:
            stream.seek(self._at)
            chunk = stream.read(LINE_BYTES)
            whole = chunk.rfind(b"\n") + 1 or (len(chunk) if last or len(chunk) == LINE_BYTES else 0)
            if not whole:
                return
            for line in chunk[:whole].split(b"\n"):
                if line.strip():
                    self._take(line)
            self._at += whole

    def _take(self, line: bytes) -> None:
        try:
            values = json.loads(line)
        except (ValueError, RecursionError):
            values = None
        if not isinstance(values, dict):
            start = line[:60].decode(errors="replace")
            self.problem = self.problem or f"{self.path}: a line that is no JSON object: {start!r}"
            return
        for name, value in values.items():
            if (number := _finite(value)) is not None:
                self._numbers[name] = number
        if values.get("failed"):
            self.failure = _failure(values)
        first = self.result is None
        self.had_the_last_word = False
        if all(name in values for name in self.objectives):
            finite = {name: value for name, value in values.items() if _finite(value) is not None}
            numbers = {name: value for name, value in finite.items() if name not in _POSITION}
            self.result = numbers | {name: values[name] for name in self.objectives}
            self.result_tokens = _finite(values.get("tokens"))
            self.had_the_last_word = first and "tokens" not in values

    @property
    def flops(self) -> float:
        """What this launch has cost so far, by its own word."""
        return max(0.0, self._numbers.get("flops", 0.0))

    def progress(self, job: Job) -> TrialProgress:
        """Where the program says that it is."""
        numbers = self._numbers
        return TrialProgress(
            trial=job.trial,
            tokens=int(numbers.get("tokens", 0)),
            total_tokens=job.tokens,
            loss=numbers.get("loss", 0.0),
            tokens_per_second=numbers.get("tokens_per_second", 0.0),
            flops=self.flops,
        )


_POSITION = ("tokens", "flops")
"""Numbers of a line that say where the launch is, and are no metrics unless they are objectives."""


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _finite(value: Any) -> float | None:
    """A number as such, None for anything else."""
    try:
        return float(value) if _is_number(value) and math.isfinite(value) else None
    except OverflowError:
        return None


def _failure(values: Mapping[str, Any]) -> tuple[Any, str]:
    """Reason and message of a failure that the program tells itself."""
    reason, message = values["failed"], _line(str(values.get("message", "")))
    if reason in (*FAILURES, "infeasible"):
        return reason, message or f"says that it is {reason}"
    return "crashed", ": ".join(filter(None, [_line(str(reason)), message]))


def _line(text: str) -> str:
    """Somebody's words on one line, without what would do something to a terminal."""
    return "".join(character if character.isprintable() else " " for character in text[:500]).strip()


class _Output:
    """Keeps what the program prints: in a file that does not grow beyond all bounds.

    Its words are no reason for a trial to fail: what cannot be written is dropped, and never holds the program up.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._file = path, path.open("ab", buffering=0)
        self._tail = b""
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> _Output:
        return self

    def __exit__(self, *_: object) -> None:
        """Wait until the rest is written. Should a process have got away, it is not waited for."""
        self._ended.set()
        if self._thread is not None:
            self._thread.join()
        self._file.close()

    def follow(self, stream: IO[bytes] | None) -> None:
        """Keep what comes from a stream, as it comes."""
        assert stream is not None
        self._tail = b""
        self._thread = threading.Thread(target=self._copy, args=(stream,), daemon=True)
        self._thread.start()

    def _copy(self, stream: IO[bytes]) -> None:
        rest = 2**20  # as much as a pipe can hold
        ready = select.poll()
        with stream:
            ready.register(stream, select.POLLIN)
            while rest > 0:
                if ready.poll(100):
                    chunk = os.read(stream.fileno(), 2**16)
                    if not chunk:
                        break
                    self.keep(chunk)
                    rest -= len(chunk) if self._ended.is_set() else 0
                elif self._ended.is_set():
                    break

    def keep(self, chunk: bytes) -> None:
        """Write some of it down."""
        self._tail = (self._tail + chunk)[-4096:]
        with suppress(OSError, ValueError):  # a ValueError where the file could not be opened anew
            if self._file.tell() > LOG_BYTES:
                self._file.close()
                self._path.replace(self._path.with_name(f"{self._path.name}.1"))
                self._file = self._path.open("ab", buffering=0)
            self._file.write(chunk)

    @property
    def last_line(self) -> str:
        """The end of what was printed: where a program fails, that is mostly why."""
        lines = [line for line in map(_line, self._tail.decode(errors="replace").splitlines()) if line]
        return lines[-1] if lines else ""
