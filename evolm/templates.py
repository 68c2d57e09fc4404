"""Space files to start from: the ones that ship, under the name of what they are for."""

from __future__ import annotations

import json
import re
from importlib.resources import files
from pathlib import Path

from evolm.errors import UsageError
from search_spaces.errors import nearest

TEMPLATES = {
    "demo": "demo.yaml",
    "cpu": "cpu.yaml",
    "cluster": "gpt2_small.yaml",
    "mix": "data_mix.yaml",
    "command": "command.yaml",
}

PROGRAMS = {"command": "train_gpt.py"}
"""Of evolm/examples, what a template's trials are trained by."""


def write_template(name: str, out: Path) -> list[Path]:
    """Write a template as a space file of the user's own, beside it the program that it names and the schema for
    editors; returns what is the user's to change.

    Raises UsageError for a template that does not exist and for files that do.
    """
    from evolm.schema import FILE, schema_text

    if name not in TEMPLATES:
        close = nearest(name, TEMPLATES)
        advice = f"did you mean '{close}'?" if close else f"there are {', '.join(TEMPLATES)}"
        raise UsageError(f"--template: unknown template '{name}'; {advice}")
    if not out.parent.is_dir():
        raise UsageError(f"{out}: there is no folder {out.parent}")
    shipped = (files("search_spaces") / TEMPLATES[name]).read_text(encoding="utf-8")
    text = shipped.replace(f"search_spaces/{TEMPLATES[name]}", str(out))
    written = {out: re.sub(r"(?m)^name: .*$", f"name: {json.dumps(_name_of(out))}", text, count=1)}
    if name in PROGRAMS:
        program = out.parent / PROGRAMS[name]
        written[out] = written[out].replace(f'"evolm/examples/{PROGRAMS[name]}"', json.dumps(str(program)))
        written[program] = (files("evolm") / "examples" / PROGRAMS[name]).read_text(encoding="utf-8")
    for path in written:
        if path.exists() or path.is_symlink():
            raise UsageError(f"{path}: exists already; name another file, or remove it")
    for path, words in written.items():
        _write_new(path, words)
    beside = out.parent / FILE
    if not beside.exists():
        beside.write_text(schema_text(), encoding="utf-8")
    return list(written)


def _write_new(path: Path, text: str) -> None:
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        raise UsageError(f"{path}: cannot be written: {error.strerror}") from None


def _name_of(out: Path) -> str:
    """The file's name as the name of a space."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", out.stem).lstrip("._-")[:64] or "space"
