"""What a trial spends on anything but its own steps: within a trial of half a minute, and before its first step.

    python benchmarks/trial_overhead.py [--seconds 30] [--trials 3] [--pairs 5] [--json]

(a) One trial of a 1.8M-parameter proxy over the Python on this machine, as a worker runs it (`run_recipe`), on one
thread, with a rung above it and a save on the way; its length is chosen so that it takes about `--seconds`. The time
spent in evaluation, checkpoints, gates, opening the corpus and building the model is taken at their entrances.

(b) Start-up of a trial in a warm worker: from the arrival of a job to the end of its first step, less a later step of
the same trial (the median of steps 3 to 12); steps are of one sequence, so that their noise hides less. Jobs alternate
between two genomes, of which one differs from all before in its mix, as it does in a search, and one in its learning
rate alone.

Figures are medians; the last line is JSON. It takes about three minutes on a quiet core, half a minute of them to
tokenise the corpus where evolm's cache does not have it. Beside wall-clock time stands the processor time of the
process, which other work on the machine changes little; where the two differ, believe the second, and add what a disk
takes.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from evolm import worker
from evolm.executors.base import Job, TrialProgress
from evolm.worker import Context, run_recipe
from trainer.data.cache import default_cache

TREES = {
    "evaluation": ("evolm.worker.score_domains", "trainer.data.corpus.Corpus.held_out"),
    "checkpoints": ("trainer.loop._Run.save",),
    "gates": ("trainer.loop.check_causality", "trainer.loop.check_floor"),
    "corpus": ("evolm.worker._corpus", "trainer.data.corpus.Corpus.loader"),
    "model": ("trainer.loop.build_engine",),
}
"""Where each part is entered."""


def genome(mix: float = 0.6, rate: float = 3e-3, batch: int = 8192) -> dict[str, Any]:
    """The preset micro over the text at hand."""
    return {
        "data": {
            "sources": {"code": {"path": "python:stdlib"}, "docs": {"path": "python:docs"}},
            "mix": {"code": mix, "docs": 1 - mix},
            "tokenizer": {"vocab_size": 4096},
            "sequence_length": 256,
        },
        "model": {"d_model": 128, "n_layers": 6, "n_heads": 4, "head_dim": 32, "ffn_dim": 384},
        "train": {"learning_rate": rate, "batch_tokens": batch, "warmup_steps": 30, "precision": "bf16"},
    }


def job(number: int, tokens: int, values: dict[str, Any], folder: Path, **context: Any) -> Job:
    shared = Context(cache=str(folder / "cache"), roots=[], documents={}, target=None, **context)
    place = folder / "run" / "trials" / str(number)
    return Job(
        trial=number, lease=number, rung=0, top=False, tokens=tokens, genome=values, seed=0, folder=str(place),
        context=shared.as_dict(),
    )  # fmt: skip


Moment = tuple[float, float]
"""Wall-clock and processor time."""


def now() -> Moment:
    return time.perf_counter(), time.process_time()


def since(before: Moment, after: Moment | None = None) -> Moment:
    after = after or now()
    return after[0] - before[0], after[1] - before[1]


def median(moments: Sequence[Moment]) -> Moment:
    return statistics.median(one[0] for one in moments), statistics.median(one[1] for one in moments)


def shares(values: dict[str, Any], tokens: int, folder: Path, number: int, seconds: float) -> dict[str, Moment]:
    """Time of one trial, in all and by part."""
    spent: dict[str, Moment] = dict.fromkeys(TREES, (0.0, 0.0))

    def timed(part: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **options: Any) -> Any:
            begun = now()
            try:
                return call(*args, **options)
            finally:
                took = since(begun)
                spent[part] = spent[part][0] + took[0], spent[part][1] + took[1]

        return run

    with ExitStack() as stack:
        for part, places in TREES.items():
            for place in places:
                owner, name = place.rsplit(".", 1)
                target = _import(owner)
                stack.enter_context(patch.object(target, name, timed(part, getattr(target, name))))
        begun = now()
        saves = {"checkpoint_seconds": seconds / 2}
        outcome = run_recipe(job(number, tokens, values, folder, **saves), lambda progress: True)
        total = since(begun)
    assert outcome.kind == "result", outcome.message
    return {"total": total, **spent}


def _import(place: str) -> Any:
    import importlib

    try:
        return importlib.import_module(place)
    except ModuleNotFoundError:
        module, name = place.rsplit(".", 1)
        return getattr(importlib.import_module(module), name)


def start_up(values: dict[str, Any], folder: Path, number: int) -> Moment:
    """From a job's arrival to the end of its first step, less one step."""
    marks: list[Moment] = []

    def tell(progress: TrialProgress) -> bool:
        if progress.tokens:
            marks.append(now())
        return len(marks) < 12

    begun = now()
    outcome = run_recipe(job(number, 10**7, values, folder), tell)
    assert outcome.reason == "interrupted", outcome.message
    step = median([since(before, after) for before, after in pairwise(marks[1:])])
    return since(step, since(begun, marks[0]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=30.0)
    parser.add_argument("--pairs", type=int, default=5, help="start-ups of each kind")
    parser.add_argument("--trials", type=int, default=3, help="trials of `--seconds`")
    parser.add_argument("--cache", type=Path, default=default_cache(), help="of the corpus; evolm's own when absent")
    parser.add_argument("--json", action="store_true", help="print the last line only")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "run" / "trials").mkdir(parents=True)
        options.cache.mkdir(parents=True, exist_ok=True)
        (folder / "cache").symlink_to(options.cache.resolve())
        say = (lambda text: None) if options.json else partial(print, flush=True)
        start_up(genome(batch=256), folder, 0)  # cold: imports, and the corpus where it is new
        warm: dict[str, list[Moment]] = {"another mix": [], "same data": []}
        for n in range(options.pairs):
            warm["another mix"].append(start_up(genome(mix=0.3 + 0.01 * n, batch=256), folder, 100 + n))
            warm["same data"].append(start_up(genome(rate=1e-3 + 1e-4 * n, batch=256), folder, 200 + n))
        begins = {kind: median(found) for kind, found in warm.items()}
        say(f"{'start-up in a warm worker':26}  {'ms':>8}  {'processor':>9}")
        for kind, (wall, processor) in begins.items():
            say(f"{kind:26}  {1000 * wall:8.0f}  {1000 * processor:9.0f}")
        tokens = _length(folder, options.seconds)
        trials = []
        for n in range(options.trials):
            trials.append(shares(genome(), tokens, folder, 300 + n, options.seconds))
            say(f"trial {n + 1} of {options.trials}: {tokens:,} tokens in {trials[-1]['total'][0]:.1f} s")
    whole = median([one["total"] for one in trials])
    parts = {name: median([one[name] for one in trials]) for name in TREES}
    part = {name: (wall / whole[0], processor / whole[1]) for name, (wall, processor) in parts.items()}
    say(f"{'of a trial':26}  {'ms':>8}  {'processor':>9}  {'share':>7}  {'of proc.':>8}")
    for name, (wall, processor) in {"all": whole, **parts}.items():
        of = f"{wall / whole[0]:7.2%}  {processor / whole[1]:8.2%}"
        say(f"{name:26}  {1000 * wall:8.0f}  {1000 * processor:9.0f}  {of}")
    scored = [part["evaluation"][clock] + part["checkpoints"][clock] for clock in (0, 1)]
    print(
        json.dumps(
            {
                "seconds": round(whole[0], 2),
                "shares": {name: round(wall, 4) for name, (wall, _) in part.items()},
                "evaluation_and_checkpoints": round(scored[0], 4),
                "evaluation_and_checkpoints_processor": round(scored[1], 4),
                "start_up_ms": {name: round(1000 * wall, 1) for name, (wall, _) in begins.items()},
                "start_up_processor_ms": {name: round(1000 * used, 1) for name, (_, used) in begins.items()},
            }
        )
    )


def _length(folder: Path, seconds: float) -> int:
    """Tokens of a trial that takes about so long, by the speed of a short one."""
    outcome = run_recipe(job(299, 8 * 8192, genome(), folder), lambda progress: True)
    return max(8192, int(outcome.metrics["tokens_per_second"] * seconds / 8192) * 8192)


if __name__ == "__main__":
    assert worker  # the module whose entrances are timed
    main()
