"""From which length of a run on compiled blocks pay: seconds to compile, cold and warm, against what a step gains.

    python benchmarks/compile.py [--device cpu] [--precision bf16] [--shapes 1.3M 7.2M] [--steps 12] [--json]

Every figure is of a process of its own: blocks as they are, compiled with an empty cache, compiled with the cache that
the one before filled. Forward and backward pass of 8 sequences of 256 tokens (on a GPU: 64 of 1,024), vocabulary 4,096.
A run breaks even at cold / (1 - ratio) seconds, ratio being the compiled step's time as a share of the plain one's. The
last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile

SHAPES = {"1.3M": (128, 4, 4), "7.2M": (288, 6, 9), "124M": (768, 12, 12)}  # width, layers, heads
BATCHES = {"cpu": (8, 256), "cuda": (64, 1024)}
WARMUP = 3

SIDE = """
import json, sys, time
import torch
torch.set_num_threads(1)
from trainer.compiling import compiled_blocks
from trainer.model import build_model
from trainer.objective import training_loss
from trainer.recipe import Recipe

said = json.loads(sys.argv[1])
recipe = Recipe.model_validate(said["recipe"])
model = build_model(recipe, 0, said["device"]).train()
batch = torch.randint(3, 4096, (said["rows"], recipe.data.sequence_length + 1), device=said["device"])
marks = []

def mark():
    if said["device"] != "cpu":
        torch.cuda.synchronize()
    marks.append(time.perf_counter())

mark()
with compiled_blocks(model, said["compiled"]):
    for _ in range(said["steps"]):
        training_loss(model, recipe, batch).objective.backward()
        model.zero_grad(set_to_none=True)
        mark()
print(json.dumps([b - a for a, b in zip(marks, marks[1:])]))
"""


def side(shape: str, device: str, precision: str, steps: int, cache: str, compiled: bool) -> list[float]:
    """Seconds of each step."""
    width, layers, heads = SHAPES[shape]
    rows, length = BATCHES[device.split(":")[0]]
    recipe = {
        "data": {"sources": {"none": {"path": "none"}}, "tokenizer": {"vocab_size": 4096}, "sequence_length": length},
        "model": {"d_model": width, "n_layers": layers, "n_heads": heads},
        "train": {"batch_tokens": rows * length, "precision": precision},
    }
    said = {"recipe": recipe, "device": device, "rows": rows, "steps": steps, "compiled": compiled}
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", SIDE, json.dumps(said)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def measure(shape: str, device: str, precision: str, steps: int) -> dict[str, float | None]:
    with tempfile.TemporaryDirectory() as cache:
        plain = side(shape, device, precision, steps, cache, False)
        cold = side(shape, device, precision, steps, cache, True)
        warm = side(shape, device, precision, steps, cache, True)
    step, compiled = (statistics.median(one) for one in (plain[WARMUP:], cold[WARMUP:] + warm[WARMUP:]))
    ratio = compiled / step
    taken = {name: one[0] - compiled for name, one in (("cold", cold), ("warm", warm))}
    even = taken["cold"] / (1 - ratio) if ratio < 1 else math.inf
    return {
        "plain_ms": 1e3 * step,
        "compiled_ms": 1e3 * compiled,
        "ratio": ratio,
        "cold_seconds": taken["cold"],
        "warm_seconds": taken["warm"],
        "break_even_seconds": even if math.isfinite(even) else None,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", nargs="*", default=["fp32", "bf16"])
    parser.add_argument("--shapes", nargs="*", default=["1.3M", "7.2M"], choices=SHAPES)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--json", action="store_true")
    wanted = parser.parse_args()
    found = {}
    for shape in wanted.shapes:
        for precision in wanted.precision:
            one = found[f"{shape}/{precision}"] = measure(shape, wanted.device, precision, wanted.steps)
            if not wanted.json:
                words = ", ".join(
                    f"{name} {'never' if value is None else f'{value:.3g}'}" for name, value in one.items()
                )
                print(f"{shape} {precision} on {wanted.device}: {words}", flush=True)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
