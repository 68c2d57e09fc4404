"""One trial, start to finish, in the process that runs it: recipe, corpus, training, scores.

This is the trial boundary: whatever goes wrong inside becomes an outcome with a reason, and the search goes on.
"""

from __future__ import annotations

import json
import time
import traceback
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evolm.errors import CheckpointError, DataError, EvolmError, RankError, RankLost, Refused
from evolm.executors.base import ENDED, Job, Outcome, Tell, TrialProgress
from evolm.executors.fence import Held, fenced, storage_words
from evolm.executors.ranked import run_over_ranks
from evolm.run_folder import final_checkpoint, latest_checkpoint, rung_checkpoint, saves
from fitness.loss import loss_metrics, score_domains
from fitness.trial import Reason
from trainer.data.corpus import Corpus
from trainer.extras import EngineName
from trainer.metrics_log import MAX_BYTES, MetricsLog
from trainer.recipe import Data, Recipe
from trainer.sinks import RunInfo, Sinks

if TYPE_CHECKING:  # torch is imported when a trial runs: the process that only decides does without
    from trainer.engines import Ranks
    from trainer.records import Progress, Record
    from trainer.telemetry import Telemetry

    Meet = Callable[[], AbstractContextManager[tuple[Ranks | None, str]]]

NOTICED = "another rank of this trial has gone"
"""What a rank tells that is not why its trial came to nothing."""


@dataclass(frozen=True, kw_only=True)
class Context:
    """What all trials of a run share.

    `documents` pins the sources: their digests when the run began. A running trial saves every `checkpoint_seconds`
    and keeps its last `keep_last` saves; `keep_final` has trials of the top rung save their final weights. A trial is
    trained by so many `processes` together, under an `engine`. `log_bytes` bounds each metrics.jsonl, and `sinks` says
    where its lines go besides.
    """

    cache: str
    roots: list[str]
    documents: dict[str, str]
    target: dict[str, float] | None
    device: str = "cpu"
    threads: int = 1
    checkpoint_seconds: float = 300.0
    keep_last: int = 1
    keep_final: bool = False
    log_bytes: int = MAX_BYTES
    sinks: list[str] = field(default_factory=list)
    processes: int = 1
    engine: EngineName | None = None

    def as_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return asdict(self)


def run_recipe(job: Job, tell: Tell) -> Outcome:
    """Train and score a job's genome up to its rung, over several processes where there are to be. Never raises."""
    context = Context(**job.context)
    if context.processes > 1:
        try:
            return run_over_ranks(run_rank, job, tell, context.processes, _noticed)
        except Exception as error:  # as in `_run`: ranks that cannot be started are this trial's failure alone
            return _failed(job, error)
    return _run(job, tell, context, lambda: nullcontext((None, context.device)))


def run_rank(job: Job, tell: Tell) -> Outcome:
    """`run_recipe` in one of the processes that train a trial together. The first one's outcome counts."""
    from trainer.engines import open_ranks

    context = Context(**job.context)
    return _run(job, tell, context, lambda: open_ranks(context.device))


def _noticed(outcome: Outcome) -> bool:
    """Whether an outcome is that of a rank that another one left."""
    return outcome.message == ENDED or outcome.message.startswith(NOTICED)


def _run(job: Job, tell: Tell, context: Context, meet: Meet) -> Outcome:
    started = time.perf_counter()
    spent = _Spent()
    try:
        with meet() as (ranks, device), _held(job, ranks):
            return _train_and_score(job, tell, replace(context, device=device), spent, ranks)
    except RankLost as error:
        outcome = job.failed("lost", f"{NOTICED}: {error}")
    except RankError as error:
        outcome = job.failed("lost", str(error))
    except Held as error:
        outcome = job.failed("lost", str(error))
    except Exception as error:  # the one broad except of evolm: no trial's failure may end the search
        outcome = _failed(job, error)
    return replace(outcome, flops=spent.flops, seconds=time.perf_counter() - started)


def _held(job: Job, ranks: Ranks | None) -> AbstractContextManager[None]:
    """The trial's folder, which the first rank holds for all."""
    return fenced(Path(job.folder)) if ranks is None or ranks.first else nullcontext()


@dataclass
class _Spent:
    """FLOPs of a launch so far, for the case that it comes to nothing: up to its last whole step."""

    flops: float = 0.0


def _train_and_score(job: Job, tell: Tell, context: Context, spent: _Spent, ranks: Ranks | None) -> Outcome:
    import torch

    from trainer.engines import ALONE
    from trainer.evaluate import TokenScorer
    from trainer.telemetry import Telemetry

    ranks = ranks or ALONE

    torch.set_num_threads(context.threads)
    recipe = Recipe.model_validate(job.genome)
    preparing = _Preparing(job, tell)
    data = recipe.model_dump_json(include={"data"})
    opened = partial(_corpus, data, context.cache, tuple(context.roots), preparing)
    ranks.tell(lambda: opened().digest)  # the first rank prepares it, the others find it ready
    corpus = opened()
    _refuse_changed(corpus, context)
    first = ranks.first
    with (
        MetricsLog(Path(job.folder) / "metrics.jsonl" if first else None, context.log_bytes) as log,
        Sinks(context.sinks if first else (), _run_info(job, recipe), _Warn(job)) as sinks,
    ):
        telemetry = Telemetry(recipe, context.device, log, sinks, devices=ranks.world)
        record, note = _train(job, context, recipe, corpus, _Reporter(job, tell, telemetry, spent), ranks)
        if not record.finished:
            return job.failed("interrupted", "stopped and saved", flops=record.flops, seconds=record.seconds)
        if record.model is None:
            return job.told({})  # the first rank tells
        scoring = time.perf_counter()
        losses = score_domains(TokenScorer(record.model, recipe), corpus.held_out("validation"))
        metrics = loss_metrics(losses, context.target)
        metrics |= {
            "train_loss": record.train_loss,
            "tokens_per_second": record.trained_tokens / max(record.seconds, 1e-9),
            "seconds": record.total_seconds,
            **{f"tokens/{name}": float(count) for name, count in record.tokens_by_source.items()},
            **{f"epochs/{name}": count for name, count in record.epochs_by_source.items()},
        }
        telemetry.scores({"rung": job.rung, "tokens": record.tokens, **metrics})
        seconds = record.seconds + time.perf_counter() - scoring  # before the sinks are waited for
    return job.told(metrics, flops=record.flops, seconds=seconds, message=note)


def _train(
    job: Job, context: Context, recipe: Recipe, corpus: Corpus, reporter: _Reporter, ranks: Ranks
) -> tuple[Record, str]:
    """Train from the newest checkpoint that can be used; says which ones could not."""
    from trainer.checkpoint import settle
    from trainer.engines import Setup
    from trainer.loop import train
    from trainer.records import Checkpoints

    ranks.tell(lambda: settle(latest_checkpoint(job.folder)))
    setup = Setup(engine=context.engine or ("ddp" if ranks.together else "single"), ranks=ranks)
    checkpoints = Checkpoints(
        latest=latest_checkpoint(job.folder),
        trunk=None if job.top else rung_checkpoint(job.folder, job.rung),
        final=final_checkpoint(job.folder) if job.top and context.keep_final else None,
        seconds=context.checkpoint_seconds,
        keep=context.keep_last,
    )
    notes: list[str] = []
    for start in (*saves(latest_checkpoint(job.folder)), rung_checkpoint(job.folder, job.rung - 1), None):
        if start is not None and not start.exists():
            continue
        try:
            record = train(
                recipe,
                reporter,
                corpus=corpus,
                tokens=job.tokens,
                seed=job.seed,
                start=start,
                checkpoints=checkpoints,
                device=context.device,
                roots=[Path(root) for root in context.roots],
                setup=setup,
            )
            return record, "; ".join(notes)
        except CheckpointError as error:
            if start is None:
                raise
            notes.append(f"not used: {error}")
    raise AssertionError("training from the beginning needs no checkpoint")


class _Reporter:
    """Passes the progress of training on: to the executor every step, to metrics.jsonl now and then."""

    def __init__(self, job: Job, tell: Tell, telemetry: Telemetry, spent: _Spent) -> None:
        self.job, self.tell, self.telemetry, self.spent = job, tell, telemetry, spent

    def __call__(self, progress: Progress) -> bool:
        self.spent.flops = progress.flops
        self.telemetry(progress)
        return self.tell(
            TrialProgress(
                trial=self.job.trial,
                tokens=progress.tokens,
                total_tokens=progress.total_tokens,
                loss=progress.loss,
                tokens_per_second=progress.tokens_per_second,
                flops=progress.flops,
            )
        )


def _run_info(job: Job, recipe: Recipe) -> RunInfo:
    """What sinks are told of a trial."""
    folder = Path(job.folder)
    home = folder.parent.parent  # runs/NAME/trials/ID
    name = f"trial-{job.trial}-rung-{job.rung}"
    return RunInfo(folder=folder, home=home, group=home.name, name=name, recipe=recipe.model_dump(mode="json"))


@dataclass(frozen=True)
class _Warn:
    """Notes in the trial's folder what is wrong with a sink, which is no matter of the trial's."""

    job: Job

    def __call__(self, text: str) -> None:
        with suppress(OSError), (Path(self.job.folder) / "sinks.log").open("a") as log:
            log.write(text + "\n")


@lru_cache(maxsize=64)
def _corpus(data: str, cache: str, roots: tuple[str, ...], preparing: _Preparing) -> Corpus:
    """A corpus stays open between the trials of a worker."""
    values = Data.model_validate_json(json.dumps(json.loads(data)["data"]))
    return Corpus.open(values, Path(cache), [Path(root) for root in roots], preparing)


class _Preparing:
    """Tells that a trial moves while its corpus is tokenised, which may take hours. To the cache of open corpora, all
    are alike."""

    def __init__(self, job: Job, tell: Tell) -> None:
        self._job, self._tell, self._steps = job, tell, 0

    def __call__(self) -> None:
        self._steps += 1
        self._tell(TrialProgress(trial=self._job.trial, prepared=self._steps))

    def __hash__(self) -> int:
        return 0

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Preparing)


def _refuse_changed(corpus: Corpus, context: Context) -> None:
    for name, documents in corpus.documents.items():
        pinned = context.documents.get(name, documents.digest)
        if documents.digest != pinned:
            raise _CorpusChanged(
                f"source '{name}' is not what it was when the run began ({documents.digest[:12]}, was {pinned[:12]}); "
                "restore it, or start a new run"
            )


class _CorpusChanged(DataError):
    """The text that all trials are compared on is no longer the same."""


def _failed(job: Job, error: Exception) -> Outcome:
    """What an exception inside a trial means for it."""
    words = f"{type(error).__name__}: {error}" if not isinstance(error, EvolmError) else str(error)
    if isinstance(error, _CorpusChanged):
        return job.fatal("data", words)
    if storage := storage_words(Path(job.folder), error):
        return job.fatal("storage", storage)
    if isinstance(error, DataError):
        return job.infeasible(words)
    reason: Reason = "crashed"
    if isinstance(error, Refused):
        reason = error.reason  # type: ignore[assignment]  # a trial's reason by construction
    elif _out_of_memory(error):
        reason = "oom"
    else:
        with suppress(OSError):  # the folder itself may be what is wrong; the message is in the ledger
            (Path(job.folder) / "error.log").write_text("".join(traceback.format_exception(error)))
    return job.failed(reason, words)


def _out_of_memory(error: Exception) -> bool:
    words = str(error)
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or (isinstance(error, RuntimeError) and ("can't allocate memory" in words or "out of memory" in words))
    )
