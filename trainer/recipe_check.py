"""Checking mappings against the recipe's schema, and saying what is wrong in the words of the space language."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from types import UnionType
from typing import Any, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError

from search_spaces.errors import Path, dotted, nearest
from search_spaces.genome import shown
from trainer.recipe import Recipe

Finding = tuple[str, str | None]
"""A rule that is broken, and advice."""

_KINDS = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "string_type": "text",
    "list_type": "a list",
    "dict_type": "a mapping",
    "model_type": "a mapping",
    "model_attributes_type": "a mapping",
    "finite_number": "a finite number",
}
_COMPARISONS = {
    "greater_than": (">", "gt"),
    "greater_than_equal": (">=", "ge"),
    "less_than": ("<", "lt"),
    "less_than_equal": ("<=", "le"),
}


def rule(values: Mapping[str, Any]) -> str | None:
    """Why a genome is no complete, coherent recipe, in words, or None: the rule of every space of recipes."""
    try:
        Recipe.model_validate(dict(values))
    except ValidationError as error:
        first = _deepest(error.errors(), values)[0]
        words = _words(first)[0]
        path = dotted(_path_of(first["loc"], values))
        return f"{path}: {words}" if path else words
    return None


def check(values: Mapping[str, Any], schema: type[BaseModel] = Recipe) -> list[tuple[Path, str, str | None]]:
    """Every field that is unknown, missing, or of the wrong type or range: (path, rule, advice).

    Fields that are legal one by one but not together are left to `rule`.
    """
    try:
        schema.model_validate(dict(values))
    except ValidationError as error:
        # An error without a place is about fields that do not go together.
        entries = [entry for entry in _deepest(error.errors(), values) if entry["loc"]]
    else:
        return []
    found: dict[Path, Finding] = {}
    for entry in entries:
        path = _path_of(entry["loc"], values)
        finding = _unknown(path, schema) if entry["type"] == "extra_forbidden" else _words(entry)
        found[path] = _either(found[path], finding) if path in found else finding
    return [(path, words, advice) for path, (words, advice) in found.items()]


def _deepest(entries: Sequence[Any], values: Any) -> list[Any]:
    """The errors without those of an alternative that another one got further with: of a list, its bad items."""
    paths = [_path_of(entry["loc"], values) for entry in entries]
    return [
        entry
        for entry, path in zip(entries, paths, strict=True)
        if not any(
            len(other) > len(path) and other[: len(path)] == path and isinstance(other[len(path)], int)
            for other in paths
        )
    ]


def _path_of(location: Iterable[Any], values: Any) -> Path:
    """The part of a pydantic location that exists in the input: unions add the names of their alternatives to it."""
    path: list[str | int] = []
    for part in location:
        present = isinstance(values, Mapping) and part in values
        present |= isinstance(values, list) and isinstance(part, int) and part < len(values)
        if present:
            values = values[part]
            path.append(part)
        elif isinstance(values, Mapping) and isinstance(part, str) and "[" not in part:
            path.append(part)  # a field that is missing
    return tuple(path)


def _unknown(path: Path, model: type[BaseModel]) -> Finding:
    known = sorted(_fields(model, path[:-1]))
    close = nearest(str(path[-1]), known)
    advice = f"did you mean '{close}'?" if close else f"known here: {', '.join(known)}"
    return f"unknown key '{path[-1]}'", advice


def _fields(annotation: Any, path: Path) -> list[str]:
    """The names of the fields at a path of the schema."""
    for part in path:
        if get_origin(annotation) is dict:
            annotation = get_args(annotation)[1]
        else:
            annotation = annotation.model_fields[part].annotation
        if get_origin(annotation) in (Union, UnionType):  # a section that may be absent
            annotation = next(one for one in get_args(annotation) if hasattr(one, "model_fields"))
    return list(annotation.model_fields)


def _words(entry: Any) -> Finding:
    """A pydantic error in the words of the space language."""
    kind, context = entry["type"], entry.get("ctx", {})
    if kind == "value_error":
        return str(context["error"]), None
    if kind == "missing":
        return "is missing", None
    if kind == "too_short" and entry["input"] == {}:
        return "must not be empty", None
    seen = shown(entry["input"])
    if kind in _KINDS:
        return f"must be {_KINDS[kind]}, is {seen}", None
    if kind in _COMPARISONS:
        sign, limit = _COMPARISONS[kind]
        return f"must be {sign} {context[limit]:g}, is {seen}", None
    if kind == "literal_error":
        choices = re.findall(r"'([^']*)'", context["expected"])
        close = nearest(str(entry["input"]), choices)
        return f"must be one of {', '.join(choices)}, is {seen}", f"did you mean '{close}'?" if close else None
    message: str = entry["msg"]
    return f"{message[0].lower()}{message[1:]}, is {seen}", None


def _either(one: Finding, other: Finding) -> Finding:
    """One finding for a field with alternatives: pydantic reports a line for each."""
    start, middle = "must be ", ", is "
    if not (one[0].startswith(start) and other[0].startswith(start) and middle in one[0]):
        return one
    wanted, seen = one[0].removeprefix(start).split(middle, 1)
    alternative = other[0].removeprefix(start).split(middle, 1)[0]
    return one if alternative in wanted else (f"{start}{wanted} or {alternative}{middle}{seen}", one[1])
