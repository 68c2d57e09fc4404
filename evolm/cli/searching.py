"""Commands that search: search, resume."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from evolm.launch import Ended

Run = Annotated[str, typer.Argument(help="Name of a run under runs/, or its folder.", metavar="RUN")]
Trials = Annotated[int | None, typer.Option(min=1, help="Genomes to try in all.")]
Hours = Annotated[float | None, typer.Option(min=0, help="Hours after which nothing more is launched.")]
Executor = Annotated[str, typer.Option(help="Where trials run: ray or inline (one by one, in this process).")]
Address = Annotated[
    str | None, typer.Option(help="Ray cluster to use: auto or host:port. A Ray on this machine when absent.")
]
Cache = Annotated[Path | None, typer.Option(help="Folder for tokenised corpora. The user's cache folder when absent.")]


def seed_option(help: str) -> Any:
    """A seed that all generators take."""
    return typer.Option(min=0, max=2**31 - 1, help=help)


def register(app: typer.Typer) -> None:
    """Add the commands of this file."""
    app.command()(search)
    app.command()(resume)


def search(
    space: Annotated[Path, typer.Argument(help="Space file: a recipe in which values may be genes.", metavar="SPACE")],
    run: Annotated[str | None, typer.Option(help="Name or folder of the run; the space's name when absent.")] = None,
    algorithm: Annotated[str | None, typer.Option(help="auto, nsga2, random, or a plug-in's name.")] = None,
    seed: Annotated[int | None, seed_option("Seed of proposals, initial weights and data order.")] = None,
    trials: Trials = None,
    hours: Hours = None,
    executor: Executor = "ray",
    address: Address = None,
    cache: Cache = None,
) -> None:
    """Search a space: train many small models, show the Pareto front.

    Examples:

      evolm search search_spaces/demo.yaml

      evolm search my_space.yaml --run first --trials 200 --address auto
    """
    from evolm import launch

    ended = launch.start(
        space,
        run=run,
        executor=executor,
        address=address,
        cache=cache,
        say=_say,
        algorithm=algorithm,
        seed=seed,
        trials=trials,
        hours=hours,
    )
    _finish(ended, executor, address)


def resume(
    run: Run,
    trials: Trials = None,
    hours: Hours = None,
    executor: Executor = "ray",
    address: Address = None,
    cache: Cache = None,
    repair: Annotated[
        bool, typer.Option("--repair", help="First make a damaged ledger anew of what can still be read.")
    ] = False,
) -> None:
    """Go on with a run that was stopped or killed, or that has a larger budget now.

    Examples:

      evolm resume demo-1

      evolm resume runs/demo-1 --trials 100
    """
    from evolm import launch

    ended = launch.resume(
        run,
        executor=executor,
        address=address,
        cache=cache,
        repair=repair,
        say=_say,
        trials=trials,
        hours=hours,
    )
    _finish(ended, executor, address)


def _say(text: str) -> None:
    with suppress(OSError):  # a reader that has gone away does not end a search
        typer.echo(text, err=True)


def _finish(ended: Ended, executor: str, address: str | None) -> None:
    """Write the report; print the front, the report's path and what to do next."""
    import signal

    from reports.page import write_report

    run = ended.run
    write_report(run.data(), run.folder.report)
    try:
        for line in _last_words(ended, executor, address):
            typer.echo(line)
    except BrokenPipeError:
        if ended.why != "interrupted":
            raise
    if ended.why == "interrupted":
        raise typer.Exit(128 + (ended.signal or signal.SIGINT))


def _last_words(ended: Ended, executor: str, address: str | None) -> Iterator[str]:
    from reports.table import trial_table

    run = ended.run
    status, front = run.status(), run.front()
    counts = ", ".join(f"{count} {state}" for state, count in sorted(status["trials"].items()))
    yield f"run {run.name}: {counts}; {status['flops']:.3g} FLOPs, {status['seconds']:.0f} s"
    if front:
        yield trial_table(front, run.objectives, [gene.path for gene in run.file.space.genes])
    yield f"report: {run.folder.report}"
    if ended.why == "interrupted":
        where = f" --executor {executor}" * (executor != "ray") + f" --address {address}" * (address is not None)
        kept = "everything told is saved, what was running begins again" if ended.abandoned else "everything is saved"
        yield f"interrupted, {kept}; go on with: evolm resume {run.folder.path}{where}"
    elif front and run.baseline is not None and front[0].id == run.baseline.id:
        more = f"evolm resume {run.folder.path} --trials {2 * run.settings.trials}"
        yield f"no recipe that reached the last rung beat the baseline yet; try more: {more}"
    elif front and run.settings.command is not None:
        yield f"the best: evolm show {run.folder.path} best"
    elif front:
        yield f"promote the best: evolm promote {run.folder.path} best"
