"""What it takes to get a run's results again: commands, versions, digests."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any

from reports.frame import RunData
from reports.table import short


def promote(data: RunData, which: int | str) -> str:
    """The command that promotes a trial, to be pasted into a shell."""
    return f"evolm promote {shlex.quote(data.path)} {which}"


def commands(data: RunData) -> list[tuple[str, str]]:
    """(what it is for, command) of what a reader may want to do next."""
    path = shlex.quote(data.path)
    options = [
        f" --{name} {shlex.quote(str(data.settings[name]))}"
        for name in ("algorithm", "seed", "trials")
        if data.settings.get(name) is not None
    ]
    trials = data.settings.get("trials")
    more = f" --trials {2 * trials}" if data.state == "finished" and isinstance(trials, int) else ""
    found = [("Go on with this search", f"evolm resume {path}{more}")]
    if data.front:
        found.append(("Train the best trial for real", promote(data, "best")))
    space = shlex.quote(f"{data.path}/space.yaml")
    again = "Search the same space again; trials that run side by side are told in another order each time"
    found.append((again, f"evolm search {space}{''.join(options)}"))
    return found


def provenance(data: RunData) -> list[tuple[str, str]]:
    """What the results depend on: versions, seeds, digests, and how much text there was."""
    settings, corpus = data.settings, _mapping(data.meta.get("corpus"))
    tokenizer = _mapping(corpus.get("tokenizer"))
    found = [
        *data.versions.items(),
        ("algorithm", settings.get("algorithm")),
        ("seed", settings.get("seed")),
        ("corpus digest", corpus.get("digest")),
        ("tokenizer sha256", tokenizer.get("sha256")),
    ]
    for name, source in _mapping(corpus.get("sources")).items():
        found.append((f"source {name}", _source(_mapping(source))))
    return [(name, str(value)) for name, value in found if value is not None and value != ""]


def _source(source: Mapping[str, Any]) -> str:
    """One source of the corpus: the size of its splits and its digest."""
    documents, sizes = _mapping(source.get("documents")), _mapping(source.get("bytes"))
    splits = [f"{name} {count} documents, {short(sizes.get(name))} bytes" for name, count in documents.items()]
    digest = [f"digest {source['digest']}"] if "digest" in source else []
    return "; ".join([*splits, *digest])


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}
