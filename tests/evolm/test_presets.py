"""Presets: models of the sizes that their names promise, and spaces on top of them, through the real command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from evolm.config import load_recipe, load_space
from search_spaces.errors import SpaceError
from search_spaces.extends import PRESETS, preset_names
from trainer.cost import costs

SIZED = sorted({*preset_names()} - {"wide"})

DATA = "data: {sources: {text: {path: text}}}\n"


def recipe_of(preset: str, folder: Path, more: str = "") -> Any:
    (folder / "recipe.yaml").write_text(f'version: 1\nextends: "preset:{preset}"\n{DATA}{more}')
    return load_recipe(folder / "recipe.yaml")[1]


def test_there_is_a_preset_of_every_size() -> None:
    assert {"nano", "micro", "tiny", "small", "base", "large", "xl", "mantus", "llama_7b", "wide"} == {*preset_names()}


@pytest.mark.parametrize(
    ("preset", "params"),
    [
        ("nano", "0.39M"),
        ("micro", "1.8M"),
        ("tiny", "57.9M"),
        ("small", "216.5M"),
        ("base", "1.34B"),
        ("large", "2.68B"),
        ("xl", "13.1B"),
        ("llama_7b", "6738M"),
        ("mantus", "1.821B"),
    ],
)
def test_a_preset_has_as_many_parameters_as_it_says(preset: str, params: str, tmp_path: Path) -> None:
    """To all digits that are said, here and in the first line of the file."""
    unit = {"M": 10**6, "B": 10**9}[params[-1]]
    digits = len(params[:-1].partition(".")[2])
    assert f"{costs(recipe_of(preset, tmp_path)).params / unit:.{digits}f}{params[-1]}" == params
    first = (PRESETS / f"{preset}.yaml").read_text().splitlines()[0]
    assert first.replace(",", "").startswith(f"# {params} parameters")


@pytest.mark.parametrize(
    ("preset", "shape"),
    [
        ("tiny", (8, 512)),
        ("small", (12, 1024)),
        ("base", (24, 2048)),
        ("large", (32, 2560)),
        ("xl", (64, 4096)),
        ("llama_7b", (32, 4096)),
        ("mantus", (24, 2048)),
    ],
)
def test_a_preset_has_the_shape_it_is_known_by(preset: str, shape: tuple[int, int], tmp_path: Path) -> None:
    model = recipe_of(preset, tmp_path).model
    assert (model.n_layers, model.d_model) == shape and model.tie_embeddings is False
    if preset in ("tiny", "small", "base", "large", "xl"):  # the largest multiple that fits below 8/3
        assert 0 <= 8 / 3 * model.d_model - model.ffn_dim < 64


def test_the_seven_billions_are_those_of_llama(tmp_path: Path) -> None:
    assert costs(recipe_of("llama_7b", tmp_path)).params == 6_738_415_616


@pytest.mark.parametrize("preset", SIZED)
def test_presets_suit_their_hardware(preset: str, tmp_path: Path) -> None:
    recipe = recipe_of(preset, tmp_path)
    assert all(layer.head_dim in (32, 64, 80, 96, 112, 128) for layer in recipe.model.layers())
    assert all(layer.ffn_dim % 8 == 0 for layer in recipe.model.layers())
    assert recipe.train.precision == ("fp32" if preset == "nano" else "bf16")
    assert recipe.train.batch_tokens % recipe.data.sequence_length == 0


def test_a_file_changes_what_it_says_of_a_preset(tmp_path: Path) -> None:
    recipe = recipe_of("micro", tmp_path, "model: {n_layers: 2}\ntrain: {warmup_steps: 7}\n")
    assert (recipe.model.n_layers, recipe.model.d_model, recipe.train.warmup_steps) == (2, 128, 7)


def test_a_space_on_a_preset_is_kept_as_one_file_and_looks_for_data_beside_its_own(tmp_path: Path) -> None:
    (tmp_path / "s.yaml").write_text(
        f'version: 1\nname: s\nextends: "preset:nano"\n{DATA}model: {{n_layers: {{int: [1, 4]}}}}\n'
        "fidelity: {tokens: 1M}\n"
    )
    file = load_space(tmp_path / "s.yaml")
    assert file.document.folders == [tmp_path]
    (tmp_path / "merged.yaml").write_text(file.text)
    assert "extends" not in load_space(tmp_path / "merged.yaml").document.value
    assert load_space(tmp_path / "merged.yaml").space.baseline == file.space.baseline


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("smal", "unknown preset 'smal'; did you mean 'small'?"),
        ("xyzzy", "unknown preset 'xyzzy'; there are base, large, llama_7b"),
        ("../tiny", "unknown preset '../tiny'; did you mean 'tiny'?"),
        ("", "unknown preset ''; there are"),
    ],
)
def test_an_unknown_preset_is_told_at_its_place(name: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "s.yaml").write_text(f'version: 1\nextends: "preset:{name}"\n')
    with pytest.raises(SpaceError) as refused:
        load_space(tmp_path / "s.yaml")
    assert "s.yaml:2:10: extends: " in str(refused.value) and words in str(refused.value)


# --- evolm init --preset ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", preset_names())
def test_init_writes_a_space_on_each_preset(
    preset: str, evolm: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert evolm("init", "mine.yaml", "--preset", preset).code == 0
    said = evolm("validate", "mine.yaml", "--json", "--draws", "60")
    assert said.code == 0, said.err
    found = json.loads(said.out)
    assert found["name"] == "mine" and found["feasible"]["share"] > 0
    assert {"data.mix", "train.learning_rate", "train.weight_decay"} <= {gene["path"] for gene in found["genes"]}
    assert (tmp_path / "space.schema.json").is_file()
    settings = load_space(tmp_path / "mine.yaml").settings
    gpus = 0 if preset in ("nano", "micro") else 8 if preset in ("xl", "llama_7b", "wide") else 1
    assert settings.gpus == gpus
    assert settings.engine == ("fsdp" if gpus == 8 else None)  # no GPU has to hold such a model whole


def test_init_refuses_what_it_cannot_write(evolm: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    said = evolm("init", "mine.yaml", "--preset", "nan")
    assert said.code == 2 and "--preset: unknown preset 'nan'; did you mean 'nano'?" in said.err
    assert evolm("init", "mine.yaml", "--preset", "nano", "--template", "mix").code == 2
    assert not (tmp_path / "mine.yaml").exists()
    assert evolm("init", "mine.yaml", "--preset", "nano").code == 0
    said = evolm("init", "mine.yaml", "--preset", "nano")
    assert said.code == 2 and "exists already" in said.err


def test_the_wide_space_reaches_from_billions_to_a_trillion(tmp_path: Path) -> None:
    (tmp_path / "s.yaml").write_text(f'version: 1\nname: s\nextends: "preset:wide"\n{DATA}fidelity: {{tokens: 1B}}\n')
    space = load_space(tmp_path / "s.yaml").space
    bounds = {".".join(map(str, gene.path)): gene for gene in space.genes}
    for path, low, high in (
        ("model.d_model", 768, 12288), ("model.n_layers", 12, 96), ("model.n_heads", 8, 128),
        ("model.ffn_dim", 2048, 49152), ("model.dropout", 0, 0.2), ("train.learning_rate", 1e-4, 1e-3),
    ):  # fmt: skip
        assert (bounds[path].low, bounds[path].high) == (low, high)
    assert {"params >= 1B", "params <= 1T"} <= {constraint.text for constraint in space.constraints}


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["nano", "micro"])
def test_a_space_on_a_preset_is_searched(
    preset: str, evolm: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words_corpus: Path, cache: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    sources = ", ".join(f"{name}: {{path: {words_corpus / name}}}" for name in ("web", "code"))
    (tmp_path / "s.yaml").write_text(
        f'version: 1\nname: s\nextends: "preset:{preset}"\n'
        f"data: {{sources: {{{sources}}}, tokenizer: {{vocab_size: 300}}, held_out: {{max_bytes: 2KiB}}}}\n"
        "train: {learning_rate: {float: [1e-3, 1e-2], log: true}}\nfidelity: {tokens: 8K}\nbudget: {trials: 2}\n"
    )
    said = evolm("search", "s.yaml", "--executor", "inline", "--cache", cache, "--run", "first")
    assert said.code == 0, said.err
    assert json.loads(evolm("status", "first", "--json").out)["trials"]["complete"] == 2
