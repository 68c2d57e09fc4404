"""`extends: other.yaml`: a space file on top of another one.

Files are merged as JSON Merge Patch does it (RFC 7386): mappings key by key, anything else is replaced, null removes.
A gene counts as one value: a mapping with a kind key replaces what was there, one without changes the options of the
gene that was there. Every part of the result remembers the file it came from, so that messages point there.

`extends: "preset:small"` names one of the files in `presets/`, which ship with evolm: a model of a known size, with the
batch and precision that suit it, and without data.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path as FilePath
from typing import Any

import yaml

from search_spaces.errors import Path, Problem, SpaceError, UsageError, nearest
from search_spaces.reading import is_derived, is_gene
from search_spaces.yaml_source import Document, plain_scalar, read_yaml

KEY = "extends"

MAX_FILES = 16

PRESET = "preset:"

PRESETS = FilePath(__file__).parent / "presets"


def preset_names() -> list[str]:
    """The presets that ship."""
    return sorted(path.stem for path in PRESETS.glob("*.yaml"))


def unknown_preset(name: str) -> str | None:
    """Why there is no preset of that name, in words, or None."""
    known = preset_names()
    if name in known:
        return None
    close = nearest(name, known)
    advice = f"did you mean '{close}'?" if close else f"there are {', '.join(known)}"
    return f"unknown preset '{name}'; {advice}"


@dataclass(frozen=True)
class Layered(Document):
    """The merged value of several files. `layers` has the file itself first, then what it extends."""

    layers: tuple[Document, ...] = ()
    origins: Mapping[Path, Document] | None = None

    def origin(self, path: Path) -> Document:
        """The file that a part of the merged value came from."""
        origins = self.origins or {}
        while path and path not in origins:
            path = path[:-1]
        return origins.get(path, self.layers[0])

    def locate(self, problems: Iterable[Problem]) -> list[Problem]:
        """The problems with the file, line and column of the part they are about, file by file."""
        by_file: dict[str, list[Problem]] = {layer.file: [] for layer in self.layers}
        for problem in problems:
            by_file[self.origin(problem.path).file].append(problem)
        return [one for layer in self.layers for one in layer.locate(by_file[layer.file])]

    @property
    def text(self) -> str:
        """The merged value as one file that extends nothing, and reads the same."""
        names = ", ".join(FilePath(layer.file).name for layer in self.layers)
        return f"# Merged from {names}.\n\n" + _written(self.value)

    @property
    def folders(self) -> list[FilePath]:
        """Where the files lie, those that ship aside."""
        places = dict.fromkeys(FilePath(layer.file).resolve().parent for layer in self.layers)
        return [place for place in places if place != PRESETS.resolve()]


def read_layers(path: FilePath) -> Document:
    """Read a space file and all that it extends. Raises UsageError and SpaceError as `read_yaml` does, and SpaceError
    for circles."""
    layers = [read_yaml(path)]
    seen = [path.resolve()]  # read already, so it has a place
    while KEY in layers[-1].value:
        last = layers[-1]
        name = last.value[KEY]
        if not isinstance(name, str) or not name:
            raise _refused(last, "must be the path of a space file, or preset:NAME", name)
        if name.startswith(PRESET):
            preset = name.removeprefix(PRESET)
            if words := unknown_preset(preset):
                raise _refused(last, words, name)
            name = str(PRESETS / f"{preset}.yaml")
        try:
            base = (seen[-1].parent / name).resolve()
        except (OSError, RuntimeError, ValueError) as error:  # a circle of links, a name that no path can have
            raise _refused(last, f"cannot be followed: {error}", name) from None
        if base in seen:
            way = " -> ".join(one.name for one in [*seen[seen.index(base) :], base])
            raise _refused(last, f"extends itself: {way}", name)
        if len(layers) == MAX_FILES:
            raise _refused(last, f"more than {MAX_FILES} files extend each other", name)
        shown = FilePath(name) if FilePath(name).is_absolute() else FilePath(last.file).parent / name
        try:
            layers.append(read_yaml(shown))
        except SpaceError:
            raise  # the other file's own problems, at their places in it
        except UsageError as error:
            raise _refused(last, str(error), name) from None
        seen.append(base)
    if len(layers) == 1:
        return layers[0]
    return _merged(layers)


def _refused(document: Document, rule: str, value: Any) -> SpaceError:
    return SpaceError(document.locate([Problem(path=(KEY,), rule=rule, value=value)]))


def _merged(layers: list[Document]) -> Layered:
    *above, bottom = layers
    value = {key: part for key, part in bottom.value.items() if key != KEY}
    origins: dict[Path, Document] = {(key,): bottom for key in value}
    for layer in reversed(above):
        own = {key: part for key, part in layer.value.items() if key != KEY}
        value = _merge(value, own, (), layer, origins)
    top = layers[0]
    return Layered(top.file, top.lines, value, top.value_marks, top.key_marks, tuple(layers), origins)


def _merge(below: Any, above: Any, path: Path, layer: Document, origins: dict[Path, Document]) -> Any:
    """One layer on top of what is there; what it says from now on belongs to it."""
    whole = not isinstance(above, Mapping) or is_gene(above) or is_derived(above)
    if whole or not isinstance(below, Mapping):
        for known in [known for known in origins if known[: len(path)] == path]:
            del origins[known]
        origins[path] = layer
        return above if whole else {key: _merge(None, part, (*path, key), layer, origins)
                                    for key, part in above.items() if part is not None}  # fmt: skip
    merged = dict(below)
    for key, part in above.items():
        if part is None:
            merged.pop(key, None)
            origins[(*path, key)] = layer
        else:
            merged[key] = _merge(below.get(key), part, (*path, key), layer, origins)
    return merged


class _Dumper(yaml.SafeDumper):
    """Quotes every text that would otherwise be read as something else."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.Node:
    try:
        plain = plain_scalar(text) == text
    except ValueError:
        plain = False
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=None if plain else '"')


_Dumper.add_representer(str, _text)


def _written(value: Mapping[str, Any]) -> str:
    text: str = yaml.dump(
        value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120, default_flow_style=None
    )
    return text
