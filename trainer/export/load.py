"""Loading an exported folder with our own classes or stock ones: code that a folder carries is never run."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast
from transformers.utils import logging

import trainer.model  # noqa: F401  # makes EvolmForCausalLM known, so that its folder needs no code of its own
from search_spaces.errors import UsageError
from trainer.device import usable_device


def load_model(folder: Path, device: str = "cpu") -> PreTrainedModel:
    """The model in an exported folder, in fp32. Raises UsageError when there is none."""
    if not (folder / "config.json").is_file():
        raise UsageError(f"{folder}: no exported model there (a folder with config.json and model.safetensors)")
    logging.disable_progress_bar()
    place = usable_device(device)
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=torch.float32,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
        )
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RuntimeError, SafetensorError) as error:
        raise UsageError(
            f"{folder}: cannot be loaded: {(str(error).splitlines() or [type(error).__name__])[0]}"
        ) from None
    if missing := sorted(report["missing_keys"]):
        raise UsageError(f"{folder}: cannot be loaded: {missing[0]} is missing from its weights")
    return model.eval().to(place)


def load_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """The tokenizer in an exported folder. Raises UsageError when there is none."""
    if not (folder / "tokenizer.json").is_file():
        raise UsageError(f"{folder}: no tokenizer.json there")
    try:
        return PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise UsageError(f"{folder}: its tokenizer cannot be loaded: {error}") from None
