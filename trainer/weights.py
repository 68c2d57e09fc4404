"""The weights of a recipe's model, known before it is built: their kinds, shapes and uses. No torch."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Literal, NamedTuple

from trainer.recipe import GATED, Layer, Model, Recipe

Kind = Literal["embedding", "hidden", "router", "head", "vector"]


class Weight(NamedTuple):
    """One parameter tensor. `times` is how often a token is multiplied by it, 0 where it is looked up or a vector;
    `active` how many of its entries one token uses."""

    kind: Kind
    shape: tuple[int, ...]
    active: int
    times: int = 0

    @property
    def size(self) -> int:
        """Its entries."""
        return math.prod(self.shape)


def weights(recipe: Recipe) -> Iterator[Weight]:
    """Every parameter tensor of the model; tied ones once."""
    model, vocabulary, width = recipe.model, recipe.data.tokenizer.vocab_size, recipe.model.d_model
    yield _matrix("embedding", vocabulary, width, times=int(model.tie_embeddings))
    if model.positions == "learned":
        yield _matrix("embedding", recipe.data.sequence_length, width, times=0)
    for layer in model.layers():
        yield from _attention(layer, model)
        yield from _feed_forward(layer, model)
        yield from _norms(model, norms_per_block(model))
    yield from _norms(model, 1)
    if not model.tie_embeddings:
        yield _matrix("head", vocabulary, width)


def norms_per_block(model: Model) -> int:
    """Norms of the residual stream in each block; a parallel one reads both branches through the same."""
    if model.norm_placement == "post":
        return 2
    return (2 if model.norm_placement == "pre" else 4) - int(model.parallel_block)


def _matrix(kind: Kind, rows: int, columns: int, times: int = 1) -> Weight:
    return Weight(kind, (rows, columns), rows * columns, times)


def _vector(size: int) -> Weight:
    return Weight("vector", (size,), size)


def _norms(model: Model, count: int) -> Iterator[Weight]:
    for _ in range(count):
        yield _vector(model.d_model)
        if model.norm == "layernorm" and model.bias == "all":
            yield _vector(model.d_model)


def _attention(layer: Layer, model: Model) -> Iterator[Weight]:
    query, key = layer.n_heads * layer.head_dim, layer.n_kv_heads * layer.head_dim
    for rows in (query, key, key):
        yield _matrix("hidden", rows, model.d_model)
        if model.bias != "none":
            yield _vector(rows)
    yield _matrix("hidden", model.d_model, query)
    if model.bias == "all":
        yield _vector(model.d_model)
    if model.qk_norm:
        yield _vector(query if model.qk_norm == "full" else layer.head_dim)
        yield _vector(key if model.qk_norm == "full" else layer.head_dim)


def _feed_forward(layer: Layer, model: Model) -> Iterator[Weight]:
    if layer.ffn != "moe":
        yield from _ffn(layer.ffn, layer.ffn_dim, layer.recursion, model)
        return
    experts, active, width = model.n_experts, model.n_active_experts, model.d_model
    yield _matrix("router", experts, width, layer.recursion)
    for rows, columns in ((2 * layer.ffn_dim, width), (width, layer.ffn_dim)):
        yield Weight("hidden", (experts, rows, columns), active * rows * columns, layer.recursion)
    if model.n_shared_experts:
        yield from _ffn("swiglu", model.n_shared_experts * layer.ffn_dim, layer.recursion, model)


def _ffn(kind: str, hidden: int, times: int, model: Model) -> Iterator[Weight]:
    shapes = [(hidden, model.d_model)] * (2 if kind in GATED else 1) + [(model.d_model, hidden)]
    for rows, columns in shapes:
        yield _matrix("hidden", rows, columns, times)
        if model.bias == "all":
            yield _vector(rows)
