"""A small GPT of bytes that learns the source code of your own Python: a trainer for evolm to search with. It is yours.

By itself, `python train_gpt.py` trains the configuration below. Under `evolm search` a recipe overrides it, and the
environment says how far to train, where to save and where to report: look for EVOLM_.
"""

import json
import math
import os
import signal
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional

SAVE_SECONDS = 60.0
"""How often a running training is saved: what a crash may cost."""

REPORT_STEPS = 10


@dataclass
class Config:
    """Every value may be a gene, in any section of the recipe."""

    width: int = 128
    depth: int = 4
    head_width: int = 32
    context: int = 128
    batch: int = 16
    learning_rate: float = 3e-3
    warmup_steps: int = 10
    schedule: str = "decay"  # or constant
    decay_share: float = 0.2  # of the steps, the last ones
    weight_decay: float = 0.1
    beta2: float = 0.95
    grad_clip: float = 1.0


# --- the model --------------------------------------------------------------------------------------------------------


class Block(nn.Module):
    """Attention and a feed-forward part, each after a norm and around a shortcut."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        width, self.heads = config.width, config.width // config.head_width
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.mixed = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """From and to (batch, context, width)."""
        batch, context, width = x.shape
        heads = self.qkv(self.norm_1(x)).view(batch, context, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        seen = functional.scaled_dot_product_attention(heads[0], heads[1], heads[2], is_causal=True)
        x = x + self.mixed(seen.transpose(1, 2).reshape(batch, context, width))
        hidden: Tensor = self.down(functional.gelu(self.up(self.norm_2(x))))
        return x + hidden


class GPT(nn.Module):
    """Bytes in, logits of the next byte out."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.bytes, self.places = nn.Embedding(256, config.width), nn.Embedding(config.context, config.width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.norm = nn.LayerNorm(config.width)
        for name, weight in self.named_parameters():
            if weight.dim() == 2:  # what is added to the stream, the less the more there is of it
                added = name.endswith(("mixed.weight", "down.weight"))
                nn.init.normal_(weight, std=0.02 / math.sqrt(2 * config.depth) if added else 0.02)

    def forward(self, text: Tensor) -> Tensor:
        """From (batch, context) to (batch, context, 256)."""
        x = self.bytes(text) + self.places.weight[: text.shape[1]]
        for block in self.blocks:
            x = block(x)
        return functional.linear(self.norm(x), self.bytes.weight)


# --- the text ---------------------------------------------------------------------------------------------------------


def read_text() -> tuple[Tensor, Tensor]:
    """The modules of the running Python, each tenth of them held out, as bytes."""
    files = sorted(Path(os.__file__).parent.glob("*.py"))
    kept = bytearray(b"".join(file.read_bytes() for number, file in enumerate(files) if number % 10))
    held = bytearray(b"".join(file.read_bytes() for file in files[::10]))
    return torch.frombuffer(kept, dtype=torch.uint8), torch.frombuffer(held, dtype=torch.uint8)


def draw(text: Tensor, config: Config, seed: int, step: int) -> tuple[Tensor, Tensor]:
    """The batch of a step: the same one whether training went on from a checkpoint or not."""
    generator = torch.Generator().manual_seed(seed * 2**32 + step)
    begins = torch.randint(len(text) - config.context, (config.batch, 1), generator=generator)
    rows = text[begins + torch.arange(config.context + 1)].long().to(device)
    return rows[:, :-1], rows[:, 1:]


def loss_of(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Mean loss of the next byte, in nats."""
    return functional.cross_entropy(model(batch[0]).flatten(0, 1), batch[1].flatten())


@torch.no_grad()
def validate(model: nn.Module, text: Tensor, config: Config) -> float:
    """Loss on text that was held out: the same one for every model."""
    return sum(float(loss_of(model, draw(text, config, 0, step))) for step in range(16)) / 16


# --- training ---------------------------------------------------------------------------------------------------------


def save(place: Path, model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
    """All of it under its name or nothing: whoever is killed while writing leaves the file of before."""
    tensors = {f"model.{name}": weight.detach() for name, weight in model.named_parameters()}
    for name, weight in model.named_parameters():
        tensors |= {f"{key}.{name}": value for key, value in optimizer.state[weight].items()}
    new = place.with_suffix(".new")
    save_file(tensors, new, metadata={"step": str(step)})
    new.replace(place)


def load(place: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Go on from a checkpoint; how many steps it has behind it."""
    with safe_open(place, "pt") as file:
        for name, weight in model.named_parameters():
            weight.data.copy_(file.get_tensor(f"model.{name}"))
            keys = [key for key in ("step", "exp_avg", "exp_avg_sq") if f"{key}.{name}" in file.keys()]  # noqa: SIM118
            optimizer.state[weight] = {key: file.get_tensor(f"{key}.{name}").to(device) for key in keys}
        return int(file.metadata()["step"])


def train(config: Config, tokens: int, seed: int, place: Path, metrics: Path) -> None:
    """Train up to so many tokens from the very beginning, and report what came of it.

    What is saved is the trunk: training before its rate decays. A longer training goes on from there, and decays later.
    """
    stopping = threading.Event()
    signal.signal(signal.SIGTERM, lambda number, frame: stopping.set())

    def report(**values: Any) -> None:
        with metrics.open("a") as file:
            file.write(json.dumps(values) + "\n")

    kept, held = read_text()
    torch.manual_seed(seed)
    model = GPT(config).to(device)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=config.learning_rate, betas=(0.9, config.beta2), weight_decay=config.weight_decay
    )
    params = sum(weight.numel() for weight in model.parameters())
    tokens_a_step = config.batch * config.context
    flops_a_step = tokens_a_step * (6 * params + 12 * config.depth * config.width * config.context)
    steps = math.ceil(tokens / tokens_a_step)
    trunk = steps - round(config.decay_share * steps) if config.schedule == "decay" else steps
    first = load(place, model, optimizer) if place.exists() else 0
    began = saved = time.monotonic()
    for step in range(first, steps + 1):
        if step == trunk or (step < trunk and (stopping.is_set() or time.monotonic() - saved > SAVE_SECONDS)):
            save(place, model, optimizer, step)
            saved = time.monotonic()
        if stopping.is_set():
            return
        if step == steps:
            break
        rate = min(1.0, (step + 1) / config.warmup_steps) * min(1.0, (steps - step) / max(1, steps - trunk))
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * rate
        loss = loss_of(model, draw(kept, config, seed + 1, step))
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip)
        optimizer.step()
        value, done, flops = loss.item(), step + 1, (step + 1 - first) * flops_a_step
        if not math.isfinite(value):
            return report(failed="diverged", message=f"loss is {value} at step {done}", flops=flops)
        if done % REPORT_STEPS == 0:
            speed = (done - first) * tokens_a_step / (time.monotonic() - began)
            report(tokens=done * tokens_a_step, loss=value, tokens_per_second=speed, flops=flops)
    bits = validate(model, held, config) / math.log(2)
    report(tokens=steps * tokens_a_step, bits_per_byte=bits, params=params, flops=(steps - first) * flops_a_step)


def main() -> None:
    """Take what evolm says where it says something."""
    told = os.environ
    recipe = json.loads(Path(told["EVOLM_RECIPE"]).read_text()) if "EVOLM_RECIPE" in told else {}
    folder = Path(told.get("EVOLM_CHECKPOINT", "out"))
    folder.mkdir(exist_ok=True)
    train(
        Config(**{name: value for section in recipe.values() for name, value in section.items()}),
        tokens=int(told.get("EVOLM_TOKENS", 1_000_000)),
        seed=int(told.get("EVOLM_SEED", 0)),
        place=folder / "checkpoint.safetensors",
        metrics=Path(told.get("EVOLM_METRICS", "out/metrics.jsonl")),
    )


device = "cuda" if torch.cuda.is_available() else "cpu"

if __name__ == "__main__":
    main()
