"""The command that plays a run again: replay."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated

import typer

from evolm.cli.looking import AsJson
from evolm.cli.searching import Run, seed_option

if TYPE_CHECKING:
    from evolm.replay import Comparison, Spread, Verified
    from evolm.run import Run as Loaded


def register(app: typer.Typer) -> None:
    """Add the command of this file."""
    app.command()(replay)


def replay(
    run: Run,
    verify: Annotated[
        bool, typer.Option("--verify", help="Propose every trial again and compare; 6 when one differs.")
    ] = False,
    algorithm: Annotated[
        str | None, typer.Option(help="Say what this algorithm would have found in the run's trials.", metavar="NAME")
    ] = None,
    seed: Annotated[int | None, seed_option("Seed of its first repeat; one more than the run's when absent.")] = None,
    repeats: Annotated[int | None, typer.Option(min=1, max=1000, help="Times it searches; 20 when absent.")] = None,
    as_json: AsJson = False,
) -> None:
    """Play a run again: propose its trials once more and compare, or let another algorithm search in its results.

    Nothing is trained or written; the run may be at work.

    Examples:

      evolm replay demo-1 --verify

      evolm replay demo-1 --algorithm random --repeats 50
    """
    from evolm.errors import UsageError
    from evolm.run import load

    if verify and algorithm is not None:
        raise UsageError("--verify and --algorithm are two questions: ask one at a time")
    if verify and (seed is not None or repeats is not None):
        raise UsageError("--seed and --repeats belong to --algorithm: --verify proposes with the run's own seed")
    if verify:
        _verify(load(run), as_json)
    elif algorithm is not None:
        _compare(load(run), algorithm, seed, repeats, as_json)
    else:
        raise UsageError(
            "evolm replay needs --verify (propose every trial again and compare) "
            "or --algorithm NAME (what it would have found in the run's trials)"
        )


@contextmanager
def _progress(words: str) -> Iterator[Callable[[int, int], None]]:
    """A bar on stderr where somebody looks; a line elsewhere."""
    with typer.progressbar(length=1, label=words, file=sys.stderr) as bar:

        def tick(done: int, of: int) -> None:
            bar.length = of
            bar.update(done - bar.pos)

        yield tick


# --- verify -----------------------------------------------------------------------------------------------------------


def _verify(loaded: Loaded, as_json: bool) -> None:
    from evolm.errors import GateError
    from evolm.replay import verify

    with _progress("proposing again") as tick:
        found = verify(loaded, tick)
    if as_json:
        typer.echo(json.dumps(found.as_dict(), indent=2, ensure_ascii=False, allow_nan=False))
        raise typer.Exit(GateError.exit_code if found.different else 0)  # the object says what the error would
    _print_verified(found)
    found.raise_if_different()


def _print_verified(found: Verified) -> None:
    by_hand = f"; {found.enqueued} were enqueued, and proposed by nobody" if found.enqueued else ""
    proposals = found.equal + len(found.different)
    typer.echo(f"run {found.run}: {found.equal} of {proposals} proposals are the same again{by_hand}")
    if found.unverifiable:
        typer.echo(f"{found.unverifiable} more cannot be verified: they saw what was lost before a repair")
    for one in found.different:
        typer.echo(f"trial {one.trial.id}, recorded -> proposed now:")
        for line in one.differences:
            typer.echo(f"  {line}")


# --- compare ----------------------------------------------------------------------------------------------------------


def _compare(loaded: Loaded, algorithm: str, seed: int | None, repeats: int | None, as_json: bool) -> None:
    from evolm.replay import REPEATS, compare

    with _progress(f"searching with {algorithm}") as tick:
        found = compare(loaded, algorithm, seed, repeats or REPEATS, tick)
    if as_json:
        typer.echo(json.dumps(found.as_dict(), indent=2, ensure_ascii=False, allow_nan=False))
    else:
        _print_comparison(found)


def _print_comparison(found: Comparison) -> None:
    """An order a column: medians, with quartiles where there are repeats."""
    from evolm.replay import BOUNDED, SHARES
    from reports.table import short, text_table

    def row(words: str, index: int, spreads: list[Spread], spell: Callable[[float], str]) -> list[str]:
        cells = []
        for order, spread in zip(found.orders, spreads, strict=True):
            low, median, high = (spell(values[index]) for values in (spread.low, spread.median, spread.high))
            cells.append(f"{median} ({low} to {high})" if order.repeats > 1 else median)
        return [words, *cells]

    volumes, best = ([order.hypervolume for order in found.orders], [order.best for order in found.orders])
    reached = [order.trials_to for order in found.orders]
    rows = [row(f"hypervolume after {n}", n - 1, volumes, "{:.4f}".format) for n in found.after]
    rows += [row(f"trials to {share:.0%} of it", i, reached, "{:g}".format) for i, share in enumerate(SHARES)]
    rows += [row(f"{found.objective.metric} after {n}", n - 1, best, short) for n in found.after]
    names = [f"{order.name}, {order.repeats} times" if order.repeats > 1 else order.name for order in found.orders]
    typer.echo(f"run {found.run}: {found.trials} trials of {short(found.tokens)} tokens, in other orders")
    typer.echo(text_table(["median (quartiles)", *names], rows))
    asked = found.orders[1]
    if asked.stand_in is not None:
        away = f"{asked.stand_in:.3f} from the trials that stood in for them (0: the same, 1: nothing in common)"
        typer.echo(f"the proposals of {asked.name} were on average {away}")
    typer.echo(BOUNDED)
