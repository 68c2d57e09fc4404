"""What makes two recipes the same training."""

from __future__ import annotations

from typing import Any

from search_spaces.genome import canonical_json
from trainer.data.cache import digest_of
from trainer.recipe import Recipe, Train

OUTSIDE = (
    "tokens",
    "seed",
    "micro_batch_tokens",
    "gradient_checkpointing",
    "attention_kernel",
    "compile",
)
"""Fields of `train` that a run is given beside its recipe, or that change memory and speed alone."""


def recipe_digest(recipe: Recipe) -> str:
    """Identifies what is trained: the recipe without its length and seed, without the names of its files, whose content
    has a digest of its own (the teacher's too), without what changes memory, speed or scores alone, and without what is
    said of things that the recipe does not have. What stands at its default is left out, so that a field that is new
    changes no old digest."""
    exclude = {"data": {"sources", "held_out"}, "train": set(OUTSIDE)}
    values = recipe.model_dump(mode="json", exclude=exclude, exclude_defaults=True)
    if recipe.model.ffn != "moe":
        experts = ("n_experts", "n_active_experts", "balance_loss")
        values["model"] = {key: value for key, value in values.get("model", {}).items() if key not in experts}
    if "train" in values:
        values["train"] = _said(recipe.train, values["train"])
    return digest_of("recipe", canonical_json(values))


def _said(train: Train, values: dict[str, Any]) -> dict[str, Any]:
    """The fields that mean something beside the others; of a teacher, that there is one."""
    idle = {
        "momentum": train.optimizer != "muon",
        "decay_power": train.schedule != "polynomial",
        "distillation": train.teacher is None,
        "distillation_temperature": train.teacher is None,
    }
    said = {key: value for key, value in values.items() if not idle.get(key, False)}
    return said | {"teacher": True} if train.teacher is not None else said
