"""Weights, gradients and moments cut over the ranks, gathered block by block when they are needed: torch's FSDP2.

Norms, biases and routers, a thousandth of a model, stay whole on every rank in fp32, where the precision of the recipe
leaves them too; their gradients are summed in one message a step.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import chain

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from trainer.checkpoint import untrained
from trainer.cost import costs
from trainer.distillation import Teacher
from trainer.engines.base import Objective, Setup
from trainer.engines.single import Single
from trainer.model import EvolmForCausalLM, build_model
from trainer.objective import Losses
from trainer.optim import build_optimizer
from trainer.parameter_groups import kind_of
from trainer.recipe import Recipe
from trainer.sharding import gathered

SPARE = 2.0
"""Free memory of a device, in sizes of a whole model, with which one is put there beside its parts."""


class FSDP(Single):
    """Each rank holds its rows of every matrix."""

    compiles = False

    def __init__(
        self, recipe: Recipe, seed: int, device: torch.device, setup: Setup, teacher: Teacher | None = None
    ) -> None:
        self.recipe, self.ranks, self.device, self.teacher = recipe, setup.ranks, device, teacher
        self.norms: Mapping[str, torch.Tensor] = {}  # no rank has a matrix whole
        self.model = build_model(recipe, seed)
        self.objective = self._cut()
        self.optimizer = build_optimizer(self.model, recipe)

    def _cut(self) -> Objective:
        """The blocks one by one, in the recipe's precision; then what is left, embeddings and head, in fp32: what a
        block adds to is never rounded."""
        whole = {p for name, p in self.model.named_parameters() if kind_of(name, p) in ("vector", "router")}
        for parameter in whole:
            parameter.data = parameter.data.to(self.device)
        mesh = init_device_mesh(self.device.type, (self.ranks.world,))
        narrow = torch.bfloat16 if self.recipe.train.precision == "bf16" else None
        blocks = MixedPrecisionPolicy(param_dtype=narrow, reduce_dtype=torch.float32, cast_forward_inputs=False)
        rest = MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)
        objective = Objective(self.model, self.recipe, self.teacher)
        for layer in self.model.model.layers:
            fully_shard(layer, mesh=mesh, mp_policy=blocks, ignored_params=whole)
        fully_shard(objective, mesh=mesh, mp_policy=rest, ignored_params=whole)
        for module in objective.modules():
            if isinstance(module, FSDPModule):
                module.set_gradient_divide_factor(1.0)
                module.set_force_sum_reduction_for_comms(True)
        return objective

    def forward(self, batch: torch.Tensor, *, last: bool, length: int | None = None) -> Losses:
        """See Engine. Every pass sums its gradients over the ranks: to keep them for the last would hold them whole."""
        self.objective.train()
        assert isinstance(self.objective, FSDPModule)
        self.objective.set_is_last_backward(last)
        losses: Losses = self.objective(batch, length)
        return losses

    def clip(self, limit: float) -> torch.Tensor:
        """See Engine."""
        cut, whole = [], []
        for parameter in self.model.parameters():
            gradient = parameter.grad
            if isinstance(gradient, DTensor):
                cut.append(gradient.to_local())
            elif gradient is not None:
                whole.append(gradient)
        self._sum(whole)
        squares = self.ranks.sum(_squares(cut, self.device)) + _squares(whole, self.device)
        norm = squares.sqrt()
        torch._foreach_mul_(cut + whole, (limit / (norm + 1e-6)).clamp(max=1.0))
        return norm

    def _sum(self, gradients: list[torch.Tensor]) -> None:
        """Sum over ranks, in one message."""
        if self.ranks.world > 1 and gradients:
            flat = torch.cat([gradient.flatten() for gradient in gradients])
            dist.all_reduce(flat)
            parts = torch.split_with_sizes(flat, [one.numel() for one in gradients])
            for gradient, part in zip(gradients, parts, strict=True):
                gradient.copy_(part.view_as(gradient))

    def whole(self) -> EvolmForCausalLM | None:
        """See Engine."""
        weights = ((name, gathered(parameter)) for name, parameter in self.model.named_parameters())
        return whole_model(
            self.recipe, self.device, chain(weights, untrained(self.model).items()), keep=self.ranks.first
        )


def _squares(gradients: list[torch.Tensor], device: torch.device) -> torch.Tensor:
    """Sum of the squares of all elements."""
    if not gradients:
        return torch.zeros((), device=device)
    return torch.stack(torch._foreach_norm(gradients)).square().sum()


def whole_model(
    recipe: Recipe, device: torch.device, weights: Iterable[tuple[str, torch.Tensor]], *, keep: bool
) -> EvolmForCausalLM | None:
    """A plain model with these weights, on the device where that has room for it and on the CPU otherwise; None, and
    nothing kept, where `keep` is not set."""
    needed = 4 * costs(recipe).params
    roomy = device.type != "cuda" or torch.cuda.mem_get_info(device)[0] > SPARE * needed
    model = build_model(recipe, 0, device if roomy else "cpu") if keep else None
    mine = {**dict(model.named_parameters()), **untrained(model)} if model is not None else {}
    with torch.no_grad():
        for name, value in weights:
            if keep:
                mine[name].copy_(value)
    return model
