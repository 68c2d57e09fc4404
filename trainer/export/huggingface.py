"""The exported folder: what transformers, vLLM and lm-eval load, with the receipt that it is the model that was
trained."""

from __future__ import annotations

import json
import os
import shutil
import uuid
from pathlib import Path
from typing import Any

import tokenizers
from safetensors.torch import save_file
from tokenizers import processors
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerFast

from search_spaces.errors import UsageError
from trainer.data.tokenizer import BOS, EOS, PAD, Tokenizer
from trainer.export.lower import lower, published_weights
from trainer.export.parity import check_parity
from trainer.model import EvolmForCausalLM, configuration_evolm, layers_evolm, modeling_evolm, positions_evolm
from trainer.recipe import SPECIAL_TOKENS

CODE = (configuration_evolm, layers_evolm, modeling_evolm, positions_evolm)
"""What others need to run EvolmForCausalLM."""

AUTO_MAP = {
    "AutoConfig": "configuration_evolm.EvolmConfig",
    "AutoModel": "modeling_evolm.EvolmModel",
    "AutoModelForCausalLM": "modeling_evolm.EvolmForCausalLM",
}


def export_huggingface(
    model: EvolmForCausalLM, tokenizer: Tokenizer, folder: Path, about: dict[str, Any]
) -> dict[str, Any]:
    """Write the folder, load it again, compare its logits with the model's, and return the receipt.

    `about` says where the model comes from and is kept as `evolm.json`. The receipt stands in `parity.json`: the
    class, the tier (`stock` or `evolm`), and the largest differences. An export that fails the comparison leaves no
    folder: raises ParityError.
    """
    _refuse_foreign(folder)
    lowered = lower(model)
    stock = lowered is not model
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = folder.with_name(f"{folder.name}.tmp-{uuid.uuid4().hex[:8]}")
    temporary.mkdir()
    try:
        _write_model(lowered, temporary, remote_code=not stock)
        _write_tokenizer(tokenizer, temporary, model.config.max_position_embeddings)
        receipt = {
            "class": type(lowered).__name__,
            "tier": "stock" if stock else "evolm",
            "tokenizer": tokenizer.digest,
            **check_parity(model, temporary),
        }
        (temporary / "parity.json").write_text(json.dumps(receipt, indent=1) + "\n")
        (temporary / "evolm.json").write_text(json.dumps(about, indent=1) + "\n")
        if folder.exists():
            shutil.rmtree(folder)  # an export of ours, as `_refuse_foreign` has seen
        os.rename(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return receipt


def _refuse_foreign(folder: Path) -> None:
    if folder.exists() and not (folder / "parity.json").is_file():
        raise UsageError(f"{folder}: holds something that evolm did not export; move it away or name another folder")


def _write_model(model: PreTrainedModel, folder: Path, *, remote_code: bool) -> None:
    config = model.config.to_dict()
    config["architectures"] = [type(model).__name__]
    config["dtype"] = "float32"
    if remote_code:
        config["auto_map"] = AUTO_MAP
        for module in CODE:
            source = Path(str(module.__file__))
            shutil.copyfile(source, folder / source.name)
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    tied = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
    weights = {name: tensor.contiguous().cpu() for name, tensor in published_weights(model).items() if name not in tied}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors").chmod(
        0o644
    )  # safetensors leaves it to its owner alone; a model is made to be shared
    # Neither is ever the next token of a text: a model that is unsure must not end up there.
    GenerationConfig(bos_token_id=BOS, eos_token_id=EOS, pad_token_id=PAD, suppress_tokens=[PAD, BOS]).save_pretrained(
        folder
    )


def _write_tokenizer(tokenizer: Tokenizer, folder: Path, longest: int) -> None:
    """The tokenizer, made to begin every text with `<s>`: in training every document does."""
    pad, bos, eos = SPECIAL_TOKENS
    backend = tokenizers.Tokenizer.from_file(str(tokenizer.file))
    backend.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, BOS)]),
        ]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=pad,
        bos_token=bos,
        eos_token=eos,
        model_max_length=longest,
        padding_side="left",  # what a batch is continued from stands at its right end
        clean_up_tokenization_spaces=False,
        split_special_tokens=True,  # as in training: what a text spells is text
    )
    fast.save_pretrained(folder)
    about = folder / "tokenizer_config.json"
    values = {**json.loads(about.read_text()), "tokenizer_class": "PreTrainedTokenizerFast"}  # a name that all know
    about.write_text(json.dumps(values, indent=2) + "\n")
