"""What a run is told and what it tells: where to save, how far it is, what it did."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from trainer.model import EvolmForCausalLM


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Where a run is: tokens so far and in all, FLOPs of this call, and what the last step looked like. Losses are nats
    per token. `oom_backoffs` and `skipped_steps` count from the first token: how often a device was out of memory and
    the micro-batch was halved, and steps that were spikes.

    Where `looked` is false, loss and gradient norm are those of an earlier step: a GPU was not made to wait. `details`
    gives more by name when it is called, and waits for the device (see `Meter.details`).
    """

    tokens: int
    total_tokens: int
    flops: float
    loss: float
    learning_rate: float
    gradient_norm: float
    tokens_per_second: float
    micro_batch_tokens: int
    oom_backoffs: int
    skipped_steps: int
    step: int = 0
    looked: bool = True
    details: Callable[[], Mapping[str, float]] = dict


Report = Callable[[Progress], bool]
"""Called after each step; False stops the run."""


@dataclass(frozen=True, kw_only=True)
class Record:
    """What a run did. `flops`, `seconds` and `trained_tokens` are of this call alone; all else counts from the first
    token. The model is whole and has the weights that are to be judged, their mean where the recipe asks for one; it is
    the first rank's, the others have None."""

    model: EvolmForCausalLM | None
    finished: bool
    tokens: int
    trained_tokens: int
    train_loss: float
    flops: float
    seconds: float
    total_flops: float
    total_seconds: float
    tokens_by_source: dict[str, int]
    epochs_by_source: dict[str, float]
    micro_batch_tokens: int
    oom_backoffs: int
    skipped_steps: int


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
