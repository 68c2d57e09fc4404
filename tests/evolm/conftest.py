"""A command line to call, and one finished run for everything that only looks."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from evolm.cli import main


@dataclass(frozen=True)
class Said:
    """What a command printed and how it ended."""

    code: int
    out: str
    err: str


Command = Callable[..., Said]


@pytest.fixture
def evolm(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Command:
    """Call the command line in this process."""

    def call(*words: object) -> Said:
        monkeypatch.setattr(sys, "argv", ["evolm", *map(str, words)])
        capsys.readouterr()
        try:
            main()
            code = 0
        except SystemExit as ended:
            code = ended.code if isinstance(ended.code, int) else 0
        printed = capsys.readouterr()
        return Said(code, printed.out, printed.err)

    return call


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory: pytest.TempPathFactory, space_text: str, cache: Path) -> Path:
    """The folder of a search of six trials over two rungs, run once for all tests that read."""
    from evolm.launch import start
    from reports.page import write_report

    home = tmp_path_factory.mktemp("runs")
    (home / "words.yaml").write_text(space_text)
    ended = start(home / "words.yaml", run=str(home / "first"), executor="inline", cache=cache)
    write_report(ended.run.data(), ended.run.folder.report)
    return home / "first"


@pytest.fixture(scope="session")
def python_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The text of the running Python, tokenised once for all tests of the group `python-text`."""
    return tmp_path_factory.mktemp("python-cache") / "evolm"
