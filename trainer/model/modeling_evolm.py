"""EvolmForCausalLM: the parameterised transformer that every recipe describes.

Exported folders carry a copy of this file and of those that it imports: torch, transformers and its neighbours alone.
Names of modules and weights are those of the Llama family (Olmo2 and Gemma2 for norms after a branch), so that a genome
that fits a stock class is exported to it by copying tensors.

Serving engines read this source, not only run it: the attention call must stay one plain call of a local name obtained
from `ALL_ATTENTION_FUNCTIONS.get_interface`, with `self` first and `scaling=self.scaling`; and of what follows the base
model they know `logit_scale` and `final_logit_softcapping` alone.

Shapes: B sequences, T tokens, D = hidden_size, H query heads, K key-value heads, E = head_dim, X experts.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers import GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import CausalLMOutputWithPast, MoeModelOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .configuration_evolm import EvolmConfig
from .layers_evolm import (
    EvolmExperts,
    EvolmLayerNorm,
    EvolmMixture,
    EvolmMLP,
    EvolmRMSNorm,
    EvolmRouter,
    activation_dtype,
    norm_of,
)
from .positions_evolm import EvolmRotary, Rotation, additive, rotate, sinusoids, with_distances

NORMS = {
    "pre": ("input_layernorm", None, "post_attention_layernorm", None),
    "post": (None, "post_attention_layernorm", None, "post_feedforward_layernorm"),
    "sandwich": (
        "input_layernorm",
        "post_attention_layernorm",
        "pre_feedforward_layernorm",
        "post_feedforward_layernorm",
    ),
}
"""Norms by placement: of what attention reads and writes, and of what the feed-forward part reads and writes."""

ADDS_DISTANCES = ("sdpa", "eager", "evolm_blocked")
"""Attention kernels that take an additive mask, as alibi needs."""


def eager_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention as it is written in the textbook: the reference for every other kernel. Returns (B, T, H, E),
    weights."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scores = query @ key.transpose(2, 3) * scaling
    if softcap is not None:
        scores = softcap * (scores / softcap).tanh()
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = scores.softmax(dim=-1, dtype=torch.float32).to(query.dtype)
    weights = functional.dropout(weights, p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights


class EvolmAttention(nn.Module):
    """Causal self-attention with H query heads that share K key-value heads: MHA, GQA and MQA in one."""

    def __init__(self, config: EvolmConfig, layer: Any, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = layer.head_dim
        self.num_key_value_groups = layer.num_attention_heads // layer.num_key_value_heads
        self.scaling = self.head_dim**-0.5
        self.is_causal = True
        self.attention_dropout = config.attention_dropout
        self.softcap = config.attn_logit_softcapping
        self.sliding_window = config.sliding_window if config.layer_types[layer_idx] == "sliding_attention" else None
        self.turned = layer.positions == "rope"
        size, bias = config.hidden_size, config.bias != "none"
        queries, keys = layer.num_attention_heads * self.head_dim, layer.num_key_value_heads * self.head_dim
        self.q_proj = nn.Linear(size, queries, bias=bias)
        self.k_proj = nn.Linear(size, keys, bias=bias)
        self.v_proj = nn.Linear(size, keys, bias=bias)
        self.o_proj = nn.Linear(queries, size, bias=config.bias == "all")
        self.o_proj.writes_to_residual = True
        self.normed_whole = config.qk_norm == "full"
        if config.qk_norm:
            self.q_norm = EvolmRMSNorm(queries if self.normed_whole else self.head_dim, eps=config.rms_norm_eps)
            self.k_norm = EvolmRMSNorm(keys if self.normed_whole else self.head_dim, eps=config.rms_norm_eps)
        else:
            self.q_norm = self.k_norm = nn.Identity()

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: Rotation | None,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(B, T, D) -> (B, T, D), and the attention weights where the kernel gives them."""
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        query, key = self.q_proj(hidden_states), self.k_proj(hidden_states)
        if self.normed_whole:
            query, key = self.q_norm(query).view(shape), self.k_norm(key).view(shape)
        else:
            query, key = self.q_norm(query.view(shape)), self.k_norm(key.view(shape))
        query, key = query.transpose(1, 2), key.transpose(1, 2)
        value = self.v_proj(hidden_states).view(shape).transpose(1, 2)
        if self.turned:
            query, key = rotate(query, position_embeddings), rotate(key, position_embeddings)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)

        attention_interface: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        output, weights = attention_interface(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            sliding_window=self.sliding_window,
            softcap=self.softcap,
            **kwargs,
        )
        return self.o_proj(output.reshape(*hidden_states.shape[:-1], -1)), weights


class EvolmDecoderLayer(GradientCheckpointingLayer):
    """Attention and feed-forward part, one after the other or side by side, with norms before, after or around each.

    With norms before: x + attention(norm x), then x + mlp(norm x), as often as `recursion` says.
    """

    def __init__(self, config: EvolmConfig, layer_idx: int) -> None:
        super().__init__()
        layer = config.per_layer_config[layer_idx]
        self.self_attn = EvolmAttention(config, layer, layer_idx)
        mixed = layer.ffn == "moe"
        self.mlp = EvolmMixture(config, layer) if mixed else EvolmMLP(config, layer.ffn, layer.intermediate_size)
        self.parallel, self.recursion = config.parallel_block, layer.recursion
        self.dropout, self.multiplier = config.dropout, config.residual_multiplier
        before, after, before_mlp, after_mlp = NORMS[config.norm_placement]
        self.attention_norms = before, after
        self.mlp_norms = before if self.parallel else before_mlp, after_mlp
        # Not a set: the order of modules has to be the same in every process.
        for name in dict.fromkeys((before, after, *self.mlp_norms)):
            if name is not None:
                self.add_module(name, norm_of(config))
        for name in (after, after_mlp):
            if name is not None:
                self.get_submodule(name).writes_to_residual = True
        if after is not None:  # then it is the norm that writes to the stream, and not what it reads
            for module in self.modules():
                if isinstance(module, nn.Linear | EvolmExperts):
                    module.normed_after = True

    def read(self, x: torch.Tensor, norm: str | None) -> torch.Tensor:
        """What a branch reads of the residual stream, cast once where autocast would cast it for each matrix."""
        return x.to(activation_dtype(x)) if norm is None else getattr(self, norm)(x)

    def write(self, x: torch.Tensor, norm: str | None) -> torch.Tensor:
        """What a branch adds to the residual stream."""
        if norm is not None:
            x = getattr(self, norm)(x)
        if self.dropout and self.training:
            x = functional.dropout(x, self.dropout)
        return x if self.multiplier == 1.0 else x * self.multiplier

    def forward(self, hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        before, after = self.attention_norms
        read = self.read(hidden_states, before)
        hidden_states = hidden_states + self.write(self.self_attn(read, **kwargs)[0], after)
        before, after = self.mlp_norms
        for step in range(self.recursion):
            if step > 0 or not self.parallel:
                read = self.read(hidden_states, before)
            hidden_states = hidden_states + self.write(self.mlp(read), after)
        return hidden_states


class EvolmPreTrainedModel(PreTrainedModel):
    """Initial weights and what transformers and serving engines ask of a model class."""

    config: EvolmConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["EvolmDecoderLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {
        "hidden_states": EvolmDecoderLayer,
        "attentions": EvolmAttention,
        "router_logits": EvolmRouter,
    }

    def __init__(self, config: EvolmConfig, *args: Any, **kwargs: Any) -> None:
        self._supports_sdpa = config.attn_logit_softcapping is None
        super().__init__(config, *args, **kwargs)
        self.branches = sum(1 + layer.recursion for layer in config.per_layer_config)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Normal with std `initializer_range`, biases zero, norms one; what writes to the residual stream is scaled by
        1/sqrt(branches), 1/sqrt(2 layers) without recursion (GPT-2), or zero with `zero_init`."""
        std = self.config.initializer_range
        writes = getattr(module, "writes_to_residual", False)
        silent = self.config.zero_init and not getattr(module, "normed_after", False)
        residual_std = 0.0 if silent else std / self.branches**0.5
        if isinstance(module, nn.Linear | nn.Embedding | EvolmRouter):
            init.normal_(module.weight, mean=0.0, std=residual_std if writes else std)
        elif isinstance(module, EvolmExperts):
            init.normal_(module.gate_up_proj, mean=0.0, std=std)
            init.normal_(module.down_proj, mean=0.0, std=residual_std)
            init.zeros_(module.loads)
            init.zeros_(module.balanced)
        elif isinstance(module, EvolmRMSNorm | EvolmLayerNorm):
            init.constant_(module.weight, 0.0 if writes and silent else 1.0)
        elif isinstance(module, EvolmRotary):
            init.copy_(module.inv_freq, module.frequencies(module.inv_freq.device)[0])
        if getattr(module, "bias", None) is not None:
            init.zeros_(module.bias)
        if getattr(module, "e_score_correction_bias", None) is not None:
            init.zeros_(module.e_score_correction_bias)


class EvolmModel(EvolmPreTrainedModel):
    """Embeddings and blocks, without the output head."""

    def __init__(self, config: EvolmConfig) -> None:
        super().__init__(config)
        layers = list(config.per_layer_config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        if config.absolute_positions == "learned":
            self.embed_positions = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.layers = nn.ModuleList([EvolmDecoderLayer(config, i) for i in range(config.num_hidden_layers)])
        self.norm = norm_of(config)
        self.rotary = EvolmRotary(config) if any(layer.positions == "rope" for layer in layers) else None
        self.dropout, self.multiplier = config.dropout, config.embedding_multiplier
        # Layers with the same mask: their type, and with alibi their heads, as each head has its own slope.
        self.mask_kinds = [
            (kind, layer.num_attention_heads if layer.positions == "alibi" else 0)
            for kind, layer in zip(config.layer_types, layers, strict=True)
        ]
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> MoeModelOutputWithPast:
        """Token ids (B, T) or embeddings (B, T, D) -> hidden states (B, T, D) after the final norm.

        With `output_router_logits=True`, also `router_logits`: one (B, T, X) for each run of a mixture.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        hidden_states = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        masks = self.masks(hidden_states, attention_mask, past_key_values, position_ids)
        if position_ids is None:
            past = past_key_values.get_seq_length() if past_key_values is not None else 0
            position_ids = torch.arange(past, past + hidden_states.shape[1], device=hidden_states.device).unsqueeze(0)
        turn = None if self.rotary is None else self.rotary(position_ids, activation_dtype(hidden_states))
        hidden_states = self.embed(hidden_states, position_ids)
        for layer, kind in zip(self.layers, self.mask_kinds, strict=True):
            hidden_states = layer(
                hidden_states,
                position_embeddings=turn,
                attention_mask=masks[kind],
                past_key_values=past_key_values,
                **kwargs,
            )
        return MoeModelOutputWithPast(
            last_hidden_state=self.norm(hidden_states), past_key_values=past_key_values if use_cache else None
        )

    def embed(self, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Token embeddings (B, T, D) and places (B or 1, T) -> the begin of the residual stream (B, T, D).

        The multiplier is on what is learned, not on sinusoids (Vaswani et al. 2017, arXiv 1706.03762, section 3.4).
        """
        if self.config.absolute_positions == "learned":
            tokens = tokens + self.embed_positions(positions)
        if self.multiplier != 1.0:
            tokens = tokens * self.multiplier
        if self.config.absolute_positions == "sinusoidal":
            tokens = tokens + sinusoids(positions, tokens.shape[-1]).to(tokens.dtype)
        return functional.dropout(tokens, self.dropout) if self.dropout and self.training else tokens

    def masks(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None,
        past_key_values: Cache | None,
        position_ids: torch.Tensor | None,
    ) -> dict[tuple[str, int], Any]:
        """What attention is given for each kind of layer: without padding and cache, nothing for full layers in sdpa,
        which is the fast way to be causal."""
        masks: dict[tuple[str, int], Any] = {}
        for index, kind in enumerate(self.mask_kinds):
            if kind in masks:
                continue
            create = create_causal_mask if kind[0] == "full_attention" else create_sliding_window_causal_mask
            masks[kind] = create(
                config=self.config,
                inputs_embeds=hidden_states,
                attention_mask=attention_mask,
                past_key_values=past_key_values,
                position_ids=position_ids,
            )
            if kind[1]:
                masks[kind] = self.distances(masks[kind], kind, hidden_states, past_key_values, index)
            elif isinstance(masks[kind], torch.Tensor):
                masks[kind] = additive(masks[kind], activation_dtype(hidden_states))
        return masks

    def distances(
        self, mask: Any, kind: tuple[str, int], hidden_states: torch.Tensor, past_key_values: Cache | None, index: int
    ) -> torch.Tensor:
        """A layer's mask with alibi. Raises ValueError where the attention kernel cannot add it."""
        if self.config._attn_implementation not in ADDS_DISTANCES:
            kernel = self.config._attn_implementation
            raise ValueError(f"attention '{kernel}' cannot add alibi's distances: take {' or '.join(ADDS_DISTANCES)}")
        length = hidden_states.shape[1]
        past, seen, first = 0, length, 0
        if past_key_values is not None:
            past = past_key_values.get_seq_length(index)
            seen, first = past_key_values.get_mask_sizes(length, index)
        window = self.config.sliding_window if kind[0] == "sliding_attention" else None
        queries, keys = range(past, past + length), range(first, first + seen)
        like = hidden_states.new_empty(0, dtype=activation_dtype(hidden_states))
        return with_distances(mask, kind[1], queries, keys, window, like)


@dataclass(frozen=True)
class Head:
    """What turns hidden states h (..., D) into logits: s = multiplier * h weight^T with weight (V, D), and where
    `softcap` is not zero softcap * tanh(s / softcap)."""

    weight: torch.Tensor
    multiplier: float
    softcap: float


class EvolmForCausalLM(EvolmPreTrainedModel, GenerationMixin):
    """The language model: `EvolmModel` and a linear head, tied to the embeddings or not."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: EvolmConfig) -> None:
        super().__init__(config)
        self.model = EvolmModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.multiplier, self.softcap = config.logit_scale, config.final_logit_softcapping or 0.0
        self.post_init()

    def head(self) -> Head:
        """What turns the hidden states of `model` into logits, for losses that never hold all of them."""
        return Head(weight=self.lm_head.weight, multiplier=self.multiplier, softcap=self.softcap)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Token ids (B, T) -> logits (B, T, vocabulary), or of the last `logits_to_keep` positions, and the mean loss
        of `labels` (B, T; -100 is not counted) shifted by one."""
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept, :])
        if self.multiplier != 1.0:
            logits = logits * self.multiplier
        if self.softcap:
            logits = self.softcap * (logits / self.softcap).tanh()
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


__all__ = ["EvolmForCausalLM", "EvolmModel", "EvolmPreTrainedModel", "Head"]
