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


def write_template(name: str, out: Path) -> None:
    """Write a template as a space file of the user's own, and the schema for editors beside it.

    Raises UsageError for a template that does not exist and for a file that does.
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
    try:
        with out.open("x", encoding="utf-8") as file:
            file.write(re.sub(r"(?m)^name: .*$", f"name: {json.dumps(_name_of(out))}", text, count=1))
    except FileExistsError:
        raise UsageError(f"{out}: exists already; name another file, or remove it") from None
    except OSError as error:
        raise UsageError(f"{out}: cannot be written: {error.strerror}") from None
    beside = out.parent / FILE
    if not beside.exists():
        beside.write_text(schema_text(), encoding="utf-8")


def _name_of(out: Path) -> str:
    """The file's name as the name of a space."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", out.stem).lstrip("._-")[:64] or "space"
