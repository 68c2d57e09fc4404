"""How long a run is and how large its steps are: plain functions of the sample number.

A sample is one sequence. Everything is counted in samples, so that a run can be continued to a longer horizon: up to
where the decay begins (the trunk), runs to different horizons are the same run.
"""

from __future__ import annotations

from dataclasses import dataclass

from trainer.recipe import Recipe


@dataclass(frozen=True, kw_only=True)
class Horizon:
    """The length of one run, in samples. `trunk` is where a warmup-stable-decay schedule leaves the stable part."""

    samples: int
    batch: int
    trunk: int
    sequence_length: int

    @property
    def tokens(self) -> int:
        """Tokens trained on at the end of the run."""
        return self.samples * self.sequence_length


def horizon_of(recipe: Recipe, tokens: int) -> Horizon:
    """The run that trains on `tokens` tokens, to whole sequences. The trunk ends with a whole batch."""
    length = recipe.data.sequence_length
    samples = max(1, -(-tokens // length))
    batch = max(1, recipe.train.batch_tokens // length)
    stable = samples if recipe.train.schedule == "constant" else samples * (1 - recipe.train.decay_fraction)
    trunk = int(stable // batch) * batch
    return Horizon(samples=samples, batch=batch, trunk=trunk, sequence_length=length)


def learning_rate(recipe: Recipe, horizon: Horizon, sample: int) -> float:
    """The learning rate of the step that begins with `sample`: linear warmup, stable, then linear decay towards
    zero."""
    train = recipe.train
    step = sample // horizon.batch
    warmup = min(1.0, (step + 1) / train.warmup_steps) if train.warmup_steps else 1.0
    if sample < horizon.trunk or train.schedule == "constant":
        return train.learning_rate * warmup
    return train.learning_rate * warmup * (horizon.samples - sample) / (horizon.samples - horizon.trunk)
