"""docs/architecture-genes.md: what each gene costs and how far its model carries is computed anew."""

from pathlib import Path

import pytest
import yaml

from trainer.cost import costs
from trainer.export.lower import tier
from trainer.model import config_of
from trainer.recipe import Model, Recipe

PAGE = Path(__file__).parents[2] / "docs/architecture-genes.md"
ELSEWHERE = {"d_model", "n_layers"}  # sizes, not genes of a kind


def recipe(**model):
    data = {"sources": {"a": {"path": "a"}}, "sequence_length": 1024}
    return Recipe.model_validate({"data": data, "model": model})


def table():
    rows = [line.strip("|").split("|") for line in PAGE.read_text().splitlines() if line.startswith("| `")]
    return [[cell.strip() for cell in row] for row in rows]


def change(before, after):
    share = round(100 * (after / before - 1))
    return "=" if before == after else f"{share:+d} %"


def facts(setting):
    """The last cells of a row: parameters, FLOPs and cache against the default, and the tier."""
    one, default = recipe(**yaml.safe_load(setting)), costs(recipe())
    found, reached = costs(one), tier(config_of(one))
    return [
        change(default.active_params, found.active_params),
        change(default.flops_per_token, found.flops_per_token),
        change(default.kv_bytes, found.kv_bytes),
        reached.model.removesuffix("ForCausalLM") if reached.name == "stock" else reached.name,
    ]


@pytest.mark.parametrize("row", table(), ids=lambda row: row[0])
def test_each_row_is_true(row):
    assert row[2:] == facts(row[0].strip("`"))


def test_every_gene_has_a_row():
    said = {field for row in table() for field in yaml.safe_load(row[0].strip("`"))}
    assert said | ELSEWHERE == set(Model.model_fields)
