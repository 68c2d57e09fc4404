"""Exact costs of a recipe, known before anything is trained: plain arithmetic, no torch.

The tests hold every formula against the built model: parameters against its tensors, FLOPs against torch's
FlopCounterMode, activation memory against the tensors that autograd saves.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from functools import lru_cache
from typing import Any

from search_spaces.genome import canonical_json
from trainer.activation_memory import activation_bytes_per_token, mask_bytes
from trainer.extras import SHARDING, EngineName, ZeroStage
from trainer.recipe import Recipe
from trainer.weights import Weight, weights

MICRO_BATCH_TOKENS = 4096
"""Tokens per forward pass when the recipe does not say."""


def about(words: str) -> Any:
    """A cost with its meaning."""
    return field(metadata={"about": words})


@dataclass(frozen=True, kw_only=True)
class Costs:
    """What a recipe costs. FLOPs count a multiply and an add as two; bytes are bytes."""

    params: int = about("parameters")
    active_params: int = about("parameters that one token uses; fewer than `params` in a mixture of experts")
    embedding_params: int = about("parameters of the embeddings and of an untied output head")
    flops_per_token: float = about(
        "floating-point operations of one training step, for each token, recomputation aside"
    )
    forward_flops_per_token: float = about("floating-point operations of the forward pass, for each token")
    train_memory: float = about("bytes of one training step: weights, gradients, optimiser, activations")
    kv_bytes_per_token: int = about("bytes of the key-value cache for each token, in 16 bits")
    kv_bytes: int = about("bytes of the key-value cache of a whole sequence; sliding layers hold their window")
    checkpoint_bytes: int = about("bytes of a checkpoint to resume from")


MEANINGS: dict[str, str] = {one.name: one.metadata["about"] for one in fields(Costs)}
"""What each cost is, in words."""

NAMES = tuple(MEANINGS)


def costs(recipe: Recipe) -> Costs:
    """All costs of one recipe."""
    layers, length = recipe.model.layers(), recipe.data.sequence_length
    tensors = list(weights(recipe))
    params = sum(tensor.size for tensor in tensors)
    # A matrix costs one multiply-add per weight and token. Attention scores and their use cost two more per head
    # dimension and attended position; the whole sequence is counted, as is usual (PaLM, arXiv 2204.02311, appendix B),
    # or the whole window.
    seen = [min(recipe.model.window, length) if layer.attention == "sliding" else length for layer in layers]
    attention = sum(2 * 2 * layer.n_heads * layer.head_dim * keys for layer, keys in zip(layers, seen, strict=True))
    forward = 2 * sum(tensor.active * tensor.times for tensor in tensors) + attention
    kept = [2 * layer.n_kv_heads * layer.head_dim * 2 for layer in layers]  # keys and values, 16 bits
    return Costs(
        params=params,
        active_params=sum(tensor.active for tensor in tensors),
        embedding_params=sum(tensor.size for tensor in tensors if tensor.kind in ("embedding", "head")),
        flops_per_token=3 * forward,  # the backward pass does each product twice: for the input and for the weight
        forward_flops_per_token=forward,
        train_memory=train_memory(recipe, tensors).total,
        kv_bytes_per_token=sum(kept),
        kv_bytes=sum(one * keys for one, keys in zip(kept, seen, strict=True)),
        checkpoint_bytes=4 * (params + optimizer_entries(recipe, tensors) + _untrained(recipe)),
    )


def _untrained(recipe: Recipe) -> int:
    """Entries of the model that are kept but not trained: the biases of routers."""
    model = recipe.model
    mixtures = sum(layer.ffn == "moe" for layer in model.layers())
    copies = 2 if recipe.train.ema else 1  # the weights that are judged, and those that training goes on from
    return copies * mixtures * model.n_experts if model.balance == "bias" else 0


def optimizer_entries(recipe: Recipe, tensors: Sequence[Weight]) -> int:
    """Numbers that the recipe's optimiser keeps of its gradients, step counters aside, and the mean of the weights."""
    entries = OPTIMIZER_ENTRIES[recipe.train.optimizer]
    return sum(entries(one, recipe.model.d_model) + (one.size if recipe.train.ema else 0) for one in tensors)


def _factored(one: Weight, width: int) -> int:
    """Adafactor's: of a matrix the means of its rows and columns (Shazeer and Stern 2018, arXiv 1804.04235)."""
    *stack, rows, columns = (1, *one.shape)
    return math.prod(stack) * (rows + columns) if len(one.shape) > 1 else one.size


def _preconditioned(one: Weight, width: int) -> int:
    """SOAP's: two moments, and of each side of a matrix a covariance and its eigenvectors (arXiv 2409.11321)."""
    largest = width if one.kind in ("embedding", "head") else SOAP_LARGEST
    sides = 2 * sum(side * side for side in one.shape if side <= largest) if len(one.shape) > 1 else 0
    return 2 * one.size + sides


OPTIMIZER_ENTRIES: dict[str, Callable[[Weight, int], int]] = {
    "adamw": lambda one, width: 2 * one.size,
    "muon": lambda one, width: one.size if one.kind == "hidden" else 2 * one.size,
    "adafactor": _factored,
    "lion": lambda one, width: one.size,
    "soap": _preconditioned,
    "adan": lambda one, width: 4 * one.size,
    "ademamix": lambda one, width: 3 * one.size,
}
"""Numbers that each optimiser keeps of a weight's gradients, in a model of some width."""

SOAP_LARGEST = 10_000
"""Side of a matrix beyond which SOAP leaves it as it is; that of a vocabulary it always does."""


@dataclass(frozen=True, kw_only=True)
class TrainMemory:
    """Bytes of one training step, by what they are for. `copies` are matrices in 16 bits, `gathered` what a rank has
    whole for a while of weights and gradients that are cut over ranks, `passing` what grows with the micro-batch, and
    the gradient of the head."""

    weights: float
    gradients: float
    optimizer: float
    copies: float
    passing: float
    gathered: float = 0.0

    @property
    def total(self) -> float:
        """All of them."""
        return self.weights + self.gradients + self.optimizer + self.copies + self.passing + self.gathered


def train_memory(recipe: Recipe, tensors: Sequence[Weight] | None = None) -> TrainMemory:
    """What one training step takes on a single device: weights and gradients in fp32, what the optimiser keeps, and the
    activations of a micro-batch."""
    tensors = list(weights(recipe)) if tensors is None else tensors
    params = sum(tensor.size for tensor in tensors)
    size = _activation_size(recipe)
    head = 4 * recipe.data.tokenizer.vocab_size * recipe.model.d_model  # its gradient, ready before the backward pass
    activations = micro_batch_tokens(recipe) * activation_bytes_per_token(recipe, size) + mask_bytes(recipe, size)
    return TrainMemory(
        weights=4 * params,
        gradients=4 * params,
        optimizer=4 * optimizer_entries(recipe, tensors),
        copies=2 * params if size == 2 else 0,  # matrices are cast once per step
        passing=head + activations,
    )


def sharded_memory(
    recipe: Recipe, engine: EngineName, world: int, *, zero_stage: ZeroStage = 2, offload: bool = False
) -> TrainMemory:
    """What one training step takes on each of `world` devices. fsdp and ZeRO 3 hold their part of weights, gradients
    and optimiser, and for a while embeddings, head and two blocks whole with their gradients: the one at work and the
    next. ZeRO 1 cuts the optimiser, 2 the gradients too, and both keep a second copy of the weights, cut, which is with
    the optimiser (Rajbhandari et al. 2020, arXiv 1910.02054)."""
    memory = train_memory(recipe)
    if engine not in SHARDING or world == 1:
        return memory
    stage = zero_stage if engine == "deepspeed" else 3
    optimizer = memory.optimizer + (memory.weights if engine == "deepspeed" else 0)
    memory = replace(
        memory,
        optimizer=0 if engine == "deepspeed" and offload else optimizer / world,
        gradients=memory.gradients / (world if stage > 1 else 1),
    )
    if stage < 3:
        return memory
    found = costs(recipe)
    block = (found.params - found.embedding_params) / recipe.model.n_layers
    gathered = 8 * found.embedding_params + 2 * (_activation_size(recipe) + 4) * block
    return replace(memory, weights=memory.weights / world, copies=memory.copies / world, gathered=gathered)


def _activation_size(recipe: Recipe) -> int:
    return 4 if recipe.train.precision == "fp32" else 2


def micro_batch_tokens(recipe: Recipe) -> int:
    """Tokens of one forward pass: whole sequences, at least one."""
    train, length = recipe.train, recipe.data.sequence_length
    wanted = min(train.micro_batch_tokens or MICRO_BATCH_TOKENS, train.batch_tokens)
    return max(1, wanted // length) * length


@lru_cache(maxsize=4096)
def _costs_of(text: str) -> Mapping[str, float]:
    return asdict(costs(Recipe.model_validate(json.loads(text))))


def exact_functions() -> dict[str, Callable[[dict[str, Any]], float]]:
    """The costs as functions of a genome, by name, for constraints and objectives."""

    def function(name: str) -> Callable[[dict[str, Any]], float]:
        return lambda values: _costs_of(canonical_json(values))[name]

    return {name: function(name) for name in NAMES}
