"""Whether a run is still worth its steps: losses and gradients that say it is not end it with a typed reason."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable

from trainer.errors import Diverged

PATIENCE = 20
"""Steps over which the mean loss must not be worse than guessing, the logarithm of the vocabulary."""

MARGIN = 0.5
"""Nats by which it may be: initial weights are a little worse than guessing."""


class Stability:
    """The losses of the last steps, nats per token, and what they say of a run."""

    def __init__(self, vocabulary: int) -> None:
        self.guessing = math.log(vocabulary)
        self.losses: deque[float] = deque(maxlen=PATIENCE)

    def load(self, losses: Iterable[float]) -> None:
        """Go on from the losses of a checkpoint."""
        self.losses.extend(losses)

    @property
    def mean(self) -> float:
        """Mean loss of the last steps; NaN before the first."""
        return sum(self.losses) / len(self.losses) if self.losses else math.nan

    def judge(self, step: int, loss: float, norm: float, *, last: bool) -> None:
        """Raise Diverged when loss or gradient is not finite, or the mean loss is worse than guessing: over the last
        steps of a long run, or at the end of a short one."""
        if not math.isfinite(loss) or not math.isfinite(norm):
            raise Diverged(f"step {step}: loss {loss}, gradient norm {norm}")
        self.losses.append(loss)
        judged = len(self.losses) == PATIENCE or last
        if judged and self.mean > self.guessing + MARGIN:
            raise Diverged(
                f"step {step}: mean loss {self.mean:.2f} of {len(self.losses)} steps is worse than guessing, "
                f"{self.guessing:.2f}"
            )
