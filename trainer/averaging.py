"""A running mean of the weights: what is scored in place of the last ones."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn

from trainer.sharding import part, placed


class Average:
    """The exponential mean of the weights after each step: after n steps, sum_i d^(n-i) w_i / sum_i d^(n-i).

    The initial weights are not in it, as Adam's means are freed of their initial zeros (Kingma and Ba 2015, arXiv
    1412.6980, section 3): a short run is not dragged back to where it began.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self._weights = dict(model.named_parameters())
        self._means = {name: weight.detach().clone() for name, weight in self._weights.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after step `step`, the first being 0."""
        share = (1 - self.decay) / (1 - self.decay ** (step + 1))
        means, weights = ([part(one) for one in named.values()] for named in (self._means, self._weights))
        torch._foreach_lerp_(means, weights, share)

    def state(self) -> Mapping[str, torch.Tensor]:
        """The means by the names of the weights."""
        return self._means

    @torch.no_grad()
    def load(self, means: Mapping[str, torch.Tensor]) -> None:
        """Go on from the means of a checkpoint. Raises KeyError when one is missing."""
        for name, mean in self._means.items():
            mean.copy_(placed(means[name], mean))

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The model has the means for its weights."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def settle(self) -> None:
        """Give the model the means for good."""
        self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for name, weight in self._weights.items():
            kept = weight.detach().clone()
            weight.copy_(self._means[name])
            self._means[name].copy_(kept)
