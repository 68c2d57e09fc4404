"""Whether what is tuned at a small size holds at larger ones: CompleteP against the standard parameterisation.

    python benchmarks/transfer.py [--quick] [--axis width|depth|both] [--qk-norm on|off|both] [--steps 200] [--jobs 2]
        [--out FILE]

Models of width 64 to 256 (4 blocks) and of 2 to 8 blocks (width 64) are trained on the text of this Python's own
installation, once for each learning rate in octaves, one thread a process. Initial standard deviation and learning rate
are tuned at the smallest size of each axis, where both parameterisations are the same run. Told are, for each
parameterisation and size, the losses (nats per token of held-out text), the best learning rate (of a parabola through
the minimum and its neighbours) and how far it moves from the base; then the level: CompleteP at the base's best rate
against the control arm, the standard parameterisation at the rate that the OLMo ladder's law, params^(-1/3), makes of
it. All arms have the same batch: that of the ladder would leave a run of this length a few steps.

The last line is JSON. With --out, losses are kept in a file and not computed again.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from trainer.recipe import Recipe
from trainer.scaling import scaling_params

FIRST = -7
WIDEST = (-13, -1)
"""The learning rate that is tried first, with its neighbours, and how far a sweep goes on while the best is at an end;
logarithms to base two."""

DEVIATIONS = (0.02, 0.05, 0.1)
"""Initial standard deviations that the base is tuned over."""

SEQUENCE, BATCH, VOCABULARY = 128, 512, 1024


@dataclass(frozen=True, kw_only=True)
class Job:
    """One training. `rate` is the logarithm, to base two, of the learning rate."""

    arm: str = "standard"
    width: int
    depth: int
    base: tuple[int, int]
    rate: float
    std: float
    qk_norm: bool
    steps: int
    seed: int = 0

    @property
    def key(self) -> str:
        """Names the run: at the base both parameterisations are the same one."""
        values = asdict(self)
        if (self.width, self.depth) == self.base:
            values["arm"] = "standard"
        if values["arm"] == "standard":
            del values["base"]
        return json.dumps(values, sort_keys=True)

    def recipe(self) -> Recipe:
        """What is trained."""
        return Recipe.model_validate(
            {
                "data": {
                    "sources": {"python": {"path": "python:stdlib"}},
                    "tokenizer": {"vocab_size": VOCABULARY},
                    "sequence_length": SEQUENCE,
                    "held_out": {"max_bytes": 2**15},
                },
                "model": {
                    "d_model": self.width,
                    "n_layers": self.depth,
                    "n_heads": self.width // 32,
                    "ffn_dim": self.width * 5 // 2,
                    "qk_norm": self.qk_norm,
                    "init_std": self.std,
                },
                "train": {
                    "parameterization": self.arm,
                    "base_d_model": self.base[0],
                    "base_n_layers": self.base[1],
                    "learning_rate": 2.0**self.rate,
                    "batch_tokens": BATCH,
                    "warmup_steps": max(1, self.steps // 10),
                    "decay_fraction": 0.3,
                    "seed": self.seed,
                },
            }
        )


def run(job: Job, cache: Path) -> float:
    """Nats per token of held-out text after training; infinite when it diverged."""
    import torch

    from trainer.errors import Diverged
    from trainer.evaluate import TokenScorer
    from trainer.loop import train

    torch.set_num_threads(1)
    recipe, corpus = job.recipe(), _corpus(cache)
    try:
        record = train(recipe, corpus=corpus, tokens=job.steps * BATCH)
    except Diverged:
        return math.inf
    text = corpus.held_out("validation")["python"]
    counted = text.bytes_of > 0
    return float(TokenScorer(record.model, recipe).token_nats(text.tokens)[counted].mean())


@lru_cache(maxsize=1)
def _corpus(cache: Path) -> Any:
    from trainer.data.corpus import Corpus

    return Corpus.open(
        Job(width=64, depth=2, base=(64, 2), rate=-7, std=0.02, qk_norm=True, steps=1).recipe().data, cache
    )


class Losses:
    """The losses of jobs, each computed once, side by side."""

    def __init__(self, jobs: int, cache: Path, file: Path | None) -> None:
        self.cache, self.file = cache, file
        self.known: dict[str, float] = json.loads(file.read_text()) if file and file.is_file() else {}
        self.pool = ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn"))

    def of(self, jobs: list[Job]) -> list[float]:
        """The losses of these jobs, the longest begun first."""
        missing = {job.key: job for job in jobs if job.key not in self.known}
        queue = sorted(missing.values(), key=lambda job: -job.depth * job.width**2)
        for job, future in [(job, self.pool.submit(run, job, self.cache)) for job in queue]:
            self.known[job.key] = future.result()
            if self.file:
                self.file.write_text(json.dumps(self.known, indent=0))
        return [self.known[job.key] for job in jobs]


Sweep = dict[float, float]
"""Losses by learning rate."""


def sweep(losses: Losses, jobs: list[Job], start: int) -> list[Sweep]:
    """For each job the losses at three octaves, and at further ones while the best is at an end."""
    rates: list[set[float]] = [{start - 1, start, start + 1} for _ in jobs]
    while True:
        wanted = [replace(job, rate=rate) for job, tried in zip(jobs, rates, strict=True) for rate in sorted(tried)]
        found = iter(losses.of(wanted))
        sweeps = [{rate: next(found) for rate in sorted(tried)} for tried in rates]
        grown = False
        for tried, one in zip(rates, sweeps, strict=True):
            best = min(one, key=one.__getitem__)
            for end, step in ((min(one), -1), (max(one), 1)):
                if best == end and WIDEST[0] <= end + step <= WIDEST[1]:
                    tried.add(end + step)
                    grown = True
        if not grown:
            return sweeps


def optimum(losses: Sweep) -> float:
    """The logarithm of the best learning rate: of the parabola through the minimum and its neighbours."""
    best = min(losses, key=losses.__getitem__)
    left, right = losses.get(best - 1, math.inf), losses.get(best + 1, math.inf)
    curvature = left + right - 2 * losses[best]
    return best + (left - right) / (2 * curvature) if math.isfinite(curvature) and curvature > 0 else best


@dataclass(frozen=True, kw_only=True)
class Axis:
    """Sizes that are compared, the base first."""

    name: str
    sizes: tuple[tuple[int, int], ...]


def study(losses: Losses, axis: Axis, qk_norm: bool, steps: int, seeds: int) -> dict[str, Any]:
    """Sweep one axis in both parameterisations and compare levels; prints what it finds."""
    width, depth = base = axis.sizes[0]
    print(f"\n== {axis.name} {', '.join(str(size) for size in axis.sizes)}, qk-norm {'on' if qk_norm else 'off'}")
    bases = [
        Job(width=width, depth=depth, base=base, rate=0, std=std, qk_norm=qk_norm, steps=steps) for std in DEVIATIONS
    ]
    tuning = sweep(losses, bases, FIRST)
    for job, one in zip(bases, tuning, strict=True):
        print(f"base, initial std {job.std:<5} {_row(one)}")
    job, at_base = min(zip(bases, tuning, strict=True), key=lambda pair: min(pair[1].values()))
    tuned = optimum(at_base)
    print(f"base constants: initial std {job.std}, learning rate 2^{tuned:.2f}")

    arms = ("standard", "completep")
    jobs = [replace(job, arm=arm, width=w, depth=d) for arm in arms for w, d in axis.sizes]
    sweeps = iter(sweep(losses, jobs, round(tuned)))
    drift, own = {}, {}
    for arm in arms:
        mine = [next(sweeps) for _ in axis.sizes]
        best = [optimum(one) for one in mine]
        drift[arm] = [round(value - best[0], 2) for value in best]
        own[arm] = [min(one.values()) for one in mine]
        for size, one, value, moved in zip(axis.sizes, mine, best, drift[arm], strict=True):
            print(f"{arm:<10} {size!s:<10} {_row(one)}  best 2^{value:.2f} ({moved:+.2f} octaves)")
    level = _level(losses, axis, job, tuned, own, seeds)
    return {"std": job.std, "rate": round(tuned, 2), "drift": drift, "level": level}


def _level(
    losses: Losses, axis: Axis, job: Job, tuned: float, own: dict[str, list[float]], seeds: int
) -> list[dict[str, Any]]:
    """CompleteP at the base's learning rate and the control arm at the one that its law gives, at every larger size."""
    level = []
    params = scaling_params(job.recipe())
    for index, (width, depth) in enumerate(axis.sizes[1:], start=1):
        here = replace(job, width=width, depth=depth, rate=tuned)
        law = tuned - math.log2(scaling_params(here.recipe()) / params) / 3
        transferred = losses.of([replace(here, arm="completep", seed=seed) for seed in range(seeds)])
        control = losses.of([replace(here, rate=law, seed=seed) for seed in range(seeds)])
        difference = sum(transferred) / seeds - sum(control) / seeds
        level.append({"size": [width, depth], "completep": transferred, "ladder": control, "difference": difference})
        print(
            f"level {(width, depth)!s:<10} completep at 2^{tuned:.2f}: {_mean(transferred)}   ladder at 2^{law:.2f}: "
            f"{_mean(control)}   difference {difference:+.4f}   best of the sweeps: completep "
            f"{own['completep'][index]:.4f}, standard {own['standard'][index]:.4f}"
        )
    return level


def _mean(values: list[float]) -> str:
    return f"{sum(values) / len(values):.4f} ({', '.join(f'{value:.4f}' for value in values)})"


def _row(losses: Sweep) -> str:
    return "  ".join(f"2^{rate:g} {loss:.4f}" for rate, loss in losses.items())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two sizes of each axis, 60 steps")
    parser.add_argument("--qk-norm", choices=("on", "off", "both"), default="both")
    parser.add_argument("--axis", choices=("width", "depth", "both"), default="both")
    parser.add_argument("--steps", type=int, default=200, help=f"steps of {BATCH} tokens")
    parser.add_argument("--seeds", type=int, default=2, help="of the comparison of levels")
    parser.add_argument("--jobs", type=int, default=2, help="trainings side by side")
    parser.add_argument("--cache", type=Path, help="of tokenised text")
    parser.add_argument("--out", type=Path, help="file that keeps losses")
    options = parser.parse_args()
    from trainer.data.cache import default_cache

    assert hasattr(sys.stdout, "reconfigure")
    sys.stdout.reconfigure(line_buffering=True)
    cache = options.cache or default_cache()
    axes = [
        Axis(name="width", sizes=((64, 4), (128, 4), (256, 4))),
        Axis(name="depth", sizes=((64, 2), (64, 4), (64, 8))),
    ]
    axes = [axis for axis in axes if options.axis in (axis.name, "both")]
    steps, seeds = options.steps, options.seeds
    if options.quick:
        axes = [replace(axis, sizes=axis.sizes[:2]) for axis in axes]
        steps, seeds = 60, 1
    begun = time.monotonic()
    _corpus(cache)
    losses = Losses(options.jobs, cache, options.out)
    told: dict[str, Any] = {"steps": steps, "batch_tokens": BATCH}
    for qk_norm in {"on": [True], "off": [False], "both": [False, True]}[options.qk_norm]:
        for axis in axes:
            told[f"{axis.name}, qk-norm {'on' if qk_norm else 'off'}"] = study(losses, axis, qk_norm, steps, seeds)
    print(json.dumps({**told, "seconds": round(time.monotonic() - begun)}))


if __name__ == "__main__":
    main()
