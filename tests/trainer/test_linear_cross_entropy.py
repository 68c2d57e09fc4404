"""Guards the loss that is fused with the output head, against the two operations that it replaces."""

import pytest
import torch
from torch.nn import functional

from trainer import loss
from trainer.loss import Lesson, fused_loss, linear_cross_entropy, token_nats

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


# --- multipliers, softcaps, z-loss and teachers, against autograd in double precision ---------------------------------

BENDS = [{}, {"multiplier": 0.3}, {"softcap": 2.0}, {"multiplier": 1.7, "softcap": 5.0}]


def bent(logits, multiplier=1.0, softcap=0.0):
    logits = multiplier * logits
    return softcap * torch.tanh(logits / softcap) if softcap else logits


def exact(hidden, weight, targets, *, z_loss=0.0, lesson=None, **bend):
    """All terms as they are written in the papers, of whole logits."""
    logits = bent(hidden @ weight.T, **bend)
    nats = functional.cross_entropy(logits, targets, reduction="sum")
    total = nats + z_loss * logits.logsumexp(dim=1).square().sum()
    if lesson is not None:
        theirs = bent(lesson.hidden.double() @ lesson.weight.double().T, lesson.multiplier, lesson.softcap)
        ours, wanted = ((one / lesson.temperature).log_softmax(dim=1) for one in (logits, theirs))
        distance = functional.kl_div(ours, wanted, reduction="sum", log_target=True)
        total = total - lesson.share * nats + lesson.share * lesson.temperature**2 * distance
    return total, nats


def taught(share, temperature, **bend):
    hidden, weight, _ = (tensor.detach() for tensor in sample(width=7, seed=5))
    return Lesson(hidden=hidden, weight=weight, share=share, temperature=temperature, **bend)


@pytest.mark.usefixtures("chunks")
@pytest.mark.parametrize("bend", BENDS, ids=str)
@pytest.mark.parametrize("z_loss", [0.0, 0.05])
@pytest.mark.parametrize(
    "lesson",
    [None, taught(0.3, 1.0), taught(1.0, 2.5), taught(0.6, 0.5, multiplier=0.4, softcap=3.0), taught(0.0, 2.0)],
    ids=["alone", "taught", "taught alone, soft", "bent teacher", "no share"],
)
def test_all_terms_and_their_gradients_are_exact(bend, z_loss, lesson):
    hidden, weight, targets = sample()
    total, nats = fused_loss(hidden, weight, targets, z_loss=z_loss, lesson=lesson, **bend)
    (total * 0.125).backward()
    doubles = [tensor.detach().double().requires_grad_() for tensor in (hidden, weight)]
    expected, text = exact(*doubles, targets, z_loss=z_loss, lesson=lesson, **bend)
    (expected * 0.125).backward()
    assert total.item() == pytest.approx(expected.item(), rel=1e-5)
    assert nats.item() == pytest.approx(text.item(), rel=1e-5)
    assert not nats.requires_grad
    for one, other in zip((hidden, weight), doubles, strict=True):
        torch.testing.assert_close(one.grad.double(), other.grad, rtol=1e-4, atol=1e-5)


def test_the_gradient_of_all_terms_is_the_slope_of_their_sum():
    """Where KL and z-loss pull against the text: no term may be counted with another's weight."""
    hidden, weight, targets = sample(positions=3)
    lesson = Lesson(hidden=hidden.detach().roll(1, 0), weight=weight.detach(), share=0.5, temperature=2.0)
    terms = {"z_loss": 0.1, "lesson": lesson, "softcap": 3.0}
    fused_loss(hidden, weight, targets, **terms)[0].backward()
    along = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(2))
    up, down = (
        exact(hidden.detach().double() + sign * 1e-5 * along, weight.detach().double(), targets, **terms)[0].item()
        for sign in (1, -1)
    )
    assert (up - down) / 2e-5 == pytest.approx((hidden.grad * along).sum().item(), rel=1e-3)


@pytest.mark.usefixtures("chunks")
@pytest.mark.parametrize("bend", BENDS, ids=str)
def test_token_nats_are_bent_as_the_loss_is(bend):
    hidden, weight, targets = (tensor.detach() for tensor in sample())
    expected = functional.cross_entropy(bent(hidden @ weight.T, **bend), targets, reduction="none")
    torch.testing.assert_close(token_nats(hidden, weight, targets, **bend), expected, rtol=1e-5, atol=1e-5)


def test_a_student_that_is_its_teacher_has_nothing_to_learn():
    hidden, weight, targets = sample()
    lesson = Lesson(hidden=hidden.detach(), weight=weight.detach(), share=1.0, temperature=3.0)
    total, _ = fused_loss(hidden, weight, targets, lesson=lesson)
    total.backward()
    assert total.item() == pytest.approx(0, abs=1e-4)
    torch.testing.assert_close(hidden.grad, torch.zeros_like(hidden), rtol=0, atol=1e-4)


def test_of_a_teacher_too_a_chunk_of_logits_is_held(monkeypatch):
    monkeypatch.setitem(loss.CHUNK_BYTES, "cpu", 32 * 4 * VOCABULARY)
    hidden, weight, targets = sample(positions=2048)
    lesson = Lesson(hidden=hidden.detach(), weight=weight.detach(), share=0.5)
    with torch.profiler.profile(profile_memory=True) as profile:
        fused_loss(hidden, weight, targets, lesson=lesson, z_loss=1e-4)
    assert max(event.cpu_memory_usage for event in profile.events()) < 4 * VOCABULARY * 2048 / 2
