"""Generation from an exported folder, with transformers' own decoding."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import GenerationConfig

from search_spaces.errors import UsageError
from trainer.export.load import load_model, load_tokenizer


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is chosen: temperature 0 takes the likeliest; `top_k` 0 and `top_p` 1 leave all tokens in."""

    max_tokens: int = 100
    temperature: float = 0.8
    top_k: int = 0
    top_p: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        """Refuse what no decoding means: raises UsageError."""
        if self.max_tokens < 1 or self.top_k < 0 or not 0 < self.top_p <= 1 or not self.temperature >= 0:
            raise UsageError(
                "sampling needs max_tokens >= 1, temperature >= 0, top_k >= 0 and 0 < top_p <= 1; "
                f"got {self.max_tokens}, {self.temperature}, {self.top_k}, {self.top_p}"
            )


class Engine:
    """A model and its tokenizer, ready to continue texts."""

    def __init__(self, folder: Path, device: str = "cpu") -> None:
        self.model = load_model(folder, device)
        self.tokenizer = load_tokenizer(folder)

    @torch.inference_mode()
    def generate(self, prompt: str, sampling: Sampling) -> str:
        """The prompt and its continuation. Raises UsageError when the prompt leaves no room in the model's context."""
        prompt = prompt.encode("utf-8", errors="replace").decode()  # a lone surrogate is no text
        encoded = self.tokenizer(prompt, return_tensors="pt", return_token_type_ids=False).to(self.model.device)
        context = int(self.model.config.max_position_embeddings)
        length = int(encoded["input_ids"].shape[1])
        room = context - length
        if room < 1:
            raise UsageError(f"the prompt has {length} tokens, the model's context is {context}")
        config = GenerationConfig(
            max_new_tokens=min(sampling.max_tokens, room),
            do_sample=sampling.temperature > 0,
            eos_token_id=self.tokenizer.eos_token_id,
            bos_token_id=self.tokenizer.bos_token_id,
            pad_token_id=self.tokenizer.pad_token_id,
            suppress_tokens=[self.tokenizer.pad_token_id, self.tokenizer.bos_token_id],
        )
        if sampling.temperature > 0:
            config.update(temperature=sampling.temperature, top_k=sampling.top_k, top_p=sampling.top_p)
        if sampling.seed is not None:
            torch.manual_seed(sampling.seed)
        ids = self.model.generate(**encoded, generation_config=config)
        return str(self.tokenizer.decode(ids[0], skip_special_tokens=True))
