"""Exact costs of a recipe, known before anything is trained: plain arithmetic, no torch.

The tests hold every formula against the built model: parameters against its tensors, FLOPs against torch's
FlopCounterMode, activation memory against the tensors that autograd saves.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from functools import lru_cache
from typing import Any

from search_spaces.genome import canonical_json
from trainer.recipe import GATED, Layer, Model, Recipe

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
    flops_per_token: float = about("floating-point operations of one training step, for each token")
    forward_flops_per_token: float = about("floating-point operations of the forward pass, for each token")
    train_memory: float = about("bytes of one training step: weights, gradients, optimiser, activations")
    kv_bytes_per_token: int = about("bytes of the key-value cache for each token, in 16 bits")
    checkpoint_bytes: int = about("bytes of a checkpoint to resume from")


MEANINGS: dict[str, str] = {one.name: one.metadata["about"] for one in fields(Costs)}
"""What each cost is, in words."""

NAMES = tuple(MEANINGS)


def costs(recipe: Recipe) -> Costs:
    """All costs of one recipe."""
    model, data = recipe.model, recipe.data
    layers = model.layers()
    vocabulary = data.tokenizer.vocab_size
    embedding = vocabulary * model.d_model
    head = 0 if model.tie_embeddings else embedding
    attention_matrices = sum(_attention_matrices(layer, model.d_model) for layer in layers)
    matrices = attention_matrices + sum(_ffn_matrices(layer, model, model.n_experts) for layer in layers)
    used = attention_matrices + sum(_ffn_matrices(layer, model, model.n_active_experts) for layer in layers)
    norms = [2 * model.d_model + (2 * layer.head_dim if model.qk_norm else 0) for layer in layers]
    params = embedding + head + matrices + sum(norms) + model.d_model
    # A matrix costs one multiply-add per weight and token. Attention scores and their use cost two more per head
    # dimension and attended position; the whole sequence is counted, as is usual (PaLM, arXiv 2204.02311, appendix B).
    attention = sum(2 * 2 * layer.n_heads * layer.head_dim * data.sequence_length for layer in layers)
    forward = 2 * (used + embedding) + attention
    return Costs(
        params=params,
        active_params=params - matrices + used,
        embedding_params=embedding + head,
        flops_per_token=3 * forward,  # the backward pass does each product twice: for the input and for the weight
        forward_flops_per_token=forward,
        train_memory=_train_memory(recipe, params),
        kv_bytes_per_token=sum(2 * layer.n_kv_heads * layer.head_dim for layer in layers) * 2,  # keys and values, bf16
        checkpoint_bytes=3 * 4 * params,  # weights and AdamW's two moments, fp32
    )


def _attention_matrices(layer: Layer, d_model: int) -> int:
    return d_model * layer.head_dim * (2 * layer.n_heads + 2 * layer.n_kv_heads)


def _ffn_matrices(layer: Layer, model: Model, experts: int) -> int:
    """Weights of a feed-forward part; of a mixture, those of so many of its experts and of the whole router."""
    one = (3 if layer.ffn in GATED else 2) * model.d_model * layer.ffn_dim
    return one if layer.ffn != "moe" else experts * one + model.n_experts * model.d_model


def _train_memory(recipe: Recipe, params: int) -> float:
    """Bytes of one training step: weights, gradients and AdamW's moments in fp32, and the activations of a
    micro-batch."""
    size = 2 if recipe.train.precision == "bf16" else 4
    copies = 2 * params if recipe.train.precision == "bf16" else 0  # matrices are cast once per step
    head = 4 * recipe.data.tokenizer.vocab_size * recipe.model.d_model  # its gradient, ready before the backward pass
    return 16 * params + copies + head + micro_batch_tokens(recipe) * activation_bytes_per_token(recipe, size)


def micro_batch_tokens(recipe: Recipe) -> int:
    """Tokens of one forward pass: whole sequences, at least one."""
    train, length = recipe.train, recipe.data.sequence_length
    wanted = min(train.micro_batch_tokens or MICRO_BATCH_TOKENS, train.batch_tokens)
    return max(1, wanted // length) * length


def activation_bytes_per_token(recipe: Recipe, size: int) -> float:
    """Bytes that autograd keeps per token between forward and backward, with activations of `size` bytes.

    Block by block, what each operation saves; see the test that sums the tensors actually saved. Logits are not among
    them: the loss turns them into gradients a few rows at a time.
    """
    model = recipe.model
    width = model.d_model
    norm = (8 + size) * width + 4  # the input and what it is divided down to, in fp32; the output; one scale
    total = 0.0
    for layer in model.layers():
        query, key = layer.n_heads * layer.head_dim, layer.n_kv_heads * layer.head_dim
        heads = layer.n_heads + layer.n_kv_heads
        attention = (3 * query + 2 * key) * size + 4 * layer.n_heads  # query, two forms of the output, key, value, lse
        attention += 8 * (query + key) + 4 * heads if model.qk_norm else 0  # as for norms, but the output is the query
        ffn = (4 if layer.ffn in GATED else 2) * layer.ffn_dim * size
        total += 2 * norm + attention + (ffn if layer.ffn != "moe" else _mixture_bytes_per_token(recipe, ffn, size))
    # The last norm, whose output is gone when the loss is there, and the gradient of the hidden state.
    return total + 8 * width + 4 + width * size


def _mixture_bytes_per_token(recipe: Recipe, expert: int, size: int) -> float:
    """What a mixture keeps. For each expert that is used: what happens in it, its input and output, its number and two
    places in the sort, its probability before and after they are made to sum to one. Their sum; the probabilities of
    all experts, once more for the balance, which also keeps the load of each sequence; and the router's input, which
    is fp32."""
    model = recipe.model
    chosen = expert + 2 * model.d_model * size + 3 * 8 + 2 * 4
    probabilities = 4 * model.n_experts * (2 + 1 / recipe.data.sequence_length if model.balance_loss else 1)
    return model.n_active_experts * chosen + 4 + probabilities + (4 - size) * model.d_model


@lru_cache(maxsize=4096)
def _costs_of(text: str) -> Mapping[str, float]:
    return asdict(costs(Recipe.model_validate(json.loads(text))))


def exact_functions() -> dict[str, Callable[[dict[str, Any]], float]]:
    """The costs as functions of a genome, by name, for constraints and objectives."""

    def function(name: str) -> Callable[[dict[str, Any]], float]:
        return lambda values: _costs_of(canonical_json(values))[name]

    return {name: function(name) for name in NAMES}
