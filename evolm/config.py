"""The space file: a recipe with genes, and how it is to be searched. Every problem of the file is told at once."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn, Self

import search_spaces
from evolm.algorithms import names
from evolm.algorithms.fidelity import Fidelity, read_fidelity
from fitness.objectives import MEASURED, read_objectives
from search_spaces.errors import Path as KeyPath
from search_spaces.errors import Problem, Problems, SpaceError, UsageError, nearest
from search_spaces.genes import KINDS, ChoiceGene, Gene, ListGene, NumberGene
from search_spaces.genome import Values, get
from search_spaces.reading import is_derived, is_gene, read_gene
from search_spaces.yaml_source import Document, read_yaml
from trainer import cost
from trainer.recipe import NAME, Recipe
from trainer.recipe_check import check, rule

SECTIONS = tuple(Recipe.model_fields)
SETTINGS = ("constraints", "baselines", "target", "objectives", "fidelity", "budget", "search", "resources")
HEADER = ("version", "name")

DEFAULT_OBJECTIVES = {"bits_per_byte": "min", "params": "min"}
DEFAULT_TRIALS = 50


class Space(search_spaces.Space):
    """A space, as `evolm.Space`: from a nested mapping (`from_dict`) or from a space file (`load`)."""

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """The space of a YAML file. Raises SpaceError with every problem of the file, each with line and column."""
        space = load_space(Path(path)).space
        assert isinstance(space, cls)
        return space


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How a space is searched. `hours` bounds the wall clock, `trials` the genomes that are tried."""

    objectives: dict[str, str]
    target: dict[str, float] | None
    fidelity: Fidelity
    trials: int
    hours: float | None
    algorithm: str
    seed: int
    cpus: float
    gpus: float
    max_concurrent: int | None

    def as_dict(self) -> dict[str, Any]:
        """As JSON values, the way a run keeps them."""
        values = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return values | {"fidelity": {"tokens": list(self.fidelity.rungs), "eta": self.fidelity.eta}}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Settings:
        """The inverse of `as_dict`."""
        ladder = values["fidelity"]
        return cls(**{**values, "fidelity": Fidelity(tuple(ladder["tokens"]), ladder["eta"])})


@dataclass(frozen=True, kw_only=True)
class SpaceFile:
    """A space file that holds what it says."""

    name: str
    document: Document
    space: Space
    settings: Settings

    @property
    def text(self) -> str:
        """The file's text."""
        return "\n".join(self.document.lines)


def load_space(path: Path) -> SpaceFile:
    """Read a space file. Raises SpaceError with every problem found, each with its line and column."""
    document = read_yaml(path)
    problems = Problems()
    values = document.value
    name = _header(values, path, (*HEADER, *SECTIONS, *SETTINGS), problems)
    recipe = {section: values[section] for section in SECTIONS if section in values}
    space = Space.read(
        recipe,
        _texts(values, "constraints", problems),
        problems,
        exact=cost.exact_functions(),
        rule=rule,
        baselines=_baselines(values, problems),
    )
    settings = _settings(values, problems)
    _check_types(recipe, problems)
    if space is not None and not problems.found:
        _check_baseline(space, problems)
    if problems.found:
        raise SpaceError(document.locate(problems.found))
    assert space is not None and settings is not None
    return SpaceFile(name=name, document=document, space=space, settings=settings)


def load_recipe(path: Path) -> tuple[str, Recipe]:
    """Read a recipe file: a space file without genes and without settings. Raises SpaceError."""
    document = read_yaml(path)
    problems = Problems()
    values = document.value
    name = _header(values, path, (*HEADER, *SECTIONS), problems)
    recipe = {section: values[section] for section in SECTIONS if section in values}
    _refuse_genes(recipe, (), problems)
    if not problems.found:
        _note(check(recipe), recipe, problems)
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
    if values.get("version") != 1:
        seen = values.get("version", "missing")
        problems.add(("version",), f"must be 1, is {seen}", value=seen, help="write `version: 1`")
    name = values.get("name", path.stem)
    if not isinstance(name, str) or not NAME.fullmatch(name):
        problems.add(("name",), f"must match {NAME.pattern}, is {name!r}", value=name)
    return str(name)


def _texts(values: Values, key: str, problems: Problems) -> list[str]:
    given = values.get(key, [])
    if not isinstance(given, list) or not all(isinstance(text, str) for text in given):
        problems.add((key,), "must be a list of expressions in quotes", value=given)
        return []
    return given


def _baselines(values: Values, problems: Problems) -> list[dict[str, Any]]:
    given = values.get("baselines", [])
    if not isinstance(given, list):
        problems.add(("baselines",), "must be a list of recipes, or parts of them", value=given)
        return []
    return given


def _settings(values: Values, problems: Problems) -> Settings | None:
    budget = _section(values, "budget", ("trials", "hours"), problems)
    search = _section(values, "search", ("algorithm", "seed"), problems)
    resources = _section(values, "resources", ("cpus", "gpus", "max_concurrent"), problems)
    domains = sorted(values["data"].get("sources", {})) if isinstance(values.get("data"), dict) else []
    objectives = _objectives(values, domains, problems)
    target = _target(values, domains, problems)
    fidelity = _fidelity(values, problems)
    trials = _number(budget, "budget", "trials", DEFAULT_TRIALS, problems, low=1, whole=True)
    hours = _number(budget, "budget", "hours", None, problems, low=0)
    seed = _number(search, "search", "seed", 0, problems, low=0, whole=True)
    algorithm = search.get("algorithm", "auto")
    if algorithm not in names():
        problems.unknown(("search", "algorithm"), str(algorithm), names(), "algorithm")
    cpus = _number(resources, "resources", "cpus", 1, problems, low=0)
    gpus = _number(resources, "resources", "gpus", 0, problems, low=0)
    concurrent = _number(resources, "resources", "max_concurrent", None, problems, low=1, whole=True)
    if problems.found or fidelity is None:
        return None
    return Settings(
        objectives=objectives,
        target=target,
        fidelity=fidelity,
        trials=int(trials or DEFAULT_TRIALS),
        hours=hours,
        algorithm=algorithm,
        seed=int(seed or 0),
        cpus=cpus or 0,
        gpus=gpus or 0,
        max_concurrent=None if concurrent is None else int(concurrent),
    )


def _section(values: Values, key: str, known: tuple[str, ...], problems: Problems) -> dict[str, Any]:
    given = values.get(key, {})
    if not isinstance(given, dict):
        problems.add((key,), "must be a mapping", value=given)
        return {}
    for name in given:
        if name not in known:
            problems.unknown((key, name), name, known)
    return given


def _number(
    section: Mapping[str, Any],
    key: str,
    name: str,
    default: float | None,
    problems: Problems,
    *,
    low: float,
    whole: bool = False,
) -> float | None:
    value = section.get(name, default)
    if value is None:
        return None
    kind = "a whole number" if whole else "a number"
    wrong_type = isinstance(value, bool) or not isinstance(value, int | float) or (whole and isinstance(value, float))
    if wrong_type or value < low:
        problems.add((key, name), f"must be {kind} of at least {low}, is {value!r}", value=value)
        return default
    return float(value) if not whole else value


def _objectives(values: Values, domains: list[str], problems: Problems) -> dict[str, str]:
    given = values.get("objectives", DEFAULT_OBJECTIVES)
    if not isinstance(given, dict):
        problems.add(("objectives",), "must be a mapping such as {bits_per_byte: min, params: min}", value=given)
        return DEFAULT_OBJECTIVES
    known = {*MEASURED, *cost.NAMES, *(f"bits_per_byte/{domain}" for domain in domains)}
    for metric in given:
        if metric not in known:
            problems.unknown(("objectives", metric), metric, known, "metric")
    try:
        read_objectives(given)
    except UsageError as error:
        text = str(error)
        place = next((metric for metric in given if text.startswith(f"objectives.{metric}:")), None)
        path: KeyPath = ("objectives", place) if place is not None else ("objectives",)
        problems.add(path, text.split(": ", 1)[1])
    return given


def _target(values: Values, domains: list[str], problems: Problems) -> dict[str, float] | None:
    given = values.get("target")
    if given is None:
        return None
    if not isinstance(given, dict) or not given:
        problems.add(("target",), "must be a mapping of domains to weights", value=given)
        return None
    for domain, weight in given.items():
        if domain not in domains:
            problems.unknown(("target", domain), domain, domains, "domain")
        if isinstance(weight, bool) or not isinstance(weight, int | float) or weight < 0:
            problems.add(("target", domain), f"must be a number of at least 0, is {weight!r}", value=weight)
            return None
    if sum(given.values()) <= 0:
        problems.add(("target",), "needs a positive weight")
    return given


def _fidelity(values: Values, problems: Problems) -> Fidelity | None:
    given = _section(values, "fidelity", ("tokens", "eta"), problems)
    if "fidelity" not in values:
        train = values.get("train")
        tokens = train.get("tokens") if isinstance(train, dict) else None
        if tokens is None:
            problems.add((), "needs `fidelity: {tokens: [2M, 32M]}`: how many tokens a trial is trained on")
            return None
        given = {"tokens": tokens}
    try:
        fidelity = read_fidelity(given)
    except UsageError as error:
        key, words = str(error).removeprefix("fidelity.").split(": ", 1)
        problems.add(("fidelity", key), words, value=given.get(key))
        return None
    schedule = values["train"].get("schedule", "wsd") if isinstance(values.get("train"), dict) else "wsd"
    assert fidelity is not None and schedule is not None
    return fidelity


# --- types ------------------------------------------------------------------------------------------------------------


def _check_types(recipe: Values, problems: Problems) -> None:
    """Hold fixed values, and the extreme values of every gene, against the recipe's schema.

    Works on what can be read: genes that are not in order are left out, and derived values, which depend on them.
    """
    genes: list[Gene] = []
    plain = _without_genes(recipe, (), genes)
    _note([entry for entry in check(plain) if entry[1] != "is missing" or entry[0] == ("data",)], recipe, problems)
    for gene in genes:
        for value in _extremes(gene):
            candidate = copy.deepcopy(plain)
            *way, last = gene.path
            get(candidate, tuple(way))[last] = value
            found = [entry for entry in check(candidate) if entry[0][: len(gene.path)] == gene.path]
            if found:
                _note([(gene.path, *found[0][1:])], recipe, problems)
                break


def _without_genes(node: Any, path: KeyPath, genes: list[Gene]) -> Any:
    """A recipe with its genes taken out; those that can be read are added to `genes`."""
    if not isinstance(node, dict):
        return node
    plain = {}
    for key, value in node.items():
        here = (*path, key)
        if is_gene(value):
            gene = read_gene(value, here, Problems())
            genes += [gene] if gene is not None else []
        elif not is_derived(value):
            plain[key] = _without_genes(value, here, genes)
    return plain


def _extremes(gene: Gene) -> list[Any]:
    values: list[Any] = [gene.default] if gene.when is not None else []
    if isinstance(gene, NumberGene):
        values += [gene.typed(gene.low), gene.typed(gene.high)]
    elif isinstance(gene, ChoiceGene):
        values += list(gene.items)
    elif isinstance(gene, ListGene):
        values += [[value] for value in _extremes(gene.item)]
    return values


def _note(found: list[tuple[KeyPath, str, str | None]], written: Values, problems: Problems) -> None:
    for path, words, advice in found:
        problems.found.append(
            Problem(
                path=path,
                rule=words,
                help=advice or _misspelt_kind(path, written),
                on_key=words.startswith("unknown key"),
            )
        )


def _misspelt_kind(path: KeyPath, written: Values) -> str | None:
    """`{flaot: [0, 1]}` is a mapping to the reader and a gene to its writer."""
    try:
        node = get(written, path)
    except KeyError:
        return None
    if not isinstance(node, Mapping) or is_gene(node) or is_derived(node):
        return None
    close = next((kind for key in node if (kind := nearest(str(key), [*KINDS, "expr"]))), None)
    return f"a gene? did you mean the kind '{close}'?" if close else None


def _check_baseline(space: Space, problems: Problems) -> None:
    for text, seen in space.violations(space.baseline):
        index = next((i for i, constraint in enumerate(space.constraints) if constraint.text == text), None)
        path: KeyPath = () if index is None else ("constraints", index)
        problems.add(path, f"the baseline breaks {f'`{text}`' if index is not None else text}: {seen}",
                     help="give genes a `baseline:` that a careful engineer would defend")  # fmt: skip


def _refuse_genes(node: Any, path: KeyPath, problems: Problems) -> None:
    if is_gene(node) or is_derived(node):
        problems.add(path, "is a gene: a recipe has one value here", help="`evolm search` searches spaces with genes")
    elif isinstance(node, dict):
        for key, value in node.items():
            _refuse_genes(value, (*path, key), problems)


def refuse(document: Document, path: KeyPath, words: str) -> NoReturn:
    """Raise one located problem of a file that was read."""
    raise SpaceError(document.locate([Problem(path=path, rule=words)]))


def with_overrides(settings: Settings, **given: Any) -> Settings:
    """The settings with those that the command line names (the others are None)."""
    return replace(settings, **{key: value for key, value in given.items() if value is not None})
