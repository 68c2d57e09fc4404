"""What a space needs of the machine beyond its own words: told before anything is launched."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

from evolm.config import SpaceFile
from search_spaces.errors import Path as KeyPath
from search_spaces.errors import Problems, SpaceError
from trainer.extras import ENGINE_FIELDS, missing_extra, untrainable, unusable_kernel, unusable_precision
from trainer.recipe import WITHOUT_TRUNK, Train

NO_VALUES = ("when", "step", "log", "ordered", "transfer")
"""Options of a gene that none of its values stands in."""


def refuse_unmet(file: SpaceFile) -> None:
    """Raise SpaceError where a value that a trial may have needs an extra that is not installed, a GPU that trials
    are not given, another engine than they are trained with, or a teacher that is not there."""
    if file.settings.command is not None:
        return
    problems = Problems()
    device = "cuda" if file.settings.gpus > 0 else "cpu"
    for path, word in _words(file, "optimizer"):
        if rule := missing_extra(word):
            problems.add(path, rule)
    for path, word in _words(file, "precision"):
        if rule := unusable_precision(word, device):
            problems.add(path, rule, help="or give each trial a GPU, with `resources: {gpus: 1}`")
    for path, word in _words(file, "attention_kernel"):
        if rule := unusable_kernel(word, device):
            problems.add(path, rule, help="or give each trial a GPU, with `resources: {gpus: 1}`")
    for path, folder in _below(file.document.value.get("train"), ("train",), "teacher", False):
        roots = (Path.cwd(), *file.document.folders)
        if isinstance(folder, str) and not any((root / folder / "config.json").is_file() for root in roots):
            advice = "give the folder of an exported model, as `evolm promote` writes it (promoted/ID/export/hf)"
            problems.add(path, "train.teacher: no exported model there", value=folder, help=advice)
    for field in ENGINE_FIELDS if file.settings.engine is not None else ():
        for path, value in _values(file, field):
            if rule := untrainable(str(file.settings.engine), field, value):
                problems.add(path, rule, value=value)
    if problems.found:
        raise SpaceError(file.document.locate(problems.found))


def retrained(file: SpaceFile) -> list[str]:
    """The schedules of a space with several rungs whose rungs cannot go on from one another."""
    if file.settings.command is not None or len(file.settings.fidelity.rungs) < 2:
        return []
    return sorted({word for _, word in _words(file, "schedule") if word in WITHOUT_TRUNK})


def _words(file: SpaceFile, field: str) -> Iterator[tuple[KeyPath, str]]:
    """The words in what a file says of a field of `train`, in genes, groups and expressions too, with their places."""
    for path, value in _below(file.document.value.get("train"), ("train",), field, False):
        if isinstance(value, str):
            yield from ((path, word) for word in sorted(set(re.findall(r"\w+", value))))


def _values(file: SpaceFile, field: str) -> Iterator[tuple[KeyPath, Any]]:
    """What a field of `train` may be: the words that a file says of it, and numbers with the bounds of their genes; of
    a number that is derived, its value in the baseline."""
    default = getattr(Train(), field)
    if isinstance(default, str):
        known = get_args(Train.model_fields[field].annotation)
        yield from ((path, word) for path, word in _words(file, field) if word in known)
        return
    found = False
    for path, value in _below(file.document.value.get("train"), ("train",), field, False):
        if isinstance(value, int | float):
            found = True
            yield path, value
    if not found:
        yield ("train", field), file.space.baseline.values().get("train", {}).get(field, default)


def _below(node: Any, path: KeyPath, field: str, inside: bool) -> Iterator[tuple[KeyPath, Any]]:
    """The leaves of what is said of a field; of genes, those that are values."""
    if isinstance(node, dict):
        for key, item in node.items():
            if not (inside and key in NO_VALUES):
                yield from _below(item, (*path, key), field, inside or key == field)
    elif isinstance(node, list):
        for index, item in enumerate(node):
            yield from _below(item, (*path, index), field, inside)
    elif inside:
        yield path, node
