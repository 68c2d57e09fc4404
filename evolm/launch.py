"""Starting and resuming searches: from a space file or a run folder to a controller at work, and what it leaves
behind."""

from __future__ import annotations

import os
import platform
import re
import shutil
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from evolm import __version__
from evolm.algorithms import load_algorithm
from evolm.config import SpaceFile, load_space
from evolm.controller import Budget, Controller, Why
from evolm.errors import (
    DataError,
    EvolmError,
    ExecutorError,
    Interrupted,
    NothingFeasible,
    Problem,
    RunBusy,
    SpaceError,
    StorageError,
    UsageError,
)
from evolm.executors.base import Executor, Limits, Runner
from evolm.executors.command import Command, check_command, run_command
from evolm.executors.inline import InlineExecutor
from evolm.needs import refuse_unmet
from evolm.progress import show
from evolm.requests import pending
from evolm.retention import Keep, Retention
from evolm.run import Run, current_settings, load
from evolm.run_folder import RunFolder, existing, new_or_named
from evolm.search import Search
from evolm.settings import Settings, with_overrides
from evolm.signals import on_signals
from evolm.worker import Context, run_recipe
from fitness.ledger import Ledger
from fitness.repair import repair as repair_ledger
from search_spaces.genes import ChoiceGene, NumberGene
from search_spaces.genome import difference
from search_spaces.yaml_source import Document
from trainer.data.cache import default_cache
from trainer.data.corpus import Corpus
from trainer.data.tokenizer import open_tokenizer
from trainer.recipe import Data
from trainer.sinks import check_sinks

EXECUTORS = ("ray", "inline")

Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Ended:
    """How a search ended: the run, why, the signal that ended it, and whether it was not waited for running trials."""

    run: Run
    why: Why
    signal: int | None
    abandoned: bool = False


def start(
    path: Path,
    *,
    run: str | None = None,
    executor: str = "ray",
    address: str | None = None,
    cache: Path | None = None,
    say: Say = lambda text: None,
    **overrides: Any,
) -> Ended:
    """Search the space in a file. A run that exists and has the same space is continued.

    Raises UsageError, SpaceError, DataError, RunBusy, StorageError, ExecutorError, NothingFeasible.
    """
    _check_executor(executor)
    file = load_space(path)
    refuse_unmet(file)
    if file.settings.command is not None:
        check_command(file.settings.command, Path.cwd(), file.document)
    check_sinks(file.settings.sinks)
    folder = new_or_named(run, file.name)
    _forget_unbegun(folder)
    if folder.exists:
        _refuse_other_space(folder, file)
        return resume(str(folder.path), executor=executor, address=address, cache=cache, say=say, **overrides)
    settings = with_overrides(file.settings, **overrides)
    load_algorithm(settings.algorithm)
    fresh = not folder.path.exists()
    with folder.locked():
        _forget_requests(folder)
        with ExitStack() as undo:
            if fresh:  # where nothing was begun, nothing is left behind
                undo.callback(shutil.rmtree, folder.path, ignore_errors=True)
            roots = [str(folder) for folder in (Path.cwd(), *file.document.folders)]
            meta = {
                "settings": settings.as_dict(),
                "roots": roots,
                "cache": str((cache or default_cache()).absolute()),
                "corpus": _prepare(file, cache or default_cache(), roots, say),
                "evolm": __version__,
            }
            undo.pop_all()
        _freeze(folder, file)
        ledger = Ledger.create(folder.ledger, meta)
        return _work(folder, file, settings, ledger, executor, address, say)


def resume(
    run: str,
    *,
    executor: str = "ray",
    address: str | None = None,
    cache: Path | None = None,
    repair: bool = False,
    say: Say = lambda text: None,
    **overrides: Any,
) -> Ended:
    """Go on with a run where it stopped. Budgets may be raised; what decides which genomes come next may not be
    changed. With `repair`, a damaged ledger is first made anew of what can still be read."""
    _check_executor(executor)
    folder = existing(run)
    with folder.locked():
        _forget_requests(folder)
        file = load_space(folder.space)
        refuse_unmet(file)
        if repair:
            say(str(repair_ledger(folder.ledger)))
        ledger = Ledger.open(folder.ledger, write=True)
        begun = current_settings(ledger)
        for name in ("algorithm", "seed"):
            wanted = overrides.get(name)
            if wanted is not None and wanted != getattr(begun, name):
                raise UsageError(f"run '{folder.name}' was begun with {name} {getattr(begun, name)}, not {wanted}")
        settings = with_overrides(begun, **overrides)
        check_sinks(settings.sinks)
        if overrides.get("trials") is not None and settings.trials < len(ledger.trials):
            raise UsageError(f"--trials {settings.trials}: run '{folder.name}' has {len(ledger.trials)} already")
        if settings.trials <= len(ledger.trials) and not ledger.in_state("proposed", "running"):
            say(f"all {settings.trials} trials of the budget were tried; for more, give --trials N")
        _prepare(file, cache or Path(ledger.meta["cache"]), ledger.meta["roots"], say)
        return _work(folder, file, settings, ledger, executor, address, say, cache=cache)


def _freeze(folder: RunFolder, file: SpaceFile) -> None:
    """Keep the space as it is now. Raises StorageError."""
    try:
        folder.space.write_text(file.text)
    except OSError as error:
        advice = "free some space, then run the command again"
        raise StorageError(f"{folder.space}: cannot be written: {error.strerror}; {advice}") from None


def _check_executor(executor: str) -> None:
    if executor not in EXECUTORS:
        raise UsageError(f"--executor must be one of {', '.join(EXECUTORS)}, is '{executor}'")


def _forget_unbegun(folder: RunFolder) -> None:
    """Take away a run whose workers never came: nothing was tried, and its space may have been what was wrong."""
    if not folder.exists:
        return
    with suppress(RunBusy), folder.locked():  # whoever is at work there is told of where the search begins
        with closing(Ledger.open(folder.ledger)) as ledger:
            begun = bool(ledger.trials)
        if not begun:
            for path in (*folder.path.glob(f"{folder.ledger.name}*"), folder.path / "ballast", folder.space):
                path.unlink(missing_ok=True)


def _forget_requests(folder: RunFolder) -> None:
    """Requests to end were meant for an earlier controller; this one hears those that come from now on."""
    for request in pending(folder):
        if request.kind != "enqueue":
            request.done()


def _refuse_other_space(folder: RunFolder, file: SpaceFile) -> None:
    frozen = load_space(folder.space)
    changed = difference(frozen.document.value, file.document.value)
    if changed:
        listing = "\n  ".join(changed[:20])
        raise UsageError(
            f"run '{folder.name}' was begun with another space:\n  {listing}\n"
            f"continue it with `evolm resume {folder.path}`, or give the new search another --run"
        )


def _prepare(file: SpaceFile, cache: Path, roots: list[str], say: Say) -> dict[str, Any]:
    """Build the corpus before any trial, so that bad data is told at once, and a vocabulary that the text cannot
    fill; returns what it is made of. The data of somebody else's trainer are its own; that it is there is checked."""
    if file.settings.command is not None:
        check_command(file.settings.command, Path(roots[0]), file.document)
        return {"sources": {}}
    data = Data.model_validate(file.space.baseline.values()["data"])
    say("reading the corpus")
    try:
        corpus = Corpus.open(data, cache, [Path(root) for root in roots])
    except DataError as error:
        raise _placed(error, file.document) from None
    largest = _largest_vocabulary(file, data.tokenizer.vocab_size)
    if largest > data.tokenizer.vocab_size:
        open_tokenizer(data.tokenizer.model_copy(update={"vocab_size": largest}), corpus.documents, cache)
    return corpus.manifest()


def _placed(error: DataError, document: Document) -> EvolmError:
    """The error with the line of the source that it names."""
    found = re.match(r"data\.sources\.([^:]+): ", str(error))
    if found is None:
        return error
    problem = Problem(path=("data", "sources", found[1]), rule=str(error)[found.end() :])
    return SpaceError(document.locate([problem]))


def _largest_vocabulary(file: SpaceFile, given: int) -> int:
    gene = next((gene for gene in file.space.genes if gene.path == ("data", "tokenizer", "vocab_size")), None)
    if isinstance(gene, NumberGene):
        return int(gene.high)
    return max(gene.items) if isinstance(gene, ChoiceGene) else given


def _work(
    folder: RunFolder,
    file: SpaceFile,
    settings: Settings,
    ledger: Ledger,
    executor: str,
    address: str | None,
    say: Say,
    cache: Path | None = None,
) -> Ended:
    """Run the controller to its end and write the report."""
    search = Search(
        file.space,
        settings.objectives,
        algorithm=settings.algorithm,
        seed=settings.seed,
        fidelity=settings.fidelity,
        ledger=ledger,
    )
    runner, context = _runner(settings, ledger, cache)
    view = show(search, settings.trials)
    say(f"starting workers ({executor})")
    try:
        workers = _executor(executor, runner, settings, address)
    except SystemExit:  # Ray's own answer to SIGTERM
        raise Interrupted(signal.SIGTERM) from None
    ledger.open_session({**_session(executor), "settings": settings.as_dict()})
    try:
        controller = Controller(
            folder,
            search,
            workers,
            budget=Budget(trials=settings.trials, seconds=None if settings.hours is None else settings.hours * 3600),
            seed=settings.seed,
            context=context,
            view=view,
            limits=_limits(settings, workers),
            retention=Retention(
                folder, Keep.of(settings, folder), settings.fidelity, search.objectives, settings.trials
            ),
            requests=lambda: pending(folder),
        )
        if isinstance(workers, InlineExecutor):
            workers.on_progress = controller.heard_inline
        with _stopped_by_signals(controller) as received, view:
            try:
                why = controller.run()
            except ExecutorError as error:
                raise ExecutorError(f"{error}\n{_go_on(folder)}") from None
            except EvolmError:
                ledger.close_session("storage" if controller.fatal else "error")
                raise
        ledger.close_session(why)
    finally:
        workers.close()
        ledger.close()
    ended = load(folder.path.absolute())
    if why != "interrupted" and not any(trial.state == "complete" for trial in ended.trials()):
        reasons = (
            ", ".join(f"{count} {name}" for name, count in ended.status()["failures"].items()) or "none was started"
        )
        raise NothingFeasible(
            f"run '{folder.name}' ended without a completed trial: {reasons}; `evolm status {folder.path}` shows it"
        )
    return Ended(run=ended, why=why, signal=received[-1] if received else None, abandoned=controller.cancelling)


def _go_on(folder: RunFolder) -> str:
    return f"everything told is saved; go on with: evolm resume {folder.path}"


def _runner(settings: Settings, ledger: Ledger, cache: Path | None) -> tuple[Runner, dict[str, Any]]:
    """Who runs trials, and what all of them share."""
    if settings.command is not None:
        return run_command, Command(
            command=list(settings.command), objectives=list(settings.objectives), roots=ledger.meta["roots"]
        ).as_dict()
    context = Context(
        cache=str((cache or Path(ledger.meta["cache"])).absolute()),
        roots=ledger.meta["roots"],
        documents={name: one["digest"] for name, one in ledger.meta["corpus"]["sources"].items()},
        target=settings.target,
        device="cuda" if settings.gpus > 0 else "cpu",
        threads=max(1, int(settings.cpus / settings.ranks)),
        checkpoint_seconds=settings.checkpoint_minutes * 60,
        keep_last=settings.keep_last,
        keep_final=settings.keep_best > 0,
        log_bytes=settings.log_bytes,
        sinks=list(settings.sinks),
        processes=settings.ranks,
        engine=settings.engine,
    )
    return run_recipe, context.as_dict()


def _executor(name: str, runner: Runner, settings: Settings, address: str | None) -> Executor:
    if name == "inline":
        from trainer.device import usable_device

        usable_device("cuda" if settings.gpus > 0 else "cpu")
        return InlineExecutor(runner)
    from evolm.executors.ray_actors import Needs, RayExecutor

    needs = Needs(cpus=settings.cpus, gpus=settings.gpus, memory=settings.memory)
    return RayExecutor(runner, needs, slots=settings.max_concurrent, address=address)


def _limits(settings: Settings, workers: Executor) -> Limits:
    """What one launch of a trial may take; without a word in the space, its share of the memory of a node."""
    return Limits(
        seconds=None if settings.trial_hours is None else settings.trial_hours * 3600,
        silent_seconds=settings.silent_minutes * 60,
        memory=settings.memory or workers.memory_share,
    )


def _session(executor: str) -> dict[str, Any]:
    """Who works, and with what: the versions that results depend on."""
    versions = {"python": platform.python_version(), "evolm": __version__}
    for package in ("torch", "transformers", "tokenizers", "ray", "numpy", "deap", "moocore"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "missing"
    return {
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "executor": executor,
        "command": " ".join(sys.argv),
        "versions": versions,
    }


@contextmanager
def _stopped_by_signals(controller: Controller) -> Iterator[list[int]]:
    """First signal: launch nothing more, running trials save and end. Second: leave them. Third: die."""
    received: list[int] = []

    def handle(number: int) -> None:
        received.append(number)
        if len(received) >= 3:
            os._exit(128 + number)
        controller.stop()

    with on_signals(handle):
        yield received
