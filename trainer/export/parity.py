"""Is the exported model the trained one? Compared where exports go wrong: whole sequences, cached steps, padded
batches."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from trainer.errors import ParityError
from trainer.export.load import load_model
from trainer.model import EvolmForCausalLM

TOLERANCE = 1e-5
"""Largest difference of a logit in fp32, relative to the largest logit: the same operations on the same weights, in
another order at most."""


@torch.inference_mode()
def check_parity(model: EvolmForCausalLM, folder: Path) -> dict[str, Any]:
    """Compare the model with what an exported folder loads as. Raises ParityError beyond the tolerance.

    The check itself is checked: with one weight of the exported model changed, it has to see a difference.
    """
    exported = load_model(folder)
    ids = _random_ids(model)
    reference = _on_cpu(model)(ids).logits
    differences = {
        "full": _largest(exported(ids).logits, reference),
        "cached": _largest(_cached(exported, ids), reference),
        "padded": _largest(_padded(exported, ids), reference),
    }
    worst = max(differences.values())
    tolerance = TOLERANCE * max(1.0, float(reference.abs().max()))
    if not worst <= tolerance:
        raise ParityError(f"{folder.name}: logits differ by {worst:.2g} from the trained model's ({differences})")
    _disturb(exported)
    seen = _largest(exported(ids).logits, reference)
    if seen <= tolerance:
        raise ParityError("the parity check did not see a changed weight: it proves nothing")
    return {"max_logit_difference": differences, "tolerance": tolerance, "tokens": ids.numel(), "disturbed": seen}


def _on_cpu(model: EvolmForCausalLM) -> EvolmForCausalLM:
    """The model where fp32 is fp32, without moving the one that somebody may go on to use."""
    copied = model if model.device.type == "cpu" else copy.deepcopy(model).to("cpu")
    copied.eval()
    return copied


def _random_ids(model: EvolmForCausalLM) -> torch.Tensor:
    """Ids over the whole vocabulary: as many positions as it takes to see a window that is wrong, more than twice as
    many, and 128 at least, but no more than the model's context has."""
    generator = torch.Generator().manual_seed(0)
    longest = max(128, 2 * (model.config.sliding_window or 0) + 1)
    length = min(longest, model.config.max_position_embeddings)
    return torch.randint(model.config.vocab_size, (4, length), generator=generator)


def _cached(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    """The logits of a prefill and one step for each further token: the second half of the sequence, at most 64."""
    first = max(ids.shape[1] // 2, ids.shape[1] - 64)
    output = model(ids[:, :first], use_cache=True)
    logits = [output.logits]
    for position in range(first, ids.shape[1]):
        output = model(ids[:, position : position + 1], past_key_values=output.past_key_values, use_cache=True)
        logits.append(output.logits)
    return torch.cat(logits, dim=1)


def _padded(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    """The logits of the same sequences behind padding on the left."""
    padding = 3
    padded = torch.cat((torch.full((len(ids), padding), int(model.config.pad_token_id)), ids), dim=1)
    mask = torch.ones_like(padded)
    mask[:, :padding] = 0
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
    logits: torch.Tensor = model(padded, attention_mask=mask, position_ids=positions).logits
    return logits[:, padding:]


def _disturb(model: PreTrainedModel) -> None:
    weight = model.get_input_embeddings().weight
    weight += 0.1 * weight.std()


def _largest(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one.float() - other.float()).abs().max())
