"""A teacher: an exported model whose predictions are a part of what another one learns from."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from trainer.data.tokenizer import Tokenizer
from trainer.errors import DataError
from trainer.export.load import load_model
from trainer.loss import Lesson
from trainer.model import EvolmForCausalLM, Head
from trainer.recipe import Recipe


class Teacher:
    """A model that is not trained, what it says of given tokens, and the digest of its weights."""

    def __init__(self, model: PreTrainedModel, digest: str, *, share: float, temperature: float) -> None:
        self.model, self.digest = model.requires_grad_(False), digest
        self.share, self.temperature = share, temperature
        self.head = head_of(model)

    @classmethod
    def open(
        cls, recipe: Recipe, tokenizer: Tokenizer, roots: Sequence[Path] = (), device: str = "cpu"
    ) -> Teacher | None:
        """The recipe's teacher, or None. A relative path is looked for below each root in turn.

        Raises DataError where there is none, or one of another tokenizer or of shorter sequences, UsageError where it
        cannot be loaded.
        """
        train = recipe.train
        if train.teacher is None:
            return None
        folder = _folder(train.teacher, roots)
        _same_tokenizer(folder, tokenizer)
        digest = _digest(folder)
        model = load_model(folder, device)
        longest = getattr(model.config, "max_position_embeddings", recipe.data.sequence_length)
        if longest < recipe.data.sequence_length:
            raise DataError(
                f"train.teacher {folder}: reads {longest} tokens, data.sequence_length is {recipe.data.sequence_length}"
            )
        return cls(model, digest, share=train.distillation, temperature=train.distillation_temperature)

    @property
    def flops_per_token(self) -> float:
        """FLOPs of its forward pass, for each token: a multiply and an add for each parameter."""
        count: int = sum(parameter.numel() for parameter in self.model.parameters())
        return 2.0 * count

    def lesson(self, inputs: torch.Tensor) -> Lesson:
        """What it says of tokens (B, T), in the autocast precision where one is set."""
        with torch.inference_mode():
            hidden = self.model.base_model(inputs, use_cache=False).last_hidden_state.flatten(0, 1)
            kind = inputs.device.type
            dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else self.head.weight.dtype
            return Lesson(
                hidden=hidden.to(dtype),
                weight=self.head.weight.to(dtype),
                share=self.share,
                temperature=self.temperature,
                multiplier=self.head.multiplier,
                softcap=self.head.softcap,
            )


def _folder(path: str, roots: Sequence[Path]) -> Path:
    wanted = Path(path).expanduser()
    for root in roots or [Path()]:
        if (root / wanted).is_dir():
            return root / wanted
    raise DataError(
        f"train.teacher '{path}': no such folder; give that of an exported model, as `evolm promote` writes"
    )


def _same_tokenizer(folder: Path, tokenizer: Tokenizer) -> None:
    """Refuse a teacher whose token ids mean something else. What is compared is how text becomes ids: an exported
    tokenizer differs from the trained one in what it puts around a text."""
    file = folder / "tokenizer.json"
    if not file.is_file():
        raise DataError(f"train.teacher {folder}: has no tokenizer.json, so it cannot be told that its tokens are ours")
    theirs, ours = _rules(file.read_text()), _rules(tokenizer.file.read_text())
    if theirs != ours:
        raise DataError(
            f"train.teacher {folder}: has another tokenizer ({len(theirs['vocab'])} entries, the recipe's has "
            f"{len(ours['vocab'])}); a teacher has to be trained with the same data.sources and data.tokenizer"
        )


def _rules(text: str) -> dict[str, Any]:
    """The vocabulary and the merges in a tokenizer.json; empty where it has none."""
    try:
        model = json.loads(text)["model"]
        merges = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
        return {"vocab": model["vocab"], "merges": merges}
    except (ValueError, KeyError, TypeError):
        return {"vocab": {}, "merges": []}


def _digest(folder: Path) -> str:
    """SHA-256 over the configuration and the weights."""
    total = hashlib.sha256()
    for file in [folder / "config.json", *sorted(folder.glob("*.safetensors"))]:
        if file.is_file():
            with file.open("rb") as stream:
                total.update(hashlib.file_digest(stream, "sha256").digest())
    return total.hexdigest()


def head_of(model: PreTrainedModel) -> Head:
    """What turns a model's hidden states into logits. What stock classes do beside the product with a matrix stands in
    their configurations: a multiplier (Cohere's `logit_scale`, the inverse of Granite's `logits_scaling`) and a softcap
    (Gemma's)."""
    if isinstance(model, EvolmForCausalLM):
        return model.head()
    config = model.config
    multiplier = getattr(config, "logit_scale", None) or 1 / (getattr(config, "logits_scaling", None) or 1.0)
    softcap = getattr(config, "final_logit_softcapping", None) or 0.0
    weight = model.get_output_embeddings().weight
    return Head(weight=weight, multiplier=float(multiplier), softcap=float(softcap))
