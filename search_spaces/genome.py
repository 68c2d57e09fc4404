"""A genome: one complete assignment of a space, frozen, with an id that depends on its content alone."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from search_spaces.errors import Path, dotted

Values = dict[str, Any]
"""A genome as the outside sees it: a plain nested dict of JSON values."""


def canonical_json(values: Any) -> str:
    """The one spelling of a JSON value: sorted keys, no blanks, shortest floats; refuses NaN and infinities."""
    return json.dumps(values, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


@dataclass(frozen=True)
class Genome:
    """A frozen genome. Equal text is an equal genome; hashing, comparing and sending it somewhere cost a string."""

    text: str

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Genome:
        """Freeze a nested mapping of JSON values."""
        return cls(canonical_json(values))

    @cached_property
    def digest(self) -> str:
        """Content id: the first 128 bits of the SHA-256 of the canonical JSON, in hexadecimal."""
        return hashlib.sha256(self.text.encode()).hexdigest()[:32]

    def values(self) -> Values:
        """A fresh nested dict; changing it does not change the genome."""
        values: Values = json.loads(self.text)
        return values


def shown(value: Any, longest: int = 60) -> str:
    """A value for a message: as JSON where it is JSON, and cut where it is long."""
    try:
        text = json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError):
        text = repr(value)
    return text if len(text) <= longest else text[: longest - 3] + "..."


def get(values: Any, path: Path) -> Any:
    """The value at `path` of a nested structure; KeyError names the path that is missing."""
    for part in path:
        try:
            values = values[part]
        except (KeyError, IndexError, TypeError):
            raise KeyError(dotted(path)) from None
    return values


def leaves(values: Any, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """Every (path, value) of a nested mapping whose value is not itself a mapping."""
    if isinstance(values, Mapping) and values:
        for key, value in values.items():
            yield from leaves(value, (*path, key))
    else:
        yield path, values


def difference(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """What changed between two genomes, in words, a line per value."""
    old, new = dict(leaves(before)), dict(leaves(after))
    lines = []
    for path in [*old, *(path for path in new if path not in old)]:
        name = dotted(path)
        if path not in new:
            lines.append(f"{name}: {canonical_json(old[path])} is gone")
        elif path not in old:
            lines.append(f"{name}: {canonical_json(new[path])} is new")
        elif canonical_json(old[path]) != canonical_json(new[path]):
            lines.append(f"{name}: {canonical_json(old[path])} -> {canonical_json(new[path])}")
    return lines
