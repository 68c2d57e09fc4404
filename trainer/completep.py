"""CompleteP: what is tuned at a small width and depth holds at larger ones (Dey et al. 2025, arXiv 2505.01618, table 1,
alpha = 1; in width it is the maximal update parameterisation, Yang et al. 2022, arXiv 2203.03466, table 8).

With mN = d_model / base_d_model and mL = n_layers / base_n_layers, times what the recipe says:

    kind            initial std      learning rate   Adam's epsilon   what else
    embedding       1                1               1 / mN
    hidden          1 / sqrt(mN)     1 / mN          1 / (mN mL)      branches are added to the stream times 1 / mL
    router          1 / sqrt(mN)     1 / mN          1 / (mN mL)     (Malasnicki et al. 2025, arXiv 2508.09752)
    head            1                1               1 / mN           logits times 1 / mN, tied or not
    vector          1                1               1 / (mN mL)

Weight decay is divided by what multiplies the learning rate, because optimisers decay by the product of the two:
weights forget as fast at every width. Standard deviations are those of a model of base_n_layers blocks: what the
standard parameterisation takes off for depth is taken off once, by the multiplier of the branches. A block that is run
several times (`recursion`) counts as one, since recursion stays what it is when a recipe is scaled.

At the base itself all factors are one: the run is, bit by bit, that of the standard parameterisation.
"""

from __future__ import annotations

from dataclasses import dataclass

from trainer.recipe import Recipe
from trainer.weights import Kind

RATE_EXPONENTS = {("muon", "hidden"): 0.5}
"""Learning rates of matrices inside blocks go as width to minus this, and to minus 1 where an optimiser is not named:
entries of Adam's step have one size at every width, so what they change of a matrix's output grows with its inputs.
That change is bounded by the spectral norm of the step (Yang et al. 2023, arXiv 2310.17813, condition 1), which for
Muon is 0.2 times the root of the width. Adafactor's step is as large as Adam's: here it is not relative to the
weights."""


@dataclass(frozen=True, kw_only=True)
class Factors:
    """What a kind of parameter's initial standard deviation, learning rate and epsilon are multiplied by."""

    std: float = 1.0
    rate: float = 1.0
    eps: float = 1.0


def growth(recipe: Recipe) -> tuple[float, float]:
    """How many times wider and deeper than its base a model is, (mN, mL); (1, 1) in the standard parameterisation."""
    train, model = recipe.train, recipe.model
    if train.parameterization == "standard":
        return 1.0, 1.0
    return model.d_model / train.base_d_model, model.n_layers / train.base_n_layers


def factors(kind: Kind, recipe: Recipe, *, writes: bool = False) -> Factors:
    """The row of the table for parameters of one kind; `writes` says that they write to the residual stream."""
    width, depth = growth(recipe)
    if kind in ("embedding", "head"):
        return Factors(eps=1 / width)
    eps = 1 / (width * depth)
    if kind == "vector":
        return Factors(eps=eps)
    exponent = RATE_EXPONENTS.get((recipe.train.optimizer, kind), 1.0)
    # A model is built with 1 / sqrt(2 n_layers) on what writes to the stream; with this it is that of the base.
    std = (depth if writes else 1.0) ** 0.5 / width**0.5
    return Factors(std=std, rate=width**-exponent, eps=eps)


def branch_multiplier(recipe: Recipe) -> float:
    """What every branch is multiplied by before it is added to the stream."""
    return recipe.model.residual_multiplier / growth(recipe)[1]


def logit_multiplier(recipe: Recipe) -> float:
    """What the logits are multiplied by."""
    return recipe.model.logit_multiplier / growth(recipe)[0]
