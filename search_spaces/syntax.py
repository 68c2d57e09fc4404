"""The words of the gene syntax: kinds, their options, and what each may hold, as JSON Schema.

One definition: `reading` knows an option by its name here, the schema for editors and the reference in docs/ are made
of the rest.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from search_spaces.genes import KINDS, TRANSFERS
from search_spaces.quantities import PATTERN

Schema = dict[str, Any]

NUMBER: Schema = {"anyOf": [{"type": "number"}, {"type": "string", "pattern": f"^[-+]?{PATTERN}$"}]}
"""A number, or one with a suffix (`2M`, `16GiB`): text to an editor, a number to evolm."""

WHOLE: Schema = {"anyOf": [{"type": "integer"}, {"type": "string", "pattern": f"^[-+]?{PATTERN}$"}]}

EXPRESSION: Schema = {"type": ["string", "number", "boolean"]}

_FLAG: Schema = {"type": "boolean"}
_PARTS: Schema = {"type": "object", "additionalProperties": NUMBER, "minProperties": 1}


@dataclass(frozen=True)
class Word:
    """A key of a gene: what it may hold, and what it says."""

    schema: Schema
    about: str


KIND_WORDS: dict[str, Word] = {
    "float": Word({"type": "array", "items": NUMBER, "minItems": 2, "maxItems": 2}, "`[low, high]`, both included"),
    "int": Word({"type": "array", "items": WHOLE, "minItems": 2, "maxItems": 2}, "`[low, high]`, both included"),
    "choice": Word(
        {"type": "array", "minItems": 1},
        "the items: numbers, words, lists, or mappings (a group of settings that change together)",
    ),
    "simplex": Word(
        {"anyOf": [_PARTS, {"type": "array", "items": {"type": "string"}, "minItems": 1, "uniqueItems": True}]},
        "names and weights, which are the baseline and are scaled to sum to one; or names alone",
    ),
    "list": Word({"$ref": "#/$defs/gene"}, "the gene of one item"),
}

COMMON_OPTIONS: dict[str, Word] = {
    "baseline": Word(
        {}, "the value a careful person would have taken; the search has to beat the recipe of all of them"
    ),
    "when": Word(EXPRESSION, "the condition under which the gene is active; it may read other conditional genes"),
    "default": Word({}, "the value while the gene is inactive; goes with `when`"),
    "transfer": Word({"enum": list(TRANSFERS)}, "how the best value carries over from a proxy to the full size"),
}

_STEP = "distance of neighbouring values, counted from `low`"
_LOG = "whether the scale is logarithmic: as many draws between 1 and 10 as between 10 and 100"

OWN_OPTIONS: dict[str, dict[str, Word]] = {
    "float": {"log": Word(_FLAG, _LOG), "step": Word(NUMBER, _STEP)},
    "int": {"step": Word(WHOLE, _STEP + "; 1 when absent"), "log": Word(_FLAG, _LOG)},
    "choice": {"ordered": Word(_FLAG, "whether neighbours in the list are alike: variation then goes step by step")},
    "simplex": {
        "floor": Word({"anyOf": [NUMBER, _PARTS]}, "least weight: one number for all parts, or a mapping for some"),
        "ceiling": Word({"anyOf": [NUMBER, _PARTS]}, "greatest weight, likewise"),
    },
    "list": {"length": Word(EXPRESSION, "how many items: a number, or the path of an int gene (`model.n_layers`)")},
}

OPTIONS: dict[str, dict[str, Word]] = {kind: {**COMMON_OPTIONS, **own} for kind, own in OWN_OPTIONS.items()}
assert set(OPTIONS) == set(KIND_WORDS) == set(KINDS)


def gene_schemas() -> dict[str, Schema]:
    """The definitions `gene`, `derived` and one for each kind, for the `$defs` of a schema."""
    kinds = {f"{kind}_gene": _gene_schema(kind) for kind in KIND_WORDS}
    derived: Schema = {
        "type": "object",
        "description": "A value that follows from others.",
        "properties": {"expr": EXPRESSION},
        "required": ["expr"],
        "additionalProperties": False,
    }
    return {"gene": {"anyOf": [{"$ref": f"#/$defs/{name}"} for name in kinds]}, "derived": derived, **kinds}


def _gene_schema(kind: str) -> Schema:
    words = {kind: KIND_WORDS[kind], **OPTIONS[kind]}
    return {
        "type": "object",
        "description": f"A gene of kind {kind}.",
        "properties": {name: {**word.schema, "description": word.about} for name, word in words.items()},
        "required": [kind, "length"] if kind == "list" else [kind],
        "dependentRequired": {"when": ["default"], "default": ["when"]},
        "additionalProperties": False,
    }
