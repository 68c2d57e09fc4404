"""The loss of a language model on held-out text, per domain, in units that do not depend on its tokenizer.

Bits per byte: nats / (ln 2 * bytes), the nats of all predicted tokens over the bytes of the text that they stand for.
Two models with different vocabularies predict the same bytes, so their bits per byte compare; their losses per token
do not. Special tokens stand for no text: neither their nats nor their bytes count.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from search_spaces.errors import UsageError


class LanguageModel(Protocol):
    """Anything that tells how surprised it is."""

    def token_nats(self, windows: NDArray[np.int64], /) -> NDArray[np.float32]:
        """Negative log-likelihood in nats of tokens 1..T given those before: (N, T+1) -> (N, T)."""


class Text(Protocol):
    """Held-out text: token windows (N, T+1), and the bytes that each predicted token stands for (N, T)."""

    @property
    def tokens(self) -> NDArray[np.int64]: ...

    @property
    def bytes_of(self) -> NDArray[np.int64]: ...


@dataclass(frozen=True)
class DomainLoss:
    """What a model lost on one domain, in total."""

    nats: float
    bytes: int
    tokens: int

    @property
    def bits_per_byte(self) -> float:
        """Bits needed per byte of text."""
        return self.nats / (math.log(2) * self.bytes)

    @property
    def nats_per_token(self) -> float:
        """The loss that training curves show."""
        return self.nats / self.tokens


def score_domains(model: LanguageModel, domains: Mapping[str, Text]) -> dict[str, DomainLoss]:
    """The loss of a model on each domain's held-out text."""
    losses = {}
    for name, text in domains.items():
        nats = model.token_nats(text.tokens).astype(np.float64)
        counted = text.bytes_of > 0
        losses[name] = DomainLoss(
            nats=float(nats[counted].sum()), bytes=int(text.bytes_of.sum()), tokens=int(counted.sum())
        )
    return losses


def loss_metrics(losses: Mapping[str, DomainLoss], target: Mapping[str, float] | None = None) -> dict[str, float]:
    """`bits_per_byte` of each domain and over the target, and `perplexity` per token over the target.

    The target gives each domain its weight in what "better" means; without one all domains weigh the same. Raises
    UsageError for a target of domains that were not scored, or of no weight, and for a domain without text.
    """
    weights = target or dict.fromkeys(losses, 1.0)
    unknown = sorted(set(weights) - set(losses))
    if unknown:
        raise UsageError(f"target: domain '{unknown[0]}' was not scored; there are {', '.join(sorted(losses))}")
    silent = sorted(name for name, loss in losses.items() if not loss.bytes)
    if silent:
        raise UsageError(f"domain '{silent[0]}' has no held-out text to be scored on")
    total = sum(weights.values())
    if total <= 0:
        raise UsageError("target: needs a domain with a positive weight")
    share = {name: weights.get(name, 0.0) / total for name in losses}
    metrics = {
        "bits_per_byte": sum(share[name] * loss.bits_per_byte for name, loss in losses.items()),
        "perplexity": math.exp(min(700.0, sum(share[name] * loss.nats_per_token for name, loss in losses.items()))),
    }
    return metrics | {f"bits_per_byte/{name}": loss.bits_per_byte for name, loss in losses.items()}
