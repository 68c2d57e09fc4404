from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import stat
import time
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from plotly.offline import get_plotlyjs

from fitness.errors import StorageError
from reports.frame import RunData
from reports.grids import MAX_ROWS, front_grid, trials_grid
from reports.page import embedded, render, write_report

Made = Callable[..., RunData]

THREE = {"bits_per_byte": "min", "params": "min", "tokens_per_second": "max"}


class Page(HTMLParser):
    """What a browser would make of the page: its elements, its scripts, its text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[tuple[str | None, str]] = []
        self.words: list[str] = []
        self._inside: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._inside.append(tag)
        if tag == "script":
            self.scripts.append((dict(attrs).get("type"), ""))

    def handle_endtag(self, tag: str) -> None:
        if tag in self._inside:
            while self._inside.pop() != tag:
                pass

    def handle_data(self, data: str) -> None:
        if self._inside and self._inside[-1] == "script":
            kind, text = self.scripts[-1]
            self.scripts[-1] = (kind, text + data)
        elif self._inside and self._inside[-1] != "style":
            self.words.append(data)

    def count(self, tag: str) -> int:
        return sum(name == tag for name, _ in self.tags)

    def attributes(self, name: str) -> list[str]:
        return [str(attributes[name]) for _, attributes in self.tags if name in attributes]

    @property
    def drawings(self) -> Any:
        return json.loads(next(text for kind, text in self.scripts if kind == "application/json"))

    @property
    def programs(self) -> list[str]:
        return [text for kind, text in self.scripts if kind is None]

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def outside_plotly(text: str) -> str:
    return text.replace(get_plotlyjs(), "")


class TestContents:
    def test_everything_is_there(self, made_up: Made) -> None:
        page = Page(render(made_up()))
        assert page.attributes("data-figure") == [
            "front", "hypervolume", "hypervolume_flops", "curves", "mix0", "triangle0", "genes",
        ]  # fmt: skip
        assert set(page.attributes("data-figure")) == set(page.drawings["figures"])
        for words in ("made-up-1", "finished", "Pareto front", "Failures", "torch.OutOfMemoryError", "evolm resume"):
            assert words in page.text
        assert page.drawings["views"] is None
        assert all("height" not in figure["layout"] for figure in page.drawings["figures"].values())

    def test_plots_have_their_question_for_readers_who_cannot_see_them(self, made_up: Made) -> None:
        page = Page(render(made_up()))
        labels = [attributes.get("aria-label") for _, attributes in page.tags if "data-figure" in attributes]
        assert all(label and label.endswith("?") for label in labels)

    def test_three_objectives_can_be_chosen_from(self, made_up: Made) -> None:
        page = Page(render(made_up(objectives=THREE)))
        assert page.count("select") == 2
        assert [one["label"] for one in page.drawings["views"]["objectives"]] == list(THREE)

    def test_tables_can_be_reached_by_keyboard(self, made_up: Made) -> None:
        page = Page(render(made_up()))
        regions = [attributes for _, attributes in page.tags if attributes.get("role") == "region"]
        assert regions
        assert all(attributes["tabindex"] == "0" and attributes["aria-label"] for attributes in regions)

    def test_readers_without_scripts_get_the_front_in_numbers(self, made_up: Made) -> None:
        data = made_up()
        (inside,) = re.findall(r"<noscript>\s*<p>.*?</noscript>", render(data), re.DOTALL)
        assert inside.count("<tr>") == len(data.front) + 1

    def test_the_front_table_has_objectives_domains_and_genes(self, made_up: Made) -> None:
        data = made_up()
        grid = front_grid(data)
        assert grid.header[:6] == (
            "trial", "bits_per_byte", "params", "bits_per_byte/web", "bits_per_byte/code", "bits_per_byte/books",
        )  # fmt: skip
        assert [row[0] for row in grid.rows] == [str(trial.id) for trial in data.front]
        assert all(len(row) == len(grid.header) for row in grid.rows)

    def test_the_table_of_all_trials_is_limited(self, made_up: Made) -> None:
        grid = trials_grid(made_up(MAX_ROWS + 5, lines=2))
        assert (len(grid.rows), grid.left_out) == (MAX_ROWS, 5)
        assert all(len(row) == len(grid.header) for row in grid.rows)

    def test_no_place_on_this_machine_is_told_but_the_run_itself(self, made_up: Made) -> None:
        assert "somebody" not in render(made_up())


class TestAnyRun:
    def test_no_trials(self, run_of: Made) -> None:
        page = Page(render(run_of([])))
        assert page.attributes("data-figure") == []
        assert page.text.count("No trial has a result yet.") >= 2
        assert "Nothing has been tried yet." in page.text

    def test_one_trial(self, made_up: Made) -> None:
        assert "front" in Page(render(made_up(1))).attributes("data-figure")

    def test_one_objective(self, made_up: Made) -> None:
        page = Page(render(made_up(objectives={"bits_per_byte": "min"})))
        assert "Ranking" in page.text
        assert "Hypervolume" not in page.text

    def test_all_failed(self, run_of: Made, made_up: Made) -> None:
        failed = [trial for trial in made_up().trials if trial.state in ("failed", "infeasible")]
        page = Page(render(run_of(failed)))
        assert "All 6 trials failed" in page.text
        assert page.attributes("data-figure") == []

    def test_no_tokens_no_corpus_no_curves(self, made_up: Made) -> None:
        data = made_up(20, rungs=[0], meta={}, settings={}, began=None, ended=None)
        page = Page(render(RunData(**{**vars(data), "curves": {}})))
        assert "No trial has logged a training loss yet." in page.text

    def test_a_thousand_trials_are_quick_and_small(self, made_up: Made) -> None:
        data = made_up(1000, lines=200)
        began = time.perf_counter()
        page = render(data).encode()
        assert time.perf_counter() - began < 8
        assert len(page) < 8_000_000

    def test_the_same_data_gives_the_same_page(self, made_up: Made) -> None:
        assert render(made_up(objectives=THREE)) == render(made_up(objectives=THREE))


class TestSafety:
    def test_no_element_and_no_script_is_made_from_data(self, hostile: RunData, made_up: Made) -> None:
        page = Page(render(hostile))
        assert page.count("img") == page.count("iframe") == page.count("object") == 0
        assert page.programs == Page(render(made_up(3))).programs
        assert not [name for _, attributes in page.tags for name in attributes if name.startswith("on")]
        assert all(link.startswith("#") for link in page.attributes("href"))
        assert page.attributes("src") == []
        assert page.text.count("</script><img src=x onerror=alert(1)>") > 10

    def test_plotly_gets_no_markup_from_data(self, hostile: RunData) -> None:
        written = json.dumps(Page(render(hostile)).drawings["figures"])
        assert not re.search(r"<(?!/?b>|br>|/?extra>)", written)
        assert "&lt;img" in written

    def test_embedded_json_cannot_leave_its_element(self) -> None:
        value = {"a": "</script><img src=x onerror=alert(1)>", "b": "<!--<script>", "c": "&amp;"}
        text = embedded(value)
        assert not set("<>&") & set(text)
        assert json.loads(text) == value

    def test_nothing_is_loaded_from_anywhere(self, made_up: Made) -> None:
        text = outside_plotly(render(made_up()))
        assert get_plotlyjs() not in text
        assert not re.findall(r"https?://", text)
        assert not re.findall(r"@import|url\(|//cdn", text)
        assert not {"link", "iframe", "img", "object", "embed", "base"} & {tag for tag, _ in Page(text).tags}

    def test_plotly_is_there_once(self, made_up: Made) -> None:
        assert render(made_up()).count(get_plotlyjs()) == 1

    def test_the_policy_allows_these_scripts_and_no_others(self, made_up: Made) -> None:
        page = Page(render(made_up()))
        (policy,) = [attributes["content"] for _, attributes in page.tags if attributes.get("http-equiv")]
        assert policy is not None
        rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
        digests = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in page.programs]
        assert rules["script-src"] == " ".join(f"'sha256-{digest}'" for digest in digests)
        assert rules["default-src"] == "'none'"
        assert rules["style-src"] == "'unsafe-inline'"
        assert rules["img-src"] == "data: blob:"
        assert "unsafe-eval" not in policy

    def test_the_policy_comes_before_anything_that_it_rules(self, made_up: Made) -> None:
        names = [tag for tag, _ in Page(render(made_up())).tags]
        assert names[:4] == ["html", "head", "meta", "meta"]

    def test_plotly_may_not_upload_figures(self, made_up: Made) -> None:
        program = Page(render(made_up())).programs[1]
        assert "showSendToCloud: false" in program
        assert 'plotlyServerURL: ""' in program
        assert "innerHTML" not in program


class TestWriting:
    def test_writes_the_page_and_nothing_else(self, made_up: Made, tmp_path: Path) -> None:
        data = made_up(5)
        write_report(data, tmp_path / "report.html")
        assert (tmp_path / "report.html").read_text(encoding="utf-8") == render(data)
        assert [path.name for path in tmp_path.iterdir()] == ["report.html"]

    def test_others_may_read_it_as_the_umask_says(self, made_up: Made, tmp_path: Path) -> None:
        before = os.umask(0o022)
        try:
            write_report(made_up(1), tmp_path / "report.html")
        finally:
            os.umask(before)
        assert stat.S_IMODE((tmp_path / "report.html").stat().st_mode) == 0o644

    def test_a_page_that_cannot_be_written_leaves_the_old_one(self, made_up: Made, tmp_path: Path) -> None:
        (tmp_path / "folder").mkdir()
        with pytest.raises(StorageError, match="folder"):
            write_report(made_up(1), tmp_path / "folder")
        with pytest.raises(StorageError, match="missing"):
            write_report(made_up(1), tmp_path / "missing" / "report.html")
        (tmp_path / "file").touch()
        with pytest.raises(StorageError, match="file"):
            write_report(made_up(1), tmp_path / "file" / "report.html")
        assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]

    def test_names_that_are_no_text_are_written_all_the_same(self, made_up: Made, tmp_path: Path) -> None:
        write_report(made_up(1, name="broken \ud800"), tmp_path / "report.html")
        assert "broken ?" in (tmp_path / "report.html").read_text(encoding="utf-8")
