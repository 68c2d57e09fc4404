"""What a space needs of the machine beyond its own words: told before anything is launched."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from evolm.config import SpaceFile
from search_spaces.errors import Path as KeyPath
from search_spaces.errors import Problems, SpaceError
from trainer.extras import missing_extra, unusable_precision
from trainer.recipe import WITHOUT_TRUNK


def refuse_unmet(file: SpaceFile) -> None:
    """Raise SpaceError where a value that a trial may have needs an extra that is not installed, or a GPU that trials
    are not given."""
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
    if problems.found:
        raise SpaceError(file.document.locate(problems.found))


def retrained(file: SpaceFile) -> list[str]:
    """The schedules of a space with several rungs whose rungs cannot go on from one another."""
    if file.settings.command is not None or len(file.settings.fidelity.rungs) < 2:
        return []
    return sorted({word for _, word in _words(file, "schedule") if word in WITHOUT_TRUNK})


def _words(file: SpaceFile, field: str) -> Iterator[tuple[KeyPath, str]]:
    """The words in what a file says of a field of `train`, in genes, groups and expressions too, with their places."""
    yield from _below(file.document.value.get("train"), ("train",), field, False)


def _below(node: Any, path: KeyPath, field: str, inside: bool) -> Iterator[tuple[KeyPath, str]]:
    if isinstance(node, dict):
        for key, item in node.items():
            yield from _below(item, (*path, key), field, inside or key == field)
    elif isinstance(node, list):
        for index, item in enumerate(node):
            yield from _below(item, (*path, index), field, inside)
    elif inside and isinstance(node, str):
        yield from ((path, word) for word in sorted(set(re.findall(r"\w+", node))))
