"""Commands about space files: init, validate, schema."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from evolm.cli.looking import AsJson

if TYPE_CHECKING:
    from search_spaces.feasibility import Feasibility, Share
    from search_spaces.space import Space


def register(app: typer.Typer) -> None:
    """Add the commands of this file."""
    for command in (init, validate, schema):
        app.command()(command)


def init(
    out: Annotated[Path, typer.Argument(help="File to write.", metavar="FILE")] = Path("space.yaml"),
    template: Annotated[str | None, typer.Option(help="demo, cpu, cluster, mix or command; demo when absent.")] = None,
    preset: Annotated[
        str | None,
        typer.Option(help="In place of a template, a search around a model of known size: micro, small, ..."),
    ] = None,
) -> None:
    """Write a commented space file to start from.

    Examples:

      evolm init

      evolm init my_space.yaml --template mix

      evolm init my_space.yaml --preset small
    """
    from evolm.templates import write_preset, write_template

    if template is not None and preset is not None:
        raise typer.BadParameter("--template and --preset are two places to start from: give one of them")
    written = write_template(template or "demo", out) if preset is None else write_preset(preset, out)
    typer.echo(f"{' and '.join(map(str, written))}: change what is yours, then: evolm validate {out}")


def validate(
    space: Annotated[Path, typer.Argument(help="Space file.", metavar="SPACE")],
    draws: Annotated[int, typer.Option(min=10, max=100_000, help="Genomes drawn to measure the constraints.")] = 1_000,
    seed: Annotated[int, typer.Option(min=0, help="Seed of these draws.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Check a space file: every problem at once, and what the constraints leave of the space.

    Nothing is trained, and no data is read.

    Examples:

      evolm validate search_spaces/demo.yaml

      evolm validate my_space.yaml --json
    """
    import numpy as np

    from evolm.config import load_space
    from evolm.needs import refuse_unmet, retrained
    from search_spaces.feasibility import examine

    file = load_space(space)
    refuse_unmet(file)
    found = examine(file.space, np.random.default_rng(seed), draws)
    if as_json:
        typer.echo(json.dumps(_as_json(file.name, file.space, found), indent=2, ensure_ascii=False, allow_nan=False))
        return
    _print(file.name, file.space, found)
    if names := retrained(file):
        rungs = len(file.settings.fidelity.rungs)
        typer.echo(
            f"\nnote: train.schedule {' and '.join(names)} cannot go on to a longer training: each of the {rungs} "
            "rungs trains anew; wsd goes on from one to the next"
        )


def schema(
    out: Annotated[Path | None, typer.Option(help="File to write; stdout when absent.")] = None,
) -> None:
    """Print the JSON Schema of space files, for editors.

    Examples:

      evolm schema --out space.schema.json

    and in the first line of a space file:

      # yaml-language-server: $schema=space.schema.json
    """
    from evolm.schema import schema_text

    if out is None:
        typer.echo(schema_text(), nl=False)
    else:
        out.write_text(schema_text())


def _as_json(name: str, space: Space, found: Feasibility) -> dict[str, Any]:
    cardinality = space.cardinality
    return {
        "schema_version": 1,
        "name": name,
        "genes": space.describe(),
        "cardinality": int(cardinality) if cardinality < 2**53 else None,
        "draws": found.draws,
        "feasible": found.feasible.as_dict(),
        "rules": None if found.rules is None else found.rules.as_dict(),
        "constraints": [share.as_dict() for share in found.constraints],
        "tightest": None if found.tightest is None else found.tightest.as_dict(),
        "example": None if found.example is None else found.example.values(),
        "ranges": {cost: list(ends) for cost, ends in found.ranges.items()},
        "smallest": None if found.smallest is None else found.smallest.values(),
        "largest": None if found.largest is None else found.largest.values(),
    }


def _print(name: str, space: Space, found: Feasibility) -> None:
    from reports.table import text_table
    from search_spaces.genome import shown

    rows = [[gene.name, gene.kind, gene.summary(), shown(gene.baseline, 40)] for gene in space.genes]
    typer.echo(f"space {name}: {len(rows)} gene{'s' * (len(rows) != 1)}, {_size(space.cardinality)}")
    typer.echo(text_table(["gene", "kind", "values", "baseline"], rows, widest=60))
    typer.echo(f"\nof {found.draws} genomes drawn, {_percent(found.feasible)} meet everything")
    if found.rules is not None and found.rules.share < 1:
        typer.echo(f"{_percent(found.rules):>24}  are recipes: values that go together; of these meet")
    for share in found.constraints:
        typer.echo(f"{_percent(share):>24}  {share.text}")
    if found.tightest is not None and found.tightest.share < 1:
        typer.echo(f"tightest together: `{found.tightest.text}` leave {found.tightest.share:.1%}")
    _print_ends(space, found)
    if found.feasible.share < SPARSE and found.constraints:
        worst = min(found.constraints, key=lambda share: share.met)
        advice = "nearly every genome will be a repaired one: narrow the genes, or widen the constraint"
        typer.echo(f"\nwarning: `{worst.text}` leaves next to nothing; {advice}", err=True)


def _print_ends(space: Space, found: Feasibility) -> None:
    """The smallest and the largest model, by what makes them so."""
    from search_spaces.genome import difference
    from search_spaces.quantities import format_count

    if found.smallest is None or found.largest is None:
        return
    low, high = next(iter(found.ranges.values()))
    typer.echo(f"\nfeasible models have {format_count(low)} to {format_count(high)} parameters")
    for word, genome in (("smallest", found.smallest), ("largest", found.largest)):
        changes = "; ".join(difference(space.baseline.values(), genome.values()))
        typer.echo(f"  {word}: {changes or 'the baseline itself'}")


SPARSE = 0.01
"""Below this share a space is mostly repaired genomes."""


def _size(cardinality: float) -> str:
    import math

    if math.isinf(cardinality):
        return "continuous"
    return f"{int(cardinality):,} genomes" if cardinality < 1e15 else f"{cardinality:.1e} genomes"


def _percent(share: Share) -> str:
    low, high = share.interval
    return f"{share.share:.1%} ({low:.1%} to {high:.1%})"
