"""Where the time of a training step goes on a CPU thread, beside what the machine could do at best.

    python benchmarks/step_profile.py [--sizes 7.2M] [--precisions fp32 bf16] [--steps 6]

The shapes are those of throughput.py. First the two numbers that bound a step: the FLOPs of its products of matrices,
and the FLOP/s that this machine gives products of the model's own shapes; their quotient is the least that a step can
take. Then the step as it is, and the share of each operation in it. The last line is JSON: that least, over the time of
the step.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch
from throughput import BATCH, LENGTH, SHAPES, recipe
from torch.profiler import ProfilerActivity, profile

from trainer.cost import costs
from trainer.device import reused_memory
from trainer.engines import Setup, build_engine
from trainer.recipe import Recipe

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def best(run: Callable[[], object], times: int = 15) -> float:
    """Least seconds of a processor."""
    run()
    taken = []
    for _ in range(times):
        begun = time.process_time()
        run()
        taken.append(time.process_time() - begun)
    return min(taken)


def product_speed(width: int, dtype: torch.dtype) -> float:
    """FLOP/s of the products of one feed-forward part: forward, and both of the backward pass."""
    tokens, hidden = BATCH * LENGTH, 4 * width
    x, up, outer = (torch.randn(shape).to(dtype) for shape in ((tokens, width), (hidden, width), (tokens, hidden)))
    seconds = best(lambda: (x @ up.t(), outer @ up, outer.t() @ x))
    return 3 * 2 * tokens * width * hidden / seconds


def measure(size: str, precision: str, steps: int) -> float:
    width, layers, heads = SHAPES[size]
    one = Recipe.model_validate(recipe(width, layers, heads, precision, __file__))
    flops = BATCH * LENGTH * costs(one).flops_per_token
    speed = product_speed(width, DTYPES[precision])
    engine = build_engine(one, 0, torch.device("cpu"), Setup(), None)
    batch = torch.randint(
        one.data.tokenizer.vocab_size, (BATCH, LENGTH + 1), generator=torch.Generator().manual_seed(0)
    )

    def step() -> None:
        engine.backward(engine.forward(batch, last=True).objective / batch[:, 1:].numel())
        engine.clip(1.0)
        engine.update()
        engine.optimizer.zero_grad(set_to_none=True)

    taken = statistics.median(best(step, 1) for _ in range(steps))
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        for _ in range(3):
            step()
    table = sorted(seen.key_averages(), key=lambda event: -event.self_cpu_time_total)
    whole = sum(event.self_cpu_time_total for event in table)
    least = flops / speed
    print(f"{size} {precision}: {flops:.3g} FLOPs a step, {speed / 1e9:.0f} GFLOP/s: at least {1e3 * least:.0f} ms")
    print(f"  a step takes {1e3 * taken:.0f} ms; of it")
    for event in table[:12]:
        print(f"    {event.self_cpu_time_total / whole:6.1%}  {event.key}")
    return round(least / taken, 3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--precisions", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--steps", type=int, default=6)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with reused_memory():
        shares = {
            f"{size}/{precision}": measure(size, precision, options.steps)
            for size in options.sizes
            for precision in options.precisions
        }
    print(json.dumps({"least_over_taken": shares}))


if __name__ == "__main__":
    main()
