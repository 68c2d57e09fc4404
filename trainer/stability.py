"""Whether a run is still worth its steps: losses and gradients that say it is not end it with a typed reason."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Mapping
from typing import Any

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

    def judge(self, step: int, loss: float, norm: float, *, last: bool, counts: bool = True) -> None:
        """Raise Diverged when loss or gradient is not finite, or the mean loss is worse than guessing: over the last
        steps of a long run, or at the end of a short one. A loss that does not count, of a step that was skipped, has
        to be finite and is left out of the mean."""
        if not math.isfinite(loss) or not math.isfinite(norm):
            raise Diverged(f"step {step}: loss {loss}, gradient norm {norm}")
        if counts:
            self.losses.append(loss)
        judged = len(self.losses) == PATIENCE or last
        if judged and self.mean > self.guessing + MARGIN:
            raise Diverged(
                f"step {step}: mean loss {self.mean:.2f} of {len(self.losses)} steps is worse than guessing, "
                f"{self.guessing:.2f}"
            )


WINDOW = 128
"""Steps that a step is compared with."""

LEAST = 32
"""Steps that must be known before one is called a spike."""

MOST_SKIPPED = 32
"""Steps skipped in a row with which a run is given up: it has not met a bad batch, it has left its course."""


class Spikes:
    """Steps that are skipped because their loss or gradient stands out from the last ones (the rule of OLMo-core's
    SkipStepOptimizer): more than `deviations` standard deviations above the mean of the last steps that were not
    skipped."""

    def __init__(self, deviations: float) -> None:
        self.deviations = deviations
        self.losses: deque[float] = deque(maxlen=WINDOW)
        self.norms: deque[float] = deque(maxlen=WINDOW)
        self.skipped = 0
        self.in_a_row = 0

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps: JSON values."""
        return {
            "losses": list(self.losses),
            "norms": list(self.norms),
            "skipped": self.skipped,
            "in_a_row": self.in_a_row,
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint."""
        self.losses.extend(state["losses"])
        self.norms.extend(state["norms"])
        self.skipped, self.in_a_row = state["skipped"], state["in_a_row"]

    def skip(self, step: int, loss: float, norm: float) -> bool:
        """Whether this step is to be skipped. Raises Diverged when too many were, one after the other."""
        if not (self._above(self.losses, loss) or self._above(self.norms, norm)):
            self.losses.append(loss)
            self.norms.append(norm)
            self.in_a_row = 0
            return False
        self.skipped += 1
        self.in_a_row += 1
        if self.in_a_row > MOST_SKIPPED:
            raise Diverged(
                f"step {step}: {self.in_a_row} steps in a row had a loss or gradient more than {self.deviations:g} "
                f"deviations above those before (now {loss:.3g} and {norm:.3g}): it is no spike that will pass"
            )
        return True

    def _above(self, known: deque[float], value: float) -> bool:
        if len(known) < LEAST:
            return False
        mean = math.fsum(known) / len(known)
        deviation = math.sqrt(math.fsum((one - mean) ** 2 for one in known) / len(known))
        return value > mean + self.deviations * deviation
