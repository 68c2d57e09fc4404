"""What makes two recipes the same training."""

from __future__ import annotations

from search_spaces.genome import canonical_json
from trainer.data.cache import digest_of
from trainer.recipe import Model, Recipe, Train

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
    for section, idle in (("model", _idle_in_model(recipe.model)), ("train", _idle_in_train(recipe.train))):
        said = {key: value for key, value in values.get(section, {}).items() if not idle.get(key, False)}
        values[section] = said | {"teacher": True} if "teacher" in said else said
    return digest_of("recipe", canonical_json(values))


def _idle_in_model(model: Model) -> dict[str, bool]:
    """Fields that mean nothing beside the others, or what their default means."""
    layers, mixed = model.layers(), model.ffn == "moe"
    turned = any(layer.positions == "rope" for layer in layers)
    experts = ("n_experts", "n_active_experts", "n_shared_experts", "n_dense_layers", "balance", "router_z_loss")
    return {
        "window": all(layer.attention == "full" for layer in layers),
        "qk_norm": model.qk_norm == "head",
        "n_kv_heads": model.n_kv_heads == model.n_heads,
        **dict.fromkeys(("rope_theta", "rope_fraction", "rope_scaling", "rope_factor"), not turned),
        **dict.fromkeys(experts, not mixed),
        "dense_ffn_dim": not (mixed and model.n_dense_layers),
        "balance_loss": not (mixed and model.balance == "loss"),
        "balance_rate": not (mixed and model.balance == "bias"),
    }


def _idle_in_train(train: Train) -> dict[str, bool]:
    """The same for the optimisation; of a teacher it only counts that there is one."""
    based = train.parameterization == "completep"
    return {
        "momentum": train.optimizer != "muon",
        **dict.fromkeys(("beta1", "beta2"), train.optimizer == "adafactor"),
        "adam_eps": train.optimizer in ("adafactor", "lion"),
        "decay_fraction": train.schedule != "wsd",
        "decay_power": train.schedule != "polynomial",
        "final_fraction": train.schedule == "constant",
        **dict.fromkeys(("base_d_model", "base_n_layers"), not based),
        **dict.fromkeys(("distillation", "distillation_temperature"), train.teacher is None),
    }
