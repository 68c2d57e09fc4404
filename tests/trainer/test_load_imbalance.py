"""Guards the load-balancing loss: its closed forms, transformers' own, and what it does in training."""

import pytest
import torch
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from trainer.cost import micro_batch_tokens
from trainer.evaluate import TokenScorer
from trainer.loop import train
from trainer.loss import load_imbalance
from trainer.model import build_model
from trainer.objective import training_loss

STEP = 128
MOE = {"ffn": "moe", "n_experts": 4}


def random_logits(layers=3, sequences=2, tokens=50, experts=6):
    generator = torch.Generator().manual_seed(0)
    return [2 * torch.randn(sequences, tokens, experts, generator=generator) for _ in range(layers)]


# --- the function -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("active", [1, 2, 3])
def test_an_even_load_gives_the_number_of_active_experts(active):
    """Each token is sure of as many neighbouring experts as are used, beginning with another one each time."""
    experts = 6
    logits = torch.full((1, 30, experts), -1e9)
    for token in range(30):
        logits[0, token, [(token + step) % experts for step in range(active)]] = 0.0
    assert load_imbalance([logits], active).item() == pytest.approx(active, rel=1e-6)


@pytest.mark.parametrize("active", [1, 2, 3])
def test_a_router_that_cannot_tell_gives_the_number_of_active_experts(active):
    assert load_imbalance([torch.zeros(1, 30, 6)], active).item() == pytest.approx(active, rel=1e-6)


@pytest.mark.parametrize("active", [1, 2, 3])
def test_all_tokens_sure_of_one_expert_give_the_number_of_experts(active):
    logits = torch.zeros(1, 30, 6)
    logits[..., 4] = 1e9
    assert load_imbalance([logits], active).item() == pytest.approx(6, rel=1e-6)


def test_layers_are_averaged_and_sequences_are_added():
    even, one = torch.zeros(1, 30, 6), torch.zeros(1, 30, 6)
    one[..., 4] = 1e9
    assert load_imbalance([even, one], 2).item() == pytest.approx((2 + 6) / 2)
    assert load_imbalance([torch.cat([even, one])], 2).item() == pytest.approx(2 + 6)


@pytest.mark.parametrize("active", [1, 2, 3])
def test_of_one_sequence_and_layer_it_is_what_transformers_computes(active):
    for logits in random_logits(layers=3, sequences=1):
        theirs = load_balancing_loss_func((logits[0],), num_experts=6, top_k=active)
        torch.testing.assert_close(load_imbalance([logits], active), theirs)


def test_its_gradient_takes_probability_from_the_expert_that_has_most_tokens():
    logits = torch.zeros(1, 8, 3)
    logits[0, :6, 0] = logits[0, 6:, 1] = 1.0
    logits.requires_grad_()
    load_imbalance([logits], 1).backward()
    assert (logits.grad[0, :, 0] > 0).all()
    assert (logits.grad[0, :, 2] < 0).all()


# --- in training ------------------------------------------------------------------------------------------------------


def run(recipe, corpus, tokens=8 * STEP):
    steps = []
    record = train(recipe, lambda progress: steps.append(progress) or True, corpus=corpus, tokens=tokens)
    return record, [step.loss for step in steps]


def weights(record):
    return torch.cat([parameter.detach().flatten() for parameter in record.model.parameters()])


def imbalance(record, recipe, corpus):
    """Of the trained model, per sequence."""
    batch = torch.from_numpy(corpus.loader(1).batch(0, 16))
    with torch.no_grad():
        logits = record.model.eval().model(batch[:, :-1], output_router_logits=True).router_logits
    return load_imbalance(logits, recipe.model.n_active_experts).item() / 16


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("active", [1, 2])
def test_a_mixture_learns(recipe_of, corpus, active, precision):
    recipe = recipe_of(model={**MOE, "n_active_experts": active}, train={"precision": precision})
    _, losses = run(recipe, corpus, 60 * STEP)
    assert sum(losses[-5:]) < 0.75 * sum(losses[:5])


def test_the_loss_that_is_told_is_without_it(recipe_of, corpus):
    """A weight that would double the loss leaves the first one, before any step, as it is."""
    (_, heavy), (_, none) = (run(recipe_of(model={**MOE, "balance_loss": weight}), corpus) for weight in (3.0, 0.0))
    assert heavy[0] == none[0] < 6
    assert heavy[2:] != none[2:]


def test_scores_are_without_it(recipe_of, corpus):
    heavy, none = (recipe_of(model={**MOE, "balance_loss": weight}) for weight in (3.0, 0.0))
    model, windows = build_model(heavy, 0), corpus.loader(0).batch(0, 3)
    one, other = (TokenScorer(model, recipe).token_nats(windows) for recipe in (heavy, none))
    assert (one == other).all()


def test_training_evens_the_load_out(recipe_of, corpus):
    """From experts of which two are liked by all."""
    found = []
    for weight in (0.0, 0.5):
        recipe = recipe_of(model={**MOE, "balance_loss": weight, "init_std": 0.2})
        record, _ = run(recipe, corpus, 40 * STEP)
        found.append(imbalance(record, recipe, corpus))
    assert 2 - 0.01 < found[1] < found[0] - 0.05


@pytest.mark.parametrize("sequences", [1, 3], ids=lambda n: f"micro-batches of {n}")
@pytest.mark.parametrize("tokens", [4 * STEP, 4 * STEP + 64], ids=["whole batches", "ragged last batch"])
def test_the_size_of_micro_batches_changes_nothing(recipe_of, corpus, sequences, tokens):
    model = {**MOE, "balance_loss": 1.0}
    whole, losses = run(recipe_of(model=model, train={"adam_eps": 1e-3}), corpus, tokens)
    divided = recipe_of(model=model, train={"adam_eps": 1e-3, "micro_batch_tokens": 32 * sequences})
    assert micro_batch_tokens(divided) == 32 * sequences
    parts, others = run(divided, corpus, tokens)
    assert others == pytest.approx(losses, abs=1e-6)
    torch.testing.assert_close(weights(parts), weights(whole), atol=1e-6, rtol=1e-5)


def test_the_gradient_is_that_of_both_losses(recipe_of, corpus):
    recipe = recipe_of(model={**MOE, "balance_loss": 0.25})
    model, batch = build_model(recipe, 0), torch.from_numpy(corpus.loader(0).batch(0, 3))
    nats, balance, _ = training_loss(model, recipe, batch)
    output = model(batch[:, :-1])
    logits = model.model(batch[:, :-1], output_router_logits=True).router_logits
    expected = torch.nn.functional.cross_entropy(output.logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="sum")
    torch.testing.assert_close(nats, expected)
    torch.testing.assert_close(balance, 0.25 * load_imbalance(logits, 2))


@pytest.mark.parametrize("model", [{}, {**MOE, "balance_loss": 0.0}], ids=["dense", "no weight"])
def test_there_is_none_where_none_is_asked_for(recipe_of, corpus, model):
    recipe = recipe_of(model=model)
    assert training_loss(build_model(recipe, 0), recipe, torch.from_numpy(corpus.loader(0).batch(0, 1)))[1] is None


def test_the_same_seed_gives_the_same_weights_bit_by_bit(recipe_of, corpus):
    (one, _), (same, _) = (run(recipe_of(model=MOE), corpus) for _ in range(2))
    assert torch.equal(weights(one), weights(same))
