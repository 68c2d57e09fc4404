"""The training loop: one recipe, one corpus, one horizon, one record.

`train` is a plain function. It calls `report` after every optimiser step and stops, with a checkpoint, when that says
so. What it does depends on recipe, corpus, seed and horizon alone: a run that was stopped and continued is the same
run.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import torch

from search_spaces.errors import UsageError
from trainer.attention_kernels import BLOCK
from trainer.averaging import Average
from trainer.checkpoint import RunState, read_state, write_checkpoint
from trainer.compiling import compiled_blocks, compiles
from trainer.cost import costs
from trainer.data.corpus import Corpus
from trainer.data.loader import Loader
from trainer.device import reused_memory
from trainer.distillation import Teacher
from trainer.engines import Setup, build_engine
from trainer.engines.base import uncounted
from trainer.engines.shares import passes
from trainer.errors import CheckpointError, DataError
from trainer.extras import unusable_kernel, unusable_precision
from trainer.gates import check_causality, check_floor
from trainer.loss_scale import LossScale
from trainer.memory import micro_batch, out_of_memory, recompute_blocks
from trainer.model import EvolmForCausalLM, forget_loads, rebalance
from trainer.objective import dropout_stream
from trainer.optim import set_learning_rate
from trainer.recipe import Recipe
from trainer.recipe_digest import recipe_digest
from trainer.records import Checkpoints, Progress, Record, Report
from trainer.schedule import Horizon, horizon_of, learning_rate
from trainer.stability import Spikes, Stability
from trainer.telemetry import Meter

CHECK_EVERY = 10
"""On a GPU, steps between looks at the loss: each look waits for the device."""


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
    roots: Sequence[Path] = (),
    setup: Setup | None = None,
) -> Record:
    """Train a recipe's model on `tokens` tokens of its corpus, from its initial weights or from the checkpoint `start`.
    A teacher is looked for below `roots`. With a `setup` of several ranks all of them call this; the first one alone
    writes, any of them can stop the run.

    Raises Diverged and Leak when going on would be wasted, CheckpointError when `start` is not of this run, DataError
    when corpus or teacher is not the recipe's, UsageError when the recipe cannot be trained on this device or with this
    setup.
    """
    seed = recipe.train.seed if seed is None else seed
    for words in (
        unusable_precision(recipe.train.precision, device),
        unusable_kernel(recipe.train.attention_kernel, device),
    ):
        if words:
            raise UsageError(words)
    if corpus.tokenizer.vocab_size != recipe.data.tokenizer.vocab_size:
        raise DataError(
            f"the corpus has a vocabulary of {corpus.tokenizer.vocab_size} entries, "
            f"the recipe one of {recipe.data.tokenizer.vocab_size}"
        )
    teacher = Teacher.open(recipe, corpus.tokenizer, roots, device)
    horizon = horizon_of(recipe, tokens)
    run = _Run(
        recipe, corpus, horizon, seed, checkpoints or Checkpoints(), torch.device(device), setup or Setup(), teacher
    )
    if start is not None:
        run.load(start)
    with reused_memory():
        run.check(check_causality)
        finished = run.advance(report)
        if finished:
            run.finish()
    return run.record(finished)


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
        teacher: Teacher | None,
    ) -> None:
        self.recipe, self.corpus, self.horizon, self.seed = recipe, corpus, horizon, seed
        self.checkpoints, self.device, self.teacher = checkpoints, device, teacher
        self.ranks = setup.ranks
        # Before the engine takes what the prediction counts.
        self.micro, self.oom_backoffs = self.ranks.least(micro_batch(recipe, device, setup)), 0
        self.engine = build_engine(recipe, seed, device, setup, teacher)
        self.loader: Loader = corpus.loader(seed)
        self.meter = Meter(self.loader, device, self.engine.model)
        self.average = Average(self.engine.model, recipe.train.ema) if recipe.train.ema else None
        self.scale = LossScale(device) if recipe.train.precision == "fp16" else None
        self.spikes = Spikes(recipe.train.skip_spikes) if recipe.train.skip_spikes else None
        self.stability = Stability(recipe.data.tokenizer.vocab_size)
        if recipe.train.gradient_checkpointing:
            recompute_blocks(self.engine.model)
        self.flops_per_token = {phase.length: self.price(phase.length) for phase in horizon.sequences}
        self.samples = self.first_sample = 0
        self.flops_before = self.seconds_before = 0.0
        self.seen = math.nan, math.nan  # loss and gradient norm when they were last looked at
        self.started = self.saved = time.perf_counter()

    # --- position -----------------------------------------------------------------------------------------------------

    def price(self, length: int) -> float:
        """FLOPs of training on a token in a piece of so many, those of the teacher included."""
        data = self.recipe.data.model_copy(update={"sequence_length": length})
        taught = 0.0 if self.teacher is None else self.teacher.flops_per_token
        return costs(self.recipe.model_copy(update={"data": data})).flops_per_token + taught

    def flops_of(self, first: int, last: int) -> float:
        """FLOPs of the samples from `first` to before `last`."""
        spans = self.horizon.spans(first, last)
        return sum(count * self.horizon.sequence_length * self.flops_per_token[length] for count, length in spans)

    @property
    def flops(self) -> float:
        """FLOPs of this call."""
        return self.flops_of(self.first_sample, self.samples)

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
            teacher=None if self.teacher is None else self.teacher.digest,
            micro_batch=self.micro,
            oom_backoffs=self.oom_backoffs,
            spikes=None if self.spikes is None else self.spikes.state(),
            scaler=None if self.scale is None else self.scale.state(),
        )

    def load(self, folder: Path) -> None:
        """Continue from a checkpoint of the same recipe, seed and corpus."""
        state, mine = read_state(folder), self.state()
        for field in ("recipe", "tokenizer", "corpus", "seed", "teacher"):
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
        self.engine.restore(folder, self.average)
        self.stability.load(state.losses)
        if self.spikes is not None and state.spikes is not None:
            self.spikes.load(state.spikes)
        if self.scale is not None and state.scaler is not None:
            self.scale.load(state.scaler)
        self.samples = self.first_sample = state.samples
        self.flops_before, self.seconds_before = state.flops, state.seconds
        self.oom_backoffs = state.oom_backoffs
        if state.micro_batch is not None and (state.oom_backoffs or self.recipe.train.micro_batch_tokens is None):
            self.micro = state.micro_batch  # what fits was found out, and another size would round otherwise

    # --- training -----------------------------------------------------------------------------------------------------

    def advance(self, report: Report) -> bool:
        """Train to the horizon; False when `report` stopped the run, which is then checkpointed."""
        whole = self.flops_of(0, self.horizon.samples)
        wanted = self.engine.compiles and compiles(self.recipe, self.device, whole)
        with compiled_blocks(self.engine.model, wanted):
            return self.steps(report)

    def steps(self, report: Report) -> bool:
        """The steps to the horizon, and what is saved between them."""
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

    def step(self) -> Progress:
        """One optimiser step over the next batch, the last of a run possibly smaller."""
        begun = time.perf_counter()
        count, number = self.horizon.count(self.samples), self.horizon.step(self.samples)
        rate = learning_rate(self.recipe, self.horizon, self.samples)
        set_learning_rate(self.engine.optimizer, rate)
        loss = self.gradient(count)
        norm = self.clip()
        skip = self.stands_out(number + 1, loss, norm)
        self.update(number, skip)
        first = self.samples == self.first_sample
        self.samples += count
        last = self.samples == self.horizon.samples
        now = self.device.type == "cpu" or self.spikes is not None or first or last or number % CHECK_EVERY == 0
        if now:
            self.look(number + 1, loss, norm, last=last, skipped=skip)
        tokens = count * self.horizon.sequence_length
        return Progress(
            tokens=self.samples * self.horizon.sequence_length,
            total_tokens=self.horizon.tokens,
            flops=self.flops,
            loss=self.seen[0],
            learning_rate=rate,
            gradient_norm=self.seen[1],
            tokens_per_second=tokens / (time.perf_counter() - begun),
            micro_batch_tokens=self.micro * self.horizon.sequence_length,
            oom_backoffs=self.oom_backoffs,
            skipped_steps=0 if self.spikes is None else self.spikes.skipped,
            step=number + 1,
            looked=now,
            details=partial(self.meter.details, self.samples, self.engine.norms),
        )

    def gradient(self, count: int) -> torch.Tensor:
        """`backward` over the next `count` samples, begun anew with half the micro-batch where memory does not do, for
        as long as there is more than one sequence to halve. Of several ranks one that has begun cannot begin anew."""
        while True:
            try:
                return self.backward(count)
            except RuntimeError as error:
                if not out_of_memory(error) or min(self.micro, count) == 1 or self.ranks.world > 1:
                    raise
            self.back_off(count)  # here nothing holds the tensors of the attempt any longer

    def back_off(self, count: int) -> None:
        """Halve the micro-batch for the rest of the run."""
        self.engine.optimizer.zero_grad(set_to_none=True)
        forget_loads(self.engine.model)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        self.micro = -(-min(self.micro, count) // 2)
        self.oom_backoffs += 1

    def backward(self, count: int) -> torch.Tensor:
        """Accumulate the gradient of the mean loss over the next `count` samples; returns the mean cross-entropy, nats
        per token.

        Every pass of every rank is divided by the tokens of the whole batch, so that their size and number change
        nothing but memory. What else training makes small, such as the balance of experts, is in the gradient, not in
        what is returned.
        """
        whole, length = self.horizon.sequence_length, self.horizon.length(self.samples)
        tokens, pieces = count * whole, count * whole // length
        total, seen = torch.zeros((), device=self.device), []
        shares = passes(count, self.micro, self.ranks.rank, self.ranks.world)
        for share in shares:
            start = self.samples + share.offset
            batch = self.batch(start, share.samples)
            counted = nullcontext() if share.weight else uncounted(self.engine.model)
            with counted, dropout_stream(self.recipe, self.seed, start, self.device):
                losses = self.engine.forward(batch, last=share is shares[-1], length=length)
                loss = losses.objective / tokens
                loss = share.weight * (loss if losses.balance is None else loss + losses.balance / pieces)
                self.engine.backward(loss if self.scale is None else self.scale.scaled(loss))
            total += share.weight * losses.nats.sum() / tokens
            if share.weight:
                seen.append((start, share.samples, losses.nats))
        for one in seen:  # now that nothing of the step can begin anew
            self.meter.add(*one)
        return self.ranks.sum(total)

    def batch(self, start: int, count: int) -> torch.Tensor:
        """Samples `start` to before `start + count` on the device."""
        batch = torch.from_numpy(self.loader.batch(start, count))
        return batch.pin_memory().to(self.device, non_blocking=True) if self.device.type == "cuda" else batch

    def clip(self) -> torch.Tensor:
        """Clip the gradient; returns its norm before."""
        if self.scale is not None:
            self.scale.unscale(self.engine.optimizer)
        return self.engine.clip(self.recipe.train.grad_clip)

    def stands_out(self, step: int, loss: torch.Tensor, norm: torch.Tensor) -> bool:
        """Whether a step is to be skipped, where the recipe asks for that. Waits for the device."""
        if self.spikes is None:
            return False
        seen = loss.item(), norm.item()
        if self.scale is not None and self.scale.overflowed(step, *seen):
            return False
        return self.spikes.skip(step, *seen)

    def update(self, number: int, skip: bool) -> None:
        """Change the weights by their gradients, unless the step is skipped, and their mean."""
        if self.scale is not None:
            self.scale.step(self.engine.optimizer, skip=skip)
        elif not skip:
            self.engine.update()
        if self.recipe.model.ffn == "moe" and self.recipe.model.balance == "bias":
            if skip:
                forget_loads(self.engine.model)
            else:
                rebalance(self.engine.model, self.recipe.model.balance_rate)
        self.engine.optimizer.zero_grad(set_to_none=True)
        if self.average is not None:
            self.average.update(number)

    def look(self, step: int, loss: torch.Tensor, norm: torch.Tensor, *, last: bool, skipped: bool) -> None:
        """See loss and gradient norm, which waits for the device. Raises Diverged when the run has gone wrong."""
        seen = self.seen = loss.item(), norm.item()
        if self.scale is not None and self.scale.overflowed(step, *seen):
            seen = seen[0], 0.0  # the step was left out, and the scale halved
        self.stability.judge(step, *seen, last=last, counts=not skipped)

    # --- saving -------------------------------------------------------------------------------------------------------

    def save(self, folder: Path | None) -> None:
        """Write a checkpoint where one is wanted; before the first step there is nothing to keep."""
        if folder is not None and self.samples > 0:
            keep = self.checkpoints.keep if folder == self.checkpoints.latest else 1
            content = self.engine.content(self.average)
            self.ranks.tell(partial(write_checkpoint, folder, content, self.state(), keep=keep))
            self.saved = time.perf_counter()

    def finish(self) -> None:
        """Judge the trained model, save it, and give it the weights that it is judged by."""
        with self.average.in_place() if self.average is not None else nullcontext():
            self.check(partial(check_causality, length=2 * BLOCK + 2), check_floor)  # over the edges of blocks
        self.save(self.checkpoints.final)
        if self.average is not None:
            self.average.settle()

    def check(self, *gates: Callable[[EvolmForCausalLM], None]) -> None:
        """Put the whole model, which the first rank has, through gates."""
        model = self.engine.whole()
        for gate in gates:
            self.ranks.tell(partial(gate, model))  # type: ignore[arg-type]  # called where there is one

    def record(self, finished: bool) -> Record:
        """What this call did."""
        return Record(
            model=self.engine.whole(),
            finished=finished,
            tokens=self.samples * self.horizon.sequence_length,
            trained_tokens=(self.samples - self.first_sample) * self.horizon.sequence_length,
            train_loss=self.stability.mean,
            flops=self.flops,
            seconds=self.seconds,
            total_flops=self.flops_before + self.flops,
            total_seconds=self.seconds_before + self.seconds,
            tokens_by_source=self.loader.drawn(self.samples),
            epochs_by_source=self.loader.epochs(self.samples),
            micro_batch_tokens=self.micro * self.horizon.sequence_length,
            oom_backoffs=self.oom_backoffs,
            skipped_steps=0 if self.spikes is None else self.spikes.skipped,
        )
