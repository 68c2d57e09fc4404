"""Guards the optimisers: each as its paper has it, or as torch does, with decay on matrices alone."""

import pytest
import torch

from search_spaces.errors import UsageError
from trainer import extras
from trainer.cost import optimizer_entries
from trainer.extras import missing_extra, unusable_precision
from trainer.model import build_model
from trainer.muon import Muon, orthogonalised
from trainer.optim import ADAN_DIFFERENCES, ADEMAMIX_SLOW, Together, build_optimizer, set_learning_rate
from trainer.optimizer_state import optimizer_state
from trainer.recipe import OPTIMIZERS_OF_EXTRA
from trainer.weights import weights


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


# --- other optimisers, against formulas in double precision -----------------------------------------------------------


def adafactor(weight, gradients, train, decay):
    """Algorithm 4 of Shazeer and Stern 2018 with decay of the square 1 - t^-0.8, steps that are no share of the
    weights, and decoupled weight decay."""
    weight, row, column = weight.double(), 0, 0
    for step, gradient in enumerate(gradients, start=1):
        square, beta = gradient.double() ** 2, 1 - step**-0.8
        if square.ndim == 2:
            row = beta * row + (1 - beta) * square.mean(dim=1, keepdim=True)
            column = beta * column + (1 - beta) * square.mean(dim=0, keepdim=True)
            estimate = row * column / row.mean()
        else:
            row = estimate = beta * row + (1 - beta) * square
        update = gradient.double() / estimate.sqrt()
        update = update / update.square().mean().sqrt().clamp(min=1)
        rate = min(train.learning_rate, step**-0.5) * max(1.0, weight.square().mean().sqrt())
        weight = weight * (1 - train.learning_rate * decay) - rate * update
    return weight


def lion(weight, gradients, train, decay):
    """Algorithm 2 of Chen et al. 2023."""
    weight, mean = weight.double(), 0
    for gradient in (one.double() for one in gradients):
        direction = torch.sign(train.beta1 * mean + (1 - train.beta1) * gradient)
        weight = weight - train.learning_rate * (direction + decay * weight)
        mean = train.beta2 * mean + (1 - train.beta2) * gradient
    return weight


def adan(weight, gradients, train, decay):
    """Algorithm 1 of Xie et al. 2022, its means freed of their initial zeros as in the authors' code; the paper's betas
    are one minus ours."""
    weight, mean, differences, second, last = weight.double(), 0, 0, 0, None
    beta1, beta2, beta3 = train.beta1, ADAN_DIFFERENCES, train.beta2
    for step, gradient in enumerate((one.double() for one in gradients), start=1):
        difference = gradient - (gradient if last is None else last)
        mean = beta1 * mean + (1 - beta1) * gradient
        differences = beta2 * differences + (1 - beta2) * difference
        second = beta3 * second + (1 - beta3) * (gradient + beta2 * difference) ** 2
        root = (second / (1 - beta3**step)).sqrt() + train.adam_eps
        update = mean / (1 - beta1**step) + beta2 * differences / (1 - beta2**step)
        weight = (weight - train.learning_rate * update / root) / (1 + train.learning_rate * decay)
        last = gradient
    return weight


def ademamix(weight, gradients, train, decay):
    """Algorithm 1 of Pagliardini et al. 2024 without its schedules, alpha being 5."""
    weight, fast, slow, second = weight.double(), 0, 0, 0
    for step, gradient in enumerate((one.double() for one in gradients), start=1):
        fast = train.beta1 * fast + (1 - train.beta1) * gradient
        slow = ADEMAMIX_SLOW * slow + (1 - ADEMAMIX_SLOW) * gradient
        second = train.beta2 * second + (1 - train.beta2) * gradient**2
        root = (second / (1 - train.beta2**step)).sqrt() + train.adam_eps
        update = (fast / (1 - train.beta1**step) + 5 * slow) / root
        weight = weight - train.learning_rate * (update + decay * weight)
    return weight


def soap(weight, gradients, train, decay):
    """Algorithm 3 of Vyas et al. 2024 up to the first new bases: Adam in the eigenvectors of what the first gradient
    gives, a step behind; vectors are left to Adam."""
    weight, mean, second = weight.double(), 0, 0
    first = gradients[0].double()
    left = right = None
    if first.ndim == 2:
        left, right = (torch.linalg.eigh(product).eigenvectors for product in (first @ first.T, first.T @ first))
    turned = (lambda x: left.T @ x @ right) if first.ndim == 2 else (lambda x: x)
    back = (lambda x: left @ x @ right.T) if first.ndim == 2 else (lambda x: x)
    for step, gradient in enumerate((one.double() for one in gradients[1:]), start=1):
        mean = train.beta1 * mean + (1 - train.beta1) * gradient
        second = train.beta2 * second + (1 - train.beta2) * turned(gradient) ** 2
        rate = train.learning_rate * (1 - train.beta2**step) ** 0.5 / (1 - train.beta1**step)
        weight = weight - rate * back(turned(mean) / (second.sqrt() + train.adam_eps))
        weight = weight * (1 - train.learning_rate * decay)
    return weight


def stepped(module, recipe, steps=5):
    """A module after some steps on random gradients: its weights before, the gradients, and the optimiser."""
    before = {name: parameter.detach().clone() for name, parameter in module.named_parameters()}
    generator = torch.Generator().manual_seed(1)
    gradients = {
        name: [torch.randn(start.shape, generator=generator) for _ in range(steps)] for name, start in before.items()
    }
    optimizer = build_optimizer(module, recipe)
    for step in range(steps):
        for name, parameter in module.named_parameters():
            parameter.grad = gradients[name][step].clone()
        optimizer.step()
    return before, gradients, optimizer


@pytest.mark.parametrize("formula", [adafactor, lion, adan, ademamix, soap], ids=lambda one: one.__name__)
def test_every_optimiser_steps_as_its_paper_says(recipe_of, formula):
    recipe = recipe_of(train={"optimizer": formula.__name__, "learning_rate": 0.05, "weight_decay": 0.5})
    module = Two()
    if formula is soap:  # eigenvectors are unique, up to their sign, where eigenvalues differ
        module.matrix = torch.nn.Parameter(torch.randn(3, 3, generator=torch.Generator().manual_seed(0)))
    before, gradients, _ = stepped(module, recipe)
    for name, parameter in module.named_parameters():
        expected = formula(before[name], gradients[name], recipe.train, 0.5 if name == "matrix" else 0)
        torch.testing.assert_close(parameter.detach().double(), expected, rtol=1e-4, atol=1e-5)


# --- muon -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(8, 3), (3, 8), (5, 5)], ids=str)
def test_orthogonal_is_what_singular_values_near_one_are(shape):
    matrix = torch.randn(2, *shape, generator=torch.Generator().manual_seed(3))
    found = orthogonalised(matrix).float()
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    values = (left.mT @ found @ right.mT).diagonal(dim1=-2, dim2=-1)
    assert ((values > 0.6) & (values < 1.3)).all()  # what five iterations reach
    assert (left.mT @ found @ right.mT - torch.diag_embed(values)).abs().max() < 0.05


def test_muon_is_that_of_torch_on_matrices(recipe_of):
    recipe = recipe_of(train={"optimizer": "muon", "learning_rate": 0.02, "weight_decay": 0.5})
    module, other = Two(), Two()
    theirs = torch.optim.Muon(
        [other.matrix], lr=0.02, weight_decay=0.5, momentum=recipe.train.momentum, adjust_lr_fn="match_rms_adamw"
    )
    _, gradients, _ = stepped(module, recipe)
    for gradient in gradients["matrix"]:
        other.matrix.grad = gradient.clone()
        theirs.step()
    torch.testing.assert_close(module.matrix.detach(), other.matrix.detach(), rtol=1e-4, atol=2e-4)
    assert (module.matrix - Two().matrix).abs().max() > 0.01


def test_muon_leaves_all_but_the_blocks_matrices_to_adamw(recipe_of):
    recipe = recipe_of(train={"optimizer": "muon", "learning_rate": 0.05, "weight_decay": 0.5})
    module = Two()
    before, gradients, _ = stepped(module, recipe)
    expected = adamw(before["vector"], gradients["vector"], recipe.train, 0)
    torch.testing.assert_close(module.vector.detach().double(), expected, rtol=1e-5, atol=1e-6)


def test_muon_takes_every_expert_by_itself():
    generator = torch.Generator().manual_seed(4)
    stacked = torch.nn.Parameter(torch.randn(3, 6, 4, generator=generator))
    single = [torch.nn.Parameter(expert.detach().clone()) for expert in stacked]
    for _ in range(3):
        gradient = torch.randn(3, 6, 4, generator=generator)
        stacked.grad = gradient
        for one, part in zip(single, gradient, strict=True):
            one.grad = part.clone()
    for parameters in ([stacked], single):
        Muon([{"params": parameters}], lr=0.1, momentum=0.9).step()
    torch.testing.assert_close(stacked.detach(), torch.stack([one.detach() for one in single]))


def test_muon_takes_an_experts_gate_and_its_other_factor_by_themselves():
    gate, up = torch.randn(2, 2, 4, 6, generator=torch.Generator().manual_seed(0))
    together, apart = torch.nn.Parameter(torch.cat((gate, up), dim=1)), torch.nn.Parameter(gate.clone())
    for name, parameter, gradient in (
        ("mlp.experts.gate_up_proj", together, torch.cat((gate, 1e-3 * up), dim=1)),
        ("mlp.experts.down_proj", apart, gate),
    ):
        parameter.grad = gradient.clone()
        Muon([{"params": [parameter], "names": [name]}], lr=0.1, momentum=0.0).step()
    torch.testing.assert_close(together[:, :4], apart)
    assert (together[:, 4:] - up).norm() > 0.5 * (together[:, :4] - gate).norm()


def test_which_parameters_muon_is_for(recipe_of):
    recipe = recipe_of(
        model={"ffn": "moe", "n_experts": 4, "tie_embeddings": False}, train={"optimizer": "muon", "weight_decay": 0.3}
    )
    model = build_model(recipe, 0)
    optimizer = build_optimizer(model, recipe)
    assert isinstance(optimizer, Together)
    muon, rest = optimizer.optimizers
    inside = {name for group in muon.param_groups for name in group["names"]}
    outside = {name for group in rest.param_groups for name in group["names"]}
    assert inside | outside == {name for name, _ in model.named_parameters()}
    assert not inside & outside
    assert all("proj" in name for name in inside)
    assert {"lm_head.weight", "model.embed_tokens.weight", "model.layers.0.mlp.gate.weight"} <= outside


# --- what they keep ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["adamw", "muon", "adafactor", *OPTIMIZERS_OF_EXTRA])
@pytest.mark.parametrize(
    "model",
    [
        {"positions": "learned"},
        {"ffn": "moe", "n_experts": 4, "n_shared_experts": 1, "tie_embeddings": False, "bias": "all"},
    ],
    ids=["dense", "moe"],
)
def test_what_an_optimiser_keeps_is_what_it_is_predicted_to(recipe_of, name, model):
    recipe = recipe_of(model=model, train={"optimizer": name})
    built = build_model(recipe, 0)
    optimizer = build_optimizer(built, recipe)
    ids = torch.arange(3, 35).unsqueeze(0)
    for _ in range(2):
        built(ids, labels=ids).loss.backward()
        optimizer.step()
    tensors, _ = optimizer_state(optimizer)
    kept = sum(tensor.numel() for key, tensor in tensors.items() if not key.endswith(".step"))
    assert kept == optimizer_entries(recipe, list(weights(recipe)))


# --- two as one -------------------------------------------------------------------------------------------------------


def test_two_optimisers_are_one(recipe_of):
    recipe = recipe_of(train={"optimizer": "muon"})
    module = Two()
    _, _, optimizer = stepped(module, recipe)
    assert set(optimizer.state) == set(module.parameters())
    set_learning_rate(optimizer, 0.25)
    assert [group["lr"] for one in optimizer.optimizers for group in one.param_groups] == [0.25, 0.25]
    optimizer.zero_grad()
    assert all(parameter.grad is None for parameter in module.parameters())


# --- what is not there ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OPTIMIZERS_OF_EXTRA)
def test_an_optimiser_whose_package_is_missing_says_what_to_install(recipe_of, monkeypatch, name):
    assert missing_extra(name) is None
    monkeypatch.setattr(extras, "find_spec", lambda package: None)
    words = rf"train.optimizer '{name}' needs the extra `optim`: pip install 'evolm\[optim\]'"
    with pytest.raises(UsageError, match=words):
        build_optimizer(Two(), recipe_of(train={"optimizer": name}))


def test_torch_brings_the_others(monkeypatch):
    monkeypatch.setattr(extras, "find_spec", lambda package: None)
    assert [missing_extra(name) for name in ("adamw", "muon", "adafactor")] == [None] * 3


@pytest.mark.parametrize(
    ("precision", "device", "usable"),
    [("fp16", "cpu", False), ("fp16", "cuda", True), ("fp16", "cuda:1", True), ("bf16", "cpu", True)],
)
def test_fp16_is_for_gpus(precision, device, usable):
    assert (unusable_precision(precision, device) is None) is usable
