"""Space files to start from: the ones that ship, under the name of what they are for."""

from __future__ import annotations

import json
import re
from importlib.resources import files
from pathlib import Path
from typing import Any

from evolm.errors import UsageError
from search_spaces.errors import nearest
from search_spaces.extends import PRESETS, unknown_preset
from search_spaces.reading import is_gene
from search_spaces.yaml_source import read_yaml

TEMPLATES = {
    "demo": "demo.yaml",
    "cpu": "cpu.yaml",
    "cluster": "gpt2_small.yaml",
    "mix": "data_mix.yaml",
    "command": "command.yaml",
}

PROGRAMS = {"command": "train_gpt.py"}
"""Of evolm/examples, what a template's trials are trained by."""


PRESET_SPACE = """# yaml-language-server: $schema=space.schema.json
#
# A search around the preset {preset}: {about}
# Mix and hyperparameters are searched; make genes of other values, or give a model value of your own, as you like.
#
#   evolm validate {out}
#   evolm search {out}

version: 1
name: {name}
extends: "preset:{preset}"

data:
{data}

train:
{rate}  weight_decay: {{float: [0.01, 0.3], log: true, baseline: 0.1}}

objectives: {objectives}
fidelity: {{tokens: [{short}, {long}], eta: 4}}
budget: {{trials: 40}}
resources: {resources}
"""

TEXT_AT_HAND = """  sources:
    code: {path: "python:stdlib"}         # text that every machine has; name your own
    docs: {path: "python:docs"}
  mix: {simplex: {code: 0.5, docs: 0.5}, floor: 0.1}"""

TEXT_OF_ONES_OWN = """  sources:
    web:  {path: "corpus/web/**/*.parquet"}
    code: {path: "corpus/code/**/*.jsonl.zst"}
    wiki: {path: "corpus/wiki/**/*.jsonl.gz"}
  mix: {simplex: {web: 0.7, code: 0.15, wiki: 0.15}, floor: 0.02}
  held_out: {validation: 0.005, test: 0.005, max_bytes: 4MiB}"""

FOR_CPUS = ("nano", "micro")
"""Presets that are searched on text at hand, without a GPU."""


def write_preset(name: str, out: Path) -> list[Path]:
    """Write a space file of the user's own on top of a preset, beside it the schema for editors.

    Raises UsageError for a preset that does not exist and for a file that does.
    """
    if words := unknown_preset(name):
        raise UsageError(f"--preset: {words}")
    _write_all({out: _preset_space(name, out)}, out)
    return [out]


def _preset_space(name: str, out: Path) -> str:
    """A search of mix and hyperparameters: from one training token for each parameter to four."""
    shipped = read_yaml(PRESETS / f"{name}.yaml")
    rate = shipped.value["train"]["learning_rate"]
    sized = not is_gene(rate)
    params = _params(shipped.value) if sized else 10**9
    small, fits = name in FOR_CPUS, sized and params < 4e9  # on one GPU, whole
    return PRESET_SPACE.format(
        preset=name,
        about=shipped.lines[0].removeprefix("# "),
        out=out,
        name=json.dumps(_name_of(out)),
        data=TEXT_AT_HAND if small else TEXT_OF_ONES_OWN,
        rate=f"  learning_rate: {{float: [{rate / 4:g}, {rate * 4:g}], log: true, baseline: {rate:g}}}\n"
        if sized
        else "",
        objectives="{bits_per_byte: min}" if sized else "{bits_per_byte: min, params: min}",
        short=_rounded(params),
        long=_rounded(4 * params),
        resources="{cpus: 1}" if small else "{cpus: 8, gpus: 1}" if fits else "{cpus: 64, gpus: 8, engine: fsdp}",
    )


def _params(values: dict[str, Any]) -> int:
    from trainer.cost import costs
    from trainer.recipe import Recipe

    anything = {"sources": {"text": {"path": "text"}}}
    return costs(Recipe.model_validate({"data": values["data"] | anything, "model": values["model"]})).params


def _rounded(count: int) -> str:
    """A count as people write it, in two digits."""
    unit, suffix = next((unit, suffix) for unit, suffix in ((10**9, "B"), (10**6, "M"), (10**3, "K")) if count >= unit)
    whole = round(count / unit) if count >= 10 * unit else round(count / unit, 1)
    return f"{whole:g}{suffix}"


def write_template(name: str, out: Path) -> list[Path]:
    """Write a template as a space file of the user's own, beside it the program that it names and the schema for
    editors; returns what is the user's to change.

    Raises UsageError for a template that does not exist and for files that do.
    """
    if name not in TEMPLATES:
        close = nearest(name, TEMPLATES)
        advice = f"did you mean '{close}'?" if close else f"there are {', '.join(TEMPLATES)}"
        raise UsageError(f"--template: unknown template '{name}'; {advice}")
    shipped = (files("search_spaces") / TEMPLATES[name]).read_text(encoding="utf-8")
    text = shipped.replace(f"search_spaces/{TEMPLATES[name]}", str(out))
    written = {out: re.sub(r"(?m)^name: .*$", f"name: {json.dumps(_name_of(out))}", text, count=1)}
    if name in PROGRAMS:
        program = out.parent / PROGRAMS[name]
        written[out] = written[out].replace(f'"evolm/examples/{PROGRAMS[name]}"', json.dumps(str(program)))
        written[program] = (files("evolm") / "examples" / PROGRAMS[name]).read_text(encoding="utf-8")
    _write_all(written, out)
    return list(written)


def _write_all(written: dict[Path, str], out: Path) -> None:
    """Write new files, and the schema beside the space file where there is none. Raises UsageError before anything is
    written where it cannot be."""
    from evolm.schema import FILE, schema_text

    if not out.parent.is_dir():
        raise UsageError(f"{out}: there is no folder {out.parent}")
    for path in written:
        if path.exists() or path.is_symlink():
            raise UsageError(f"{path}: exists already; name another file, or remove it")
    for path, words in written.items():
        _write_new(path, words)
    beside = out.parent / FILE
    if not beside.exists():
        beside.write_text(schema_text(), encoding="utf-8")


def _write_new(path: Path, text: str) -> None:
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        raise UsageError(f"{path}: cannot be written: {error.strerror}") from None


def _name_of(out: Path) -> str:
    """The file's name as the name of a space."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", out.stem).lstrip("._-")[:64] or "space"
