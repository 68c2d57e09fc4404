"""Programs with all that they start: counted together, ended together."""

from __future__ import annotations

import mmap
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from evolm.executors import processes
from evolm.executors.processes import Family, die_with_parent, how_it_ended, kill_marked, marked

MARK = "EVOLM_TEST"

QUICK = [sys.executable, "-S", "-E", "-c"]

Start = Callable[..., Family]


@pytest.fixture
def start() -> Iterator[Start]:
    families: list[Family] = []

    def begin(program: str | list[str]) -> Family:
        command = [*QUICK, program] if isinstance(program, str) else program
        families.append(Family(command, mark=MARK))
        return families[-1]

    yield begin
    for family in families:
        family.kill()


def until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        os.sched_yield()


def lives(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


def children(family: Family, count: int) -> list[int]:
    """The numbers of a family's further members, once there are so many."""
    first = psutil.Process(family.pid)
    until(lambda: len(first.children(recursive=True)) == count)
    return [child.pid for child in first.children(recursive=True)]


# --- ending -----------------------------------------------------------------------------------------------------------


def test_whether_it_has_ended_is_known_as_soon_as_it_has(start: Start) -> None:
    family = start(["sleep", "60"])
    assert not family.ended(0) and not family.ended(0.01)
    os.kill(family.pid, signal.SIGKILL)
    began = time.monotonic()
    assert family.ended(30) and time.monotonic() - began < 10
    assert family.ended(0)


def test_the_number_of_the_group_is_nobody_elses_until_all_of_it_is_ended(start: Start, tmp_path: Path) -> None:
    """`env -i` takes away the mark, and the parent is gone: only the group still holds the sleeper."""
    family = start(["sh", "-c", f"env -i sleep 60 & echo $! > {tmp_path}/pid"])
    assert family.ended(30)
    sleeper = int((tmp_path / "pid").read_text())
    until(lambda: psutil.Process(sleeper).name() == "sleep")
    assert marked(family._mark) == [] and os.getpgid(sleeper) == family.pid
    assert psutil.Process(family.pid).status() == psutil.STATUS_ZOMBIE
    family.kill()
    until(lambda: not lives(sleeper))
    assert family.process.returncode == 0


def test_all_are_ended_and_once_more_does_no_harm(start: Start) -> None:
    family = start("import os, signal\nfor _ in range(3): os.fork()\nsignal.pause()")
    members = children(family, 7)
    family.kill()
    family.kill()
    assert family.process.returncode == -signal.SIGKILL
    assert not any(lives(pid) for pid in members) and marked(family._mark) == []


def test_members_that_keep_starting_others_are_ended(start: Start) -> None:
    family = start(
        ["sh", "-c", "spawn() { setsid sh -c 'while :; do sleep 0.01; setsid sleep 60 & done' & }; spawn; wait"]
    )
    until(lambda: len(marked(family._mark)) > 5)
    family.kill()
    assert not any(lives(process.pid) for process in marked(family._mark))


def test_what_the_kernel_holds_up_does_not_hold_up_who_kills_it(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "KILL_SECONDS", 0.1)
    family = start(["sleep", "60"])
    with monkeypatch.context() as stuck:
        stuck.setattr(psutil.Process, "kill", lambda _: None)
        stuck.setattr(os, "killpg", lambda *_: None)
        began = time.monotonic()
        family.kill()
        assert time.monotonic() - began < 10 and family.process.returncode is None
    family.kill()
    assert family.process.returncode == -signal.SIGKILL


def test_sigterm_reaches_the_whole_group(start: Start, tmp_path: Path) -> None:
    family = start(
        "import os, signal, sys\n"
        f"signal.signal(signal.SIGTERM, lambda *_: (open(f'{tmp_path}/{{os.getpid()}}', 'w'), sys.exit()))\n"
        "signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])\nos.fork()\n"
        "signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])\nwhile True: signal.pause()"
    )
    members = [family.pid, *children(family, 1)]
    family.ask_to_end()
    until(lambda: sorted(path.name for path in tmp_path.iterdir()) == sorted(map(str, members)))


def test_a_member_that_left_in_every_way_is_ended(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once the first process has ended, nothing leads to it any more."""
    killpg = os.killpg

    def kill_and_see(group: int, number: int) -> None:
        killpg(group, number)
        until(lambda: not lives(group))

    monkeypatch.setattr(os, "killpg", kill_and_see)
    family = start(["sh", "-c", f"env -i setsid sh -c 'echo $$ > {tmp_path}/pid; exec sleep 60' & wait"])
    until(lambda: (tmp_path / "pid").is_file() and (tmp_path / "pid").read_text())
    sleeper = int((tmp_path / "pid").read_text())
    until(lambda: psutil.Process(sleeper).name() == "sleep")
    assert marked(family._mark)[0].pid == family.pid and os.getpgid(sleeper) != family.pid
    family.kill()
    assert not lives(sleeper)


def test_all_processes_of_the_machine_are_looked_at_once(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    searches: list[str] = []

    def search(mark: str) -> list[psutil.Process]:
        searches.append(mark)
        return marked(mark)

    monkeypatch.setattr(processes, "marked", search)
    monkeypatch.setattr(os, "killpg", lambda *_: None)  # as if all had left the group
    family = start("import os, signal\nfor _ in range(3): os.fork()\nsignal.pause()")
    members = children(family, 7)
    family.kill()
    assert searches == [family._mark] and not any(lives(pid) for pid in members)


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (0, "ended with exit code 0"),
        (7, "ended with exit code 7"),
        (-11, "ended with SIGSEGV"),
        (-40, "ended with signal 40"),
        (None, "was killed, but the kernel holds it up"),
    ],
)
def test_how_a_process_ended_can_always_be_told(code: int | None, words: str) -> None:
    assert how_it_ended(code) == words


def test_what_carries_a_mark_is_found_and_ended() -> None:
    mine = f"{os.getpid()}-mine"  # other tests may run beside this one
    with subprocess.Popen(["sleep", "60"], env={**os.environ, MARK: mine}, start_new_session=True) as process:
        assert [one.pid for one in marked(f"{MARK}={mine}")] == [process.pid]
        assert marked(f"{MARK}={mine[:-1]}") == [] and marked(f"{MARK}={mine}2") == []
        kill_marked(f"{MARK}={mine}")
        assert not lives(process.pid)


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel of Linux does it")
def test_a_process_dies_with_its_parent(tmp_path: Path) -> None:
    parent = (
        "import subprocess, signal, sys\nfrom functools import partial\nimport os\n"
        "from evolm.executors.processes import die_with_parent\n"
        "child = subprocess.Popen(['sleep', '60'], preexec_fn=partial(die_with_parent, os.getpid()))\n"
        "print(child.pid, flush=True)\nsignal.pause()"
    )
    with subprocess.Popen([sys.executable, "-c", parent], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        child = int(process.stdout.readline())
        assert lives(child)
        process.kill()
    until(lambda: not lives(child))


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel of Linux does it")
def test_a_process_whose_parent_died_just_before_ends(start: Start) -> None:
    gone = start(["true"])
    gone.kill()
    orphan = subprocess.Popen(["sleep", "60"], preexec_fn=lambda: die_with_parent(gone.pid))
    assert orphan.wait(30) == 1


# --- memory -----------------------------------------------------------------------------------------------------------

MIB = 2**20


def settled(family: Family, at_least: int, monkeypatch: pytest.MonkeyPatch) -> tuple[int, int]:
    """What the family holds by the quick count, once it is so much, and by the exact one."""
    monkeypatch.setattr(processes, "COUNT_SECONDS", 0.0)
    until(lambda: family.memory() >= at_least)
    return family.memory(), family.shared_memory_counted_once()


def test_memory_of_all_members_counts(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    family = start("import os, signal\nfor _ in range(2): os.fork()\nx = bytearray(20 << 20)\nsignal.pause()")
    until(lambda: family.shared_memory_counted_once() >= 80 * MIB)
    quick, exact = settled(family, 80 * MIB, monkeypatch)
    assert 80 * MIB <= exact < 130 * MIB and 80 * MIB <= quick < 130 * MIB


def test_what_forks_share_is_counted_once(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    family = start("import os, signal\nx = bytearray(40 << 20)\nfor _ in range(2): os.fork()\nsignal.pause()")
    quick, exact = settled(family, 160 * MIB, monkeypatch)
    assert quick >= 160 * MIB and 40 * MIB <= exact < 60 * MIB


def test_shared_memory_counts_and_only_once(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    program = (
        "import mmap, os, signal\nx = mmap.mmap(-1, 40 << 20)\nx.write(bytes(40 << 20))\nos.fork()\n"
        "assert sum(x[::4096]) == 0\nsignal.pause()"
    )
    quick, exact = settled(start(program), 80 * MIB, monkeypatch)
    assert quick >= 80 * MIB and 40 * MIB <= exact < 60 * MIB


def test_a_file_that_is_mapped_does_not_count(start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, read = tmp_path / "data", tmp_path / "read"
    data.write_bytes(os.urandom(mmap.PAGESIZE) * (40 * MIB // mmap.PAGESIZE))
    family = start(
        "import mmap, signal\n"
        f"file = open({str(data)!r})\nx = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)\n"
        f"assert sum(x[::4096]) >= 0\nopen({str(read)!r}, 'w')\nsignal.pause()"
    )
    until(read.exists)
    assert psutil.Process(family.pid).memory_info().rss > 40 * MIB
    assert max(settled(family, 1, monkeypatch)) < 20 * MIB


def test_of_a_family_that_has_ended_nothing_is_held(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    family = start(["sleep", "60"])
    settled(family, 1, monkeypatch)
    os.kill(family.pid, signal.SIGKILL)
    assert family.ended(30)
    assert family.memory() == family.shared_memory_counted_once() == 0
    family.kill()
    assert family.memory() == family.shared_memory_counted_once() == 0


@pytest.mark.parametrize(
    ("end", "before", "after", "expected"),
    [
        ("kill -9 $$", 3, 4, True),
        ("sh -c 'kill -9 $$'; exit $?", 3, 4, True),
        ("kill -9 $$", 3, 3, False),
        ("kill -15 $$", 3, 4, False),
        ("kill -9 $$", None, 4, False),
        ("kill -9 $$", 3, None, False),
    ],
)
def test_who_was_killed_while_the_kernel_killed_was_killed_by_it(
    start: Start, monkeypatch: pytest.MonkeyPatch, end: str, before: int | None, after: int | None, expected: bool
) -> None:
    family = start(["sh", "-c", end])
    assert family.ended(30)
    family.kill()
    monkeypatch.setattr(processes, "memory_kills", lambda: after)
    assert family.killed_by_the_system(before) is expected


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel of Linux tells")
def test_how_often_the_kernel_has_killed_is_told_here() -> None:
    kills = processes.memory_kills()
    assert kills is not None and kills >= 0
