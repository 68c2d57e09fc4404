"""By how much a search's winner beats its baseline: both trained anew with fresh seeds, judged on the test split.

    python benchmarks/winner_vs_baseline.py RUN [--trial best] [--tokens 2M] [--seeds 3] [--out FOLDER]

Training is `evolm train`, one thread a process, two processes at a time, and goes on where it was interrupted when the
same command is given again. Seeds are 1, 2, ...: none of them is the search's own. Differences are of pairs with the
same seed, hence the same initial stream and data order.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import evolm
from search_spaces.genome import Values
from search_spaces.quantities import parse_quantity


def train(recipe: Values, folder: Path, tokens: int, seed: int, run: evolm.Run) -> dict[str, float]:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "recipe.yaml").write_text(json.dumps({"version": 1, "name": folder.name, **recipe}))
    command = [sys.executable, "-m", "evolm", "train", str(folder / "recipe.yaml"), "--out", str(folder)]
    command += ["--tokens", str(tokens), "--seed", str(seed), "--threads", "1", "--test", "--no-export"]
    command += ["--cache", run.ledger.meta["cache"]]
    if run.settings.target:
        command += ["--target", json.dumps(run.settings.target)]
    command += [word for root in run.ledger.meta["roots"] for word in ("--root", root)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    record = json.loads((folder / "record.json").read_text())
    return {**record["test"], "params": record["params"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run")
    parser.add_argument("--trial", default="best")
    parser.add_argument("--tokens", default="2M")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, help="RUN/winner-vs-baseline when absent")
    options = parser.parse_args()
    run = evolm.load(options.run)
    options.out = options.out or run.folder.path / "winner-vs-baseline"
    tokens = int(parse_quantity(options.tokens) or options.tokens)
    recipes = {"winner": run.trial(options.trial).genome, "baseline": run.file.space.baseline.values()}
    jobs = [(name, seed) for seed in range(1, options.seeds + 1) for name in recipes]
    with ThreadPoolExecutor(2) as pool:
        done = pool.map(
            lambda job: train(recipes[job[0]], options.out / f"{job[0]}-{job[1]}", tokens, job[1], run), jobs
        )
        scores = dict(zip(jobs, done, strict=True))
    differences = []
    for seed in range(1, options.seeds + 1):
        winner, baseline = scores["winner", seed], scores["baseline", seed]
        differences.append(winner["bits_per_byte"] - baseline["bits_per_byte"])
        print(
            f"seed {seed}: winner {winner['bits_per_byte']:.4f}  baseline {baseline['bits_per_byte']:.4f}  "
            f"difference {differences[-1]:+.4f} bits per byte"
        )
    mean, spread = statistics.mean(differences), statistics.stdev(differences) if len(differences) > 1 else 0.0
    base = statistics.mean(scores["baseline", seed]["bits_per_byte"] for seed in range(1, options.seeds + 1))
    sizes = {name: int(scores[name, 1]["params"]) for name in recipes}
    print(f"parameters: winner {sizes['winner']:,}, baseline {sizes['baseline']:,}")
    print(
        f"mean difference {mean:+.4f} ({100 * mean / base:+.1f} %), standard deviation {spread:.4f}, {tokens:,} tokens"
    )
    print(json.dumps({"differences": differences, "relative": mean / base, "params": sizes, "tokens": tokens}))


if __name__ == "__main__":
    main()
