"""Training speed beside nanoGPT's train.py and Hugging Face's Trainer: same shape, batch and thread, in one run.

    python benchmarks/throughput.py --nanogpt CHECKOUT [--trainer] [--pairs 5] [--json]

CHECKOUT is a clone of karpathy/nanoGPT, run as it comes (on a CPU: fp32). Both train on the same random tokens, 8
sequences of 256 tokens a step, vocabulary 4,096, tied embeddings, GELU, four times the width in the FFN. In place of
learned positions and LayerNorm ours has rotary positions and RMSNorm. With `--trainer`, also a Llama (SwiGLU of 8/3 of
the width: three matrices with the parameters of our two), trained by `transformers.Trainer` in each precision with
fused AdamW. Each figure is the median over the steps of one process; runs alternate, and the ratio is the median over
the pairs. The last line is JSON: {"ratios": {"0.36M/fp32": ..., ...}}, with `--trainer` also {"trainer": {...}}.
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
import re
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

VOCABULARY, BATCH, LENGTH = 4096, 8, 256
SHAPES = {"0.36M": (64, 2, 2), "1.3M": (128, 4, 4), "7.2M": (288, 6, 9)}  # width, layers, heads
STEPS = {"0.36M": 60, "1.3M": 40, "7.2M": 16}
WARMUP = 5
PRECISIONS = ("fp32", "bf16")

OURS = """
import json, statistics, sys, time
import torch
torch.set_num_threads(1)
from pathlib import Path
from trainer.data.corpus import Corpus
from trainer.data.tokenizer import Tokenizer
from trainer.loop import train
from trainer.recipe import Recipe

recipe = Recipe.model_validate(json.loads(sys.argv[1]))
corpus = Corpus.open(recipe.data, Path(sys.argv[2]))
tokens = int(sys.argv[3]) * recipe.train.batch_tokens
marks = []
train(recipe, lambda progress: marks.append(time.perf_counter()) or True, corpus=corpus, tokens=tokens)
steps = [b - a for a, b in zip(marks, marks[1:])][int(sys.argv[4]):]
print(json.dumps(recipe.train.batch_tokens / statistics.median(steps)))
"""


TRAINER = """
import json, statistics, sys, time
import torch
torch.set_num_threads(1)
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

width, layers, heads, precision, steps, warmup, folder = sys.argv[1:]
width, layers, heads, steps, warmup = (int(one) for one in (width, layers, heads, steps, warmup))
batch, length, vocabulary = BATCH, LENGTH, VOCABULARY
model = LlamaForCausalLM(LlamaConfig(
    vocab_size=vocabulary, hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads,
    intermediate_size=8 * width // 3, tie_word_embeddings=True, max_position_embeddings=length, use_cache=False,
))
ids = torch.randint(vocabulary, (batch * steps, length), generator=torch.Generator().manual_seed(0))
data = [{"input_ids": row, "labels": row} for row in ids]
marks = []

class Clock(TrainerCallback):
    def on_step_end(self, *given, **named):
        marks.append(time.perf_counter())

Trainer(
    model=model, train_dataset=data, callbacks=[Clock()],
    args=TrainingArguments(
        output_dir=folder, per_device_train_batch_size=batch, max_steps=steps, bf16=precision == "bf16", use_cpu=True,
        optim="adamw_torch_fused", learning_rate=1e-3, report_to=[], save_strategy="no", logging_strategy="no",
        disable_tqdm=True,
    ),
).train()
took = [b - a for a, b in zip(marks, marks[1:])][warmup:]
print(json.dumps(batch * length / statistics.median(took)))
"""


def recipe(width: int, layers: int, heads: int, precision: str, text: Path) -> dict[str, object]:
    return {
        "data": {
            "sources": {"words": {"path": str(text), "document": "line"}},
            "tokenizer": {"vocab_size": VOCABULARY},
            "sequence_length": LENGTH,
        },
        "model": {
            "d_model": width, "n_layers": layers, "n_heads": heads, "head_dim": width // heads,
            "ffn": "gelu", "ffn_dim": 4 * width, "qk_norm": False, "tie_embeddings": True,
        },
        "train": {"batch_tokens": BATCH * LENGTH, "precision": precision, "learning_rate": 1e-3},
    }  # fmt: skip


def write_text(path: Path) -> None:
    """Random words, enough for 4,096 tokens of vocabulary."""
    rng = np.random.default_rng(0)
    syllables = ["".join(rng.choice(list("abcdefghijklmnopqrstuvwxyz"), 3)) for _ in range(6000)]
    lines = [" ".join(syllables[i] for i in rng.integers(0, 6000, 400)) for _ in range(1000)]
    path.write_text("\n".join(lines))


def run_ours(width: int, layers: int, heads: int, precision: str, folder: Path, steps: int) -> float:
    text = json.dumps(recipe(width, layers, heads, precision, folder / "text.txt"))
    command = [sys.executable, "-c", OURS, text, str(folder / "cache"), str(steps), str(WARMUP)]
    done = subprocess.run(command, capture_output=True, text=True, env=one_thread(), check=True)
    return float(done.stdout.splitlines()[-1])


def run_nanogpt(checkout: Path, width: int, layers: int, heads: int, folder: Path, steps: int) -> float:
    """Tokens per second from the step times that train.py prints."""
    options = {
        "device": "cpu", "compile": False, "dtype": "float32", "dataset": str(folder / "nanogpt"), "eval_iters": 1,
        "eval_interval": 10**9, "gradient_accumulation_steps": 1, "batch_size": BATCH, "block_size": LENGTH,
        "n_layer": layers, "n_head": heads, "n_embd": width, "max_iters": steps, "out_dir": str(folder / "out"),
    }  # fmt: skip
    command = [sys.executable, "train.py", *(f"--{name}={value}" for name, value in options.items())]
    done = subprocess.run(command, capture_output=True, text=True, cwd=checkout, env=one_thread(), check=True)
    times = [float(ms) / 1000 for ms in re.findall(r"^iter \d+: .* time ([\d.]+)ms", done.stdout, re.MULTILINE)]
    return BATCH * LENGTH / statistics.median(times[WARMUP:])


def run_trainer(width: int, layers: int, heads: int, precision: str, folder: Path, steps: int) -> float:
    """Tokens per second of Hugging Face's Trainer."""
    sizes = {"BATCH": BATCH, "LENGTH": LENGTH, "VOCABULARY": VOCABULARY}
    script = "\n".join(f"{name} = {value}" for name, value in sizes.items()) + TRAINER
    words = [str(one) for one in (width, layers, heads, precision, steps, WARMUP, folder / "trainer")]
    command = [sys.executable, "-c", script, *words]
    done = subprocess.run(command, capture_output=True, text=True, env=one_thread(), check=True)
    return float(done.stdout.splitlines()[-1])


def write_nanogpt_data(folder: Path) -> None:
    """Random tokens in nanoGPT's layout; its vocabulary size is read from a pickle."""
    folder.mkdir()
    tokens = np.random.default_rng(0).integers(0, VOCABULARY, 2**20).astype(np.uint16)
    for name in ("train.bin", "val.bin"):
        tokens.tofile(folder / name)
    (folder / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": VOCABULARY}))


def one_thread() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nanogpt", type=Path, required=True, help="a clone of karpathy/nanoGPT")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--sizes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=list(PRECISIONS))
    parser.add_argument("--trainer", action="store_true", help="also beside Hugging Face's Trainer")
    parser.add_argument("--json", action="store_true", help="print the last line only")
    options = parser.parse_args()
    ratios: dict[str, float] = {}
    trainer: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_text(folder / "text.txt")
        write_nanogpt_data(folder / "nanogpt")
        for size in options.sizes:
            shape, steps = SHAPES[size], STEPS[size]
            pairs: dict[str, list[tuple[float, float]]] = {precision: [] for precision in options.precisions}
            peers: dict[str, list[tuple[float, float]]] = {precision: [] for precision in options.precisions}
            for _ in range(options.pairs):
                theirs = run_nanogpt(options.nanogpt.resolve(), *shape, folder, steps)
                for precision in options.precisions:
                    ours = run_ours(*shape, precision, folder, steps)
                    pairs[precision].append((ours, theirs))
                    if options.trainer:
                        peers[precision].append((ours, run_trainer(*shape, precision, folder, steps)))
            for precision in options.precisions:
                ratios[f"{size}/{precision}"] = told(size, precision, "nanoGPT fp32", pairs[precision], options.json)
                if options.trainer:
                    trainer[f"{size}/{precision}"] = told(
                        size, precision, f"Trainer {precision}", peers[precision], options.json
                    )
    print(json.dumps({"ratios": ratios} | ({"trainer": trainer} if trainer else {})))


def told(size: str, precision: str, peer: str, measured: list[tuple[float, float]], quiet: bool) -> float:
    """The median ratio over pairs of tokens per second, printed with what it is made of."""
    ratio = statistics.median(ours / theirs for ours, theirs in measured)
    if not quiet:
        ours, theirs = (statistics.median(side) for side in zip(*measured, strict=True))
        spread = sorted(round(a / b, 2) for a, b in measured)
        speeds = f"ours {ours:8.0f}  {peer} {theirs:8.0f} tokens/s  ratio {ratio:.2f}"
        print(f"{size:>6} {precision}  {speeds}  pairs {spread}", flush=True)
    return round(ratio, 3)


if __name__ == "__main__":
    main()
