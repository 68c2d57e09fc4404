"""evolm's neighbours have common names: somebody else's package of the same name must not be taken for one of them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from evolm.packages import NEIGHBOURS, foreign_packages


def test_all_is_well_here() -> None:
    assert foreign_packages() == []


def test_a_foreign_package_is_told_with_its_place_and_a_way_out(tmp_path: Path) -> None:
    (tmp_path / "trainer").mkdir()
    (tmp_path / "trainer/__init__.py").touch()
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-m", "evolm", "--help"], env=environment, capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert f"package 'trainer' is taken from {tmp_path / 'trainer'}" in done.stderr
    assert "environment of its own" in done.stderr


def test_a_missing_package_is_told(tmp_path: Path) -> None:
    found = foreign_packages(tmp_path)
    assert len(found) == len(NEIGHBOURS)
