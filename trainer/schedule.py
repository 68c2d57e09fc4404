"""How long a run is and how large its steps are: plain functions of the sample number.

A sample is one sequence of `data.sequence_length` tokens. Everything is counted in samples from the first, so that a
run can be continued to a longer horizon: up to where the decay begins (the trunk), runs to different horizons are the
same run, with batches and sequences that grow as with those that do not.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeVar

from trainer.recipe import WITHOUT_TRUNK, Recipe


@dataclass(frozen=True, kw_only=True)
class BatchPhase:
    """From this sample and this step on, a step takes `batch` samples."""

    sample: int
    step: int
    batch: int


@dataclass(frozen=True, kw_only=True)
class SequencePhase:
    """From this sample on, samples are cut into pieces of `length` tokens."""

    sample: int
    length: int


@dataclass(frozen=True, kw_only=True)
class Horizon:
    """The length of one run, in samples, and the batches and sequences on the way.

    `trunk` is where a warmup-stable-decay schedule leaves the stable part; it is 0 for schedules that decay from the
    start, whose runs to different horizons have nothing in common. `batch` is the largest of the batches.
    """

    samples: int
    batch: int
    trunk: int
    sequence_length: int
    batches: tuple[BatchPhase, ...]
    sequences: tuple[SequencePhase, ...]

    @property
    def tokens(self) -> int:
        """Tokens trained on at the end of the run."""
        return self.samples * self.sequence_length

    def count(self, sample: int) -> int:
        """Samples of the step that begins with `sample`; the last step of a run is as small as what is left."""
        return min(_phase(self.batches, sample).batch, self.samples - sample)

    def step(self, sample: int) -> int:
        """The number of the step that `sample` is in, from 0."""
        phase = _phase(self.batches, sample)
        return phase.step + (sample - phase.sample) // phase.batch

    def length(self, sample: int) -> int:
        """Tokens of the pieces that this sample is cut into."""
        return _phase(self.sequences, sample).length

    def spans(self, first: int, last: int) -> Iterator[tuple[int, int]]:
        """The samples from `first` to before `last`, as (how many, tokens of their pieces)."""
        ends = [phase.sample for phase in self.sequences[1:]] + [last]
        for phase, end in zip(self.sequences, ends, strict=True):
            count = min(end, last) - max(phase.sample, first)
            if count > 0:
                yield count, phase.length


def horizon_of(recipe: Recipe, tokens: int) -> Horizon:
    """The run that trains on `tokens` tokens, to whole sequences. The trunk ends with a whole batch."""
    train, length = recipe.train, recipe.data.sequence_length
    samples = max(1, -(-tokens // length))
    batches = _batches(recipe)
    stable = samples * (1 - train.decay_fraction) if train.schedule == "wsd" else float(samples)
    return Horizon(
        samples=samples,
        batch=batches[-1].batch,
        trunk=0 if train.schedule in WITHOUT_TRUNK else _whole(batches, int(stable)),
        sequence_length=length,
        batches=batches,
        sequences=_sequences(recipe, batches),
    )


def learning_rate(recipe: Recipe, horizon: Horizon, sample: int) -> float:
    """The learning rate of the step that begins with `sample`: linear warmup, then what the schedule says.

    wsd stays and then falls in a line from the trunk to the horizon; cosine, linear and polynomial, (1 - p)^power, fall
    from the end of the warmup on. All go towards `final_fraction` of the peak, which a step after the last would have.
    """
    train = recipe.train
    step = horizon.step(sample)
    warmup = min(1.0, (step + 1) / train.warmup_steps) if train.warmup_steps else 1.0
    if train.schedule == "constant" or sample < horizon.trunk:
        return train.learning_rate * warmup
    first = horizon.trunk if train.schedule == "wsd" else _after_warmup(horizon, train.warmup_steps)
    if sample < first:
        return train.learning_rate * warmup
    floor = train.learning_rate * warmup * train.final_fraction
    above = train.learning_rate * warmup * (1 - train.final_fraction)
    left, whole = horizon.samples - sample, horizon.samples - first
    if train.schedule == "cosine":
        return floor + above * (1 - math.cos(math.pi * left / whole)) / 2
    if train.schedule == "polynomial":
        return floor + above * float((left / whole) ** train.decay_power)
    return floor + above * left / whole


Phase = TypeVar("Phase", BatchPhase, SequencePhase)


def _phase(phases: tuple[Phase, ...], sample: int) -> Phase:
    return phases[bisect_right(phases, sample, key=lambda phase: phase.sample) - 1]


def _batches(recipe: Recipe) -> tuple[BatchPhase, ...]:
    """Batches that double from batch_start_tokens to batch_tokens, each size for the same share of batch_ramp_tokens
    and for whole batches."""
    train, length = recipe.train, recipe.data.sequence_length
    whole = max(1, train.batch_tokens // length)
    batch = whole if train.batch_start_tokens is None else max(1, train.batch_start_tokens // length)
    doublings = max(0, math.ceil(math.log2(whole / batch)))
    phases = [BatchPhase(sample=0, step=0, batch=batch)]
    for _ in range(doublings):
        last = phases[-1]
        steps = max(1, round(train.batch_ramp_tokens / doublings / (last.batch * length)))
        phases.append(
            BatchPhase(
                sample=last.sample + steps * last.batch, step=last.step + steps, batch=min(whole, 2 * last.batch)
            )
        )
    return tuple(phases)


def _sequences(recipe: Recipe, batches: tuple[BatchPhase, ...]) -> tuple[SequencePhase, ...]:
    """Pieces that double from sequence_start to sequence_length, each size for the same share of sequence_ramp_tokens;
    they change between steps."""
    train, length = recipe.train, recipe.data.sequence_length
    piece = train.sequence_start or length
    doublings = round(math.log2(length / piece))
    phases = [SequencePhase(sample=0, length=piece)]
    for index in range(doublings):
        samples = math.ceil(train.sequence_ramp_tokens * (index + 1) / doublings / length)
        begins = _whole(batches, samples, up=True)
        if begins == phases[-1].sample:  # shorter than a step
            phases.pop()
        phases.append(SequencePhase(sample=begins, length=piece * 2 ** (index + 1)))
    return tuple(phases)


def _whole(batches: tuple[BatchPhase, ...], samples: int, *, up: bool = False) -> int:
    """The last sample at or before this one, or the first at or after it, at which a step begins."""
    phase = _phase(batches, samples)
    steps, rest = divmod(samples - phase.sample, phase.batch)
    return phase.sample + (steps + (up and rest > 0)) * phase.batch


def _after_warmup(horizon: Horizon, steps: int) -> int:
    """The first sample after so many steps, at most the end of the run."""
    phase = next(phase for phase in reversed(horizon.batches) if phase.step <= steps)
    return min(horizon.samples, phase.sample + (steps - phase.step) * phase.batch)
