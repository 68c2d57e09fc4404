"""Commands that make and use models: train, promote, generate."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from evolm.cli.searching import Cache, Run, seed_option

if TYPE_CHECKING:
    from evolm.promote import Promotion
    from trainer.extras import EngineName, ZeroStage

Device = Annotated[str, typer.Option(help="cpu or cuda.")]


def _tokens(text: str | None) -> int | None:
    """A number of tokens as people write it: 2000000 or 2M."""
    from search_spaces.quantities import parse_quantity

    if text is None:
        return None
    value = int(text) if text.isdecimal() and text.isascii() else parse_quantity(text)
    if not isinstance(value, int) or value < 1:
        raise typer.BadParameter(f"must be a number of tokens such as 2M, is '{text}'")
    return value


Tokens = Annotated[str | None, typer.Option(help="Training tokens, such as 2M.", metavar="N")]
PromotedTokens = Annotated[
    str | None,
    typer.Option(
        help="Training tokens, such as 2M; when absent 4 times the last rung, or for a larger model as many for each "
        "parameter as there.",
        metavar="N",
    ),
]


def _larger(what: str) -> Any:
    return typer.Option(min=1, metavar="K", help=f"Make the model K times as {what}; what was tuned is carried over.")


def _weights(text: str | None, domains: Iterable[str]) -> dict[str, float] | None:
    """Weights of domains, given as JSON."""
    if text is None:
        return None
    try:
        given = json.loads(text)
    except ValueError as error:
        raise typer.BadParameter(f"must be JSON such as '{{\"web\": 1}}': {error}") from None
    known = set(domains)
    if not isinstance(given, dict) or not given or not set(given) <= known:
        raise typer.BadParameter(f"must give weights to some of {', '.join(sorted(known))}, is {text}")
    numbers = [weight for weight in given.values() if isinstance(weight, int | float) and weight >= 0]
    if len(numbers) < len(given) or not 0 < sum(numbers) < float("inf"):
        raise typer.BadParameter(f"weights must be numbers of at least 0, and one must be positive, is {text}")
    return given


def register(app: typer.Typer) -> None:
    """Add the commands of this file."""
    for command in (promote, train, generate):
        app.command()(command)


def promote(
    run: Run,
    trial: Annotated[str, typer.Argument(help="A trial's number, best or knee.", metavar="TRIAL")],
    tokens: PromotedTokens = None,
    width: Annotated[int | None, _larger("wide")] = None,
    depth: Annotated[int | None, _larger("deep")] = None,
    cache: Cache = None,
    force: Annotated[bool, typer.Option("--force", help="Export even when the baseline is no worse.")] = False,
) -> None:
    """Train a trial's recipe for real, beside the baseline; judge both on the test split; export the winner.

    Examples:

      evolm promote demo-1 best --tokens 2M

      evolm promote runs/demo-1 17

      evolm promote demo-1 best --width 2 --depth 2
    """
    from evolm.errors import GateError
    from evolm.promote import promote as promote_trial
    from evolm.run import load

    length = _tokens(tokens)
    loaded = load(run)
    found = loaded.trial(trial)
    try:
        done = promote_trial(
            loaded,
            found,
            tokens=length,
            width=width,
            depth=depth,
            cache=cache,
            force=force,
            say=lambda text: typer.echo(text, err=True),
        )
    except GateError as refused:
        _print_comparison(refused.result)
        raise
    _print_comparison(done)
    assert done.export is not None
    folder, stock = done.export["folder"], done.export["tier"] == "stock"
    typer.echo(f"exported as {done.export['class']}: {folder}")
    typer.echo(f"try it: evolm generate {folder} --prompt 'The '")
    trust = "" if stock else ", trust_remote_code=True"
    typer.echo(f"in Python: transformers.AutoModelForCausalLM.from_pretrained({folder!r}{trust})")


def _print_comparison(done: Promotion) -> None:
    """Winner beside baseline on the test split, with what lies between them."""
    from reports.table import short, text_table

    def row(name: str, winner: float, baseline: float | None) -> list[str]:
        if baseline is None:
            return [name, short(winner)]
        return [name, short(winner), short(baseline), f"{(winner - baseline) / baseline:+.1%}"]

    other = done.baseline
    rows = [row(name, value, other["test"][name] if other else None) for name, value in done.winner["test"].items()]
    rows.append(row("params", done.winner["params"], other["params"] if other else None))
    typer.echo(text_table(["test split", "winner", *(["baseline", ""] if other else [])], rows))
    if other and done.winner["corpus"]["tokenizer"] != other["corpus"]["tokenizer"]:
        typer.echo("perplexity is per token, and the tokenizers differ: compare bits per byte")


def train(
    recipe: Annotated[Path, typer.Argument(help="Recipe file: a space file without genes.", metavar="RECIPE")],
    tokens: Tokens = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the model; runs/NAME when absent.")] = None,
    seed: Annotated[int | None, seed_option("Seed of weights and data; the recipe's when absent.")] = None,
    device: Device = "cpu",
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads; all when absent.")] = None,
    cache: Cache = None,
    test: Annotated[bool, typer.Option("--test", help="Score on the test split too.")] = False,
    export: Annotated[bool, typer.Option(help="Export the model to OUT/export/hf.")] = True,
    root: Annotated[
        list[str] | None, typer.Option(help="Folders from which relative data paths are looked up.")
    ] = None,
    target: Annotated[str | None, typer.Option(help="Weights of the domains, as JSON.")] = None,
    engine: Annotated[
        str | None,
        typer.Option(help="single, ddp, fsdp or deepspeed; single for one process, ddp for several when absent."),
    ] = None,
    processes: Annotated[
        int | None, typer.Option(min=1, help="Processes that train together on this machine, one for each GPU.")
    ] = None,
    zero_stage: Annotated[int, typer.Option(help="What deepspeed cuts over the processes: 1, 2 or 3.")] = 2,
    offload: Annotated[
        bool, typer.Option("--offload", help="Optimiser state in the CPU's memory (deepspeed).")
    ] = False,
    sink: Annotated[
        list[str] | None, typer.Option(help="tensorboard, mlflow, wandb or a plug-in: where its numbers go besides.")
    ] = None,
) -> None:
    """Train one recipe to the end; run it again to go on after an interruption.

    Examples:

      evolm train recipe.yaml --tokens 2M

      evolm train recipe.yaml --tokens 1B --device cuda --out models/first

      evolm train recipe.yaml --tokens 1B --device cuda --engine fsdp --processes 8

      torchrun --nproc_per_node 8 -m evolm train recipe.yaml --tokens 1B --device cuda --engine fsdp
    """
    from evolm.config import load_recipe
    from evolm.errors import RankLost
    from evolm.ranks import BYSTANDER, LAUNCHER, check_devices, end_with_launcher, run_ranks, this_command
    from evolm.run_folder import RUNS
    from evolm.training import read_trainable, train_recipe

    _check_engine(engine, zero_stage, offload)
    name, read = load_recipe(recipe)
    length, weights, chosen = _tokens(tokens), _weights(target, read.data.sources), cast("EngineName | None", engine)
    sinks = list(dict.fromkeys(sink or []))
    if processes is not None and "RANK" not in os.environ:
        read_trainable(
            recipe,
            tokens=length,
            device=device,
            engine=chosen,
            world=processes,
            together=True,
            offload=offload,
            sinks=sinks,
        )
        check_devices(device, processes)
        raise typer.Exit(run_ranks(this_command(), processes))
    _check_rank(processes)
    end_with_launcher()
    folder = out or RUNS / name
    try:
        done = train_recipe(
            recipe,
            folder,
            tokens=length,
            seed=seed,
            device=device,
            threads=threads,
            cache=cache,
            roots=root,
            target=weights,
            test=test,
            export=export,
            engine=chosen,
            zero_stage=cast("ZeroStage", zero_stage),
            offload=offload,
            sinks=sinks,
        )
    except RankLost as error:
        if LAUNCHER in os.environ:
            typer.echo(f"error: {error}", err=True)
            raise typer.Exit(BYSTANDER) from None
        raise
    if done.record is None:
        if done.first:
            typer.echo("interrupted, everything is saved; the same command goes on", err=True)
        raise typer.Exit(128 + (done.signal or 2))
    for split in ("validation", "test"):
        if split in done.record:
            typer.echo(f"{split}: " + "  ".join(f"{name} {value:.4f}" for name, value in done.record[split].items()))
    if "export" in done.record:
        typer.echo(f"exported as {done.record['export']['class']}: {done.record['export']['folder']}")


def _check_engine(engine: str | None, zero_stage: int, offload: bool) -> None:
    """Raises UsageError for flags that do not go together."""
    from evolm.errors import UsageError
    from trainer.extras import ENGINES, ZERO_STAGES

    if zero_stage not in ZERO_STAGES:
        raise UsageError(f"--zero-stage must be one of {', '.join(map(str, ZERO_STAGES))}, is {zero_stage}")
    if engine is not None and engine not in ENGINES:
        raise UsageError(f"--engine must be one of {', '.join(ENGINES)}, is '{engine}'")
    for flag, given in (("--zero-stage", zero_stage != 2), ("--offload", offload)):
        if given and engine != "deepspeed":
            raise UsageError(f"{flag} is for --engine deepspeed")


def _check_rank(processes: int | None) -> None:
    """Raises UsageError where this process was made one of several ranks by somebody else, and --processes asks for
    another number of them."""
    from evolm.errors import UsageError
    from evolm.ranks import LAUNCHER

    world = os.environ.get("WORLD_SIZE", "1")
    if processes is not None and LAUNCHER not in os.environ and world != str(processes):
        raise UsageError(
            f"--processes {processes}: the environment has made this process rank {os.environ['RANK']} of {world} "
            "(RANK, WORLD_SIZE); leave --processes out to train as that rank, or unset both to start ranks here"
        )


def generate(
    model: Annotated[Path, typer.Argument(help="Exported folder.", metavar="MODEL")],
    prompt: Annotated[str, typer.Option(help="Text to continue.")],
    max_tokens: Annotated[int, typer.Option(min=1, help="New tokens, at most.")] = 100,
    temperature: Annotated[float, typer.Option(min=0, help="0 takes the likeliest token every time.")] = 0.8,
    top_k: Annotated[int, typer.Option(min=0, help="Choose among the k likeliest; 0 for all.")] = 0,
    top_p: Annotated[float, typer.Option(min=0.0, max=1.0, help="Choose among the likeliest that sum to p.")] = 1.0,
    seed: Annotated[int | None, seed_option("Makes sampling repeatable.")] = None,
    device: Device = "cpu",
) -> None:
    """Continue a text with an exported model.

    Example:

      evolm generate runs/demo-1/promoted/7/export/hf --prompt 'def main(' --max-tokens 50
    """
    from trainer.serving.engine import Engine, Sampling

    sampling = Sampling(max_tokens=max_tokens, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
    typer.echo(Engine(model, device).generate(prompt, sampling))
