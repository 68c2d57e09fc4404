"""Starting the ranks of one training on this machine: several processes of the same command, watched together."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

from evolm.errors import RankError, UsageError
from evolm.executors.processes import Family, die_with_parent, how_it_ended
from evolm.signals import ENDING, on_signals
from trainer.sinks import FLUSH_SECONDS

MARK = "EVOLM_RANK"

LAUNCHER = "EVOLM_LAUNCHER"
"""The process that started this one as a rank."""

BYSTANDER = 86
"""The exit code of a rank that ended because another one has gone: why that was, it does not know."""

LAST_SECONDS = 3.0
"""How long the others may take to end by themselves once one rank has failed. They cannot save: it takes all of them to
put a step together."""

ENDING_SECONDS = FLUSH_SECONDS + 5.0
"""The same, when the first to end did so by a signal or noticed that another one had gone: what is saved is saved, but
the first rank may be waiting for its sinks."""

LOOK_SECONDS = 0.05

TAIL = 15
"""Lines of a failed rank's last words."""


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as stream:
        stream.bind(("127.0.0.1", 0))
        port: int = stream.getsockname()[1]
        return port


def rank_environment(rank: int, world: int, port: int) -> dict[str, str]:
    """What tells a process its place, as torchrun does, and who started it."""
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "MASTER_PORT": port}
    threads = os.environ.get("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // world)))
    own = {"MASTER_ADDR": "127.0.0.1", LAUNCHER: str(os.getpid()), "OMP_NUM_THREADS": threads}
    return own | {name: str(value) for name, value in place.items()}


def end_with_launcher() -> None:
    """Have this process end when the one that started it as a rank ends."""
    if LAUNCHER in os.environ:
        die_with_parent(int(os.environ[LAUNCHER]))


def check_devices(device: str, world: int) -> None:
    """Raises UsageError where this machine has no GPU for each of `world` ranks. Leaves the memory of GPUs alone."""
    if device.startswith("cuda:") and world > 1:
        raise UsageError(f"--device {device} is one GPU, and --processes {world} needs as many: take --device cuda")
    if device == "cuda":
        import torch

        if (there := torch.cuda.device_count()) < world:
            raise UsageError(f"--processes {world} needs as many GPUs, and this machine has {there}")


def run_ranks(command: Sequence[str], world: int) -> int:
    """Run a command as `world` ranks to their end; returns the exit code of the first rank. It has this process's
    terminal; what the others say is kept, and shown only when one of them is why the run failed.

    A signal is passed on to all: once they train they save and end after the same step, before that they end. The exit
    code is then the signal's. When one rank fails, the others are ended. Raises RankError with the words of a rank that
    failed, and its exit code where that is one of evolm's, unless the first one has said them itself.
    """
    port = free_port()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="evolm-ranks-")))
        families: list[Family] = []
        passed: list[int] = []

        def pass_on(number: int) -> None:
            passed.append(signal.SIGTERM if number == signal.SIGHUP else number)
            for family in families:
                _tell(family, passed[-1:])

        stack.enter_context(on_signals(pass_on))
        for rank in range(world):
            words = None if rank == 0 else stack.enter_context((folder / str(rank)).open("wb"))
            environment = {**os.environ, **rank_environment(rank, world, port)}
            said = None if words is None else subprocess.STDOUT
            family = Family(command, mark=MARK, env=environment, stdin=subprocess.DEVNULL, stdout=words, stderr=said)
            stack.callback(family.kill)
            families.append(family)
            _tell(family, passed[-1:])  # it may have come before this rank was there to hear it
        codes = _watch(families)
        return _verdict(codes, {rank: folder / str(rank) for rank in range(1, world)}, passed)


def _tell(family: Family, numbers: Iterable[int]) -> None:
    for number in numbers:
        if not family.ended(0):
            os.kill(family.pid, number)


def _watch(families: list[Family]) -> dict[int, int]:
    """Wait for all ranks to end, or for one to fail; the exit codes of those that ended by themselves."""
    until = float("inf")
    codes: dict[int, int] = {}
    while len(codes) < len(families) and time.monotonic() < until:
        for rank, family in enumerate(families):
            if rank not in codes and family.ended(0):
                codes[rank] = _code(family)
                if codes[rank]:
                    until = min(until, time.monotonic() + _patience(codes[rank]))
        time.sleep(LOOK_SECONDS)
    return codes


def _code(family: Family) -> int:
    family.process.wait()
    return int(family.process.returncode)


def _patience(code: int) -> float:
    """How long the others may take to end by themselves once a rank has ended with this code."""
    return ENDING_SECONDS if code == BYSTANDER or _signal_of(code) in ENDING else LAST_SECONDS


def _signal_of(code: int) -> int:
    """The signal that an exit code tells of, from the kernel or from the process itself; below 1 for no signal."""
    return -code if code < 0 else code - 128


def _verdict(codes: Mapping[int, int], words: Mapping[int, Path], passed: Sequence[int]) -> int:
    """The exit code of the run, to whose ranks the signals `passed` were passed on. Raises RankError with the words of
    the rank that is why it failed."""
    if codes.get(0, BYSTANDER) not in (0, BYSTANDER) and codes[0] > 0:
        return codes[0]  # it has said why
    failed = {rank: code for rank, code in codes.items() if code not in (0, BYSTANDER)}
    if not failed:
        if noticed := [rank for rank, code in codes.items() if code]:
            told = next((said for rank in sorted(noticed) if (said := _last(words, rank))), "")
            raise RankError(f"each rank that ended did so because another one was gone{told}")
        return 0
    if passed and all(_signal_of(code) in passed for code in failed.values()):
        return 128 + passed[0]
    rank = min(failed, key=lambda one: (failed[one] > 0, one))
    error = RankError(f"rank {rank} {how_it_ended(failed[rank])}, and the others were ended{_last(words, rank)}")
    if 0 < failed[rank] < 7:
        error.exit_code = failed[rank]
    raise error


def _last(words: Mapping[int, Path], rank: int) -> str:
    """What a rank said last, to be added to a message."""
    last = words[rank].read_text(errors="replace").strip().splitlines()[-TAIL:] if rank in words else []
    return "\n".join(["; it said last:", *last]) if last else ""


def this_command() -> list[str]:
    """The command line of this process, to be run as a rank."""
    return [sys.executable, "-m", "evolm", *sys.argv[1:]]
