"""The space file: a recipe with genes, and how it is to be searched. Every problem of the file is told at once."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np

import search_spaces
from evolm.algorithms import names
from evolm.algorithms.fidelity import Fidelity, read_fidelity
from evolm.gene_types import check_types, note
from evolm.settings import Settings, SettingsSchema
from fitness.objectives import MEASURED
from search_spaces.errors import Path as KeyPath
from search_spaces.errors import Problems, SpaceError
from search_spaces.extends import KEY as EXTENDS
from search_spaces.extends import read_layers
from search_spaces.genome import Values, difference
from search_spaces.reading import is_derived, is_gene
from search_spaces.repair import approach
from search_spaces.yaml_source import Document
from trainer import cost
from trainer.recipe import NAME, Recipe, defaults
from trainer.recipe_check import check, rule

SECTIONS = tuple(Recipe.model_fields)
SETTINGS = tuple(SettingsSchema.model_fields)
HEADER = ("version", "name")


class Space(search_spaces.Space):
    """A space, as `evolm.Space`: from a nested mapping (`from_dict`) or from a space file (`load`)."""

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """The space of a YAML file. Raises SpaceError with every problem of the file, each with line and column."""
        space = load_space(Path(path)).space
        assert isinstance(space, cls)
        return space


@dataclass(frozen=True, kw_only=True)
class SpaceFile:
    """A space file that holds what it says."""

    name: str
    document: Document
    space: Space
    settings: Settings

    @property
    def text(self) -> str:
        """The file's text; where it extends others, all of them in one."""
        return self.document.text


def load_space(path: Path) -> SpaceFile:
    """Read a space file. Raises SpaceError with every problem found, each with its line and column."""
    document = read_layers(path)
    problems = Problems()
    values = document.value
    name = _header(values, path, (*HEADER, EXTENDS, *SECTIONS, *SETTINGS), problems)
    recipe = {section: values[section] for section in SECTIONS if section in values}
    own = not _commanded(values)  # somebody else's trainer has recipes of its own
    space = Space.read(
        recipe,
        _listed(values, "constraints", str),
        problems,
        exact=cost.exact_functions() if own else {},
        rule=rule if own else None,
        baselines=_listed(values, "baselines", dict),
        defaults=defaults() if own else {},
    )
    settings = _settings(values, problems, own)
    if own:
        check_types(recipe, problems)
    if space is not None and not problems.found:
        _check_baseline(space, problems)
    if problems.found:
        raise SpaceError(document.locate(problems.found))
    assert space is not None and settings is not None
    return SpaceFile(name=name, document=document, space=space, settings=settings)


def load_recipe(path: Path) -> tuple[str, Recipe]:
    """Read a recipe file: a space file without genes and without settings. Raises SpaceError."""
    document = read_layers(path)
    problems = Problems()
    values = document.value
    name = _header(values, path, (*HEADER, *SECTIONS), problems)
    recipe = {section: values[section] for section in SECTIONS if section in values}
    _refuse_genes(recipe, (), problems)
    if not problems.found:
        note(check(recipe), recipe, problems)
    if not problems.found and (words := rule(recipe)):
        problems.add((), words)
    if problems.found:
        raise SpaceError(document.locate(problems.found))
    return name, Recipe.model_validate(recipe)


# --- the parts of the file --------------------------------------------------------------------------------------------


def _header(values: Values, path: Path, known: tuple[str, ...], problems: Problems) -> str:
    for key in values:
        if key not in known:
            if key in SETTINGS:
                problems.add((key,), f"`{key}` belongs to a search, a recipe has none", help="use `evolm search`")
            else:
                problems.unknown((key,), key, known)
    if values.get("version") != 1 or isinstance(values["version"], bool):
        seen = values.get("version", "missing")
        problems.add(("version",), f"must be 1, is {seen}", value=seen, help="write `version: 1`")
    name = values.get("name", path.stem)
    if not isinstance(name, str) or not NAME.fullmatch(name):
        problems.add(("name",), f"must match {NAME.pattern}, is {name!r}", value=name)
    return str(name)


def _commanded(values: Values) -> bool:
    """Whether the file names a trainer of its own."""
    trial = values.get("trial")
    return isinstance(trial, dict) and trial.get("command") is not None


def _listed(values: Values, key: str, kind: type) -> list[Any]:
    """The items of a list that holds nothing else; the schema of the settings tells of all others."""
    given = values.get(key)
    return given if isinstance(given, list) and all(isinstance(item, kind) for item in given) else []


def _settings(values: Values, problems: Problems, own: bool) -> Settings | None:
    given = {key: values[key] for key in SETTINGS if key in values}
    found = check(given, SettingsSchema)
    note(found, given, problems)
    broken = {path[0] for path, *_ in found if path}
    domains = _domains(values)
    if isinstance(given.get("target"), dict):
        _check_target(given["target"], domains, problems)
    if isinstance(given.get("objectives"), dict):
        _check_objectives(given["objectives"], domains if own else None, problems)
    algorithm = given["search"].get("algorithm", "auto") if isinstance(given.get("search"), dict) else "auto"
    if algorithm not in names():
        problems.unknown(("search", "algorithm"), str(algorithm), names(), "algorithm")
    if not own and "telemetry" in given:
        problems.add(("telemetry",), "is about evolm's own trainer: a trial.command writes its metrics.jsonl itself")
    if not own and isinstance(given.get("resources"), dict):
        for key in ("processes", "engine"):
            if given["resources"].get(key) is not None:
                advice = "a trial.command starts what it needs itself, on the devices of resources.gpus"
                problems.add(("resources", key), "is about evolm's own trainer", help=advice)
    fidelity = _fidelity(values, problems) if "fidelity" not in broken else None
    if problems.found or fidelity is None:
        return None
    return Settings.of(SettingsSchema.model_validate(given), fidelity)


def _domains(values: Values) -> list[str]:
    sources = values["data"].get("sources") if isinstance(values.get("data"), dict) else None
    return sorted(sources) if isinstance(sources, dict) else []


def _check_target(target: Mapping[str, Any], domains: list[str], problems: Problems) -> None:
    for domain in target:
        if domain not in domains:
            problems.unknown(("target", domain), domain, domains, "domain")
    if not any(isinstance(weight, int | float) and weight for weight in target.values()):
        problems.add(("target",), "needs a positive weight", help="leave `target` out for equal weights")


def _check_objectives(objectives: Mapping[str, Any], domains: list[str] | None, problems: Problems) -> None:
    """Names of metrics; those of somebody else's trainer (`domains` is None) are not ours to know."""
    if not objectives:
        problems.add(("objectives",), "at least one is needed", help="such as {bits_per_byte: min}")
    if domains is None:
        return
    known = {*MEASURED, *cost.NAMES, *(f"bits_per_byte/{domain}" for domain in domains)}
    for metric in objectives:
        if metric not in known:
            problems.unknown(("objectives", metric), metric, known, "metric")


def _fidelity(values: Values, problems: Problems) -> Fidelity | None:
    """The ladder that a file names, or the single rung of its recipe's own tokens."""
    if values.get("fidelity"):
        return read_fidelity(values["fidelity"])
    train = values.get("train")
    tokens = train.get("tokens") if isinstance(train, dict) else None
    if isinstance(tokens, int):
        return read_fidelity({"tokens": tokens}) if tokens > 0 else None
    if tokens is None:
        problems.add((), "needs `fidelity: {tokens: [2M, 32M]}`: how many tokens a trial is trained on")
    elif is_gene(tokens) or is_derived(tokens):
        problems.add(("train", "tokens"), "is no gene: rungs are told by `fidelity: {tokens: [2M, 32M]}`")
    return None


def _check_baseline(space: Space, problems: Problems) -> None:
    """The recipe to beat has to be feasible; where it is not, say what to change, or that nothing helps."""
    broken = space.violations(space.baseline)
    if not broken:
        return
    near, left = approach(space, space.baseline, np.random.default_rng(0))
    if left == 0:
        changes = ", ".join(difference(space.baseline.values(), near.values()))
        help = f"feasible and near, as `baseline:` of the genes: {changes}"
    else:
        seen = "; ".join(f"`{text}`: {words}" for text, words in space.violations(near))
        help = f"no genome of this space was found that meets it; the nearest one still breaks {seen}"
    for text, words in broken:
        index = next((i for i, constraint in enumerate(space.constraints) if constraint.text == text), None)
        if index is None:
            problems.add(_named_path(words), words, help=help if left == 0 else None)
        else:
            problems.add(("constraints", index), f"the baseline breaks `{text}`: {words}", help=help)


def _named_path(words: str) -> KeyPath:
    """The part of the recipe that a rule begins to speak of: its place in the file."""
    found = re.search(r"\b(?:data|model|train)(?:\.\w+)+", words)
    return tuple(found[0].split(".")) if found else ()


def _refuse_genes(node: Any, path: KeyPath, problems: Problems) -> None:
    if is_gene(node) or is_derived(node):
        problems.add(path, "is a gene: a recipe has one value here", help="`evolm search` searches spaces with genes")
    elif isinstance(node, dict):
        for key, value in node.items():
            _refuse_genes(value, (*path, key), problems)
