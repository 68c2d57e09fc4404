"""The JSON Schema of space files, for editors: made of the recipe's and the settings' own models and the gene syntax.

It says less than evolm checks: what ties values together is only known to `evolm validate`.
"""

from __future__ import annotations

import json
from typing import Any

from evolm.config import SECTIONS
from evolm.settings import SettingsSchema
from search_spaces.extends import KEY as EXTENDS
from search_spaces.syntax import NUMBER, WHOLE, Schema, gene_schemas
from trainer.recipe import NAME, Recipe

FILE = "space.schema.json"
"""Its name beside the space files."""

TEMPLATE = "#/$defs/{model}"


def space_schema() -> Schema:
    """The schema as JSON values (draft 2020-12)."""
    recipe = Recipe.model_json_schema(ref_template=TEMPLATE)
    settings = SettingsSchema.model_json_schema(ref_template=TEMPLATE)
    definitions = {name: _with_genes(one) for name, one in recipe["$defs"].items()}
    definitions |= {name: _with_suffixes(one) for name, one in settings["$defs"].items()}
    sections = {name: _gene_or(_with_suffixes(recipe["properties"][name])) for name in SECTIONS}
    asked = {name: _with_suffixes(one) for name, one in settings["properties"].items()}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "evolm space",
        "description": "A training recipe in which any value may be a gene, and how it is searched.",
        "type": "object",
        "properties": {
            "version": {"const": 1},
            "name": {
                "type": "string",
                "pattern": f"^(?:{NAME.pattern})$",
                "description": "the file's name when absent",
            },
            EXTENDS: {"type": "string", "description": "space file that this one is merged on top of, or preset:NAME"},
            **{name: {} for name in (*SECTIONS, *settings["properties"])},
        },
        "allOf": [
            # A file on top of another one says only what it changes, and null takes away.
            {"if": {"required": [EXTENDS]}, "else": {"properties": asked, "required": ["version"]}},
            # Somebody else's trainer has keys of its own.
            {
                "if": {
                    "anyOf": [
                        {"required": [EXTENDS]},
                        {"properties": {"trial": {"required": ["command"]}}, "required": ["trial"]},
                    ]
                },
                "else": {"properties": sections},
            },
        ],
        "additionalProperties": False,
        "$defs": {**gene_schemas(), **definitions},
    }


def schema_text() -> str:
    """The schema as the text of a file."""
    return json.dumps(space_schema(), indent=1, ensure_ascii=False) + "\n"


def _with_genes(definition: Schema) -> Schema:
    """A section of the recipe in which every value may be a gene, a derived value, or missing: a file that extends
    another one gives only what it changes."""
    properties = {name: _gene_or(_with_suffixes(one)) for name, one in definition["properties"].items()}
    kept = {key: value for key, value in definition.items() if key != "required"}
    return {**kept, "properties": properties}


def _gene_or(schema: Schema) -> Schema:
    about: Schema = {key: schema[key] for key in ("description", "default") if key in schema}
    plain = {key: value for key, value in schema.items() if key not in (*about, "title")}
    return {**about, "anyOf": [plain, {"$ref": "#/$defs/gene"}, {"$ref": "#/$defs/derived"}, {"type": "null"}]}


def _with_suffixes(schema: Any) -> Any:
    """The same schema, in which numbers may be written with a suffix; without the titles that pydantic adds."""
    if isinstance(schema, list):
        return [_with_suffixes(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    if schema.get("type") in ("integer", "number"):
        limits = {key: value for key, value in schema.items() if key not in ("title", "description", "default")}
        about: Schema = {key: schema[key] for key in ("description", "default") if key in schema}
        return {**about, "anyOf": [limits, (WHOLE if schema["type"] == "integer" else NUMBER)["anyOf"][1]]}
    return {key: _with_suffixes(value) for key, value in schema.items() if not (key == "title" and value is not dict)}
