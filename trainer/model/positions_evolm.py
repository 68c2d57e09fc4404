"""How tokens know their place: rotary embeddings, sinusoids, and distances that are added to attention scores.

Exported folders carry a copy of this file: it imports torch, transformers and its configuration alone.

Shapes: B sequences, T tokens, S keys, D = hidden_size, H query heads, E = head_dim, R of which are turned.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from .configuration_evolm import EvolmConfig

Rotation = tuple[torch.Tensor, torch.Tensor]


class EvolmRotary(nn.Module):
    """Cosines and sines of the rotary embedding, once for all layers.

    Pair i turns by position * theta^(-2i/R) (Su et al. 2021, arXiv 2104.09864, equation 15); stretched frequencies
    (`rope_type` linear, yarn: Peng et al. 2023, arXiv 2309.00071) are transformers' own. Frequencies and angles are
    fp32 whatever the model is cast to: bf16 cannot tell neighbouring positions apart beyond 256.
    """

    inv_freq: torch.Tensor

    def __init__(self, config: EvolmConfig) -> None:
        super().__init__()
        self.config = config.per_layer_config[0]
        frequencies, self.scaling = self.frequencies()
        self.register_buffer("inv_freq", frequencies, persistent=False)

    def frequencies(self, device: torch.device | None = None) -> tuple[torch.Tensor, float]:
        """The R/2 frequencies, and what cosines and sines are multiplied by."""
        rope = self.config.rope_parameters
        if rope["rope_type"] != "default":
            return ROPE_INIT_FUNCTIONS[rope["rope_type"]](self.config, device)
        turned = int(self.config.head_dim * rope.get("partial_rotary_factor", 1.0))
        exponent = torch.arange(0, turned, 2, dtype=torch.float32, device=device) / turned
        return 1.0 / rope["rope_theta"] ** exponent, 1.0

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> "EvolmRotary":
        super()._apply(fn, recurse)
        if self.inv_freq.dtype != torch.float32:
            self.inv_freq = self.frequencies(self.inv_freq.device)[0]
        return self

    def forward(self, positions: torch.Tensor, dtype: torch.dtype) -> Rotation:
        """Integer positions (B or 1, T) -> cosines and sines, each (B or 1, 1, T, R), in `dtype`: of each pair, the
        first half's sine is negated."""
        angle = positions[:, None, :, None].float() * self.inv_freq
        cos, sin = angle.cos(), angle.sin()
        if self.scaling != 1.0:
            cos, sin = cos * self.scaling, sin * self.scaling
        return torch.cat((cos, cos), dim=-1).to(dtype), torch.cat((-sin, sin), dim=-1).to(dtype)


def rotate(x: torch.Tensor, by: Rotation) -> torch.Tensor:
    """Turn the pairs (i, i + R/2) of the first R of each head in x (B, heads, T, E)."""
    cos, sin = by
    turned = cos.shape[-1]
    if turned == x.shape[-1]:
        return torch.addcmul(x * cos, x.roll(turned // 2, dims=-1), sin)
    head, rest = x.split((turned, x.shape[-1] - turned), dim=-1)
    return torch.cat((torch.addcmul(head * cos, head.roll(turned // 2, dims=-1), sin), rest), dim=-1)


def sinusoids(positions: torch.Tensor, size: int) -> torch.Tensor:
    """sin(p w_i) and cos(p w_i) with w_i = 10000^(-2i/D) for positions p (B or 1, T) -> (B or 1, T, D), fp32.

    Vaswani et al. 2017, arXiv 1706.03762, section 3.5; sines come first and cosines after, not in turns.
    """
    exponent = torch.arange(0, size, 2, dtype=torch.float32, device=positions.device) / size
    angle = positions[..., None].float() * 10_000.0**-exponent
    return torch.cat((angle.sin(), angle.cos()), dim=-1)[..., :size]


def alibi_slopes(heads: int, device: torch.device) -> torch.Tensor:
    """How fast each of H heads forgets, fp32: 2^(-8/H), 2^(-16/H), ... (Press et al. 2022, arXiv 2108.12409,
    section 3).

    Where H is no power of two, those of the power below it come first, then every other one of the power above, as in
    the authors' code.
    """
    power = 2 ** int(math.log2(heads))
    slopes = 2.0 ** (-8 / power * torch.arange(1, power + 1, dtype=torch.float32, device=device))
    if power == heads:
        return slopes
    between = torch.arange(1, 2 * (heads - power), 2, dtype=torch.float32, device=device)
    return torch.cat((slopes, 2.0 ** (-4 / power * between)))


def additive(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A mask that is true where a key is seen, the same for all sequences, as what is added to scores (1, 1, T, S):
    kernels would make it of a true one for every sequence and layer. Others are returned as they are."""
    if mask.dtype != torch.bool or mask.stride(0) != 0:
        return mask
    return torch.zeros(mask[:1].shape, dtype=dtype, device=mask.device).masked_fill_(~mask[:1], -math.inf)


def with_distances(
    mask: torch.Tensor | None, heads: int, queries: range, keys: range, window: int | None, like: torch.Tensor
) -> torch.Tensor:
    """An additive mask (B or 1, H, T, S) that says how far away each key is: -slope * distance where it is seen.

    `mask` is what sdpa or eager attention would get: None (causal, within the window), or (B, 1, T, S) that is true, or
    zero, where a key is seen. `queries` and `keys` are their places in the sequence; device and dtype are those of
    `like`.
    """
    places = torch.arange(queries.start, queries.stop, device=like.device)
    distance = places[:, None] - torch.arange(keys.start, keys.stop, device=like.device)
    if mask is None:
        seen = distance >= 0 if window is None else (distance >= 0) & (distance < window)
    else:
        mask = mask[:1] if mask.stride(0) == 0 else mask  # one for all sequences
        seen = mask if mask.dtype == torch.bool else mask == 0
    bias = -alibi_slopes(heads, like.device)[None, :, None, None] * distance
    return torch.where(seen, bias.to(like.dtype), torch.finfo(like.dtype).min)


__all__ = ["EvolmRotary", "Rotation", "additive", "alibi_slopes", "rotate", "sinusoids", "with_distances"]
