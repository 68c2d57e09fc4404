"""From the recipe of a proxy to that of a larger model: wider, deeper, trained for longer.

`scaled` keeps what was tuned by CompleteP; `ladder` is its control arm, the standard parameterisation with learning
rate and batch by size alone.
"""

from __future__ import annotations

import math
from typing import Any

from trainer.cost import costs
from trainer.recipe import Recipe
from trainer.recipe.model import PER_LAYER
from trainer.recipe_check import rule

BATCH_EXPONENT = 0.383
"""Batches grow as tokens to this power (Bergsma et al. 2025, arXiv 2505.13738, by way of nanochat's
scripts/base_train.py)."""

LADDER_PARAMS = 108_000_000
"""Parameters at which the formulas of the OLMo ladder are pinned (Porian et al. 2024, arXiv 2406.19146)."""


def scaled(
    recipe: Recipe, *, width: int = 1, depth: int = 1, tokens: int | None = None, tuned_at: int | None = None
) -> Recipe:
    """The recipe `width` times as wide and `depth` times as deep, in CompleteP; for `tokens` training tokens where
    `tuned_at` were those that it was tuned at (both or neither).

    Heads keep their size, feed-forward parts and the number of heads grow with the width, experts and the window stay.
    Every layer of a list is repeated. The base of CompleteP is the recipe's own shape, unless it names one: what was
    tuned there holds as it is.

    With the ratio D of tokens, the batch B grows by the power of two nearest to D^0.383, the learning rate by sqrt(B),
    and weight decay so that B / (learning rate * weight decay * tokens), the share of the run that weights remember, is
    kept (Wang and Aitchison 2024, arXiv 2405.13698). Warmup stays the same number of steps.

    Raises ValueError when what comes out is no legal recipe.
    """
    if width < 1 or depth < 1:
        raise ValueError(f"width and depth must be at least 1, are {width} and {depth}")
    if (tokens is None) != (tuned_at is None):
        raise ValueError("tokens and tuned_at go together")
    train = recipe.train
    changes: dict[str, Any] = {"parameterization": "completep"}
    if train.parameterization == "standard":
        changes |= {"base_d_model": recipe.model.d_model, "base_n_layers": recipe.model.n_layers}
    if tokens is not None and tuned_at is not None:
        changes |= _horizon(recipe, tokens / tuned_at)
    return _changed(recipe, model=_shape(recipe, width, depth), train=changes)


def ladder(recipe: Recipe, params: int, tokens: int) -> Recipe:
    """The recipe in the standard parameterisation, with AdamW as the OLMo ladder sets it for a model of `params`
    parameters other than embeddings and a run of so many tokens (allenai/OLMo-core, model_ladder, after Porian et al.
    2024).

    The learning rate beyond 20 tokens a parameter goes down with the root of how often that is exceeded.
    """
    length = recipe.data.sequence_length
    batch = max(1, round(2048 * 160 * (params / LADDER_PARAMS) ** (2 / 3) / length)) * length
    changes = {
        "parameterization": "standard",
        "optimizer": "adamw",
        "learning_rate": min(1.0, ladder_rate(params, tokens)),
        "beta1": 0.9,
        "beta2": 0.95 if batch >= 524_288 else 0.99,
        "weight_decay": 0.1,
        "grad_clip": 1.0,
        "batch_tokens": batch,
        "batch_start_tokens": None,
        "batch_ramp_tokens": 0,
        "schedule": "wsd",
        "warmup_steps": max(1, round(params / batch)),
        "decay_fraction": 0.1,
        "final_fraction": 0.0,
        "z_loss": 1e-5,
    }
    return _changed(recipe, model={}, train=changes)


def ladder_rate(params: int, tokens: int) -> float:
    """The learning rate of the OLMo ladder: 0.00235 (params / 108M)^(-1/3), beyond 20 tokens a parameter divided by the
    root of tokens / (20 params)."""
    long = max(1.0, tokens / (20 * params))
    return 0.0047 / 2 / math.cbrt(params / LADDER_PARAMS) / math.sqrt(long)


def scaling_params(recipe: Recipe) -> int:
    """The parameters that a token is multiplied with: those of laws of scale, the output head in and the input
    embeddings out."""
    cost = costs(recipe)
    return cost.active_params - cost.embedding_params + recipe.data.tokenizer.vocab_size * recipe.model.d_model


def _shape(recipe: Recipe, width: int, depth: int) -> dict[str, Any]:
    """The fields of the model that are other than in the recipe."""
    model = recipe.model
    changes: dict[str, Any] = {"d_model": width * model.d_model, "n_layers": depth * model.n_layers}
    for field in PER_LAYER:
        value = getattr(model, field)
        if field in ("n_heads", "n_kv_heads", "ffn_dim") and value is not None:
            value = [width * item for item in value] if isinstance(value, list) else width * value
        changes[field] = [item for item in value for _ in range(depth)] if isinstance(value, list) else value
    if model.ffn_dim is None:
        # Where the width is the default one, all layers are alike: written out, it grows by exactly `width`.
        changes["ffn_dim"] = width * model.default_ffn_dim()
    if model.dense_ffn_dim is not None:
        changes["dense_ffn_dim"] = width * model.dense_ffn_dim
    if model.ffn == "moe":
        changes["n_dense_layers"] = depth * model.n_dense_layers
    return changes


def _horizon(recipe: Recipe, ratio: float) -> dict[str, Any]:
    """The fields of the optimisation that follow from so many times the tokens."""
    train, length = recipe.train, recipe.data.sequence_length
    batch = max(length, round(train.batch_tokens * 2.0 ** round(BATCH_EXPONENT * math.log2(ratio))))
    growth = batch / train.batch_tokens
    rate = min(1.0, train.learning_rate * growth**0.5)
    changes: dict[str, Any] = {
        "batch_tokens": batch,
        "learning_rate": rate,
        "weight_decay": train.weight_decay * growth / (rate / train.learning_rate * ratio),
        "batch_ramp_tokens": _ramp(train.batch_ramp_tokens, ratio),
        "sequence_ramp_tokens": _ramp(train.sequence_ramp_tokens, ratio),
    }
    if train.batch_start_tokens is not None:
        changes["batch_start_tokens"] = min(batch, max(length, round(train.batch_start_tokens * growth)))
    return changes


def _ramp(tokens: int, ratio: float) -> int:
    return max(1, round(tokens * ratio)) if tokens else 0


def _changed(recipe: Recipe, **sections: dict[str, Any]) -> Recipe:
    """The recipe with other values, validated anew."""
    values = recipe.model_dump()
    for section, changes in sections.items():
        values[section] |= changes
    if words := rule(values):
        raise ValueError(words)
    return Recipe.model_validate(values)
