"""The report of a run: one HTML file that needs no network, no server and no other file.

Nothing that comes from a run is ever part of a script: names and messages reach the page as escaped text, and figures
as JSON that is parsed, not run. A policy in the page's head lets the browser run only the scripts that evolm wrote, by
their hashes, and load nothing.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
from collections.abc import Sequence
from contextlib import suppress
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, FunctionLoader, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs
from plotly.utils import PlotlyJSONEncoder

from fitness.errors import StorageError
from reports import reproduce, summary
from reports.figures.front import views
from reports.figures.style import template
from reports.frame import RunData
from reports.grids import brief_grid, front_grid, trials_grid
from reports.sections import Section, sections

_ESCAPES = str.maketrans({"<": "\\u003c", ">": "\\u003e", "&": "\\u0026"})


def write_report(data: RunData, path: Path) -> None:
    """Write the report of a run to `path`, in whole or not at all. Raises StorageError when it cannot be written."""
    page = render(data).encode("utf-8", errors="replace")
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        unfinished.write_bytes(page)
        unfinished.replace(path)
    except OSError as error:
        raise StorageError(f"{path}: the report cannot be written: {error.strerror}") from error
    finally:
        with suppress(OSError):
            unfinished.unlink()  # it is there only when something went wrong


def render(data: RunData) -> str:
    """The report of a run as the text of an HTML page; the same data gives the same text."""
    shown = sections(data)
    scripts = [get_plotlyjs(), _resource("report.js")]
    environment = Environment(
        loader=FunctionLoader(_resource),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report.html").render(
        data=data,
        policy=Markup(policy(scripts)),
        css=Markup(_resource("report.css")),
        scripts=[Markup(script) for script in scripts],
        embedded=Markup(embedded(drawings(data, shown))),
        sections=shown,
        facts=summary.facts(data),
        headline=summary.headline(data),
        tiles=summary.tiles(data),
        picks=summary.picks(data),
        failures=summary.failures(data),
        commands=reproduce.commands(data),
        provenance=reproduce.provenance(data),
        version=data.meta.get("evolm", ""),
        brief=brief_grid(data),
        front=front_grid(data),
        trials=trials_grid(data),
        settings=json.dumps(data.settings, indent=2, ensure_ascii=False),
    )


def policy(scripts: Sequence[str]) -> str:
    """A content security policy under which a browser runs these inline scripts, and no others, and loads nothing.

    `blob:` and `data:` images are the ones that plotly makes when a reader saves a figure.
    """
    digests = (base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts)
    allowed = " ".join(f"'sha256-{digest}'" for digest in digests)
    return (
        f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; img-src data: blob:; "
        "base-uri 'none'; form-action 'none'"
    )


def embedded(value: Any) -> str:
    """A value as JSON that may stand in a script element of type application/json: it can neither close the element
    nor open a comment or another element."""
    return json.dumps(value, cls=PlotlyJSONEncoder, separators=(",", ":"), allow_nan=False).translate(_ESCAPES)


def drawings(data: RunData, shown: Sequence[Section]) -> dict[str, Any]:
    """What the page's script draws: the figures, without the template that they share and the height that the page
    gives them; the template of each colour scheme; where there are more than two objectives, the values of all."""
    figures = {}
    for plot in (plot for section in shown for plot in section.plots):
        figure = plot.figure.to_dict()
        del figure["layout"]["template"], figure["layout"]["height"]
        figures[plot.name] = figure
    chosen = views(data) if "front" in figures and len(data.objectives) > 2 else None
    return {"figures": figures, "templates": {"dark": template("dark"), "light": template("light")}, "views": chosen}


def _resource(name: str) -> str:
    """A file beside the templates, as text."""
    return files("reports").joinpath("templates", name).read_text(encoding="utf-8")
