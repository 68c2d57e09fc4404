"""Commands that make and use models: train, promote, generate."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from evolm.cli.searching import Cache, Run

Device = Annotated[str, typer.Option(help="cpu or cuda.")]


def _tokens(text: str | None) -> int | None:
    """A number of tokens as people write it: 2000000 or 2M."""
    from search_spaces.quantities import parse_quantity

    if text is None:
        return None
    value = int(text) if text.isdigit() else parse_quantity(text)
    if not isinstance(value, int) or value < 1:
        raise typer.BadParameter(f"must be a number of tokens such as 2M, is '{text}'")
    return value


Tokens = Annotated[str | None, typer.Option(help="Training tokens, such as 2M.", metavar="N")]


def register(app: typer.Typer) -> None:
    """Add the commands of this file."""
    for command in (promote, train, generate):
        app.command()(command)


def promote(
    run: Run,
    trial: Annotated[str, typer.Argument(help="A trial's number, best or knee.", metavar="TRIAL")],
    tokens: Tokens = None,
    cache: Cache = None,
    force: Annotated[bool, typer.Option("--force", help="Export even when the baseline is no worse.")] = False,
) -> None:
    """Train a trial's recipe for real, beside the baseline; judge both on the test split; export the winner.

    Examples:

      evolm promote demo-1 best --tokens 2M

      evolm promote runs/demo-1 17
    """
    from evolm.promote import promote as promote_trial
    from evolm.run import load
    from reports.table import short, text_table

    length = _tokens(tokens)
    loaded = load(run)
    found = loaded.trial(trial)
    done = promote_trial(
        loaded, found, tokens=length, cache=cache, force=force, say=lambda text: typer.echo(text, err=True)
    )
    records = {"winner": done.winner, **({"baseline": done.baseline} if done.baseline else {})}
    rows = [[name, *(short(record["test"][name]) for record in records.values())] for name in done.winner["test"]]
    rows.append(["params", *(short(record["params"]) for record in records.values())])
    typer.echo(text_table(["test split", *records], rows))
    assert done.export is not None
    typer.echo(f"exported as {done.export['class']}: {done.export['folder']}")
    typer.echo(f"try it: evolm generate {done.export['folder']} --prompt 'def main('")


def train(
    recipe: Annotated[Path, typer.Argument(help="Recipe file: a space file without genes.", metavar="RECIPE")],
    tokens: Tokens = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the model; runs/NAME when absent.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Seed of weights and data; the recipe's when absent.")] = None,
    device: Device = "cpu",
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads; all when absent.")] = None,
    cache: Cache = None,
    test: Annotated[bool, typer.Option("--test", help="Score on the test split too.")] = False,
    export: Annotated[bool, typer.Option(help="Export the model to OUT/export/hf.")] = True,
    root: Annotated[
        list[str] | None, typer.Option(help="Folders from which relative data paths are looked up.")
    ] = None,
    target: Annotated[str | None, typer.Option(help="Weights of the domains, as JSON.")] = None,
) -> None:
    """Train one recipe to the end; run it again to go on after an interruption.

    Examples:

      evolm train recipe.yaml --tokens 2M

      evolm train recipe.yaml --tokens 1B --device cuda --out models/first
    """
    from evolm.config import load_recipe
    from evolm.run_folder import RUNS
    from evolm.training import train_recipe

    folder = out or RUNS / load_recipe(recipe)[0]
    done = train_recipe(
        recipe,
        folder,
        tokens=_tokens(tokens),
        seed=seed,
        device=device,
        threads=threads,
        cache=cache,
        roots=root,
        target=json.loads(target) if target else None,
        test=test,
        export=export,
    )
    if done.record is None:
        typer.echo("interrupted, everything is saved; the same command goes on", err=True)
        raise typer.Exit(128 + (done.signal or 2))
    for split in ("validation", "test"):
        if split in done.record:
            typer.echo(f"{split}: " + "  ".join(f"{name} {value:.4f}" for name, value in done.record[split].items()))
    if "export" in done.record:
        typer.echo(f"exported as {done.record['export']['class']}: {done.record['export']['folder']}")


def generate(
    model: Annotated[Path, typer.Argument(help="Exported folder.", metavar="MODEL")],
    prompt: Annotated[str, typer.Option(help="Text to continue.")],
    max_tokens: Annotated[int, typer.Option(min=1, help="New tokens, at most.")] = 100,
    temperature: Annotated[float, typer.Option(min=0, help="0 takes the likeliest token every time.")] = 0.8,
    top_k: Annotated[int, typer.Option(min=0, help="Choose among the k likeliest; 0 for all.")] = 0,
    top_p: Annotated[float, typer.Option(min=0.0, max=1.0, help="Choose among the likeliest that sum to p.")] = 1.0,
    seed: Annotated[int | None, typer.Option(min=0, help="Makes sampling repeatable.")] = None,
    device: Device = "cpu",
) -> None:
    """Continue a text with an exported model.

    Example:

      evolm generate runs/demo-1/promoted/7/export/hf --prompt 'def main(' --max-tokens 50
    """
    from trainer.serving.engine import Engine, Sampling

    sampling = Sampling(max_tokens=max_tokens, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
    typer.echo(Engine(model, device).generate(prompt, sampling))
