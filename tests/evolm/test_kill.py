"""Runs that are interrupted: signals, SIGKILL, and what `evolm resume` makes of them. Real processes."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import sqlite3
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from evolm.signals import on_signals
from fitness.errors import StorageError
from fitness.ledger import Ledger


def launch(folder: Path, *words: str) -> subprocess.Popen[str]:
    """`evolm ...` in a process group of its own, so that only it hears our signals."""
    return subprocess.Popen(
        [sys.executable, "-m", "evolm", *words],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[Any]) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert process.poll() is None and time.monotonic() < deadline, process.stdout and process.stdout.read()
        os.sched_yield()


def results(folder: Path) -> list[tuple[int, str]]:
    """The acknowledged results of a run: (event number, digest)."""
    try:
        ledger = Ledger.open(folder / "runs/first/ledger.db")
    except StorageError:  # not there yet, or not yet complete
        return []
    found = [(rung.seq, trial.digest) for trial in ledger.trials.values() for rung in trial.rungs]
    ledger.close()
    return sorted(found)


def test_sigkill_loses_nothing_that_was_acknowledged(tmp_path: Path, space_file: Path, cache: Path) -> None:
    """Killed again and again at its next result; the run ends with the genomes and losses of an undisturbed one."""
    common = ("--executor", "inline", "--cache", str(cache))
    search = ("search", str(space_file), *common, "--trials", "8")
    undisturbed = launch(tmp_path, *search, "--run", "undisturbed")
    output, _ = undisturbed.communicate(timeout=120)
    assert undisturbed.returncode == 0, output
    known: list[tuple[int, str]] = []
    command = (*search, "--run", "first")
    for kill in range(3):
        process = launch(tmp_path, *command)
        enough = len(known) + kill + 1
        wait_for(lambda enough=enough: len(results(tmp_path)) >= enough, process)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        now = results(tmp_path)
        assert now[: len(known)] == known
        known = now
        command = ("resume", "runs/first", "--executor", "inline")
    process = launch(tmp_path, *command)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    assert results(tmp_path)[: len(known)] == known

    def told(name: str) -> list[tuple[str, float]]:
        ledger = Ledger.open(tmp_path / "runs" / name / "ledger.db")
        return [(trial.digest, trial.metrics["bits_per_byte"]) for trial in ledger.trials.values()]

    assert told("first") == told("undisturbed")


def test_thirty_kills_at_random_moments_lose_nothing(tmp_path: Path) -> None:
    """Promises G1, G3 and G5: what was acknowledged is there, once, and the search is the one that nobody disturbed."""
    from killed_search import search

    rng = random.Random(7)
    folder, trials = tmp_path / "killed", 400
    script = Path(__file__).with_name("killed_search.py")
    ready = []
    for _ in range(30):
        began = time.monotonic()
        known = events(folder)
        process = subprocess.Popen([sys.executable, script, folder, str(trials)], start_new_session=True)
        wait_for(lambda known=known: events(folder) > known + 1, process)
        ready.append(time.monotonic() - began)
        pause(rng.uniform(0, 0.15), process)
        process.kill()
        process.wait()
    assert statistics.median(ready) < 5, ready
    killed = search(folder, trials)
    acknowledged = [line.split() for line in (folder / "acknowledged").read_text().splitlines()]
    told = {(trial.id, rung.rung): rung.metrics["loss"] for trial in killed for rung in trial.rungs}
    assert all(told[int(trial), int(rung)] == float(loss) for trial, rung, _, loss in acknowledged)
    connection = sqlite3.connect(folder / "ledger.db")
    assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    assert connection.execute("SELECT count(DISTINCT digest), count(*) FROM trials").fetchone() == (trials, trials)
    assert connection.execute("SELECT count(*) FROM events WHERE kind = 'open'").fetchone() == (31,)
    connection.close()
    undisturbed = search(tmp_path / "undisturbed", trials)
    assert [(t.digest, t.rung, t.metrics) for t in killed] == [(t.digest, t.rung, t.metrics) for t in undisturbed]
    interrupted = sum(trial.attempts for trial in killed) - sum(trial.attempts for trial in undisturbed)
    assert 5 < interrupted <= 30  # most kills came while a trial ran


def events(folder: Path) -> int:
    """The number of the last event of a run; 0 before there is one."""
    try:
        with contextlib.closing(sqlite3.connect(f"file:{folder / 'ledger.db'}?mode=ro", uri=True)) as connection:
            return int(connection.execute("SELECT coalesce(max(seq), 0) FROM events").fetchone()[0])
    except sqlite3.Error:
        return 0


def pause(seconds: float, process: subprocess.Popen[bytes]) -> None:
    """Let a process go on for so long, or until it has ended."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(seconds)


def test_a_signal_that_was_ignored_stays_ignored() -> None:
    """What nohup does to SIGHUP."""
    heard: list[int] = []
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with on_signals(heard.append):
            os.kill(os.getpid(), signal.SIGHUP)
            os.kill(os.getpid(), signal.SIGTERM)
        assert heard == [signal.SIGTERM]
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_signal_saves_and_prints_how_to_go_on(
    tmp_path: Path, space_file: Path, cache: Path, number: signal.Signals, code: int
) -> None:
    text = space_file.read_text().replace("tokens: [512, 2048], eta: 4", "tokens: [512, 2M], eta: 4000")
    space_file.write_text(text)  # the second rung of the first trial would take minutes
    process = launch(
        tmp_path, "search", str(space_file), "--executor", "inline", "--cache", str(cache), "--run", "first"
    )
    log = tmp_path / "runs/first/trials/1/metrics.jsonl"
    wait_for(lambda: log.is_file() and any(json.loads(x).get("total_tokens", 0) > 10**6 for x in lines(log)), process)
    process.send_signal(number)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == code, output
    assert "stopped and saved" in output and "go on with: evolm resume " in output
    ledger = Ledger.open(tmp_path / "runs/first/ledger.db")
    assert ledger.trials[1].state == "paused" and ledger.trials[1].rung == 0
    assert (tmp_path / "runs/first/trials/1/checkpoints/latest/checkpoint.json").is_file()
    assert ledger.sessions()[-1]["why"] == "interrupted"


def lines(log: Path) -> list[str]:
    """The whole lines of a log that is being written."""
    return [line for line in log.read_text().split("\n")[:-1] if line]
