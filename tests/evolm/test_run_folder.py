"""Run folders: names, places, and one controller at a time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from evolm.errors import RunBusy, StorageError, UsageError
from evolm.run_folder import RunFolder, existing, new_or_named


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("name", ["a b", "-x", "x" * 65, "a\nb", "é", "..", "a/../.hidden"])
def test_names_that_would_hurt_are_refused(name: str) -> None:
    with pytest.raises(UsageError, match="must match"):
        new_or_named(name, "space")


def test_a_run_without_a_name_takes_the_next_number() -> None:
    assert new_or_named(None, "demo").path == Path("runs/demo-1")
    Path("runs/demo-1").mkdir(parents=True)
    assert new_or_named(None, "demo").path == Path("runs/demo-2")


def test_a_name_lies_under_runs_and_a_path_where_it_says(tmp_path: Path) -> None:
    assert new_or_named("first", "demo").path == Path("runs/first")
    assert new_or_named("elsewhere/first", "demo").path == tmp_path / "elsewhere/first"


def test_an_unknown_run_is_told_the_nearest() -> None:
    Path("runs/demo-1").mkdir(parents=True)
    Path("runs/demo-1/ledger.db").touch()
    with pytest.raises(UsageError, match="no run 'dmo-1'; did you mean 'demo-1'"):
        existing("dmo-1")
    assert existing("demo-1") == existing("runs/demo-1").__class__(Path("runs/demo-1"))


def test_a_second_controller_is_refused_with_the_owner(tmp_path: Path) -> None:
    script = (
        "import sys; from pathlib import Path; from evolm.run_folder import RunFolder\n"
        "with RunFolder(Path(sys.argv[1])).locked(): print('locked', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "run")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == "locked\n"
        folder = RunFolder(tmp_path / "run")
        assert folder.busy
        with pytest.raises(RunBusy, match=f"run 'run' is in use by process {holder.pid} on "), folder.locked():
            pass
        holder.kill()
    assert not folder.busy  # the kernel has let go of the lock
    with folder.locked():
        assert json.loads((folder.path / "run.lock").read_text())["pid"] == os.getpid()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "closed").mkdir(mode=0o500)
    with pytest.raises(StorageError, match="cannot be written"), RunFolder(tmp_path / "closed/run").locked():
        pass


def test_a_file_in_the_way_is_told(tmp_path: Path) -> None:
    (tmp_path / "run").touch()
    with pytest.raises(StorageError, match="cannot be written"), RunFolder(tmp_path / "run").locked():
        pass
