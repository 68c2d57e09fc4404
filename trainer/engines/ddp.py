"""The model whole on every rank, each with its share of every batch: torch's DistributedDataParallel."""

from __future__ import annotations

import warnings
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from trainer.distillation import Teacher
from trainer.engines.base import Objective, Setup, uncounted
from trainer.engines.single import Single
from trainer.objective import Losses
from trainer.recipe import Recipe


class DDP(Single):
    """Gradients are summed while the backward pass still runs."""

    def __init__(
        self, recipe: Recipe, seed: int, device: torch.device, setup: Setup, teacher: Teacher | None = None
    ) -> None:
        super().__init__(recipe, seed, device, setup, teacher)
        places = [device] if device.type == "cuda" else None
        with warnings.catch_warnings():  # torch is about to rename an option; the new name is not in all we take
            warnings.simplefilter("ignore", FutureWarning)
            self.wrapped = DistributedDataParallel(
                Objective(self.model, recipe, teacher),
                device_ids=places,
                gradient_as_bucket_view=True,
                broadcast_buffers=False,  # each rank counts the experts that its own tokens use
            )
        self.wrapped.register_comm_hook(None, lambda state, bucket: _summed(bucket))
        self._rehearse(recipe, device)

    def _rehearse(self, recipe: Recipe, device: torch.device) -> None:
        """One pass that counts nothing. DDP orders its messages anew after the first pass it sees, and with them the
        sums of three ranks and more: so that a continued run adds as an uninterrupted one does."""
        batch = torch.zeros((1, recipe.data.sequence_length + 1), dtype=torch.int64, device=device)
        with uncounted(self.model), torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            losses = self.forward(batch, last=True)
            loss = losses.objective if losses.balance is None else losses.objective + losses.balance
            self.backward(0.0 * loss)
        self.optimizer.zero_grad(set_to_none=True)

    def forward(self, batch: torch.Tensor, *, last: bool, length: int | None = None) -> Losses:
        """See Engine."""
        self.model.train()
        self.wrapped.require_backward_grad_sync = last
        losses: Losses = self.wrapped(batch, length)
        return losses


def _summed(bucket: Any) -> torch.futures.Future[torch.Tensor]:
    """The gradients of a bucket summed over ranks, where DDP's own way would round: it divides each rank's before."""
    future = dist.all_reduce(bucket.buffer(), async_op=True).get_future()
    summed: torch.futures.Future[torch.Tensor] = future.then(lambda done: done.value()[0])
    return summed
