"""Causal attention for training on CPUs, as products of matrices over blocks of queries.

For short sequences and small heads most of a fused kernel's time goes to its own bookkeeping. Here a block of queries
meets the keys that it may see in one batched product, the softmax is one vectorised pass, and what lies above the
diagonal or beyond the window is, but for the blocks on their edges, never computed. The probabilities are kept for the
backward pass, which is why long sequences are left to the fused kernel.

Registered with transformers as the attention implementation `evolm_blocked`. Where there is padding or a cache it is
sdpa.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from trainer.attention_kernels import LONGEST, blocks

NAME = "evolm_blocked"


class _BlockedAttention(torch.autograd.Function):
    """Query (B, H, T, E), key and value (B, K, T, E), each key head serving H/K query heads -> (B, H, T, E)."""

    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scaling: float,
        window: int | None,
    ) -> torch.Tensor:
        batch, heads, length, size = query.shape
        groups = heads // key.shape[1]
        ctx.layout = batch, groups, scaling, window
        # A key head's queries lie under each other: (B K, G, T, E).
        query = (query * scaling).reshape(-1, groups, length, size)
        key, value = key.reshape(-1, length, size), value.reshape(-1, length, size)
        output = torch.empty_like(query)
        kept = []
        for first, low, high in blocks(length, window):
            part = query[:, :, low:high].reshape(len(key), -1, size)
            scores = torch.bmm(part, key[:, first:high].transpose(1, 2))
            by_query = scores.view(len(key), groups, high - low, high - first)
            # Only the last keys can be after a query; the first ones are out of the window where there is one.
            by_query[..., low - first :].masked_fill_(_hidden(low, low, high, window, scores.device), -torch.inf)
            if first > 0 or window is not None:
                edge = by_query[..., : low - first]
                edge.masked_fill_(_hidden(first, low, high, window, scores.device)[:, : low - first], -torch.inf)
            weights = torch.softmax(scores, dim=-1)
            output[:, :, low:high] = torch.bmm(weights, value[:, first:high]).view(len(key), groups, -1, size)
            kept.append(weights)
        ctx.save_for_backward(query, key, value, *kept)
        return output.view(batch, heads, length, size)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query, key, value, *kept = ctx.saved_tensors
        batch, groups, scaling, window = ctx.layout
        length, size = key.shape[1:]
        gradient = gradients[0].reshape(query.shape)
        # What many blocks add to is summed in fp32 at least.
        wide = torch.promote_types(key.dtype, torch.float32)
        to_query = torch.empty_like(query)
        to_key, to_value = torch.zeros_like(key, dtype=wide), torch.zeros_like(value, dtype=wide)
        for (first, low, high), weights in zip(blocks(length, window), kept, strict=True):
            part = query[:, :, low:high].reshape(len(key), -1, size)
            outer = gradient[:, :, low:high].reshape(len(key), -1, size)
            to_weights = torch.bmm(outer, value[:, first:high].transpose(1, 2))
            to_scores = torch._softmax_backward_data(to_weights, weights, -1, weights.dtype)
            to_query[:, :, low:high] = torch.bmm(to_scores, key[:, first:high]).view(len(key), groups, -1, size)
            to_key[:, first:high] += torch.bmm(to_scores.transpose(1, 2), part)
            to_value[:, first:high] += torch.bmm(weights.transpose(1, 2), outer)
        shape = batch, -1, length, size
        to_key, to_value = to_key.to(key.dtype), to_value.to(key.dtype)
        return to_query.mul_(scaling).view(shape), to_key.view(shape), to_value.view(shape), None, None


def _hidden(first: int, low: int, high: int, window: int | None, device: torch.device) -> torch.Tensor:
    """Which keys `first` to `high` the queries `low` to `high` must not see: those after them, or out of the window."""
    query = torch.arange(low, high, device=device)[:, None]
    key = torch.arange(first, high, device=device)
    hidden = key > query
    return hidden if window is None else hidden | (key <= query - window)


def blocked_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """The output (B, T, H, E) of one layer's attention, as transformers calls it.

    Raises ValueError for dropout, which is not built in: `build_model` chooses another kernel for it.
    """
    length = query.shape[2]
    if attention_mask is not None or length != key.shape[2] or not 1 < length <= LONGEST:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs
        )
    if dropout:
        raise ValueError("blocked attention has no dropout; choose attn_implementation='sdpa'")
    factor = query.shape[-1] ** -0.5 if scaling is None else scaling
    output = _BlockedAttention.apply(query, key, value, factor, sliding_window)
    return output.transpose(1, 2), None


def blocked_mask(
    q_length: int,
    kv_length: int,
    attention_mask: torch.Tensor | None = None,
    allow_is_causal_skip: bool = True,
    **kwargs: Any,
) -> torch.Tensor | None:
    """No mask for whole sequences, whose diagonal and window the kernel knows; otherwise sdpa's."""
    if allow_is_causal_skip and attention_mask is None and 1 < q_length == kv_length <= LONGEST:
        return None
    return sdpa_mask(
        q_length=q_length,
        kv_length=kv_length,
        attention_mask=attention_mask,
        allow_is_causal_skip=allow_is_causal_skip,
        **kwargs,
    )


ALL_ATTENTION_FUNCTIONS.register(NAME, blocked_attention_forward)
ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, blocked_mask)
