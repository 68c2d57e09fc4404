"""Guards the loss that is fused with the output head, against the two operations that it replaces."""

import pytest
import torch
from torch.nn import functional

from trainer import loss
from trainer.loss import linear_cross_entropy, token_nats

VOCABULARY = 40


@pytest.fixture(params=[1, 17 * 4 * VOCABULARY, 2**21], ids=["16 rows", "17 rows", "all rows"])
def chunks(request, monkeypatch):
    """The loss takes as many rows at a time as these bytes of logits allow, 16 at least."""
    monkeypatch.setitem(loss.CHUNK_BYTES, "cpu", request.param)


def sample(positions=50, width=12, scale=1.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(positions, width, generator=generator) * scale
    weight = torch.randn(VOCABULARY, width, generator=generator)
    targets = torch.randint(VOCABULARY, (positions,), generator=generator)
    return hidden.requires_grad_(), weight.requires_grad_(), targets


def reference(hidden, weight, targets):
    return functional.cross_entropy(hidden @ weight.T, targets, reduction="sum")


def value_and_gradients(function, hidden, weight, targets, factor=1.0):
    hidden, weight = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
    total = function(hidden, weight, targets)
    (total * factor).backward()
    return total.detach(), hidden.grad, weight.grad


@pytest.mark.usefixtures("chunks")
@pytest.mark.parametrize("positions", [1, 16, 17, 50])
def test_value_and_gradients_are_those_of_cross_entropy(positions):
    inputs = sample(positions)
    found, expected = (value_and_gradients(function, *inputs) for function in (linear_cross_entropy, reference))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_the_gradient_is_scaled_by_what_comes_after():
    """The loop divides the sum by the tokens of the whole batch, not of the micro-batch."""
    inputs = sample()
    found, expected = (
        value_and_gradients(function, *inputs, factor=-0.125) for function in (linear_cross_entropy, reference)
    )
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_gradients_are_the_slopes_of_the_value():
    """Against central differences in a random direction, taken in double precision."""
    hidden, weight, targets = (tensor.detach() for tensor in sample())
    _, to_hidden, to_weight = value_and_gradients(linear_cross_entropy, hidden, weight, targets)
    generator = torch.Generator().manual_seed(1)
    along_hidden, along_weight = (
        1e-4 * torch.randn(one.shape, generator=generator).double() for one in (hidden, weight)
    )

    def value(sign):
        return reference(hidden + sign * along_hidden, weight + sign * along_weight, targets).item()

    slope = (to_hidden * along_hidden).sum() + (to_weight * along_weight).sum()
    assert (value(1) - value(-1)) / 2 == pytest.approx(slope.item(), rel=1e-4)


def test_large_logits_do_not_overflow():
    inputs = sample(scale=1e4)
    found, expected = (value_and_gradients(function, *inputs) for function in (linear_cross_entropy, reference))
    assert torch.isfinite(found[0])
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_tied_weights_get_the_sum_of_both_gradients():
    """The embedding is the head: autograd adds what comes from either use."""
    _, weight, targets = sample()
    ids = targets.roll(1)

    def through(function):
        table = weight.detach()[:, :12].clone().requires_grad_()
        function(functional.embedding(ids, table).tanh(), table, targets).backward()
        return table.grad

    torch.testing.assert_close(through(linear_cross_entropy), through(reference), rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("chunks")
def test_in_bf16_products_are_rounded_and_sums_are_not():
    inputs = sample(positions=400, width=64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = value_and_gradients(linear_cross_entropy, *inputs)
    expected = value_and_gradients(reference, *inputs)
    assert [tensor.dtype for tensor in found] == [torch.float32] * 3
    assert found[0].item() == pytest.approx(expected[0].item(), rel=5e-3)
    for one, other in zip(found[1:], expected[1:], strict=True):
        assert (one - other).norm() < 0.02 * other.norm()


def test_logits_are_never_held_as_a_whole(monkeypatch):
    """The largest tensor that is made is a chunk of logits, not the logits of all positions."""
    monkeypatch.setitem(loss.CHUNK_BYTES, "cpu", 32 * 4 * VOCABULARY)
    hidden, weight, targets = sample(positions=2048)
    with torch.profiler.profile(profile_memory=True) as profile:
        linear_cross_entropy(hidden, weight, targets)
    largest = max(event.cpu_memory_usage for event in profile.events())
    assert largest < 4 * VOCABULARY * 2048 / 2


# --- one term a token -------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("chunks")
def test_token_nats_are_the_terms_of_the_loss():
    hidden, weight, targets = sample()
    terms = token_nats(hidden, weight, targets)
    expected = functional.cross_entropy(hidden @ weight.T, targets, reduction="none")
    torch.testing.assert_close(terms, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(terms.sum(), linear_cross_entropy(hidden, weight, targets))
    assert not terms.requires_grad


def test_a_sure_model_loses_nothing_and_a_uniform_one_the_entropy():
    hidden, targets = 100 * torch.eye(8), torch.arange(8)
    torch.testing.assert_close(token_nats(hidden, torch.eye(8), targets), torch.zeros(8))
    torch.testing.assert_close(token_nats(0 * hidden, torch.eye(8), targets), torch.full((8,), 8.0).log())
