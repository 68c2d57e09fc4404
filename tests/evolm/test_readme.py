"""The README says nothing that was not tried: its commands, its spaces and its Python go through the real thing."""

from __future__ import annotations

import contextlib
import io
import re
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml

from evolm.cli import app
from evolm.config import load_space

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    """The fenced blocks in a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)


def commands() -> list[list[str]]:
    """The words of every line of a shell block that calls evolm."""
    lines = [line for block in blocks("sh") for line in block.splitlines()]
    return [shlex.split(line)[1:] for line in lines if line.startswith("evolm ")]


def test_the_python_runs() -> None:
    (block,) = blocks("python")
    with contextlib.redirect_stdout(io.StringIO()) as out:
        exec(compile(block, "README.md", "exec"), {})
    assert len(out.getvalue().splitlines()) >= 2


def test_the_space_is_the_heart_of_the_demo(tmp_path: Path) -> None:
    (block,) = blocks("yaml")
    (tmp_path / "heart.yaml").write_text(block)
    space = load_space(tmp_path / "heart.yaml").space
    demo = load_space(ROOT / "search_spaces/demo.yaml").space
    assert {gene.path for gene in space.genes} <= {gene.path for gene in demo.genes}

    def within(part: object, whole: object) -> bool:
        if isinstance(part, dict) and isinstance(whole, dict):
            return all(key in whole and within(value, whole[key]) for key, value in part.items())
        return part == whole

    assert within(yaml.safe_load(block), yaml.safe_load((ROOT / "search_spaces/demo.yaml").read_text()))


def test_the_table_of_commands_is_the_commands(evolm) -> None:
    rows = re.findall(r"^\| `evolm (\w+)([^`]*)` \| (.*) \|$", README, flags=re.MULTILINE)
    assert {name for name, _, _ in rows} == {command.callback.__name__ for command in app.registered_commands}
    for name, signature, words in rows:
        said = evolm(name, "--help").out
        assert all(option in said for option in re.findall(r"--[a-z]+", signature + words)), name


def test_files_and_folders_that_are_named_exist() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert target.startswith("https://") or (ROOT / target).exists(), target
    tree = next(block for block in blocks("text") if "search_spaces/" in block)
    folder = ""
    for line in tree.splitlines():
        name = line.split()[0]
        folder = "" if not line.startswith(" ") else folder
        assert (ROOT / folder / name).is_dir(), line
        folder = folder or name


def test_the_error_that_is_shown_is_the_error_that_is_told(evolm, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    shown = next(block for block in blocks("text") if block.startswith("space.yaml:"))
    number, wrong = int(shown.split(":")[1]), shown.splitlines()[1].partition("|")[2][1:]
    demo = (ROOT / "search_spaces/demo.yaml").read_text().splitlines()
    at = next(index for index, line in enumerate(demo) if "d_model:" in line)
    before = [line for line in demo[:at] if line and not line.startswith("#")]
    lines = [*before, *[""] * (number - 1 - len(before)), wrong, *demo[at + 1 :]]
    Path("space.yaml").write_text("\n".join(lines))
    said = evolm("search", "space.yaml")
    assert said.code == 2 and shown.strip() in said.err


@pytest.mark.slow
@pytest.mark.xdist_group("python-text")
def test_the_commands_run(evolm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, python_cache: Path) -> None:
    """`make demo` with a smaller budget, then what the README does with its run."""
    recipe = subprocess.run(["make", "-n", "demo"], capture_output=True, text=True, cwd=ROOT, check=True).stdout
    searched = next(shlex.split(line)[1:] for line in recipe.splitlines() if "evolm search" in line)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(python_cache.parent))
    text = (ROOT / searched[1]).read_text()
    Path("search_spaces").mkdir()
    Path(searched[1]).write_text(text.replace("tokens: [100K, 400K]", "tokens: [2K, 8K]"))
    assert evolm(*searched, "--executor", "inline", "--trials", "4").code == 0
    best = evolm("show", "demo-1", "best").out.split()[1]
    for words in commands():
        words = [re.sub(r"promoted/\d+/", f"promoted/{best}/", word).replace("2M", "8K") for word in words]
        said = evolm(*words, *(["--force"] if words[0] == "promote" else []))
        assert said.code == 0, (words, said.err)
