"""Configuration of EvolmForCausalLM. Exported folders carry a copy of this file: it imports transformers alone."""

from typing import Any

from transformers import PreTrainedConfig


class EvolmConfig(PreTrainedConfig):
    """A decoder-only transformer whose blocks may differ from each other.

    What differs between layers stands in `per_layer_config`, transformers' own way to say so: a mapping of layer index
    to the attributes (`num_attention_heads`, `num_key_value_heads`, `intermediate_size`, `ffn`, `positions`,
    `recursion`) that differ there; which layers slide stands in `layer_types`.

    Args:
        ffn: `swiglu`, `geglu`, `reglu` (gated, three matrices), `gelu`, `silu`, `relu2` (two matrices), or `moe`: a
            mixture of experts, each a `swiglu` of `intermediate_size`.
        recursion: Times that the feed-forward part is run on its own result.
        num_experts: Experts of each mixture.
        num_experts_per_tok: Experts that each token uses.
        num_shared_experts: Experts that every token uses besides, as one `swiglu`.
        expert_bias: Experts are chosen by probability plus a bias that is not trained.
        qk_norm: RMSNorm of queries and keys before the rotary embedding: of each head (`head` or true), of all heads at
            once (`full`), or none.
        norm: `rmsnorm` or `layernorm`; `rms_norm_eps` is for both.
        norm_placement: Norms `pre` (on what attention and feed-forward part read), `post` (on what they write), or both
            (`sandwich`).
        parallel_block: Attention and feed-forward part read the same.
        bias: Biases of linear maps: `none`, `qkv`, or `all` (but the head, routers and experts), LayerNorms included.
        positions: Of a layer: `rope`, `alibi` or `none`.
        absolute_positions: What is added to the embeddings: `learned`, `sinusoidal` or none.
        rope_parameters: `rope_theta`, the base of the rotary frequencies; `partial_rotary_factor`, the share of each
            head that is turned; `rope_type` and `factor`, how frequencies are stretched.
        sliding_window: Tokens that the layers whose type is `sliding_attention` attend to, the present one included.
        attn_logit_softcapping: Attention scores become c tanh(score / c).
        final_logit_softcapping: Logits become c tanh(logit / c), after `logit_scale`.
        embedding_multiplier, residual_multiplier, logit_scale: On embeddings, on what branches add, on logits.
        dropout: Of embeddings and of what branches add.
        zero_init: What writes to the residual stream begins as zero.
    """

    model_type = "evolm"
    keys_to_ignore_at_inference = ["past_key_values"]

    vocab_size: int = 4096
    hidden_size: int = 256
    num_hidden_layers: int = 6
    num_attention_heads: int = 4
    num_key_value_heads: int = 4
    head_dim: int = 64
    intermediate_size: int = 704
    ffn: str = "swiglu"
    recursion: int = 1
    num_experts: int = 0
    num_experts_per_tok: int = 2
    num_shared_experts: int = 0
    expert_bias: bool = False
    qk_norm: bool | str = True
    norm: str = "rmsnorm"
    norm_placement: str = "pre"
    rms_norm_eps: float = 1e-6
    parallel_block: bool = False
    bias: str = "none"
    positions: str = "rope"
    absolute_positions: str | None = None
    rope_parameters: dict[str, Any] | None = None
    max_position_embeddings: int = 2048
    layer_types: list[str] | None = None
    sliding_window: int | None = None
    attn_logit_softcapping: float | None = None
    final_logit_softcapping: float | None = None
    embedding_multiplier: float = 1.0
    residual_multiplier: float = 1.0
    logit_scale: float = 1.0
    dropout: float = 0.0
    attention_dropout: float = 0.0
    tie_word_embeddings: bool = True
    initializer_range: float = 0.02
    zero_init: bool = False
    use_cache: bool = True
    pad_token_id: int | None = 0
    bos_token_id: int | None = 1
    eos_token_id: int | None = 2

    def __post_init__(self, **kwargs: Any) -> None:
        if self.layer_types is None:
            self.layer_types = ["full_attention"] * self.num_hidden_layers
        if self.rope_parameters is None:
            self.rope_parameters = {"rope_type": "default", "rope_theta": 10_000.0}
        super().__post_init__(**kwargs)


__all__ = ["EvolmConfig"]
