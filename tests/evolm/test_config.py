"""The space file: what is right is read, what is wrong is told, all of it at once and at its place."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import evolm
from evolm.config import load_recipe, load_space
from evolm.errors import SpaceError, UsageError
from evolm.settings import Settings

MINIMAL = """version: 1
data:
  sources: {web: {path: corpus}}
model: {d_model: {int: [32, 64], step: 32}, n_heads: 2}
fidelity: {tokens: 1M}
"""


def write(folder: Path, text: str) -> Path:
    path = folder / "space.yaml"
    path.write_text(text)
    return path


def problems(folder: Path, text: str) -> list[str]:
    """Line, column, path, rule and help of every problem of a file."""
    with pytest.raises(SpaceError) as refused:
        load_space(write(folder, text))
    found = refused.value.problems
    assert all(problem.file and problem.line and problem.column for problem in found)
    return [
        f"{p.line}:{p.column}: {str(p).split(': ', 1)[1].splitlines()[0]}" + (f" ({p.help})" if p.help else "")
        for p in found
    ]


def test_a_minimal_space_is_complete(tmp_path: Path) -> None:
    file = load_space(write(tmp_path, MINIMAL))
    assert file.name == "space"
    assert [gene.name for gene in file.space.genes] == ["model.d_model"]
    assert file.settings.fidelity.rungs == (1_000_000,)
    assert file.settings.objectives == {"bits_per_byte": "min", "params": "min"}
    assert file.settings.algorithm == "auto"


def test_settings_survive_the_ledger(tmp_path: Path) -> None:
    settings = load_space(write(tmp_path, MINIMAL + "target: {web: 1}\nbudget: {trials: 7, hours: 0.5}\n")).settings
    assert Settings.from_dict(settings.as_dict()) == settings


def test_the_python_interface_loads_the_same_space(tmp_path: Path) -> None:
    space = evolm.Space.load(write(tmp_path, MINIMAL))
    assert space.baseline.values()["model"]["d_model"] == 64
    assert isinstance(space, evolm.Space)


def test_the_number_of_experts_sleeps_where_there_is_no_mixture(tmp_path: Path) -> None:
    genes = """n_heads: 2, ffn: {choice: [swiglu, moe]},
  n_experts: {choice: [4, 8], when: "model.ffn == 'moe'", default: 0}}"""
    text = MINIMAL.replace("n_heads: 2}", genes) + 'constraints: ["active_params <= params"]\n'
    space, rng = load_space(write(tmp_path, text)).space, np.random.default_rng(0)
    drawn = [space.sample(rng) for _ in range(20)]
    assert {(one.values()["model"]["ffn"], one.values()["model"]["n_experts"]) for one in drawn} == {
        ("swiglu", 0),
        ("moe", 4),
        ("moe", 8),
    }
    assert all(space.violations(genome) == [] for genome in drawn)


def test_exact_costs_constrain_a_space(tmp_path: Path) -> None:
    space = load_space(write(tmp_path, MINIMAL + 'constraints: ["params <= 1M", "train_memory <= 1GiB"]\n')).space
    assert space.violations(space.baseline) == []


def test_everything_wrong_is_told_at_once(tmp_path: Path) -> None:
    text = """version: 1
name: two words
data:
  sources: {web: {paht: corpus}}
  mix: {simplex: {web: 1}, flor: 0.1}
model:
  d_modl: 64
  n_layers: {flaot: [2, 6]}
  n_heads: "four"
  ffn: {choice: [swiglu, relu3]}
train: {learning_rate: {float: [1e-4, 100], log: true}}
constraints: ["parms <= 3M"]
target: {wbe: 0.5}
objectives: {bits_per_bite: min, params: low}
fidelity: {tokens: [4M, 1M], ela: 3}
budget: {trails: 20}
search: {algorithm: nsga, seed: -1}
sarch: 1
"""
    assert problems(tmp_path, text) == [
        "2:7: name: must match [A-Za-z0-9][A-Za-z0-9._-]{0,63}, is 'two words'",
        "4:19: data.sources.web.paht: unknown key 'paht' (did you mean 'path'?)",
        "5:28: data.mix.flor: unknown option of a simplex gene 'flor' (did you mean 'floor'?)",
        "7:3: model.d_modl: unknown key 'd_modl' (did you mean 'd_model'?)",
        "8:13: model.n_layers: must be a whole number, is {\"flaot\": [2, 6]} (a gene? did you mean the kind 'float'?)",
        '9:12: model.n_heads: must be a whole number or a list, is "four"',
        "10:8: model.ffn: must be one of swiglu, geglu, reglu, gelu, silu, relu2, moe, "
        "is \"relu3\" (did you mean 'relu2'?)",
        "11:24: train.learning_rate: must be <= 1, is 100.0",
        "12:15: constraints[0]: unknown name 'parms' (did you mean 'params'?)",
        "13:10: target.wbe: unknown domain 'wbe' (did you mean 'web'?)",
        "14:14: objectives.bits_per_bite: unknown metric 'bits_per_bite' (did you mean 'bits_per_byte'?)",
        '14:42: objectives.params: must be one of min, max, is "low"',
        "15:20: fidelity.tokens: must grow from rung to rung, is [4000000, 1000000]",
        "15:30: fidelity.ela: unknown key 'ela' (did you mean 'eta'?)",
        "16:10: budget.trails: unknown key 'trails' (did you mean 'trials'?)",
        "17:21: search.algorithm: unknown algorithm 'nsga' (did you mean 'nsga2'?)",
        "17:33: search.seed: must be >= 0, is -1",
        "18:1: sarch: unknown key 'sarch' (did you mean 'search'?)",
    ]


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (("version: 1", "version: 2"), "1:10: version: must be 1, is 2 (write `version: 1`)"),
        (("version: 1\n", ""), "1:1: version: must be 1, is missing (write `version: 1`)"),
        (("fidelity: {tokens: 1M}\n", ""), "needs `fidelity: {tokens: [2M, 32M]}`"),
        (("corpus}}", "corpus}}\n  sequence_length: 4"), "data.sequence_length: must be >= 8, is 4"),
        (("corpus}}", "corpus}}\n  mix: {web: 1, wbe: 1}"), "names 'wbe', which is no source; did you mean 'web'?"),
        (("n_heads: 2", "n_heads: 2, head_dim: {int: [8, 16], step: 8, when: 'model.ffn == 3', default: 8}"), None),
        (("n_heads: 2", "n_heads: 2, head_dim: {int: [8, 16], when: 'train.schedul', default: 8}"), "'train.schedule'"),
        (("n_heads: 2", "n_heads: 2, head_dim: {expr: 'model.n_layers + train.beta'}"), "did you mean 'train.beta2'?"),
        (("n_heads: 2", "n_heads: 2, ffn: {choise: [gelu]}"), "a gene? did you mean the kind 'choice'?"),
        (("n_heads: 2", "n_haeds: 2"), "did you mean 'n_heads'?"),
        (("corpus}}", "corpus}}\n  held_out: {max_bytes: {choice: [1024, 4096]}}"), "data.held_out: cannot be a gene"),
        (("{path: corpus}", "{path: {choice: [a, b]}}"), "data.sources: cannot be a gene: all trials read"),
        (("n_heads: 2}", "n_heads: 2}\ntrain: {seed: 3}"), "train.seed: is not read by a search (write `search"),
        (("n_heads: 2}", "n_heads: 2}\ntrain: {seed: {int: [1, 3]}}"), "train.seed: cannot be a gene: trials are"),
        (("n_heads: 2", "n_heads: 3"), "model.d_model = 64 is no multiple of n_heads = 3 (set head_dim)"),
        (("n_heads: 2", "n_heads: 4, n_kv_heads: 3"), "n_heads = 4 is no multiple of n_kv_heads = 3"),
        (("n_heads: 2", "n_heads: [2, 2]"), "model.n_heads has 2 items for 6 layers"),
        (("n_heads: 2", "n_heads: 2, n_layers: 0"), "model.n_layers: must be > 0, is 0"),
        (("n_heads: 2", "n_heads: 2, qk_norm: 1"), "model.qk_norm: must be true or false or one of head, full, is 1"),
        (("tokens: 1M}", "tokens: 1M}\nbudget: {trials: 1.5}"), "budget.trials: must be a whole number, is 1.5"),
        (("tokens: 1M}", "tokens: 1M}\nbudget: 5"), "budget: must be a mapping"),
        (("tokens: 1M}", "tokens: 1M}\nobjectives: {}"), "objectives: at least one is needed"),
        (("tokens: 1M}", "tokens: 1M}\ntarget: {web: -1}"), "target.web: must be >= 0, is -1"),
        (("tokens: 1M}", "tokens: 1M}\ntarget: {web: 0}"), "target: needs a positive weight"),
        (("tokens: 1M}", 'tokens: 1M}\nconstraints: "params < 1M"'), "constraints: must be a list, is"),
        (("tokens: 1M}", 'tokens: 1M}\nconstraints: ["params"]'), "has no value for the baseline: must be true"),
        (("tokens: 1M}", 'tokens: 1M}\nconstraints: ["params <= 1K"]'), "the baseline breaks `params <= 1K`"),
        (("tokens: 1M}", "tokens: 1M}\nbaselines: [{model: {d_model: 48}}]"), "[0].model.d_model: must be 32 plus"),
        (("tokens: 1M}", "tokens: 1M}\nbaselines: [{model: {n_heads: 4}}]"), "is fixed at 2 in this space, got 4"),
        (("tokens: 1M}", "tokens: 1M}\nresources: {gpus: -1}"), "resources.gpus: must be >= 0, is -1"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("costly", ["", 'constraints: ["params <= 100M"]\n'], ids=["free", "with a cost"])
def test_one_thing_wrong(tmp_path: Path, change: tuple[str, str], expected: str | None, costly: str) -> None:
    """With and without a constraint that has to compute what the (wrong) recipe costs."""
    text = MINIMAL.replace(*change)
    if expected is None:  # right, though it reads a value that the file leaves at its default
        assert load_space(write(tmp_path, text + costly)).space.genes
        return
    found = problems(tmp_path, text + ("" if "constraints" in text else costly))
    assert len(found) == 1 and expected in found[0], found


def test_messages_carry_the_source_line_and_a_caret(tmp_path: Path) -> None:
    with pytest.raises(SpaceError) as refused:
        load_space(write(tmp_path, MINIMAL.replace("n_heads", "n_haeds")))
    assert str(refused.value).splitlines()[1:] == [
        "    4 | model: {d_model: {int: [32, 64], step: 32}, n_haeds: 2}",
        "      |                                             ^",
        "      = did you mean 'n_heads'?",
    ]


def test_a_recipe_has_no_genes_and_no_search(tmp_path: Path) -> None:
    with pytest.raises(SpaceError) as refused:
        load_recipe(write(tmp_path, MINIMAL))
    text = str(refused.value)
    assert "model.d_model: is a gene: a recipe has one value here" in text
    assert "`fidelity` belongs to a search, a recipe has none" in text


def test_a_recipe_is_read(tmp_path: Path) -> None:
    text = "version: 1\nname: one\ndata: {sources: {web: {path: corpus}}}\nmodel: {d_model: 64, n_heads: 2}\n"
    name, recipe = load_recipe(write(tmp_path, text))
    assert (name, recipe.model.d_model, recipe.train.optimizer) == ("one", 64, "adamw")


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"missing\.yaml: no such file"):
        load_space(tmp_path / "missing.yaml")


def test_a_known_recipe_may_give_one_value_for_all_layers(tmp_path: Path) -> None:
    text = MINIMAL.replace(
        "n_heads: 2}", "n_heads: 2, n_layers: 3, ffn_dim: {list: {int: [32, 64], step: 32}, length: 3}}"
    )
    space = load_space(write(tmp_path, text + "baselines: [{model: {ffn_dim: 64}}]\n")).space
    assert space.baselines[0].values()["model"]["ffn_dim"] == [64, 64, 64]


def test_a_condition_without_a_default_is_told_once(tmp_path: Path) -> None:
    text = MINIMAL.replace("n_heads: 2}", "n_heads: 2, n_layers: {int: [2, 4], when: 'model.d_model == 32'}}")
    (found,) = problems(tmp_path, text)
    assert "has `when` but no `default`" in found
