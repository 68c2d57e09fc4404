"""Configuration of EvolmForCausalLM. Exported folders carry a copy of this file: it imports transformers alone."""

from typing import Any

from transformers import PreTrainedConfig


class EvolmConfig(PreTrainedConfig):
    """A decoder-only transformer whose blocks may differ from each other.

    What differs between layers stands in `per_layer_config`, transformers' own way to say so: a mapping of layer index
    to the attributes (`num_attention_heads`, `num_key_value_heads`, `intermediate_size`) that differ there.

    Args:
        ffn: `swiglu` (gated, three matrices), `gelu` or `relu2` (two matrices), `moe` (a mixture of experts, each a
            `swiglu` of `intermediate_size`).
        num_experts: Experts of each mixture.
        num_experts_per_tok: Experts that each token uses.
        qk_norm: RMSNorm over each query and key head before the rotary embedding.
        rope_parameters: `rope_theta`, the base of the rotary frequencies.
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
    num_experts: int = 0
    num_experts_per_tok: int = 2
    qk_norm: bool = True
    rms_norm_eps: float = 1e-6
    rope_parameters: dict[str, Any] | None = None
    max_position_embeddings: int = 2048
    tie_word_embeddings: bool = True
    initializer_range: float = 0.02
    attention_dropout: float = 0.0
    use_cache: bool = True
    layer_types: list[str] | None = None
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
