"""init, validate, schema: what helps to write a space file."""

from __future__ import annotations

import json
from pathlib import Path

import jsonschema
import pytest

from evolm.config import load_space
from evolm.schema import FILE, schema_text, space_schema
from evolm.templates import TEMPLATES
from search_spaces.extends import read_layers

ROOT = Path(__file__).parents[2]
SHIPPED = sorted((ROOT / "search_spaces").glob("*.yaml"))


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


# --- validate ---------------------------------------------------------------------------------------------------------


def test_validate_tells_what_the_constraints_leave(evolm, space_file: Path) -> None:
    space_file.write_text(space_file.read_text() + 'constraints: ["params <= 30K", "model.d_model >= 32"]\n')
    said = evolm("validate", space_file)
    assert said.code == 0 and said.err == ""
    assert "space words: 3 genes, continuous" in said.out
    assert "model.d_model int 16 to 48, step 16 32" in " ".join(said.out.split())
    assert "of 1000 genomes drawn, " in said.out and "params <= 30K" in said.out
    assert "tightest together: `params <= 30K` and `model.d_model >= 32` leave " in said.out
    assert "feasible models have " in said.out


def test_validate_gives_the_same_as_json(evolm, space_file: Path) -> None:
    space_file.write_text(space_file.read_text() + 'constraints: ["params <= 30K"]\n')
    said = evolm("validate", space_file, "--json", "--draws", "200")
    told = json.loads(said.out)
    assert [gene["path"] for gene in told["genes"]] == ["data.mix", "model.d_model", "train.learning_rate"]
    assert {gene["kind"] for gene in told["genes"]} == {"simplex", "int", "float"}
    (constraint,) = told["constraints"]
    assert constraint["text"] == "params <= 30K" and constraint["low"] <= constraint["share"] <= constraint["high"]
    low, high = told["ranges"]["params"]
    assert low < high <= 30_000 and told["draws"] == 200 and told["cardinality"] is None
    load_space(space_file).space.validate(told["example"])
    assert told["smallest"]["model"]["d_model"] == 16


def test_the_same_seed_says_the_same(evolm, space_file: Path) -> None:
    first, second, other = (evolm("validate", space_file, "--json", "--seed", seed).out for seed in (1, 1, 2))
    assert first == second != other


def test_next_to_nothing_feasible_is_a_warning(evolm, space_file: Path) -> None:
    space_file.write_text(
        space_file.read_text() + 'constraints: ["train.learning_rate == 0.005 and model.d_model == 32"]\n'
    )
    said = evolm("validate", space_file)
    assert said.code == 0 and "warning: `train.learning_rate == 0.005 and model.d_model == 32` leaves" in said.err


def test_an_empty_space_is_refused_with_the_constraint_and_the_nearest_value(evolm, space_file: Path) -> None:
    space_file.write_text(space_file.read_text() + 'constraints: ["params <= 1K"]\n')
    said = evolm("validate", space_file)
    assert said.code == 2 and "the baseline breaks `params <= 1K`: params = " in said.err
    assert "the nearest one still breaks `params <= 1K`: params = " in said.err


def test_an_infeasible_baseline_is_refused_with_a_feasible_one(evolm, space_file: Path) -> None:
    space_file.write_text(space_file.read_text() + 'constraints: ["params <= 15K"]\n')
    said = evolm("validate", space_file)
    assert said.code == 2 and "feasible and near, as `baseline:` of the genes: model.d_model: 32 -> 16" in said.err


def test_problems_are_objects_where_json_is_asked_for(evolm, space_file: Path) -> None:
    space_file.write_text(space_file.read_text().replace("n_layers: 1", "n_layer: 1"))
    said = evolm("validate", space_file, "--json")
    told = json.loads(said.out)
    assert said.code == told["exit_code"] == 2 and said.err == "" and told["error"] == "SpaceError"
    (problem,) = told["problems"]
    assert problem["path"] == "model.n_layer" and problem["rule"] == "unknown key 'n_layer'"
    assert problem["help"] == "did you mean 'n_layers'?" and (problem["line"], problem["column"]) == (14, 3)


def test_other_errors_are_objects_too(evolm) -> None:
    said = evolm("status", "nowhere", "--json")
    told = json.loads(said.out)
    assert said.code == 2 and told["error"] == "UsageError" and told["problems"] == []


def test_a_space_that_extends_another_is_searched(evolm, space_file: Path, cache: Path) -> None:
    base = space_file.parent / "base"
    base.mkdir()
    space_file.rename(base / "words.yaml")
    Path("top.yaml").write_text("extends: base/words.yaml\nname: top\nmodel: {d_model: 16}\nbudget: {trials: 2}\n")
    said = evolm("search", "top.yaml", "--executor", "inline", "--cache", cache)
    assert said.code == 0, said.err
    frozen = Path("runs/top-1/space.yaml")
    assert load_space(frozen).document.value == read_layers(Path("top.yaml")).value
    assert evolm("resume", "top-1", "--executor", "inline", "--trials", "3").code == 0


def test_somebody_elses_trainer_has_keys_of_its_own(evolm) -> None:
    assert evolm("init", "mine.yaml", "--template", "command").code == 0
    settings = load_space(Path("mine.yaml")).settings
    assert settings.command == ("python", "train_gpt.py")
    text = Path("mine.yaml").read_text()
    Path("mine.yaml").write_text(text.replace('["python", "train_gpt.py"]', "[]"))
    assert "trial.command: " in evolm("validate", "mine.yaml").err


def test_a_program_comes_with_the_space_that_names_it(evolm) -> None:
    Path('my "own"').mkdir()
    said = evolm("init", 'my "own"/mine.yaml', "--template", "command")
    assert said.code == 0 and 'my "own"/mine.yaml and my "own"/train_gpt.py: change what is yours' in said.out
    assert load_space(Path('my "own"/mine.yaml')).settings.command == ("python", 'my "own"/train_gpt.py')
    assert Path('my "own"/train_gpt.py').read_text() == (ROOT / "evolm/examples/train_gpt.py").read_text()
    assert "evolm/examples" not in Path('my "own"/mine.yaml').read_text()


def test_a_program_that_is_there_is_never_written_over(evolm) -> None:
    Path("train_gpt.py").write_text("mine")
    said = evolm("init", "mine.yaml", "--template", "command")
    assert said.code == 2 and "train_gpt.py: exists already; name another file, or remove it" in said.err
    assert Path("train_gpt.py").read_text() == "mine" and not Path("mine.yaml").exists()


# --- init -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("template", TEMPLATES)
def test_every_template_validates_under_its_own_name(evolm, template: str) -> None:
    said = evolm("init", "my space.yaml", "--template", template)
    assert said.code == 0 and "my space.yaml" in said.out
    file = load_space(Path("my space.yaml"))
    assert file.name == "my-space" and sum("#" in line for line in file.document.lines) >= 4
    assert evolm("validate", "my space.yaml", "--draws", "10").code == 0
    assert file.document.lines[0] == f"# yaml-language-server: $schema={FILE}"
    assert Path(FILE).read_text() == schema_text()
    assert "search_spaces/" not in file.document.text


def test_a_file_that_is_there_is_never_written_over(evolm) -> None:
    Path("space.yaml").write_text("mine")
    said = evolm("init")
    assert said.code == 2 and "exists already" in said.err and Path("space.yaml").read_text() == "mine"


def test_an_unknown_template_and_folder(evolm) -> None:
    assert "did you mean 'cluster'?" in evolm("init", "--template", "clustre").err
    assert evolm("init", "nowhere/space.yaml").code == 2


# --- schema -----------------------------------------------------------------------------------------------------------


def test_the_schema_that_ships_is_the_one_that_the_definitions_give(evolm) -> None:
    """`evolm schema --out search_spaces/space.schema.json` brings it up to date."""
    assert (ROOT / "search_spaces" / FILE).read_text() == schema_text() == evolm("schema").out


def test_the_schema_is_one() -> None:
    jsonschema.Draft202012Validator.check_schema(space_schema())


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_every_shipped_space_is_valid_and_names_the_schema(path: Path) -> None:
    jsonschema.Draft202012Validator(space_schema()).validate(read_layers(path).value)
    assert path.read_text().startswith(f"# yaml-language-server: $schema={FILE}\n")


@pytest.mark.parametrize(
    ("change", "valid"),
    [
        ({"model": {"d_model": {"int": [1, 2], "step": 1, "log": True, "baseline": 1, "transfer": "width"}}}, True),
        ({"fidelity": {"tokens": ["2M", "32M"]}}, True),  # text to an editor
        ({"model": {"n_heads": {"list": {"choice": [2, 4]}, "length": "model.n_layers"}}}, True),
        ({"model": {"n_experts": {"choice": [4, 8], "when": "model.ffn == 'moe'", "default": 0}}}, True),
        ({"model": {"experts": {"choice": [4, 8]}}}, False),
        ({"model": {"experts": {"choice": [4, 8]}}, "trial": {"command": ["mine"]}}, True),
        ({"model": {"experts": {"chioce": [4, 8]}}, "trial": {"command": "mine"}}, False),
        ({"model": {"d_model": {"int": [1, 2], "choice": [1]}}}, False),
        ({"model": {"d_model": {"int": [1, 2], "stpe": 1}}}, False),
        ({"model": {"d_model": {"int": [1, 2], "when": "true"}}}, False),
        ({"model": {"d_model": "four"}}, False),
        ({"budget": {"trails": 3}}, False),
        ({"extends": "a.yaml", "model": {"n_layers": {"baseline": 10}}, "train": None, "fidelity": {"eta": 3}}, True),
        ({"extends": "a.yaml", "modle": {}}, False),
        ({"objectives": {"bits_per_byte": "low"}}, False),
        ({"name": "two words"}, False),
        ({"serach": {}}, False),
    ],
)
def test_the_schema_knows_what_evolm_knows(change: dict, valid: bool) -> None:
    base = {"version": 1, "data": {"sources": {"web": {"path": "corpus"}}}}
    assert jsonschema.Draft202012Validator(space_schema()).is_valid({**base, **change}) is valid
