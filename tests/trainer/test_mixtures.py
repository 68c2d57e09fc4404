"""Guards mixtures of experts: which experts a token uses, with what weight, what trains them, what evens them."""

import pytest
import torch
from model_shapes import MOE, random_ids, shaken
from reference_transformer import reference_logits
from torch.nn import functional

from trainer.checkpoint import load_checkpoint
from trainer.loop import train
from trainer.mixture_loss import mixture_loss, router_z_loss, watches_routers
from trainer.model import build_model, expert_loads, rebalance
from trainer.optim import build_optimizer
from trainer.recipe import Model
from trainer.records import Checkpoints

BALANCED = {**MOE, "balance": "bias"}


@pytest.fixture
def model_of(recipe_of):
    return lambda **model: shaken(build_model(recipe_of(model=model), 0))


@pytest.fixture
def mixture_of(recipe_of):
    """A mixture by itself: 32 wide, its router and experts drawn wide enough to matter."""

    def build(**model):
        recipe = recipe_of(model={**MOE, "n_layers": 1, "init_std": 0.5, **model})
        return build_model(recipe, 0).model.layers[0].mlp

    return build


def test_one_expert_of_all_is_that_expert(mixture_of):
    """With one expert for each token its weight is one, whatever its probability."""
    mixture = mixture_of(n_active_experts=1)
    x = torch.randn(2, 9, 32, generator=torch.Generator().manual_seed(0))
    likeliest = mixture.gate(x).argmax(dim=-1)
    assert len(likeliest.unique()) == 4
    for token, expert, output in zip(x.flatten(0, 1), likeliest.flatten(), mixture(x).flatten(0, 1), strict=True):
        gate, up = (mixture.experts.gate_up_proj[expert] @ token).chunk(2)
        expected = mixture.experts.down_proj[expert] @ (functional.silu(gate) * up)
        torch.testing.assert_close(output, expected, atol=1e-5, rtol=1e-5)


def test_experts_that_are_alike_are_one_expert(mixture_of):
    """Weights sum to one, and no token is left out however many want the same expert."""
    mixture = mixture_of(n_active_experts=3)
    with torch.no_grad():
        for stack in (mixture.experts.gate_up_proj, mixture.experts.down_proj):
            stack.copy_(stack[:1].expand_as(stack).clone())
        mixture.gate.weight.mul_(100)
    x = torch.randn(1, 50, 32, generator=torch.Generator().manual_seed(0)).abs()
    gate, up = functional.linear(x, mixture.experts.gate_up_proj[0]).chunk(2, dim=-1)
    expected = functional.linear(functional.silu(gate) * up, mixture.experts.down_proj[0])
    torch.testing.assert_close(mixture(x), expected, atol=1e-4, rtol=1e-4)


def test_the_gradient_reaches_the_router_and_the_experts_that_were_used_alone(mixture_of):
    mixture = mixture_of(n_experts=8)
    x = torch.randn(1, 2, 32, generator=torch.Generator().manual_seed(0))
    used = set(mixture.gate(x).topk(2).indices.flatten().tolist())
    mixture(x).square().sum().backward()
    assert mixture.gate.weight.grad.abs().max() > 0
    for stack in (mixture.experts.gate_up_proj, mixture.experts.down_proj):
        assert {index for index, gradient in enumerate(stack.grad) if gradient.abs().max() > 0} == used
    assert 2 <= len(used) < 8


def test_gradients_of_a_mixture_are_those_of_the_formula(recipe_of):
    """Every weight's, against the derivative of the reference, in which every expert is a formula."""
    recipe = recipe_of(model=MOE)
    model, ids = shaken(build_model(recipe, 0)), random_ids(rows=1, length=9)
    model(ids).logits.square().sum().backward()
    copies = {name: weight.detach().clone().requires_grad_() for name, weight in model.named_parameters()}
    reference_logits(copies, recipe, ids[0], differentiable=True).square().sum().backward()
    for name, weight in model.named_parameters():
        scale = copies[name].grad.abs().max()
        assert (weight.grad - copies[name].grad).abs().max() < 1e-4 * scale, name


def test_the_router_is_exact_in_bf16(mixture_of):
    mixture = mixture_of()
    x = torch.randn(1, 4, 32, generator=torch.Generator().manual_seed(0)).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = mixture.gate(x)
        assert mixture(x).dtype == torch.bfloat16
    assert torch.equal(logits, x.float() @ mixture.gate.weight.T)


@torch.no_grad()
def test_what_the_routers_said_can_be_asked_for(model_of):
    model, ids = model_of(**MOE), random_ids()
    asked = model.model(ids, output_router_logits=True)
    assert [logits.shape for logits in asked.router_logits] == [(2, 16, 4)] * 2
    assert model.model(ids).router_logits is None
    assert torch.equal(asked.last_hidden_state, model.model(ids).last_hidden_state)


# --- what keeps experts evenly used -----------------------------------------------------------------------------------


def test_a_bias_changes_who_is_chosen_and_no_weight(mixture_of):
    """With a bias that no probability outweighs, the two experts it names are used, in their own proportion."""
    mixture = mixture_of(balance="bias")
    x = torch.randn(1, 6, 32, generator=torch.Generator().manual_seed(0))
    mixture.gate.e_score_correction_bias += torch.tensor([0.0, 2.0, 0.0, 2.0])
    odds = mixture.gate(x).softmax(dim=-1)[..., [1, 3]]
    odds = odds / odds.sum(dim=-1, keepdim=True)
    outputs = []
    for expert in (1, 3):
        gate, up = functional.linear(x, mixture.experts.gate_up_proj[expert]).chunk(2, dim=-1)
        outputs.append(functional.linear(functional.silu(gate) * up, mixture.experts.down_proj[expert]))
    expected = sum(odds[..., [index]] * output for index, output in enumerate(outputs))
    torch.testing.assert_close(mixture(x), expected, atol=1e-5, rtol=1e-5)


def test_the_bias_moves_towards_experts_that_are_used_less_than_the_mean(model_of):
    model = model_of(**BALANCED).train()
    (mixture, _) = (layer.mlp for layer in model.model.layers)
    mixture.gate.e_score_correction_bias.zero_()
    mixture.experts.loads += torch.tensor([5, 1, 3, 3])
    rebalance(model, 0.01)
    torch.testing.assert_close(mixture.gate.e_score_correction_bias, torch.tensor([-0.01, 0.01, 0.0, 0.0]))
    mixture.experts.loads += torch.tensor([0, 0, 0, 4])  # what was counted before is not counted again
    rebalance(model, 0.01)
    torch.testing.assert_close(mixture.gate.e_score_correction_bias, torch.tensor([0.0, 0.02, 0.01, -0.01]))


def test_without_a_bias_nothing_is_moved(model_of):
    model = model_of(**MOE).train()
    model(random_ids())
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    rebalance(model, 0.1)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_loads_are_the_shares_of_tokens_that_used_each_expert(model_of):
    model, ids = model_of(**{**MOE, "n_dense_layers": 1}), random_ids()
    assert {name: loads.tolist() for name, loads in expert_loads(model).items()} == {"model.layers.1.mlp": [0.0] * 4}
    model(ids)  # not in training: not counted
    logits = model.model(ids, output_router_logits=True).router_logits[0]
    model.train()(ids)
    chosen = logits.topk(2).indices.flatten()
    expected = torch.stack([(chosen == expert).sum() / ids.numel() for expert in range(4)])
    torch.testing.assert_close(expert_loads(model)["model.layers.1.mlp"], expected)
    assert expected.sum() == pytest.approx(2)


def test_a_bias_evens_the_load_out(recipe_of, corpus):
    """From experts of which some are liked by most, with nothing in the loss that would mind."""
    spread = []
    for rate in (0.0, 0.05):
        model = {**BALANCED, "balance_rate": rate, "init_std": 0.2}
        trained = train(recipe_of(model=model), corpus=corpus, tokens=60 * 128).model
        for layer in trained.model.layers:
            layer.mlp.experts.loads.zero_()
        trained.train()(torch.from_numpy(corpus.loader(1).batch(0, 16)))
        spread.append(max(loads.max().item() for loads in expert_loads(trained).values()))
    assert 0.5 <= spread[1] < spread[0] - 0.1


def test_biases_are_in_checkpoints(recipe_of, corpus, tmp_path):
    recipe = recipe_of(model=BALANCED)
    where = Checkpoints(final=tmp_path / "final")
    trained = train(recipe, corpus=corpus, tokens=8 * 128, checkpoints=where).model
    loaded = build_model(recipe, 1)
    load_checkpoint(where.final, loaded, build_optimizer(loaded, recipe))
    for layer, other in zip(trained.model.layers, loaded.model.layers, strict=True):
        bias = layer.mlp.gate.e_score_correction_bias
        assert bias.abs().max() > 0
        assert torch.equal(bias, other.mlp.gate.e_score_correction_bias)


# --- what routers add to the loss -------------------------------------------------------------------------------------


def test_the_z_loss_is_the_squared_log_sum_of_logits():
    logits = [torch.zeros(2, 5, 4), torch.full((2, 5, 4), 3.0)]
    log = torch.tensor(4.0).log()
    expected = 2 * (log**2 + (3 + log) ** 2) / 2  # of two sequences, the mean of two layers
    torch.testing.assert_close(router_z_loss(logits), expected)


@pytest.mark.parametrize(
    ("fields", "watched"),
    [
        ({"balance_loss": 0.0}, False),
        ({"balance_loss": 0.0, "router_z_loss": 0.1}, True),
        ({}, True),
        ({"balance": "bias"}, False),
        ({"balance": "bias", "router_z_loss": 0.1}, True),
    ],
    ids=str,
)
def test_routers_are_watched_where_the_loss_depends_on_them(fields, watched):
    assert watches_routers(Model(ffn="moe", n_experts=4, **fields)) is watched
    assert not watches_routers(Model(**fields))


def test_both_losses_are_added_by_their_weights():
    logits = [torch.randn(2, 9, 4, generator=torch.Generator().manual_seed(0))]
    one = mixture_loss(Model(ffn="moe", n_experts=4, balance_loss=0.5), logits)
    other = mixture_loss(Model(ffn="moe", n_experts=4, balance="bias", router_z_loss=0.25), logits)
    both = mixture_loss(Model(ffn="moe", n_experts=4, balance_loss=0.5, router_z_loss=0.25), logits)
    torch.testing.assert_close(both, one + other)
    torch.testing.assert_close(other, 0.25 * router_z_loss(logits))
