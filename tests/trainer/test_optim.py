"""Guards the optimiser: AdamW as the paper has it, with decay on matrices alone."""

import pytest
import torch

from trainer.model import build_model
from trainer.optim import build_optimizer, set_learning_rate


class Two(torch.nn.Module):
    """A matrix and a vector."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.matrix = torch.nn.Parameter(torch.randn(5, 3))
        self.vector = torch.nn.Parameter(torch.randn(7))


def adamw(weight, gradients, train, decay):
    """Algorithm 2 of Loshchilov and Hutter 2019, one step for each gradient."""
    weight, first, second = weight.double(), 0, 0
    for step, gradient in enumerate(gradients, start=1):
        gradient = gradient.double()
        first = train.beta1 * first + (1 - train.beta1) * gradient
        second = train.beta2 * second + (1 - train.beta2) * gradient**2
        mean, square = first / (1 - train.beta1**step), second / (1 - train.beta2**step)
        weight = weight - train.learning_rate * (mean / (square.sqrt() + train.adam_eps) + decay * weight)
    return weight


@pytest.mark.parametrize(
    "changes",
    [{"learning_rate": 0.1}, {"beta1": 0.0, "beta2": 0.5, "weight_decay": 0.0}, {"adam_eps": 0.1, "weight_decay": 2.0}],
    ids=["defaults", "other betas", "other epsilon"],
)
def test_steps_are_those_of_the_paper(recipe_of, changes):
    recipe = recipe_of(train=changes)
    module, train = Two(), recipe.train
    before = {name: parameter.detach().clone() for name, parameter in module.named_parameters()}
    gradients = {name: [torch.randn_like(start) for _ in range(5)] for name, start in before.items()}
    optimizer = build_optimizer(module, recipe)
    for step in range(5):
        for name, parameter in module.named_parameters():
            parameter.grad = gradients[name][step].clone()
        optimizer.step()
    for name, parameter in module.named_parameters():
        decay = train.weight_decay if name == "matrix" else 0
        expected = adamw(before[name], gradients[name], train, decay)
        torch.testing.assert_close(parameter.detach().double(), expected, rtol=1e-5, atol=1e-6)


def decayed(model, recipe):
    groups = build_optimizer(model, recipe).param_groups
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {names[id(p)] for group in groups if group["weight_decay"] == 0.3 for p in group["params"]}


@pytest.mark.parametrize("tied", [True, False])
def test_matrices_of_blocks_and_the_head_are_decayed_and_embeddings_and_norms_are_not(recipe_of, tied):
    recipe = recipe_of(model={"tie_embeddings": tied}, train={"weight_decay": 0.3})
    model = build_model(recipe, 0)
    names = {name for name, _ in model.named_parameters()}
    free = {name for name in names if "norm" in name} | {"model.embed_tokens.weight"}
    assert decayed(model, recipe) == names - free
    assert ("lm_head.weight" in decayed(model, recipe)) is not tied


def test_every_weight_is_optimised_once(recipe):
    model = build_model(recipe, 0)
    held = [id(parameter) for group in build_optimizer(model, recipe).param_groups for parameter in group["params"]]
    assert sorted(held) == sorted(id(parameter) for parameter in model.parameters())


def test_the_learning_rate_is_set_for_all(recipe):
    optimizer = build_optimizer(build_model(recipe, 0), recipe)
    set_learning_rate(optimizer, 0.125)
    assert [group["lr"] for group in optimizer.param_groups] == [0.125] * 3
