"""The typed recipe: everything that decides what a training run does, and nothing else.

These models are the one definition of what a recipe may say: field types and ranges stand at the fields, what ties
fields together in `incoherence`. The space language, its error messages and its documentation follow from both.
"""

from __future__ import annotations

from typing import Any, Self

from pydantic import BaseModel, model_validator

from trainer.recipe.base import Section
from trainer.recipe.data import (
    NAME,
    SMALLEST_VOCABULARY,
    SPECIAL_TOKENS,
    Data,
    HeldOut,
    Quality,
    Source,
    Tokenizer,
    incoherent_data,
)
from trainer.recipe.model import GATED, Layer, Model, incoherent_model
from trainer.recipe.train import OPTIMIZERS_OF_EXTRA, WITHOUT_TRUNK, Train, incoherent_train

SECTIONS = ("data", "model", "train")


class Recipe(Section):
    """A complete training recipe."""

    data: Data
    model: Model = Model()
    train: Train = Train()

    @model_validator(mode="after")
    def _coherent(self) -> Self:
        if words := incoherence(self):
            raise ValueError(words)
        return self


def incoherence(recipe: Recipe) -> str | None:
    """Why fields that are each legal do not make a recipe together, or None. Genomes that do so are never launched."""
    return (
        incoherent_model(recipe.model)
        or incoherent_data(recipe.data)
        or incoherent_train(recipe.train, recipe.data.sequence_length)
        or _incoherent_kernel(recipe)
    )


def _incoherent_kernel(recipe: Recipe) -> str | None:
    """What an attention kernel cannot compute."""
    kernel, model = recipe.train.attention_kernel, recipe.model
    if kernel == "sdpa" and model.attention_softcap:
        return "train.attention_kernel = 'sdpa' knows no model.attention_softcap; take auto, flex or eager"
    if kernel == "flex" and model.attention_dropout:
        return "train.attention_kernel = 'flex' knows no model.attention_dropout; take auto, sdpa or eager"
    if kernel == "flex" and any(layer.positions == "alibi" for layer in model.layers()):
        return "train.attention_kernel = 'flex' cannot add alibi's distances; take auto, sdpa or eager"
    return None


def defaults() -> dict[str, Any]:
    """What a recipe says where its writer says nothing, as a nested mapping; sources have none."""
    named = {name: field.default for name, field in Data.model_fields.items() if not field.is_required()}
    data = {name: value.model_dump() if isinstance(value, BaseModel) else value for name, value in named.items()}
    return {"data": data, "model": Model().model_dump(), "train": Train().model_dump()}


__all__ = [
    "GATED",
    "NAME",
    "OPTIMIZERS_OF_EXTRA",
    "SECTIONS",
    "SMALLEST_VOCABULARY",
    "SPECIAL_TOKENS",
    "WITHOUT_TRUNK",
    "Data",
    "HeldOut",
    "Layer",
    "Model",
    "Quality",
    "Recipe",
    "Section",
    "Source",
    "Tokenizer",
    "Train",
    "defaults",
    "incoherence",
]
