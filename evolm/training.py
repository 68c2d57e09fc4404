"""One recipe, trained to the end in a folder: what `evolm train` does, and what promotion does twice."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evolm.config import load_recipe
from evolm.errors import UsageError
from evolm.run_folder import RunFolder
from evolm.signals import on_signals
from fitness.loss import loss_metrics, score_domains
from search_spaces.quantities import format_count
from trainer.cost import costs
from trainer.data.cache import default_cache
from trainer.data.corpus import Corpus
from trainer.extras import (
    EngineName,
    ZeroStage,
    missing_extra,
    refuse_setup,
    refuse_untrainable,
    unusable_kernel,
    unusable_precision,
)
from trainer.place import Place
from trainer.recipe import Recipe
from trainer.sinks import check_sinks

if TYPE_CHECKING:
    from trainer.engines import Ranks
    from trainer.records import Progress, Record

TEST_BYTES = 2**20
"""Test text that a finished model is judged on, per domain."""


@dataclass(frozen=True, kw_only=True)
class Trained:
    """A stage that ended: its folder and record, or the signal that stopped it. `first` is false on all but the first
    of several ranks, which have nothing to tell."""

    folder: Path
    record: dict[str, Any] | None
    signal: int | None = None
    first: bool = True


def read_trainable(
    path: Path,
    *,
    tokens: int | None = None,
    device: str = "cpu",
    engine: EngineName | None = None,
    world: int = 1,
    together: bool = False,
    offload: bool = False,
    sinks: Sequence[str] = (),
) -> tuple[str, Recipe, int]:
    """Name, recipe and tokens of a recipe that can be trained so, over `world` processes, which are ranks where they
    are `together`. Looks at no data, writes nothing and needs no torch. Raises UsageError, SpaceError."""
    check_sinks(sinks)
    name, recipe = load_recipe(path)
    length = tokens or recipe.train.tokens
    if length is None:
        raise UsageError(f"{path}: needs `train.tokens`, or give --tokens")
    for words in (
        missing_extra(recipe.train.optimizer),
        unusable_precision(recipe.train.precision, device),
        unusable_kernel(recipe.train.attention_kernel, device),
    ):
        if words:
            raise UsageError(f"{path}: {words}")
    chosen = engine or ("ddp" if together else "single")
    refuse_setup(chosen, world, together=together, offload=offload)
    refuse_untrainable(recipe, chosen)
    return name, recipe, length


def train_recipe(
    path: Path,
    folder: Path,
    *,
    tokens: int | None = None,
    seed: int | None = None,
    device: str = "cpu",
    threads: int | None = None,
    cache: Path | None = None,
    roots: list[str] | None = None,
    target: dict[str, float] | None = None,
    test: bool = False,
    export: bool = True,
    engine: EngineName | None = None,
    zero_stage: ZeroStage = 2,
    offload: bool = False,
    sinks: Sequence[str] = (),
) -> Trained:
    """Train the recipe in a file, score it on validation (and, with `test`, test) text, export it. Its numbers also go
    to the `sinks` of these names.

    Goes on where the folder stopped. In a process that is one of several ranks it meets the others, and the first one
    alone locks the folder, scores and exports; the engine is then ddp when none is named. Raises UsageError,
    SpaceError, DataError, RankError, and what training raises.
    """
    place = Place.of(os.environ)
    name, recipe, length = read_trainable(
        path,
        tokens=tokens,
        device=device,
        engine=engine,
        world=1 if place is None else place.world,
        together=place is not None,
        offload=offload,
        sinks=sinks,
    )
    # Before torch: threads that wait by spinning bring a busy machine to a standstill.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    import torch

    from trainer.device import usable_device
    from trainer.engines import Setup, open_ranks
    from trainer.stages.pretrain import Stage, pretrain

    if place is None:
        usable_device(device)
    if threads:
        torch.set_num_threads(threads)
    places = [Path(root) for root in roots or [str(Path.cwd()), str(path.resolve().parent)]]
    chosen = recipe.train.seed if seed is None else seed
    show = _Line(name)
    with open_ranks(device, place=place) as (ranks, here):
        setup = Setup(
            engine=engine or ("ddp" if ranks.together else "single"),
            ranks=ranks,
            zero_stage=zero_stage,
            offload=offload,
        )
        show.silent = not ranks.first
        with RunFolder(folder).locked() if ranks.first else nullcontext():
            corpus = _opened(ranks, recipe, cache or default_cache(), places)
            with on_signals(show.hear):
                record = pretrain(
                    recipe,
                    corpus,
                    folder,
                    tokens=length,
                    seed=chosen,
                    device=here,
                    report=show,
                    roots=places,
                    setup=setup,
                    sinks=sinks,
                    warn=lambda text: print(f"warning: {text}", file=sys.stderr, flush=True),
                )
            if record is not None and not record.finished:
                return Trained(folder=folder, record=None, signal=show.received, first=ranks.first)
            if not ranks.first:
                return Trained(folder=folder, record={}, first=False)
            stage = Stage(folder)
            if record is not None and stage.record() is None:
                about = {"name": name, "tokens": record.tokens, "seed": chosen}
                values = about | _judged(record, recipe, corpus, target, test)
                if export:
                    values["export"] = export_stage(stage, recipe, corpus, folder / "export" / "hf", values)
                stage.finish(values)
    return Trained(folder=folder, record=stage.record())


def _opened(ranks: Ranks, recipe: Recipe, cache: Path, roots: list[Path]) -> Corpus:
    """The corpus; of several ranks the first one prepares it, and the others find it ready."""
    mine: list[Corpus] = []

    def prepare() -> None:
        mine.append(Corpus.open(recipe.data, cache, roots))

    ranks.tell(prepare)
    return mine[0] if mine else Corpus.open(recipe.data, cache, roots)


def _judged(
    record: Record, recipe: Recipe, corpus: Corpus, target: dict[str, float] | None, test: bool
) -> dict[str, Any]:
    """What a finished training cost and what its model scores."""
    assert record.model is not None  # the first rank's
    scores = {split: _scores(record.model, recipe, corpus, split, target) for split in ("validation", *["test"] * test)}
    return {
        "flops": record.total_flops,
        "seconds": record.total_seconds,
        "train_loss": record.train_loss,
        "params": costs(recipe).params,
        "corpus": corpus.manifest(),
        **scores,
    }


def export_stage(stage: Any, recipe: Recipe, corpus: Corpus, folder: Path, about: dict[str, Any]) -> dict[str, Any]:
    """Export the final weights of a stage to a folder in Hugging Face's layout; returns the receipt."""
    from trainer.export.huggingface import export_huggingface
    from trainer.stages.pretrain import load_final

    lineage = {**about, "recipe": recipe.model_dump(mode="json")}
    return {"folder": str(folder), **export_huggingface(load_final(stage, recipe), corpus.tokenizer, folder, lineage)}


def _scores(
    model: Any, recipe: Recipe, corpus: Corpus, split: str, target: dict[str, float] | None
) -> dict[str, float]:
    from trainer.evaluate import TokenScorer

    text = corpus.held_out(split, TEST_BYTES if split == "test" else None)
    return loss_metrics(score_domains(TokenScorer(model, recipe), text), target)


class _Line:
    """Progress in one line: rewritten in place on a terminal, every tenth of the way elsewhere. False after a
    signal."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.received: int | None = None
        self._terminal = sys.stderr.isatty()
        self.silent = False
        self._next = 0.0
        self._shown = 0.0

    def hear(self, number: int) -> None:
        """A signal came: training saves and ends after its current step."""
        self.received = number

    def __call__(self, progress: Progress) -> bool:
        now = time.monotonic()
        last = progress.tokens >= progress.total_tokens
        due = now - self._shown > 0.5 if self._terminal else progress.tokens >= self._next
        if (due or last) and not self.silent:
            self._shown = now
            self._next = progress.tokens + 0.1 * progress.total_tokens
            text = (
                f"{self.name}  {format_count(progress.tokens)}/{format_count(progress.total_tokens)} tokens  "
                f"loss {progress.loss:.3f}  {progress.tokens_per_second / 1000:.1f}k tokens/s"
            )
            end = "\r" if self._terminal and not last else "\n"
            print(f"{text:<78}" if self._terminal else text, end=end, file=sys.stderr, flush=True)
        return self.received is None
