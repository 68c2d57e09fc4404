"""Moments (ZeRO 1), gradients (2) and weights (3) cut over the ranks by DeepSpeed, the moments on request in the CPU's
memory.

Nothing is compiled at start-up: the optimiser is torch's, and DeepSpeed's own exchange through shared memory, which
needs a compiler and ninja, is left off; between processes of one CPU, gloo takes its place.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from trainer.averaging import Average
from trainer.checkpoint import MODEL, OPTIMIZER, Content, read_content, untrained
from trainer.distillation import Teacher
from trainer.engines.base import Objective, Setup
from trainer.engines.fsdp import whole_model
from trainer.errors import CheckpointError
from trainer.model import EvolmForCausalLM, build_model
from trainer.objective import Losses
from trainer.optim import build_optimizer
from trainer.recipe import Recipe


class DeepSpeed:
    """ZeRO with our optimiser, our loss and our checkpoints; DeepSpeed's own are pickles and are never written."""

    compiles = False

    def __init__(
        self, recipe: Recipe, seed: int, device: torch.device, setup: Setup, teacher: Teacher | None = None
    ) -> None:
        deepspeed = _deepspeed(device)
        self.recipe, self.ranks, self.device, self.stage = recipe, setup.ranks, device, setup.zero_stage
        self.norms: Mapping[str, torch.Tensor] = {}  # no rank has a matrix whole
        self.model = build_model(recipe, seed, device)
        objective = Objective(self.model, recipe, teacher)
        self.engine, self.optimizer, _, _ = deepspeed.initialize(
            model=objective,
            optimizer=build_optimizer(self.model, recipe),
            config=_config(recipe, setup),
            dist_init_required=False,
        )
        if self.stage == 3:  # the loss reads it outside the module that owns it
            deepspeed.zero.register_external_parameter(objective, self.model.lm_head.weight)

    def forward(self, batch: torch.Tensor, *, last: bool, length: int | None = None) -> Losses:
        """See Engine."""
        self.engine.train()
        self.engine.set_gradient_accumulation_boundary(last)
        losses: Losses = self.engine(batch, length)
        return losses

    def backward(self, loss: torch.Tensor) -> None:
        """See Engine. DeepSpeed takes the mean of the ranks' gradients; unless their number is a power of two, to undo
        that rounds."""
        self.engine.backward(loss * self.ranks.world)

    def clip(self, limit: float) -> torch.Tensor:
        """See Engine. DeepSpeed clips the gradient as it steps, to a limit that was set at the start, and knows its
        norm thereafter: this is the step."""
        if limit != self.engine.gradient_clipping():
            raise ValueError(f"the limit was set to {self.engine.gradient_clipping()} at the start, it is now {limit}")
        self.engine.step()
        return torch.as_tensor(self.engine.get_global_grad_norm())

    def update(self) -> None:
        """See Engine. `clip` has done it."""

    # --- checkpoints --------------------------------------------------------------------------------------------------

    def _flat(self) -> list[torch.Tensor]:
        """The fp32 partitions of this rank, which are what the optimiser knows as its parameters."""
        zero = self.optimizer
        found: list[torch.Tensor] = (
            zero.fp32_partitioned_groups_flat if self.stage == 3 else zero.single_partition_of_fp32_groups
        )
        return found

    def _weights(self) -> Iterable[tuple[str, torch.Tensor]]:
        from deepspeed.utils import safe_get_full_fp32_param

        for name, parameter in self.model.named_parameters():
            yield name, safe_get_full_fp32_param(parameter)
        yield from untrained(self.model).items()

    def content(self, average: Average | None) -> Content:
        """See Engine. Tensor by tensor, so that no rank but the first ever holds more than one of them whole."""
        from deepspeed.utils import safe_get_full_optimizer_state

        self._link()
        keep = self.ranks.first
        weights = {name: value.clone().cpu() for name, value in self._weights() if keep}
        flat = self._flat()[0]
        state = self.optimizer.optimizer.state[flat]
        moments = {}
        for name, parameter in self.model.named_parameters():
            for key, value in state.items():
                if value.shape == flat.shape:
                    value = safe_get_full_optimizer_state(parameter, key)
                if keep:
                    moments[f"{name}.{key}"] = value.detach().clone().cpu()
        return Content(tensors={MODEL: weights, OPTIMIZER: moments}, optimizer={})

    def restore(self, folder: Path, average: Average | None) -> None:
        """See Engine."""
        found = read_content(folder)
        weights, moments = found.tensors[MODEL], found.tensors[OPTIMIZER]
        try:
            first = next(name for name, _ in self.model.named_parameters())
            keys = {key: moments[f"{first}.{key}"] for key in _keys(moments, first)}
            moving = [key for key, value in keys.items() if value.shape == weights[first].shape]
            self._make_room(keys, moving)
            for name, parameter in self.model.named_parameters():
                _refuse_shape(name, weights[name], parameter)
                self._set(parameter, weights[name], None)
                for key in moving:
                    self._set(parameter, moments[f"{name}.{key}"], key)
            for name, buffer in untrained(self.model).items():
                buffer.copy_(weights[name])
        except (KeyError, ValueError) as error:
            raise CheckpointError(f"{folder}: does not fit this model ({error})") from None

    def _make_room(self, keys: dict[str, torch.Tensor], moving: list[str]) -> None:
        """The optimiser's state as it is after a first step: tensors as large as this rank's partitions, and the
        scalars of the checkpoint."""
        for flat in self._flat():
            self.optimizer.optimizer.state[flat] = {
                key: torch.zeros_like(flat) if key in moving else value.clone().to(flat.device)
                for key, value in keys.items()
            }
        self._link()

    def _link(self) -> None:
        """Tell DeepSpeed where the moments of each parameter lie: it asks itself after the first step of the first
        group, when the others have none."""
        from deepspeed.utils import lazy_init_hp_params_optimizer_state

        if self.stage < 3:
            for group, flat in zip(self.optimizer.bit16_groups, self._flat(), strict=True):
                lazy_init_hp_params_optimizer_state(group, flat, self.optimizer.optimizer.state)

    @torch.no_grad()
    def _set(self, parameter: torch.nn.Parameter, value: torch.Tensor, key: str | None) -> None:
        """Put this rank's part of a whole tensor where ZeRO keeps it: a weight (without `key`) or a moment."""
        from deepspeed import utils, zero

        value = value.to(self.device)
        if self.stage < 3:
            if key is None:
                parameter.copy_(value)
                utils.safe_set_full_fp32_param(parameter, value)
            else:
                utils.safe_set_full_optimizer_state(parameter, value, key)
            return
        count = utils.safe_get_local_fp32_param(parameter).numel()
        padded = torch.zeros(count * self.ranks.world, device=self.device)
        padded[: value.numel()] = value.flatten()
        mine = padded[count * self.ranks.rank : count * (self.ranks.rank + 1)]
        if key is not None:
            utils.safe_set_local_optimizer_state(parameter, mine, key)
            return
        utils.safe_set_local_fp32_param(parameter, mine)
        with zero.GatheredParameters([parameter], modifier_rank=0):
            parameter.data.copy_(value)

    def whole(self) -> EvolmForCausalLM | None:
        """See Engine."""
        return whole_model(self.recipe, self.device, self._weights(), keep=self.ranks.first)


def _keys(moments: dict[str, torch.Tensor], name: str) -> list[str]:
    """What the optimiser keeps of a parameter."""
    start = f"{name}."
    return [key.removeprefix(start) for key in moments if key.startswith(start) and "." not in key.removeprefix(start)]


def _refuse_shape(name: str, value: torch.Tensor, parameter: Any) -> None:
    shape = getattr(parameter, "ds_shape", parameter.shape)
    if value.shape != shape:
        raise ValueError(f"{name} is {tuple(value.shape)}, not {tuple(shape)}")


def _deepspeed(device: torch.device) -> Any:
    """The library, silent and with nothing to compile."""
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", "`torch.distributed", FutureWarning)  # names that torch is about to change
    if device.type == "cpu":
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend="gloo" if device.type == "cpu" else "nccl")
    return deepspeed


def _config(recipe: Recipe, setup: Setup) -> dict[str, Any]:
    """DeepSpeed's configuration. Micro-batches are ours to count, so that it knows of one sample a step."""
    zero: dict[str, Any] = {"stage": setup.zero_stage}
    if setup.offload:
        zero["offload_optimizer"] = {"device": "cpu"}
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": recipe.train.grad_clip,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 2**62,
    }
