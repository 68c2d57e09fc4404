"""The training loop: one recipe, one corpus, one horizon, one record.

`train` is a plain function. It calls `report` after every optimiser step and stops, with a checkpoint, when that says
so. What it does depends on recipe, corpus, seed and horizon alone: a run that was stopped and continued is the same
run.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from trainer.checkpoint import RunState, read_state, write_checkpoint
from trainer.cost import costs, micro_batch_tokens
from trainer.data.corpus import Corpus
from trainer.data.loader import Loader
from trainer.engines import Setup, build_engine
from trainer.engines.shares import passes
from trainer.errors import CheckpointError, DataError
from trainer.gates import check_causality, check_floor
from trainer.model import EvolmForCausalLM
from trainer.optim import set_learning_rate
from trainer.recipe import Recipe
from trainer.recipe_digest import recipe_digest
from trainer.schedule import Horizon, horizon_of, learning_rate
from trainer.stability import Stability

CHECK_EVERY = 10
"""On a GPU, steps between looks at the loss: each look waits for the device."""


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Where a run is: tokens so far and in all, FLOPs of this call, and what the last step looked like. Losses are nats
    per token."""

    tokens: int
    total_tokens: int
    flops: float
    loss: float
    learning_rate: float
    gradient_norm: float
    tokens_per_second: float


Report = Callable[[Progress], bool]
"""Called after each step; False stops the run."""


@dataclass(frozen=True, kw_only=True)
class Record:
    """What a run did. `flops` and `seconds` are of this call alone; all else counts from the first token. The model is
    whole, and the first rank's; the others have None."""

    model: EvolmForCausalLM | None
    finished: bool
    tokens: int
    train_loss: float
    flops: float
    seconds: float
    total_flops: float
    total_seconds: float
    tokens_by_source: dict[str, int]
    epochs_by_source: dict[str, float]


@dataclass(frozen=True, kw_only=True)
class Checkpoints:
    """Where a run keeps its checkpoints, and when.

    `latest` is written every `seconds` and when the run is stopped, and its last `keep` saves are kept; `trunk` is
    written where the decay begins, for longer horizons; `final` at the end.
    """

    latest: Path | None = None
    trunk: Path | None = None
    final: Path | None = None
    seconds: float = math.inf
    keep: int = 1


def train(
    recipe: Recipe,
    report: Report = lambda progress: True,
    *,
    corpus: Corpus,
    tokens: int,
    seed: int | None = None,
    start: Path | None = None,
    checkpoints: Checkpoints | None = None,
    device: str = "cpu",
    setup: Setup | None = None,
) -> Record:
    """Train a recipe's model on `tokens` tokens of its corpus, from its initial weights or from the checkpoint `start`.

    With a `setup` of several ranks all of them call this; the first one alone writes. Any of them can stop the run.

    Raises Diverged and Leak when going on would be wasted, CheckpointError when `start` is not of this run, DataError
    when the corpus is not the recipe's, UsageError when the setup cannot train it.
    """
    seed = recipe.train.seed if seed is None else seed
    if corpus.tokenizer.vocab_size != recipe.data.tokenizer.vocab_size:
        raise DataError(
            f"the corpus has a vocabulary of {corpus.tokenizer.vocab_size} entries, "
            f"the recipe one of {recipe.data.tokenizer.vocab_size}"
        )
    run = _Run(
        recipe,
        corpus,
        horizon_of(recipe, tokens),
        seed,
        checkpoints or Checkpoints(),
        torch.device(device),
        setup or Setup(),
    )
    if start is not None:
        run.load(start)
    run.check(run.engine.whole(), check_causality)
    finished = run.advance(report)
    model = run.engine.whole()
    if finished:
        run.check(model, check_causality, check_floor)
        run.save(run.checkpoints.final)
    return run.record(model, finished)


class _Run:
    """The state of one call of `train`."""

    def __init__(
        self,
        recipe: Recipe,
        corpus: Corpus,
        horizon: Horizon,
        seed: int,
        checkpoints: Checkpoints,
        device: torch.device,
        setup: Setup,
    ) -> None:
        self.recipe, self.corpus, self.horizon, self.seed = recipe, corpus, horizon, seed
        self.checkpoints, self.device, self.ranks = checkpoints, device, setup.ranks
        self.loader: Loader = corpus.loader(seed)
        self.engine = build_engine(recipe, seed, device, setup)
        self.costs = costs(recipe)
        self.samples = self.first_sample = 0
        self.flops_before = self.seconds_before = 0.0
        self.stability = Stability(recipe.data.tokenizer.vocab_size)
        self.seen = math.nan, math.nan  # loss and gradient norm when they were last looked at
        self.started = self.saved = time.perf_counter()
        self.trained_seconds = 0.0

    # --- position -----------------------------------------------------------------------------------------------------

    @property
    def flops(self) -> float:
        """FLOPs of this call."""
        return (self.samples - self.first_sample) * self.horizon.sequence_length * self.costs.flops_per_token

    @property
    def seconds(self) -> float:
        """Seconds of this call."""
        return time.perf_counter() - self.started

    def state(self) -> RunState:
        """What a checkpoint says of this run."""
        return RunState(
            samples=self.samples,
            recipe=recipe_digest(self.recipe),
            tokenizer=self.corpus.tokenizer.digest,
            corpus=self.corpus.digest,
            seed=self.seed,
            horizon=self.horizon.samples if self.samples > self.horizon.trunk else None,
            seconds=self.seconds_before + self.seconds,
            flops=self.flops_before + self.flops,
            losses=list(self.stability.losses),
        )

    def load(self, folder: Path) -> None:
        """Continue from a checkpoint of the same recipe, seed and corpus."""
        state, mine = read_state(folder), self.state()
        for field in ("recipe", "tokenizer", "corpus", "seed"):
            theirs, ours = getattr(state, field), getattr(mine, field)
            if theirs != ours:
                raise CheckpointError(f"{folder}: is of another {field} ({theirs}, this run's is {ours})")
        if state.horizon is not None and state.horizon != self.horizon.samples:
            raise CheckpointError(
                f"{folder}: has begun to decay towards {state.horizon} sequences and cannot go on to "
                f"{self.horizon.samples}"
            )
        if state.samples > self.horizon.samples:
            raise CheckpointError(f"{folder}: is already beyond {self.horizon.samples} sequences")
        if state.horizon is None and state.samples > self.horizon.trunk:
            raise CheckpointError(
                f"{folder}: is beyond sequence {self.horizon.trunk}, where a run of {self.horizon.samples} decays"
            )
        self.engine.restore(folder)
        self.stability.load(state.losses)
        self.samples = self.first_sample = state.samples
        self.flops_before, self.seconds_before = state.flops, state.seconds

    def check(self, model: EvolmForCausalLM | None, *gates: Callable[[EvolmForCausalLM], None]) -> None:
        """Put the first rank's model through gates."""
        for gate in gates:
            self.ranks.tell(partial(gate, model))

    # --- training -----------------------------------------------------------------------------------------------------

    def advance(self, report: Report) -> bool:
        """Train to the horizon; False when `report` stopped the run, which is then checkpointed."""
        if self.samples == self.horizon.trunk:
            self.save(self.checkpoints.trunk)
        while self.samples < self.horizon.samples:
            stop = not report(self.step())
            if self.samples == self.horizon.trunk:
                self.save(self.checkpoints.trunk)
            due = self.ranks.first and time.perf_counter() - self.saved > self.checkpoints.seconds
            stop, due = self.ranks.any(stop, due)
            if stop and self.samples < self.horizon.samples:
                self.save(self.checkpoints.latest)
                return False
            if due:
                self.save(self.checkpoints.latest)
        return True

    def save(self, folder: Path | None) -> None:
        """Write a checkpoint where one is wanted; before the first step there is nothing to keep."""
        if folder is not None and self.samples > 0:
            keep = self.checkpoints.keep if folder == self.checkpoints.latest else 1
            tensors = self.engine.snapshot()
            self.ranks.tell(lambda: write_checkpoint(folder, tensors or {}, self.state(), keep=keep))
            self.saved = time.perf_counter()

    def step(self) -> Progress:
        """One optimiser step over the next batch, the last of a run possibly smaller."""
        begun = time.perf_counter()
        count = min(self.horizon.batch, self.horizon.samples - self.samples)
        rate = learning_rate(self.recipe, self.horizon, self.samples)
        set_learning_rate(self.engine.optimizer, rate)
        loss = self.backward(count)
        norm = self.engine.update(self.recipe.train.grad_clip)
        first, step = self.samples == self.first_sample, self.samples // self.horizon.batch
        self.samples += count
        if self.device.type == "cpu" or first or step % CHECK_EVERY == 0 or self.samples >= self.horizon.samples:
            self.seen = loss.item(), norm.item()
            self.judge()
        tokens = count * self.horizon.sequence_length
        return Progress(
            tokens=self.samples * self.horizon.sequence_length,
            total_tokens=self.horizon.tokens,
            flops=self.flops,
            loss=self.seen[0],
            learning_rate=rate,
            gradient_norm=self.seen[1],
            tokens_per_second=tokens / (time.perf_counter() - begun),
        )

    def backward(self, count: int) -> torch.Tensor:
        """Accumulate the gradient of the mean loss over `count` samples; returns that loss, nats per token.

        Every pass of every rank is divided by the tokens of the whole batch, so that their number changes nothing but
        memory. What a mixture of experts adds for its balance is in the gradient, not in that loss.
        """
        length = self.horizon.sequence_length
        shares = passes(count, micro_batch_tokens(self.recipe) // length, self.ranks.rank, self.ranks.world)
        total = torch.zeros((), device=self.device)
        for share in shares:
            batch = torch.from_numpy(self.loader.batch(self.samples + share.offset, share.count))
            batch = batch.to(self.device, non_blocking=True)
            nats, balance = self.engine.forward(batch, last=share is shares[-1])
            loss = share.weight * nats / (count * length)
            self.engine.backward(loss if balance is None else loss + share.weight * balance / count)
            total += loss.detach()
        return self.ranks.sum(total)

    def judge(self) -> None:
        """End the run when it has gone wrong: raises Diverged."""
        step = -(-self.samples // self.horizon.batch)
        self.stability.judge(step, *self.seen, last=self.samples >= self.horizon.samples)

    def record(self, model: EvolmForCausalLM | None, finished: bool) -> Record:
        """What this call did."""
        return Record(
            model=model,
            finished=finished,
            tokens=self.samples * self.horizon.sequence_length,
            train_loss=self.stability.mean,
            flops=self.flops,
            seconds=self.seconds,
            total_flops=self.flops_before + self.flops,
            total_seconds=self.seconds_before + self.seconds,
            tokens_by_source=self.loader.drawn(self.samples),
            epochs_by_source=self.loader.epochs(self.samples),
        )
