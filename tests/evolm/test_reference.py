"""docs/space-language.md: made of the definitions, and every example is tried."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from evolm.config import load_recipe, load_space
from evolm.reference import filled
from search_spaces.yaml_source import parse_yaml

PAGE = Path(__file__).parents[2] / "docs/space-language.md"
TEXT = PAGE.read_text()

REST = {
    "version": "version: 1\n",
    "data": "data: {sources: {web: {path: web}, code: {path: code}, books: {path: books}}}\n",
    "fidelity": "fidelity: {tokens: 1M}\n",
}
"""What an example that shows a part of a file leaves out."""


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", TEXT, flags=re.MULTILINE | re.DOTALL)


def test_the_tables_are_those_that_the_definitions_give() -> None:
    """`make docs` brings them up to date."""
    assert filled(TEXT) == TEXT


def whole(snippet: str) -> str:
    """An example with what it leaves out; its own part of `data` keeps the domains of the others."""
    value = parse_yaml(snippet, file="snippet").value
    if "data" in value and "sources" not in value["data"] and "extends" not in value and "trial" not in value:
        snippet = snippet.replace(
            "data:\n", "data:\n  sources: {web: {path: web}, code: {path: c}, books: {path: b}}\n"
        )
    missing = [part for key, part in REST.items() if key not in value]
    return ("" if "extends" in value else "".join(missing)) + snippet


@pytest.mark.parametrize("snippet", blocks("yaml"), ids=lambda text: re.sub(r"\W+", "-", text[:40]))
def test_every_example_is_a_space(snippet: str, tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text(
        "version: 1\nfidelity: {tokens: 1M}\ndata: {sources: {web: {path: web}}, mix: {web: 1}}\n"
        "model: {d_model: {int: [64, 128], step: 64}, n_layers: {int: [4, 12]}, n_heads: 4, qk_norm: false}\n"
    )
    (tmp_path / "space.yaml").write_text(whole(snippet))
    file = load_space(tmp_path / "space.yaml")
    assert file.space.genes and file.space.violations(file.space.baseline) == []


def test_the_example_of_extends_does_what_it_says(tmp_path: Path) -> None:
    (snippet,) = [one for one in blocks("yaml") if one.startswith("extends")]
    (tmp_path / "base.yaml").write_text(
        "version: 1\nfidelity: {tokens: 1M}\ndata: {sources: {web: {path: web}}, mix: {web: 1}}\n"
        "model: {d_model: {int: [64, 128], step: 64}, n_layers: {int: [4, 12]}, n_heads: 4, qk_norm: false}\n"
    )
    (tmp_path / "space.yaml").write_text(snippet)
    value = load_space(tmp_path / "space.yaml").document.value
    assert value["model"] == {
        "d_model": {"int": [256, 1024]},
        "n_layers": {"int": [4, 12], "baseline": 10},
        "n_heads": 4,
    }
    assert set(value["data"]["sources"]) == {"web", "wiki"} and "mix" not in value["data"]


def test_the_python_runs(capsys: pytest.CaptureFixture[str]) -> None:
    (block,) = blocks("python")
    exec(compile(block, PAGE.name, "exec"), {})
    assert len(capsys.readouterr().out.split()) == 3


def test_the_commands_run(evolm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (block,) = blocks("sh")
    lines = [line.split("#")[0].split()[1:] for line in block.splitlines()]
    assert [words[0] for words in lines] == ["init", "validate", "search"]
    assert all(evolm(*words).code == 0 for words in lines[:2])


def test_a_whole_file_without_genes_is_a_recipe(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(REST["version"] + REST["data"])
    assert load_recipe(tmp_path / "recipe.yaml")[1].model.d_model == 256
