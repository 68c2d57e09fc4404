"""The tables of docs/space-language.md, made of the definitions that evolm reads: `python -m evolm.reference FILE`."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from evolm.settings import SettingsSchema
from search_spaces.evaluation import FUNCTIONS
from search_spaces.syntax import COMMON_OPTIONS, KIND_WORDS, OWN_OPTIONS
from trainer.cost import MEANINGS
from trainer.recipe import Recipe

_PART = re.compile(r"<!-- begin: (\w+) -->\n.*?<!-- end: \1 -->", re.DOTALL)


def filled(text: str) -> str:
    """The text with every generated part made anew."""
    makers = {"genes": _genes, "functions": _functions, "costs": _costs, "recipe": _recipe, "settings": _settings}
    return _PART.sub(lambda part: f"<!-- begin: {part[1]} -->\n{makers[part[1]]()}\n<!-- end: {part[1]} -->", text)


def _table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def _genes() -> str:
    rows = [[f"**`{kind}`**", "", word.about] for kind, word in KIND_WORDS.items()]
    own = [
        [f"`{kind}`", f"`{name}`", word.about] for kind, words in OWN_OPTIONS.items() for name, word in words.items()
    ]
    common = [["all", f"`{name}`", word.about] for name, word in COMMON_OPTIONS.items()]
    return _table(["kind", "option", "what it says"], [*rows, *own, *common])


def _functions() -> str:
    return _table(["function", "gives"], [[f"`{name}(...)`", one.about] for name, one in FUNCTIONS.items()])


def _costs() -> str:
    return _table(["name", "what it is"], [[f"`{name}`", about] for name, about in MEANINGS.items()])


def _recipe() -> str:
    return "\n\n".join(_section(name, field) for name, field in Recipe.model_fields.items())


def _settings() -> str:
    rows = []
    for name, field in SettingsSchema.model_fields.items():
        model = _model_of(field)
        if model is None:
            rows.append(_row(name, name, SettingsSchema))
        else:
            rows += [_row(f"{name}.{key}", key, model) for key in model.model_fields]
    return _table(["key", "holds", "default", "what it says"], rows)


def _section(name: str, field: FieldInfo) -> str:
    model = _model_of(field)
    assert model is not None
    rows = []
    for key, inner in model.model_fields.items():
        below = _model_of(inner)
        if below is None:
            rows.append(_row(f"{name}.{key}", key, model))
        else:
            way = f"{name}.{key}" + (".DOMAIN" if key == "sources" else "")
            rows += [_row(f"{way}.{last}", last, below) for last in below.model_fields]
    return f"### {name}\n\n{model.__doc__}\n\n" + _table(["key", "holds", "default", "what it says"], rows)


def _row(path: str, name: str, model: type[BaseModel]) -> list[str]:
    schema = model.model_json_schema()
    field = model.model_fields[name]
    default = "required" if field.is_required() else _value(field.get_default(call_default_factory=True))
    return [f"`{path}`", _holds(schema["properties"][name], schema.get("$defs", {})), default, field.description or ""]


def _holds(schema: dict[str, Any], definitions: dict[str, Any]) -> str:
    """What a JSON Schema admits, in words."""
    if "$ref" in schema:
        return _holds(definitions[schema["$ref"].rsplit("/", 1)[1]], definitions)
    if "anyOf" in schema:
        return " or ".join(_holds(one, definitions) for one in schema["anyOf"] if one.get("type") != "null")
    if "const" in schema or "enum" in schema:
        return ", ".join(f"`{one}`" for one in schema.get("enum", [schema.get("const")]))
    if schema["type"] == "array":
        return "list of " + _holds(schema["items"], definitions)
    if schema["type"] == "object":
        inner = schema.get("additionalProperties")
        return "mapping of names to " + _holds(inner, definitions) if isinstance(inner, dict) else "mapping"
    limits = [f"{sign} {schema[key]:,}" for key, sign in _LIMITS.items() if key in schema]
    return " ".join([_TYPES[schema["type"]], ", ".join(limits)]).strip()


_TYPES = {"integer": "whole number", "number": "number", "string": "text", "boolean": "true or false"}
_LIMITS = {"exclusiveMinimum": ">", "minimum": ">=", "exclusiveMaximum": "<", "maximum": "<="}


def _value(default: Any) -> str:
    return "" if default is None or default == [] else f"`{json.dumps(default)}`"


def _model_of(field: FieldInfo) -> type[BaseModel] | None:
    """The section that a field holds, by itself, as one of several, or in a mapping."""
    for one in (field.annotation, *get_args(field.annotation)):
        if isinstance(one, type) and issubclass(one, BaseModel):
            return one
    return None


def main() -> None:
    """Rewrite the generated parts of the files that are named."""
    for name in sys.argv[1:]:
        path = Path(name)
        path.write_text(filled(path.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
