"""Commands that look at a run: front, show, status, export, report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from evolm.cli.searching import Run

AsJson = Annotated[bool, typer.Option("--json", help="One JSON object on stdout, nothing else.")]

MAX_FAILURES = 5
"""Failed trials that `status` tells about, the latest."""

FORMATS = ("csv", "parquet", "json")


def register(app: typer.Typer) -> None:
    """Add the commands of this file."""
    for command in (front, show, status, export, report):
        app.command()(command)


def print_json(value: Any) -> None:
    """One object on stdout."""
    typer.echo(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False))


def front(run: Run, as_json: AsJson = False) -> None:
    """The Pareto front: the trials that no other beats in every objective."""
    from evolm.run import SCHEMA_VERSION, load
    from reports.table import trial_table

    loaded = load(run)
    if as_json:
        print_json(
            {
                "schema_version": SCHEMA_VERSION,
                "run": loaded.name,
                "objectives": loaded.settings.objectives,
                "front": [trial.as_dict() for trial in loaded.front()],
            }
        )
    elif loaded.front():
        typer.echo(trial_table(loaded.front(), loaded.objectives, [gene.path for gene in loaded.file.space.genes]))
    else:
        typer.echo(f"run {loaded.name} has no result yet", err=True)


def show(
    run: Run,
    trial: Annotated[str, typer.Argument(help="A trial's number, best or knee.", metavar="TRIAL")],
    as_json: AsJson = False,
) -> None:
    """One trial: its genome, what changed from the baseline, its metrics at every rung."""
    from evolm.run import SCHEMA_VERSION, load
    from reports.table import short, text_table
    from search_spaces.genome import difference

    loaded = load(run)
    found = loaded.trial(trial)
    if as_json:
        print_json({"schema_version": SCHEMA_VERSION, "run": loaded.name, "trial": found.as_dict()})
        return
    reason = f" ({found.reason}: {found.message})" if found.reason else f" ({found.message})" if found.message else ""
    typer.echo(f"trial {found.id} of run {loaded.name}: {found.state}{reason}")
    parents = f" of {', '.join(str(parent) for parent in found.parents)}" if found.parents else ""
    typer.echo(f"proposed by {found.operator}{parents}; {found.flops:.3g} FLOPs, {found.seconds:.0f} s")
    changed = difference(loaded.file.space.baseline.values(), found.genome)
    typer.echo("against the baseline:\n  " + ("\n  ".join(changed) if changed else "no difference"))
    if found.rungs:
        header = ["metric", *(f"{short(rung.tokens)} tokens" for rung in found.rungs)]
        first = [objective.metric for objective in loaded.objectives]
        names = sorted(found.metrics, key=lambda name: (name not in first, "bits_per_byte" not in name, name))
        rows = [[name, *(short(rung.metrics.get(name)) for rung in found.rungs)] for name in names]
        typer.echo(text_table(header, rows))


def status(run: Run, as_json: AsJson = False) -> None:
    """How far a run is, what failed and why, who is at work."""
    from evolm.run import load
    from search_spaces.quantities import format_bytes

    loaded = load(run)
    found = loaded.status()
    if as_json:
        print_json(found)
        return
    typer.echo(f"run {found['run']}: {found['state']}")
    typer.echo("trials: " + (", ".join(f"{n} {state}" for state, n in sorted(found["trials"].items())) or "none"))
    if found["failures"]:
        typer.echo("failed: " + ", ".join(f"{count} {reason}" for reason, count in sorted(found["failures"].items())))
    failed = [trial for trial in loaded.trials() if trial.state in ("failed", "infeasible")]
    for trial in failed[-MAX_FAILURES:]:
        typer.echo(f"  trial {trial.id}: {trial.reason or trial.state}: {trial.message}")
    typer.echo(f"front: {found['front']} trials, hypervolume {found['hypervolume']:.4f}")
    typer.echo(f"spent: {found['flops']:.3g} FLOPs, {found['seconds']:.0f} s")
    if found["late"]:
        typer.echo(f"late: {found['late']} results of launches that had been given up; none of them counts")
    typer.echo(f"checkpoints: {format_bytes(found['checkpoint_bytes'])}")
    if found["state"] == "interrupted":
        typer.echo(f"nobody is at work; go on with: evolm resume {loaded.folder.path}")
    for worker in found["workers"]:
        typer.echo(
            f"worker {worker.get('id')}: trial {worker['trial']}, process {worker.get('pid')} on {worker.get('node')}"
        )


def export(
    run: Run,
    to: Annotated[str, typer.Option(help="csv, parquet or json.")] = "csv",
    out: Annotated[Path | None, typer.Option(help="File to write; csv and json go to stdout when absent.")] = None,
) -> None:
    """All trials as a table, or as JSON objects."""
    from evolm.errors import UsageError
    from evolm.run import SCHEMA_VERSION, load
    from reports.exports import write_csv, write_parquet

    if to not in FORMATS:
        raise UsageError(f"--to must be one of {', '.join(FORMATS)}, is '{to}'")
    loaded = load(run)
    if to == "parquet":
        if out is None:
            raise UsageError("--to parquet needs --out FILE")
        write_parquet(loaded.data(), out)
        return
    if to == "json":
        body = {"schema_version": SCHEMA_VERSION, "run": loaded.name, "trials": [t.as_dict() for t in loaded.trials()]}
        text = json.dumps(body, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    else:
        text = write_csv(loaded.data())
    if out is None:
        typer.echo(text, nl=False)
    else:
        out.write_text(text)


def report(
    run: Run,
    out: Annotated[
        Path | None, typer.Option(help="File to write; report.html in the run's folder when absent.")
    ] = None,
) -> None:
    """Write the report: one HTML file that needs no network and no server."""
    from evolm.run import load
    from reports.page import write_report

    loaded = load(run)
    path = out or loaded.folder.report
    write_report(loaded.data(), path)
    typer.echo(str(path))
