"""Guards the attention kernel for CPUs: outputs and gradients are those of the textbook, whatever the blocks."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck

from trainer.attention_kernels import BLOCK, LONGEST, attention_kernel, kept_positions
from trainer.model.blocked_attention import (
    _BlockedAttention,
    blocked_attention_forward,
    blocked_mask,
)


def textbook(query, key, value, scaling, window):
    """Softmax over the keys that a query sees, head by head."""
    length, groups = query.shape[2], query.shape[1] // key.shape[1]
    place = torch.arange(length)
    seen = place[:, None] >= place
    if window is not None:
        seen &= place[:, None] - place < window
    rows = []
    for head in range(query.shape[1]):
        scores = query[:, head] @ key[:, head // groups].mT * scaling
        rows.append(scores.masked_fill(~seen, -torch.inf).softmax(dim=-1) @ value[:, head // groups])
    return torch.stack(rows, dim=1)


def tensors(batch, heads, kv_heads, length, size, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(batch, length, count, size) for count in (heads, kv_heads, kv_heads)]
    # As a model has them: heads inside of positions.
    return [torch.randn(shape, generator=generator, dtype=dtype).transpose(1, 2).requires_grad_() for shape in shapes]


@settings(derandomize=True, deadline=None, max_examples=30)
@given(
    batch=st.integers(1, 2),
    kv_heads=st.integers(1, 2),
    groups=st.integers(1, 3),
    length=st.sampled_from([2, 5, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK + 9]),
    size=st.integers(1, 8),
    window=st.none() | st.integers(1, 2 * BLOCK + 20),
)
def test_outputs_and_gradients_are_those_of_the_textbook(batch, kv_heads, groups, length, size, window):
    inputs = tensors(batch, kv_heads * groups, kv_heads, length, size)
    ours, theirs = _BlockedAttention.apply(*inputs, 0.3, window), textbook(*inputs, 0.3, window)
    torch.testing.assert_close(ours, theirs)
    outer = torch.randn(ours.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    expected = torch.autograd.grad(theirs, inputs, outer)
    for found, wanted in zip(torch.autograd.grad(ours, inputs, outer), expected, strict=True):
        torch.testing.assert_close(found, wanted)


def test_gradients_are_those_of_finite_differences():
    assert gradcheck(lambda *inputs: _BlockedAttention.apply(*inputs, 0.5, 3), tensors(1, 2, 1, 6, 2))


def test_in_bf16_it_is_as_close_as_the_fused_kernel():
    exact = tensors(2, 4, 2, 600, 32)
    rounded = [one.detach().bfloat16().requires_grad_() for one in exact]
    reference = textbook(*exact, 0.2, None)
    outer = torch.randn(reference.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    ours = _BlockedAttention.apply(*rounded, 0.2, None)
    fused = torch.nn.functional.scaled_dot_product_attention(*rounded, is_causal=True, scale=0.2, enable_gqa=True)
    error = lambda found: (found.double() - reference).square().mean().sqrt().item()  # noqa: E731
    assert error(ours) < 1.5 * error(fused) + 1e-4
    wanted = torch.autograd.grad(reference, exact, outer)
    pairs = (torch.autograd.grad(one, rounded, outer.bfloat16()) for one in (ours, fused))
    for one, other, right in zip(*pairs, wanted, strict=True):
        assert (one - right).norm() < 1.5 * (other - right).norm() + 1e-3 * right.norm()


@pytest.mark.parametrize("window", [None, 10])
def test_the_probabilities_that_are_kept_are_counted(window):
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda one: kept.append(one) or one, lambda one: one):
        _BlockedAttention.apply(*tensors(1, 1, 1, 150, 4), 1.0, window)
    assert sum(one.numel() for one in kept[3:]) == kept_positions(150, window)
    assert kept_positions(150, 10) < kept_positions(150) < 150 * 150


def test_padding_a_cache_and_single_tokens_are_left_to_sdpa():
    module = torch.nn.Module()
    query, key, value = tensors(1, 2, 2, 8, 4)
    mask = torch.ones(1, 1, 8, 8, dtype=torch.bool).tril()
    masked, _ = blocked_attention_forward(module, query, key, value, mask, scaling=0.5)
    whole, _ = blocked_attention_forward(module, query, key, value, None, scaling=0.5)
    torch.testing.assert_close(masked, whole)
    last, _ = blocked_attention_forward(module, query[:, :, -1:], key, value, None, scaling=0.5)
    torch.testing.assert_close(last, whole[:, -1:])


def test_a_mask_is_made_where_the_kernel_cannot_know_it():
    sizes = {"batch_size": 1, "device": "cpu"}
    assert blocked_mask(8, 8, **sizes) is None
    assert blocked_mask(8, 8, local_size=4, **sizes) is None
    assert blocked_mask(8, 12, q_offset=4, local_size=4, **sizes) is not None
    assert blocked_mask(8, 8, allow_is_causal_skip=False, **sizes) is not None
    assert blocked_mask(8, 8, attention_mask=torch.tensor([[False] + [True] * 7]), **sizes) is not None
    assert blocked_mask(LONGEST + 1, LONGEST + 1, local_size=4, **sizes) is not None


def test_long_sequences_are_left_to_sdpa(recipe_of):
    query, key, value = tensors(1, 1, 1, LONGEST + 1, 2, dtype=torch.float32)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda one: kept.append(one) or one, lambda one: one):
        blocked_attention_forward(torch.nn.Module(), query, key, value, None, scaling=1.0)
    assert max(one.numel() for one in kept) < LONGEST * BLOCK
    long = recipe_of(data={"sequence_length": LONGEST + 1}, train={"batch_tokens": 8192, "attention_kernel": "blocked"})
    assert attention_kernel(long, "cpu") == "sdpa"


def test_dropout_is_refused():
    with pytest.raises(ValueError, match="no dropout"):
        blocked_attention_forward(torch.nn.Module(), *tensors(1, 1, 1, 4, 2), None, scaling=1.0, dropout=0.1)
