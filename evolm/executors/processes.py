"""Programs with all that they start: what memory they hold together, and how none of them is left behind."""

from __future__ import annotations

import contextlib
import ctypes
import math
import os
import re
import signal
import subprocess
import sys
import time
import uuid
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil

COUNT_SECONDS = 1.0
"""How often a family's members are counted anew; what they hold is looked at whenever it is asked for."""

KILL_SECONDS = 10.0
"""How long processes that were killed may take to go: one that the kernel holds up (a lost disk, a stuck device) does
not hold up who killed it."""

_LIBC = ctypes.CDLL(None)  # loaded now: nothing may be loaded between fork and exec
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36

_GONE = (psutil.NoSuchProcess, psutil.AccessDenied, OSError)


class Family:
    """A program that was started, and every process that descends from it.

    It leads a session and process group of its own. Its environment carries a mark that descendants inherit, so that
    those are found, too, that left the group or whose parents have died.
    """

    def __init__(
        self, command: Sequence[str], *, mark: str, env: Mapping[str, str] | None = None, **options: Any
    ) -> None:
        self._mark = f"{mark}={uuid.uuid4().hex}"
        name, _, value = self._mark.partition("=")
        with warnings.catch_warnings():  # that a process with threads runs a function between fork and exec
            warnings.simplefilter("ignore", DeprecationWarning)
            self.process: subprocess.Popen[bytes] = subprocess.Popen(
                command, env={**(os.environ if env is None else env), name: value}, start_new_session=True, **options
            )
        self._members: list[psutil.Process] = []
        self._counted = -math.inf

    @property
    def pid(self) -> int:
        """The number of the first process, and of its group."""
        return self.process.pid

    def memory(self) -> int:
        """Bytes of memory that the family holds, quickly and at the most: what is mapped from files is not counted, and
        what processes share is counted for each of them."""
        if time.monotonic() - self._counted > COUNT_SECONDS:
            self._members, self._counted = list(self._descended()), time.monotonic()
        return sum(_own(member) for member in self._members)

    def shared_memory_counted_once(self) -> int:
        """The same, exactly and slowly: pages that several processes share (what a parent left to its forks, shared
        memory) are split among them."""
        return sum(_proportional(member) for member in self._descended())

    def _descended(self) -> Iterator[psutil.Process]:
        with contextlib.suppress(*_GONE):
            first = psutil.Process(self.pid)
            yield first
            yield from first.children(recursive=True)

    def ended(self, seconds: float) -> bool:
        """Whether the first process has ended; waits at most so long for it. `kill` is what takes note of its end: as
        long as it has not, the number of the group is nobody else's."""
        until, pause = time.monotonic() + seconds, 0.0005
        while not _has_ended(self.process):
            left = until - time.monotonic()
            if left <= 0:
                return False
            time.sleep(min(pause, left))
            pause = min(2 * pause, 0.02)
        return True

    def ask_to_end(self) -> None:
        """SIGTERM for the group."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGTERM)

    def kill(self) -> None:
        """SIGKILL for every member, again until none is left; a member may have been about to start another one."""
        if self.process.returncode is None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(self.pid, signal.SIGSTOP)  # so that it starts nothing while its descendants are listed
            known = list(self._descended())  # once it has ended, who left its group and has no mark is not found
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.pid, signal.SIGKILL)
            _kill_all(lambda: known)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(KILL_SECONDS)
        kill_marked(self._mark)

    def killed_by_the_system(self, kills_before: int | None) -> bool:
        """Whether the first process, or what a shell ran in its place, was killed while the kernel killed for want of
        memory."""
        kills, killed = memory_kills(), self.process.returncode in (-signal.SIGKILL, 128 + signal.SIGKILL)
        return killed and None not in (kills, kills_before) and kills != kills_before


def _has_ended(process: subprocess.Popen[bytes]) -> bool:
    if sys.platform != "linux":
        return process.poll() is not None
    try:
        return os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
    except ChildProcessError:  # it was taken note of before
        return True


def how_it_ended(code: int | None) -> str:
    """What to tell of a process by its exit code, as `subprocess` has it."""
    if code is None:
        return "was killed, but the kernel holds it up"
    if code >= 0:
        return f"ended with exit code {code}"
    try:
        return f"ended with {signal.Signals(-code).name}"
    except ValueError:  # a real-time signal
        return f"ended with signal {-code}"


def kill_marked(mark: str) -> None:
    """SIGKILL for every process whose environment holds `NAME=value`, but for this one, and for what descends from
    them; returns when they are gone."""
    _kill_all(lambda: marked(mark))


def kill_descendants() -> None:
    """SIGKILL for every process that descends from this one; returns when they are gone."""
    _kill_all(lambda: psutil.Process().children(recursive=True))


def _kill_all(find: Callable[[], list[psutil.Process]]) -> None:
    """Kill what is found with what descends from it, until nothing that lives is found any more.

    Searching looks at every process of the machine, so that what was found is waited for before it is done again.
    """
    until = time.monotonic() + KILL_SECONDS
    while time.monotonic() < until and (members := [member for member in find() if _lives(member)]):
        while members and time.monotonic() < until:
            members = [*members, *_children(members)]
            for member in members:
                with contextlib.suppress(*_GONE):
                    member.kill()
            time.sleep(0.002)
            members = [member for member in members if _lives(member)]


def _children(members: list[psutil.Process]) -> list[psutil.Process]:
    found: dict[int, psutil.Process] = {}
    for member in members:
        if member.pid not in found:
            with contextlib.suppress(*_GONE):
                found.update((child.pid, child) for child in member.children(recursive=True))
    return [found[pid] for pid in found.keys() - {member.pid for member in members} - {os.getpid()}]


def marked(mark: str) -> list[psutil.Process]:
    """The processes whose environment holds `NAME=value`, but for this one."""
    found = []
    for pid in psutil.pids():
        with contextlib.suppress(*_GONE):
            if pid != os.getpid() and _carries(pid, mark):
                process = psutil.Process(pid)
                if _carries(pid, mark):  # the number may have become another one's before it was taken down
                    found.append(process)
    return found


def _carries(pid: int, mark: str) -> bool:
    if sys.platform == "linux":  # three times as fast as psutil: all processes of the machine are asked
        with open(f"/proc/{pid}/environ", "rb", buffering=0) as stream:
            return os.fsencode(mark) in stream.read().split(b"\0")
    name, _, value = mark.partition("=")
    return bool(psutil.Process(pid).environ().get(name) == value)


def _lives(process: psutil.Process) -> bool:
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except _GONE:
        return False


def _own(process: psutil.Process) -> int:
    try:
        held = Path(f"/proc/{process.pid}/status").read_text()
        return sum(int(kilobytes) for kilobytes in _OWN_PAGES.findall(held)) * 1024
    except OSError:
        pass
    try:
        info = process.memory_info()
    except _GONE:
        return 0
    return int(info.rss - getattr(info, "shared", 0))


def _proportional(process: psutil.Process) -> int:
    try:
        shares = Path(f"/proc/{process.pid}/smaps_rollup").read_text()
        return sum(int(kilobytes) for kilobytes in _OWN_SHARES.findall(shares)) * 1024
    except OSError:
        pass
    try:
        return int(process.memory_full_info().uss)
    except _GONE:
        return 0


_OWN_PAGES = re.compile(r"^Rss(?:Anon|Shmem):\s*(\d+) kB$", re.MULTILINE)
_OWN_SHARES = re.compile(r"^Pss_(?:Anon|Shmem): *(\d+) kB$", re.MULTILINE)


def memory_kills() -> int | None:
    """How many processes the kernel has killed for want of memory: of this control group, or of the machine where
    groups are not counted; None where it does not tell."""
    for counters in (_group_events, lambda: Path("/proc/vmstat")):
        with contextlib.suppress(OSError, StopIteration, ValueError):
            lines = counters().read_text().splitlines()
            return int(next(line for line in lines if line.startswith("oom_kill ")).split()[1])
    return None


def _group_events() -> Path:
    groups = Path("/proc/self/cgroup").read_text().splitlines()
    return Path(f"/sys/fs/cgroup/{next(line for line in groups if line.startswith('0::'))[3:]}/memory.events")


def die_with_parent(parent: int | None = None) -> None:
    """Have the kernel end this process when the thread that started it ends, where it can (Linux). `parent` is the
    process that started it, where that is known: it may have ended already."""
    if sys.platform != "linux":
        return
    parent = os.getppid() if parent is None else parent
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it ended just before
        os._exit(1)


def adopt_orphans() -> None:
    """Have descendants whose parents have ended become children of this process, where the kernel can do it (Linux)."""
    if sys.platform == "linux":
        _LIBC.prctl(_PR_SET_CHILD_SUBREAPER, 1)
