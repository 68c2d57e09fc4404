"""The page in a real browser, where there is one: every figure is drawn, and nothing complains."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from reports.frame import RunData
from reports.page import write_report

NAMES = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = next((found for name in NAMES if (found := shutil.which(name))), None)
OPTIONS = (
    "--headless --no-sandbox --disable-gpu --no-first-run --disable-background-networking --disable-component-update "
    "--disable-sync --enable-logging=stderr --virtual-time-budget=10000 --dump-dom"
)

pytestmark = [pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine"), pytest.mark.slow]


def opened(page: Path) -> subprocess.CompletedProcess[str]:
    """The document of a page as it is when its scripts have run, and what the browser said about it."""
    return subprocess.run(
        [str(CHROMIUM), *OPTIONS.split(), f"--user-data-dir={page.parent / 'profile'}", page.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )


def test_every_figure_is_drawn_without_a_complaint(made_up: Callable[..., RunData], tmp_path: Path) -> None:
    data = made_up(objectives={"bits_per_byte": "min", "params": "min", "tokens_per_second": "max"})
    write_report(data, tmp_path / "report.html")
    done = opened(tmp_path / "report.html")
    assert done.stdout.count('class="plot js-plotly-plot"') == 7
    assert "CONSOLE" not in done.stderr


def test_attacks_are_drawn_as_the_text_that_they_are(hostile: RunData, tmp_path: Path) -> None:
    write_report(hostile, tmp_path / "report.html")
    done = opened(tmp_path / "report.html")
    assert done.stdout.count('class="plot js-plotly-plot"') == 7
    assert "<img" not in done.stdout.split('<script type="application/json"')[0]
    assert "CONSOLE" not in done.stderr


def test_a_script_that_is_not_evolms_does_not_run(made_up: Callable[..., RunData], tmp_path: Path) -> None:
    write_report(made_up(2), tmp_path / "report.html")
    page = tmp_path / "changed.html"
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    page.write_text(text.replace("</main>", "<script>document.title = 'taken over'</script></main>"), encoding="utf-8")
    done = opened(page)
    assert "<title>taken over" not in done.stdout
    assert "Content Security Policy" in done.stderr
