"""Disks that fill, turn read-only or lose what they held: words, exit code 5, and a resume that completes once the
cause is gone."""

from __future__ import annotations

import gc
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from evolm.run import load


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 24 MB."""
    place = tmp_path / "disk"
    place.mkdir()
    if shutil.which("mount") is None or os.getuid() != 0:
        pytest.skip("needs root: mounts a disk of 24 MB")
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "none", place], capture_output=True, text=True)
    if mounted.returncode != 0:
        pytest.skip(f"a disk of 24 MB cannot be mounted here: {mounted.stderr.strip()}")
    yield place
    subprocess.run(["umount", "--lazy", place], check=True)


def remount(disk: Path, options: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{options}", disk], check=True)


def fill(disk: Path) -> Path:
    """A file that takes all that is left."""
    filler = disk / "filler"
    with filler.open("wb", buffering=0) as stream:
        try:
            while True:
                stream.write(bytes(2**16))
        except OSError:
            pass
    return filler


Told = dict[int, tuple[str, float]]


def told(run: Path) -> Told:
    """What is known of each trial that told something."""
    trials = [trial for trial in load(run).trials() if trial.rungs]
    return {trial.id: (trial.digest, trial.rungs[0].metrics["bits_per_byte"]) for trial in trials}


def test_a_disk_that_fills_while_it_searches(evolm: Any, disk: Path, space_file: Path, cache: Path) -> None:
    """The second checkpoint of some 14 MB does not fit."""
    text = space_file.read_text().replace("{int: [16, 48], step: 16, baseline: 32}", "352")
    space_file.write_text(text + "checkpoints: {max_bytes: 1GiB}\n")
    common = ("--executor", "inline", "--cache", cache)
    said = evolm("search", space_file, "--run", disk / "first", *common, "--trials", 4)
    assert said.code == 5, said.err
    assert "No space left on device; free some space, then run `evolm resume" in said.err
    before = told(disk / "first")
    assert before
    remount(disk, "size=200m")
    said = evolm("resume", disk / "first", "--executor", "inline")
    assert said.code == 0, said.err
    after = told(disk / "first")
    assert len(after) == 4 and before.items() <= after.items()


def test_a_disk_that_is_full_before_anything_is_written(evolm: Any, disk: Path, space_file: Path, cache: Path) -> None:
    common = ("--executor", "inline", "--cache", cache)
    assert evolm("search", space_file, "--run", disk / "first", *common, "--trials", 2).code == 0
    before = told(disk / "first")
    filler = fill(disk)
    said = evolm("resume", disk / "first", "--executor", "inline", "--trials", 5)
    assert said.code == 5 and "free some space" in said.err and "evolm resume" in said.err, said.err
    assert before.items() <= told(disk / "first").items()  # and it can be read
    assert evolm("status", disk / "first").code == 0
    filler.unlink()
    assert evolm("resume", disk / "first", "--executor", "inline", "--trials", 5).code == 0
    after = told(disk / "first")
    assert len(after) == 5 and before.items() <= after.items()


def test_a_disk_without_room_for_a_run(evolm: Any, disk: Path, space_file: Path, cache: Path) -> None:
    fill(disk)
    said = evolm("search", space_file, "--run", disk / "first", "--executor", "inline", "--cache", cache)
    assert said.code == 5 and "free" in said.err, said.err


def test_a_disk_that_turns_read_only(evolm: Any, disk: Path, space_file: Path, cache: Path) -> None:
    common = ("--executor", "inline", "--cache", cache)
    assert evolm("search", space_file, "--run", disk / "first", *common, "--trials", 2).code == 0
    before = told(disk / "first")
    gc.collect()  # a database that is open for reading has its index mapped for writing
    remount(disk, "ro")
    assert evolm("status", disk / "first").code == 0
    said = evolm("resume", disk / "first", "--executor", "inline", "--trials", 3)
    assert said.code == 5 and "Read-only file system" in said.err, said.err
    said = evolm("stop", disk / "first")
    assert said.code == 0 and "is not running" in said.out
    remount(disk, "rw")
    assert evolm("resume", disk / "first", "--executor", "inline", "--trials", 3).code == 0
    assert before.items() <= told(disk / "first").items()


@pytest.fixture
def copy(finished_run: Path, tmp_path: Path) -> Path:
    """A finished run of six trials, to be damaged."""
    return Path(shutil.copytree(finished_run, tmp_path / "copy"))


def test_a_folder_that_vanishes_is_told_and_not_made_anew(
    evolm: Any, copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from evolm import worker

    score = worker.score_domains

    def vanishing(*given: object) -> object:
        shutil.rmtree(copy)
        return score(*given)  # type: ignore[arg-type]

    monkeypatch.setattr(worker, "score_domains", vanishing)
    said = evolm("resume", copy, "--executor", "inline", "--trials", 8)
    assert said.code == 5 and str(copy) in said.err, said.err
    assert not copy.exists()


def damage(place: Callable[[bytes], int]) -> Callable[[Path], None]:
    def flip(file: Path) -> None:
        content = bytearray(file.read_bytes())
        content[place(content)] ^= 0x10
        file.write_bytes(content)

    return flip


def test_a_torn_ledger_is_made_anew_of_what_can_be_read(evolm: Any, copy: Path) -> None:
    before = told(copy)
    damage(lambda content: content.rindex(b"bits_per_byte"))(copy / "ledger.db")
    said = evolm("status", copy)
    assert said.code == 5 and f"evolm resume {copy} --repair" in said.err, said.err
    assert evolm("resume", copy, "--executor", "inline", "--trials", 8).code == 5
    said = evolm("resume", copy, "--executor", "inline", "--trials", 8, "--repair")
    assert said.code == 0 and "the damaged file is ledger.db.torn-1" in said.err, said.err
    after = told(copy)
    assert len(after) == 8 and len(before.items() & after.items()) >= len(before) - 1


def test_a_shard_that_is_gone_is_built_again(evolm: Any, copy: Path, cache: Path, tmp_path: Path) -> None:
    own = Path(shutil.copytree(cache, tmp_path / "cache"))
    gone = [file for file in own.rglob("*.tokens") if file.stat().st_size]
    assert gone
    for file in gone:
        file.unlink()
    said = evolm("resume", copy, "--executor", "inline", "--trials", 7, "--cache", own)
    assert said.code == 0, said.err
    assert len(told(copy)) == 7
