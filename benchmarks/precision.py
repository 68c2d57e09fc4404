"""Does bf16 train as fp32 does? The same recipe in both, over the same seeds, on the text of this Python.

    python benchmarks/precision.py [--tokens 400000] [--seeds 3]

Prints, at tenths of the run, the training loss of both (means over the seeds), their difference on the same seed, and
the standard deviation between seeds in fp32, the noise that a difference has to be seen against; and bits per byte on
held-out text at the end. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics

import torch

from fitness.loss import loss_metrics, score_domains
from trainer.data.cache import default_cache
from trainer.data.corpus import Corpus
from trainer.evaluate import TokenScorer
from trainer.loop import train
from trainer.recipe import Recipe

MARKS = 10


def recipe(precision: str) -> Recipe:
    """1.3M parameters, as in the speed benchmark."""
    return Recipe.model_validate(
        {
            "data": {
                "sources": {"code": {"path": "python:stdlib"}},
                "tokenizer": {"vocab_size": 4096},
                "sequence_length": 256,
            },
            "model": {"d_model": 128, "n_layers": 4, "n_heads": 4, "ffn": "gelu", "ffn_dim": 512},
            "train": {"batch_tokens": 2048, "learning_rate": 2e-3, "precision": precision},
        }
    )


def run(precision: str, seed: int, tokens: int) -> tuple[list[float], float]:
    """Mean losses of each tenth, nats per token, and bits per byte at the end."""
    one = recipe(precision)
    corpus = Corpus.open(one.data, default_cache())
    losses: list[float] = []
    record = train(one, lambda step: losses.append(step.loss) or True, corpus=corpus, tokens=tokens, seed=seed)
    size = math.ceil(len(losses) / MARKS)
    curve = [statistics.mean(losses[at : at + size]) for at in range(0, len(losses), size)]
    scores = loss_metrics(score_domains(TokenScorer(record.model, one), corpus.held_out("validation")), None)
    return curve, scores["bits_per_byte"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=400_000)
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    runs = {
        precision: [run(precision, seed, options.tokens) for seed in range(options.seeds)]
        for precision in ("fp32", "bf16")
    }
    print(f"{'':>6}  {'fp32':>7}  {'bf16':>7}  {'bf16 - fp32':>11}  {'seeds':>7}")
    for at in range(len(runs["fp32"][0][0])):
        told(f"{(at + 1) / MARKS:.0%}", *([curve[at] for curve, _ in runs[one]] for one in ("fp32", "bf16")))
    result = told("bpb", *([score for _, score in runs[one]] for one in ("fp32", "bf16")))
    print(json.dumps({"bits_per_byte": result}))


def told(name: str, fp32: list[float], bf16: list[float]) -> dict[str, float | None]:
    """One line of the table, and what it says."""
    difference = statistics.mean(b - a for a, b in zip(fp32, bf16, strict=True))
    noise = statistics.stdev(fp32) if len(fp32) > 1 else None
    means = statistics.mean(fp32), statistics.mean(bf16)
    spread = "" if noise is None else f"{noise:7.4f}"
    print(f"{name:>6}  {means[0]:7.4f}  {means[1]:7.4f}  {difference:11.4f}  {spread}")
    return {"fp32": means[0], "bf16": means[1], "difference": difference, "seeds": noise}


if __name__ == "__main__":
    main()
