"""A space file on top of another: what is merged, and where messages point."""

from __future__ import annotations

from pathlib import Path

import pytest

from search_spaces.errors import Problem, SpaceError
from search_spaces.extends import read_layers
from search_spaces.yaml_source import parse_yaml

BASE = """version: 1
name: base
data:
  sources: {web: {path: web}, code: {path: code}}
  mix: {simplex: {web: 0.5, code: 0.5}}
model:
  d_model: {int: [64, 256], step: 64}
  ffn: swiglu
train: {learning_rate: {float: [1e-4, 1e-2], log: true}}
constraints: ["params <= 3M"]
"""


def files(folder: Path, **texts: str) -> Path:
    """Write the files and give the first one's path."""
    for name, text in texts.items():
        (folder / f"{name}.yaml").write_text(text)
    return folder / f"{next(iter(texts))}.yaml"


def merged(folder: Path, text: str):
    return read_layers(files(folder, top=f"extends: base.yaml\n{text}", base=BASE)).value


def test_a_file_that_extends_nothing_is_itself(tmp_path: Path) -> None:
    path = files(tmp_path, base=BASE)
    document = read_layers(path)
    assert document.text == BASE and document.value["name"] == "base" and document.folders == [tmp_path]


def test_mappings_are_merged_key_by_key(tmp_path: Path) -> None:
    value = merged(tmp_path, "name: top\ndata: {sources: {books: {path: books}}}\nmodel: {n_layers: 3}\n")
    assert value["name"] == "top" and "extends" not in value
    assert list(value["data"]["sources"]) == ["web", "code", "books"]
    assert value["model"] == {"d_model": {"int": [64, 256], "step": 64}, "ffn": "swiglu", "n_layers": 3}


@pytest.mark.parametrize(
    ("said", "seen"),
    [
        ("{float: [0.1, 0.2]}", {"float": [0.1, 0.2]}),  # another gene: nothing is left of the first
        ("128", 128),
        ("{expr: '2 * 64'}", {"expr": "2 * 64"}),
        ("{baseline: 128}", {"int": [64, 256], "step": 64, "baseline": 128}),  # options of the gene that is there
        ("{step: null}", {"int": [64, 256]}),
    ],
)
def test_a_gene_is_one_value(tmp_path: Path, said: str, seen: object) -> None:
    assert merged(tmp_path, f"model: {{d_model: {said}}}\n")["model"]["d_model"] == seen


def test_lists_are_replaced_and_null_removes(tmp_path: Path) -> None:
    value = merged(tmp_path, "constraints: []\nmodel: {ffn: null}\ntrain: null\n")
    assert value["constraints"] == [] and list(value["model"]) == ["d_model"] and "train" not in value


def test_a_null_is_never_left(tmp_path: Path) -> None:
    value = merged(tmp_path, "model: {head_dim: null}\nfidelity: {tokens: 1M, eta: null}\n")
    assert "head_dim" not in value["model"] and value["fidelity"] == {"tokens": 1_000_000}


def test_a_circle_of_links_is_told(tmp_path: Path) -> None:
    (tmp_path / "loop.yaml").symlink_to(tmp_path / "loop.yaml")
    with pytest.raises(SpaceError, match=r"top\.yaml:1:10: extends: "):
        read_layers(files(tmp_path, top="extends: loop.yaml\n"))


def test_files_extend_each_other_from_folder_to_folder(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    files(tmp_path, base=BASE)
    files(tmp_path / "deep", middle="extends: ../base.yaml\nname: middle\n")
    document = read_layers(files(tmp_path, top="extends: deep/middle.yaml\n"))
    assert document.value["name"] == "middle" and document.folders == [tmp_path, tmp_path / "deep"]


def test_a_problem_is_told_where_its_part_was_written(tmp_path: Path) -> None:
    top = "extends: base.yaml\nmodel: {d_model: {baseline: 100}, n_layers: 2}\n"
    document = read_layers(files(tmp_path, top=top, base=BASE))
    paths = [("model", "ffn"), ("model", "d_model", "baseline"), ("model", "d_model", "step"), ("model", "n_layers")]
    found = document.locate([Problem(path=path, rule="is wrong") for path in paths])
    places = [(Path(one.file or "").name, one.line, one.column) for one in found]
    assert places == [("top.yaml", 2, 29), ("top.yaml", 2, 45), ("base.yaml", 7, 35), ("base.yaml", 8, 8)]
    assert found[2].source == "  d_model: {int: [64, 256], step: 64}"


def test_the_merged_text_reads_as_the_merged_value(tmp_path: Path) -> None:
    texts = '["no", "1e-4", "a: b", "é", "", "null", "30M", "<<", "9e999"]'
    top = f'extends: base.yaml\nname: "30M"\nmodel: {{note: {texts}, rate: 1.0e-7, long: {10**12}}}\n'
    document = read_layers(files(tmp_path, top=top, base=BASE))
    assert parse_yaml(document.text, file="merged").value == document.value


@pytest.mark.parametrize(
    ("files_given", "words"),
    [
        ({"top": "extends: top.yaml\n"}, "top.yaml:1:10: extends: extends itself: top.yaml -> top.yaml"),
        ({"top": "extends: b.yaml\n", "b": "extends: top.yaml\n"}, "b.yaml:1:10: extends: extends itself: top.yaml ->"),
        ({"top": "extends: gone.yaml\n"}, "top.yaml:1:10: extends: "),
        ({"top": "extends: 5\n"}, "top.yaml:1:10: extends: must be the path of a space file"),
        ({"top": "extends: b.yaml\n", "b": "x: {\n"}, "b.yaml:2:1: not valid YAML"),
    ],
)
def test_what_cannot_be_extended(tmp_path: Path, files_given: dict[str, str], words: str) -> None:
    with pytest.raises(SpaceError) as refused:
        read_layers(files(tmp_path, **files_given))
    assert words in str(refused.value)


def test_a_long_chain_ends(tmp_path: Path) -> None:
    names = {f"f{i}": f"extends: f{i + 1}.yaml\n" for i in range(40)}
    with pytest.raises(SpaceError, match="more than 16 files extend each other"):
        read_layers(files(tmp_path, **names))
