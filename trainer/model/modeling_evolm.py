"""EvolmForCausalLM: the parameterised transformer that every recipe describes.

Exported folders carry a copy of this file: it imports torch, transformers and its configuration alone. Names of
modules and weights are those of the Llama family, so that a genome that fits a stock class is exported to it by
copying tensors.

Serving engines read this source, not only run it: the attention call must stay one plain call of a local name obtained
from `ALL_ATTENTION_FUNCTIONS.get_interface`, with `self` first and `scaling=self.scaling`.

Shapes: B sequences, T tokens, D = hidden_size, H query heads, K key-value heads, E = head_dim, F = intermediate_size,
X experts, of which each token uses A.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers import GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import CausalLMOutputWithPast, MoeModelOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .configuration_evolm import EvolmConfig

Rotation = tuple[torch.Tensor, torch.Tensor]


class EvolmRMSNorm(nn.RMSNorm):
    """x / rms(x) * weight over the last dimension (Zhang and Sennrich 2019, arXiv 1910.07467, equation 4), in fp32.

    Under autocast the result is cast once, here, and not once by each of the matrices that read it.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        normed = functional.rms_norm(x.float(), self.normalized_shape, self.weight.float(), self.eps)
        kind = x.device.type
        return normed.to(torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype)


def rotation(positions: torch.Tensor, head_dim: int, theta: float, dtype: torch.dtype) -> Rotation:
    """Cosines and sines of the rotary embedding, each (B or 1, T, E/2), for integer positions (B or 1, T).

    Pair i turns by position * theta^(-2i/E) (Su et al. 2021, arXiv 2104.09864, equation 15). Angles are computed in
    fp32 (bf16 cannot tell neighbouring positions apart beyond 256), frequency first as the stock classes do: at far
    positions another order of operations moves logits.
    """
    exponent = torch.arange(0, head_dim, 2, dtype=torch.float32, device=positions.device) / head_dim
    angle = positions[..., None].float() * (1.0 / theta**exponent)
    return angle.cos().to(dtype), angle.sin().to(dtype)


def rotate(x: torch.Tensor, by: Rotation) -> torch.Tensor:
    """Turn the pairs (i, i + E/2) of x (B, heads, T, E)."""
    cos, sin = (part.unsqueeze(1).to(x.dtype) for part in by)
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def eager_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention as it is written in the textbook: the reference for every other kernel. Returns (B, T, H, E),
    weights."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scores = query @ key.transpose(2, 3) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = scores.softmax(dim=-1, dtype=torch.float32).to(query.dtype)
    weights = functional.dropout(weights, p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights


class EvolmAttention(nn.Module):
    """Causal self-attention with H query heads that share K key-value heads: MHA, GQA and MQA in one."""

    def __init__(self, config: EvolmConfig, layer_idx: int) -> None:
        super().__init__()
        layer = config.per_layer_config[layer_idx]
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = layer.head_dim
        self.num_key_value_groups = layer.num_attention_heads // layer.num_key_value_heads
        self.scaling = self.head_dim**-0.5
        self.is_causal = True
        self.attention_dropout = config.attention_dropout
        size, heads, kv_heads = config.hidden_size, layer.num_attention_heads, layer.num_key_value_heads
        self.q_proj = nn.Linear(size, heads * self.head_dim, bias=False)
        self.k_proj = nn.Linear(size, kv_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(size, kv_heads * self.head_dim, bias=False)
        self.o_proj = nn.Linear(heads * self.head_dim, size, bias=False)
        self.o_proj.writes_to_residual = True
        self.q_norm = EvolmRMSNorm(self.head_dim, eps=config.rms_norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = EvolmRMSNorm(self.head_dim, eps=config.rms_norm_eps) if config.qk_norm else nn.Identity()

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: Rotation,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(B, T, D) -> (B, T, D), and the attention weights where the kernel gives them."""
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        query = self.q_norm(self.q_proj(hidden_states).view(shape)).transpose(1, 2)
        key = self.k_norm(self.k_proj(hidden_states).view(shape)).transpose(1, 2)
        value = self.v_proj(hidden_states).view(shape).transpose(1, 2)
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
            **kwargs,
        )
        return self.o_proj(output.reshape(*hidden_states.shape[:-1], -1)), weights


class EvolmMLP(nn.Module):
    """The position-wise part of a block: (B, T, D) -> (B, T, D) through F hidden units.

    swiglu: down(silu(gate x) * up x) (Shazeer 2020, arXiv 2002.05202, equation 6); gelu: down(gelu(up x)); relu2:
    down(relu(up x)^2) (So et al. 2021, arXiv 2109.08668).
    """

    def __init__(self, config: EvolmConfig, layer_idx: int) -> None:
        super().__init__()
        size, width = config.hidden_size, config.per_layer_config[layer_idx].intermediate_size
        self.ffn = config.ffn
        if self.ffn == "swiglu":
            self.gate_proj = nn.Linear(size, width, bias=False)
        self.up_proj = nn.Linear(size, width, bias=False)
        self.down_proj = nn.Linear(width, size, bias=False)
        self.down_proj.writes_to_residual = True

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.ffn == "swiglu":
            hidden = functional.silu(self.gate_proj(x)) * self.up_proj(x)
        elif self.ffn == "gelu":
            hidden = functional.gelu(self.up_proj(x))
        else:
            hidden = functional.relu(self.up_proj(x)).square()
        return self.down_proj(hidden)


class EvolmRouter(nn.Module):
    """How much each token likes each expert: (B, T, D) -> logits (B, T, X), in fp32 whatever the precision around."""

    def __init__(self, config: EvolmConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.hidden_size))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return functional.linear(x.float(), self.weight.float())


class EvolmExperts(nn.Module):
    """X swiglu networks of F hidden units, their weights stacked; the gate's rows come before those of `up`."""

    def __init__(self, config: EvolmConfig, layer_idx: int) -> None:
        super().__init__()
        size, width = config.hidden_size, config.per_layer_config[layer_idx].intermediate_size
        self.num_experts = config.num_experts
        self.gate_up_proj = nn.Parameter(torch.empty(self.num_experts, 2 * width, size))
        self.down_proj = nn.Parameter(torch.empty(self.num_experts, size, width))

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """Tokens (N, D), the experts of each (N, A) and their weights (N, A) -> weighted sums (N, D).

        Tokens are sorted by expert, so that each expert is one product of matrices; none is left out.
        """
        count, active = top_k_index.shape
        chosen = top_k_index.flatten()
        order = chosen.argsort(stable=True)
        loads = chosen.bincount(minlength=self.num_experts).tolist()
        parts = hidden_states.index_select(0, order // active).split(loads)
        outputs = []
        # `unbind` and not an index: its backward pass builds the gradient of all experts once, not once for each.
        for part, gate_up, down in zip(parts, self.gate_up_proj.unbind(), self.down_proj.unbind(), strict=True):
            gate, up = functional.linear(part, gate_up).chunk(2, dim=-1)
            outputs.append(functional.linear(functional.silu(gate) * up, down))
        place = torch.empty_like(order)
        place[order] = torch.arange(len(order), device=order.device)
        output = torch.cat(outputs).index_select(0, place).view(count, active, -1)
        return (output * top_k_weights.unsqueeze(-1)).sum(dim=1).to(output.dtype)


class EvolmMixture(nn.Module):
    """A mixture of experts: the A likeliest of X for each token, weighted by their probabilities, which are made to sum
    to one (Jiang et al. 2024, arXiv 2401.04088, section 2.1)."""

    def __init__(self, config: EvolmConfig, layer_idx: int) -> None:
        super().__init__()
        self.top_k = config.num_experts_per_tok
        self.gate = EvolmRouter(config)
        self.experts = EvolmExperts(config, layer_idx)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, T, D) -> (B, T, D)."""
        weights, chosen = self.gate(x).flatten(0, 1).softmax(dim=-1).topk(self.top_k)
        weights = weights / weights.sum(dim=-1, keepdim=True)
        return self.experts(x.flatten(0, 1), chosen, weights).view_as(x)


class EvolmDecoderLayer(GradientCheckpointingLayer):
    """x + attention(norm x), then x + mlp(norm x)."""

    def __init__(self, config: EvolmConfig, layer_idx: int) -> None:
        super().__init__()
        self.self_attn = EvolmAttention(config, layer_idx)
        self.mlp = EvolmMixture(config, layer_idx) if config.ffn == "moe" else EvolmMLP(config, layer_idx)
        self.input_layernorm = EvolmRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = EvolmRMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(self, hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        attended, _ = self.self_attn(self.input_layernorm(hidden_states), **kwargs)
        hidden_states = hidden_states + attended
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))


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

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Normal with std `initializer_range`; what writes to the residual stream is scaled by 1/sqrt(2 layers)
        (GPT-2)."""
        std = self.config.initializer_range
        residual_std = std / (2 * self.config.num_hidden_layers) ** 0.5
        if isinstance(module, nn.Linear | nn.Embedding | EvolmRouter):
            residual = getattr(module, "writes_to_residual", False)
            init.normal_(module.weight, mean=0.0, std=residual_std if residual else std)
        elif isinstance(module, EvolmExperts):
            init.normal_(module.gate_up_proj, mean=0.0, std=std)
            init.normal_(module.down_proj, mean=0.0, std=residual_std)
        elif isinstance(module, EvolmRMSNorm):
            init.ones_(module.weight)


class EvolmModel(EvolmPreTrainedModel):
    """Embeddings and blocks, without the output head."""

    def __init__(self, config: EvolmConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([EvolmDecoderLayer(config, i) for i in range(config.num_hidden_layers)])
        self.norm = EvolmRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
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

        With `output_router_logits=True`, also `router_logits`: one (B, T, X) for each mixture.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        hidden_states = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        if position_ids is None:
            past = past_key_values.get_seq_length() if past_key_values is not None else 0
            position_ids = torch.arange(past, past + hidden_states.shape[1], device=hidden_states.device).unsqueeze(0)
        mask = create_causal_mask(
            config=self.config,
            inputs_embeds=hidden_states,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            position_ids=position_ids,
        )
        theta = self.config.rope_parameters["rope_theta"]
        head_dim = self.config.per_layer_config[0].head_dim
        turn = rotation(position_ids, head_dim, theta, hidden_states.dtype)
        for layer in self.layers:
            hidden_states = layer(
                hidden_states,
                position_embeddings=turn,
                attention_mask=mask,
                past_key_values=past_key_values,
                **kwargs,
            )
        return MoeModelOutputWithPast(
            last_hidden_state=self.norm(hidden_states), past_key_values=past_key_values if use_cache else None
        )


class EvolmForCausalLM(EvolmPreTrainedModel, GenerationMixin):
    """The language model: `EvolmModel` and a linear head, tied to the embeddings or not."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: EvolmConfig) -> None:
        super().__init__(config)
        self.model = EvolmModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

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


__all__ = ["EvolmForCausalLM", "EvolmModel", "EvolmPreTrainedModel"]
