"""Commands that steer a run from another shell: stop, enqueue."""

from __future__ import annotations

from typing import Annotated

import typer

from evolm.cli.looking import AsJson, print_json
from evolm.cli.searching import Run


def register(app: typer.Typer) -> None:
    """Add the commands of this file."""
    app.command()(stop)
    app.command()(enqueue)


def stop(
    run: Run,
    now: Annotated[bool, typer.Option("--now", help="End running trials at once, without saving.")] = False,
    wait: Annotated[float, typer.Option(min=0, help="Seconds to wait until it has ended.")] = 600.0,
) -> None:
    """Ask a running search to end: nothing more is launched, running trials save. `evolm resume` goes on.

    Works from any machine that sees the run's folder.
    """
    from evolm import steering

    stopped = steering.stop(run, now=now, wait=wait)
    folder = stopped.folder
    if not stopped.was_running:
        typer.echo(f"run {folder.name} is not running")
    elif stopped.ended:
        typer.echo(f"run {folder.name} has ended; go on with: evolm resume {folder.path}")
    else:
        owner = folder.owner() or {}
        who = f"process {owner.get('pid', '?')} on {owner.get('host', '?')}"
        typer.echo(f"asked run {folder.name} to end; {who} is still at work after {wait:g} s", err=True)
        raise typer.Exit(1)


def enqueue(
    run: Run,
    genome: Annotated[
        str,
        typer.Argument(
            help="File of YAML or JSON, or its text: {train: {learning_rate: 1e-3}}; the rest is the baseline's.",
            metavar="GENOME",
        ),
    ],
    as_json: AsJson = False,
) -> None:
    """Have a genome of your own tried before anything else is, in a running search or at its next resume.

    Examples:

      evolm enqueue demo-1 my_genome.yaml

      evolm enqueue demo-1 '{train: {learning_rate: 2e-3}}'
    """
    from evolm import steering
    from evolm.run import SCHEMA_VERSION

    folder, trial = steering.enqueue(run, genome)
    if as_json:
        print_json({"schema_version": SCHEMA_VERSION, "run": folder.name, "trial": trial})
    elif trial is None:
        typer.echo(f"left for run {folder.name}, which has not taken it yet; `evolm status {folder.path}` shows it")
    elif folder.busy:
        typer.echo(f"trial {trial} of run {folder.name} is the next to be run")
    else:
        typer.echo(f"trial {trial} of run {folder.name}; run it with: evolm resume {folder.path}")
