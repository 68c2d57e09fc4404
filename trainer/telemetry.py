"""What a run tells of itself while it trains: what is gathered on the device, and the lines made of it.

Nothing here makes a GPU wait at a step that nobody looks at: losses and norms stay on the device until a line is due.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from trainer.cost import costs
from trainer.data.loader import Loader
from trainer.metrics_log import MetricsLog
from trainer.model import expert_counts, expert_loads
from trainer.peak_flops import Precision, peak_flops
from trainer.recipe import Recipe
from trainer.sinks import Sinks

if TYPE_CHECKING:
    from trainer.records import Progress

METRICS_EVERY = 0.02
"""Share of a run's tokens between lines of metrics.jsonl."""


class Meter:
    """Training loss by source and what was drawn of each: gathered on the device as a run trains. With a `model`, also
    how evenly the experts of its mixtures are used."""

    def __init__(self, loader: Loader, device: torch.device, model: nn.Module | None = None) -> None:
        self.loader, self.model = loader, model
        self._counts: dict[str, torch.Tensor] | None = None
        kind = torch.float32 if device.type == "mps" else torch.float64
        self._nats = torch.zeros(len(loader.names), dtype=kind, device=device)
        self._tokens = np.zeros(len(loader.names), np.int64)

    def add(self, first: int, count: int, nats: torch.Tensor) -> None:
        """Take the losses of the tokens of samples `first` to before `first + count`, nats, sample by sample."""
        sources = self.loader.sources(first, count)
        by_sample = nats.detach().view(count, -1).sum(dim=1, dtype=self._nats.dtype)
        self._nats.index_add_(0, torch.from_numpy(sources).to(nats.device, non_blocking=True), by_sample)
        self._tokens += np.bincount(sources, minlength=len(self._tokens)) * (nats.numel() // count)

    def details(self, samples: int, norms: Mapping[str, torch.Tensor]) -> dict[str, float]:
        """By name: `gradient_norm/KIND` for each kind of parameter whose norm is given; of each source `loss/NAME`, the
        mean over what this rank drew of it since this was last asked, and, over the first `samples` samples,
        `tokens/NAME`, `share/NAME` (of all tokens), `mix/NAME` (the share that was asked for) and `epochs/NAME`; of
        each mixture, `experts/LAYER/most` and `experts/LAYER/mean`, the largest and the mean share of this rank's
        tokens since this was last asked that used one expert. Waits for the device."""
        read = torch.stack(list(norms.values())).tolist() if norms else []
        found = {f"gradient_norm/{kind}": norm for kind, norm in zip(norms, read, strict=True)}
        for name, nats, tokens in zip(self.loader.names, self._nats.tolist(), self._tokens, strict=True):
            if tokens:
                found[f"loss/{name}"] = nats / int(tokens)
        self._nats.zero_()
        self._tokens[:] = 0
        return found | self._drawn(samples) | self._experts()

    def _experts(self) -> dict[str, float]:
        if self.model is None:
            return {}
        loads, self._counts = expert_loads(self.model, self._counts), expert_counts(self.model)
        if not loads:
            return {}
        found: dict[str, float] = {}
        read = torch.stack([torch.stack([one.max(), one.mean()]) for one in loads.values()]).tolist()
        for name, (most, mean) in zip(loads, read, strict=True):
            layer = name.removeprefix("model.layers.").removesuffix(".mlp")
            found[f"experts/{layer}/most"], found[f"experts/{layer}/mean"] = most, mean
        return found

    def _drawn(self, samples: int) -> dict[str, float]:
        drawn, epochs, asked = self.loader.drawn(samples), self.loader.epochs(samples), self.loader.shares
        total = max(1, sum(drawn.values()))
        found: dict[str, float] = {}
        for name in self.loader.names:
            found[f"tokens/{name}"] = drawn[name]
            found[f"share/{name}"] = drawn[name] / total
            found[f"mix/{name}"] = asked[name]
            found[f"epochs/{name}"] = epochs[name]
        return found


def gradient_norms(groups: Iterable[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
    """The norm of the gradients of each kind of parameter, in groups as optimisers keep them, of which several may be
    of one kind. The norm over all is the norm of these. Waits for no device."""
    members: dict[str, list[torch.Tensor]] = {}
    for group in groups:
        members.setdefault(group["kind"], []).extend(one.grad for one in group["params"] if one.grad is not None)
    return {kind: nn.utils.get_total_norm(gradients) for kind, gradients in members.items() if gradients}


class Telemetry:
    """Writes a line of metrics.jsonl, and gives it to the sinks, whenever a run has come another `every` of its way and
    its loss has just been looked at, and at its end.

    A line has `step`, `tokens`, `total_tokens`, `flops` (of this call), `loss` (nats per token), `learning_rate`,
    `gradient_norm`, `tokens_per_second` and `flops_per_second` since the line before, `mfu` (model FLOPs over what
    `devices` devices can do in the recipe's precision; null where that is not known), `memory` (bytes: the most that a
    GPU has held, or what the process holds), and what the meter and the model add under `NAME/...`.
    """

    def __init__(
        self,
        recipe: Recipe,
        device: str | torch.device,
        log: MetricsLog,
        sinks: Sinks | None = None,
        *,
        every: float = METRICS_EVERY,
        devices: int = 1,
    ) -> None:
        self.log, self.sinks, self.every = log, sinks, every
        self.device = torch.device(device)
        self.flops_per_token = costs(recipe).flops_per_token
        peak = peak_of(self.device, recipe.train.precision)
        self.peak = None if peak is None else peak * devices
        self._next = 0.0
        self._step = 0
        self._last: tuple[float, Progress] | None = None  # the line before, and when it was written

    def __call__(self, progress: Progress) -> None:
        """Hear of a step."""
        self._step = progress.step
        if progress.looked and (progress.tokens >= self._next or progress.tokens >= progress.total_tokens):
            self._next = progress.tokens + self.every * progress.total_tokens
            self._write(self.line(progress))

    def scores(self, values: Mapping[str, Any]) -> None:
        """Write what a finished run was scored, as a line of its own."""
        self._write(values)

    def _write(self, values: Mapping[str, Any]) -> None:
        self.log.write(values)
        if self.sinks is not None:
            self.sinks.write(self._step, values)

    def line(self, progress: Progress) -> dict[str, Any]:
        """The numbers of a line."""
        details = progress.details()  # waits for the device, so the clock is read after it
        now, rate = time.perf_counter(), progress.tokens_per_second
        flops = rate * self.flops_per_token
        if self._last is not None:
            then, before = self._last
            seconds = max(now - then, 1e-9)
            rate = (progress.tokens - before.tokens) / seconds
            flops = (progress.flops - before.flops) / seconds
        self._last = now, progress
        return {
            "step": progress.step,
            "tokens": progress.tokens,
            "total_tokens": progress.total_tokens,
            "flops": progress.flops,
            "loss": progress.loss,
            "learning_rate": progress.learning_rate,
            "gradient_norm": progress.gradient_norm,
            "tokens_per_second": rate,
            "flops_per_second": flops,
            "mfu": None if self.peak is None else flops / self.peak,
            "memory": memory_of(self.device),
            "micro_batch_tokens": progress.micro_batch_tokens,
            "oom_backoffs": progress.oom_backoffs,
            "skipped_steps": progress.skipped_steps,
            **details,
        }


def peak_of(device: torch.device, precision: str) -> float | None:
    """Dense FLOP/s that a device can give in a recipe's precision, or None: on CPUs and where it is not known."""
    if device.type != "cuda":
        return None
    used: Precision = "fp32"
    if precision in ("bf16", "fp16"):
        used = precision  # type: ignore[assignment]
    elif torch.get_float32_matmul_precision() != "highest":
        used = "tf32"
    return peak_flops(torch.cuda.get_device_name(device), used)


def memory_of(device: torch.device) -> int:
    """Bytes: the most that tensors on a GPU have taken, or what this process holds of the machine's memory."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    import psutil

    return int(psutil.Process().memory_info().rss)
