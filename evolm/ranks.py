"""Starting the ranks of one training on this machine: several processes of the same command, watched together."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

from evolm.errors import RankError
from evolm.executors.processes import Family, die_with_parent, how_it_ended
from evolm.signals import on_signals

MARK = "EVOLM_RANK"

LAUNCHER = "EVOLM_LAUNCHER"
"""The process that started this one as a rank."""

BYSTANDER = 86
"""The exit code of a rank that ended because another one has gone: it has nothing to say."""

LAST_SECONDS = 3.0
"""How long the others may take to end by themselves once one rank has failed. They cannot save: it takes all of them to
put a step together."""

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


def run_ranks(command: Sequence[str], world: int) -> int:
    """Run a command as `world` ranks to their end; returns the exit code of the first rank. It has this process's
    terminal; what the others say is kept, and shown only when one of them is why the run failed.

    A signal is passed on to all, which save and end after the same step. When one rank fails, the others are ended.
    Raises RankError with the words of a rank that failed, unless the first one has said them itself.
    """
    port = free_port()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="evolm-ranks-")))
        families: list[Family] = []

        def pass_on(number: int) -> None:
            for family in families:
                if not family.ended(0):
                    os.kill(family.pid, signal.SIGTERM if number == signal.SIGHUP else number)

        stack.enter_context(on_signals(pass_on))
        for rank in range(world):
            words = None if rank == 0 else stack.enter_context((folder / str(rank)).open("wb"))
            environment = {**os.environ, **rank_environment(rank, world, port)}
            said = None if words is None else subprocess.STDOUT
            family = Family(command, mark=MARK, env=environment, stdin=subprocess.DEVNULL, stdout=words, stderr=said)
            stack.callback(family.kill)
            families.append(family)
        codes = _watch(families)
        return _verdict(codes, {rank: folder / str(rank) for rank in range(1, world)})


def _watch(families: list[Family]) -> dict[int, int]:
    """Wait for all ranks to end, or for one to fail; the exit codes of those that ended by themselves."""
    until = float("inf")
    codes: dict[int, int] = {}
    while len(codes) < len(families) and time.monotonic() < until:
        for rank, family in enumerate(families):
            if rank not in codes and family.ended(0):
                codes[rank] = _code(family)
        if any(codes.values()) and until == float("inf"):
            until = time.monotonic() + LAST_SECONDS
        time.sleep(LOOK_SECONDS)
    return codes


def _code(family: Family) -> int:
    family.process.wait()
    return int(family.process.returncode)


def _verdict(codes: Mapping[int, int], words: Mapping[int, Path]) -> int:
    """The exit code of the run. Raises RankError with the words of the rank that is why it failed."""
    if codes.get(0, BYSTANDER) not in (0, BYSTANDER) and codes[0] > 0:
        return codes[0]  # it has said why
    failed = {rank: code for rank, code in codes.items() if code not in (0, BYSTANDER)}
    if not failed:
        if any(codes.values()):
            raise RankError("a rank ended because another one was gone, which none says of itself")
        return 0
    rank = min(failed, key=lambda one: (failed[one] > 0, one))
    last = words[rank].read_text(errors="replace").strip().splitlines()[-TAIL:] if rank in words else []
    said = "\n".join(["; it said last:", *last]) if last else ""
    raise RankError(f"rank {rank} {how_it_ended(failed[rank])}, and the others were ended{said}")


def this_command() -> list[str]:
    """The command line of this process, to be run as a rank."""
    return [sys.executable, "-m", "evolm", *sys.argv[1:]]
