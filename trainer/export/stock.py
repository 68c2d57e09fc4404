"""The classes of transformers that a genome may fit: what each needs, what else it can say, and how it says it.

A class fits a model when the model demands all that the class needs and nothing that it cannot say. Demands are what
sets a model apart from the plainest one: RMSNorm before each branch, rotary positions on all layers, swiglu, full
attention, no qk-norm, no biases, all layers alike.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import transformers
from transformers import PreTrainedModel

from trainer.model import EvolmConfig

Values = dict[str, Any]

PER_HEAD, ALL_HEADS = "qk-norm of each head", "qk-norm of all heads"
SOME_SLIDE, ALL_SLIDE = "sliding attention on some layers", "sliding attention on all layers"
NO_POSITIONS = "layers without positions"
NORMS_AFTER, NORMS_AROUND, LAYERNORM = "norms after branches", "norms before and after branches", "LayerNorm"
UNGATED, OTHER_GATE = "a feed-forward part without a gate", "another gate than swiglu's"
MIXTURE, DENSE_LAYERS = "a mixture of experts", "dense layers before mixtures"
QKV_BIAS, ALL_BIAS = "biases of queries, keys and values", "biases of all maps"
SCORES_BENT, LOGITS_BENT = "an attention softcap", "a logit softcap"
PARTLY_TURNED = "rotary positions on a part of each head"
PARALLEL = "parallel blocks"
UNEVEN_HEADS = "a width that is no multiple of the heads"
FREE_HEADS = "heads that are together not as wide as the model"

ACTIVATIONS = {"swiglu": "silu", "moe": "silu", "geglu": "gelu", "reglu": "relu"}
"""What transformers calls the activation of a kind of feed-forward part, where the two names differ."""


@dataclass(frozen=True, kw_only=True)
class Stock:
    """A class of transformers: its name, its configuration's, what a model must demand to be one, what it may demand
    besides, and how the values of its configuration follow. `shifted` classes multiply by 1 + weight in norms, and by
    the root of the width after the embeddings; `renamed` are parts of the names of weights that differ."""

    name: str
    needs: frozenset[str] = frozenset()
    can: frozenset[str] = frozenset()
    values: Callable[[EvolmConfig], Values] = field(default=lambda config: {})
    configuration: str = ""
    shifted: bool = False
    renamed: tuple[tuple[str, str], ...] = ()

    @property
    def model(self) -> type[PreTrainedModel]:
        """The class itself."""
        found: type[PreTrainedModel] = getattr(transformers, self.name)
        return found

    def config(self, config: EvolmConfig) -> Any:
        """The configuration of this class that says what ours says."""
        kind = getattr(transformers, self.configuration or self.name.replace("ForCausalLM", "Config"))
        return kind(**{**_shared(config), **self.values(config)})


def demands(config: EvolmConfig) -> frozenset[str]:
    """What sets a model apart from the plainest one, in words."""
    layers, types = list(config.per_layer_config), _types(config)
    mixed = [layer.ffn == "moe" for layer in layers]
    first, last = layers[0], layers[-1]
    found = {
        PER_HEAD: config.qk_norm in (True, "head"),
        ALL_HEADS: config.qk_norm == "full",
        SOME_SLIDE: len(set(types)) > 1,
        ALL_SLIDE: set(types) == {"sliding_attention"},
        NO_POSITIONS: any(layer.positions == "none" for layer in layers),
        NORMS_AFTER: config.norm_placement == "post",
        NORMS_AROUND: config.norm_placement == "sandwich",
        LAYERNORM: config.norm == "layernorm",
        UNGATED: last.ffn in ("gelu", "silu", "relu2"),
        OTHER_GATE: last.ffn in ("geglu", "reglu"),
        MIXTURE: any(mixed),
        DENSE_LAYERS: any(mixed) and not all(mixed),
        QKV_BIAS: config.bias == "qkv",
        ALL_BIAS: config.bias == "all",
        SCORES_BENT: bool(config.attn_logit_softcapping),
        LOGITS_BENT: bool(config.final_logit_softcapping),
        PARTLY_TURNED: _rope(config).get("partial_rotary_factor", 1.0) != 1.0,
        PARALLEL: config.parallel_block,
        UNEVEN_HEADS: config.hidden_size % first.num_attention_heads != 0,
        FREE_HEADS: config.hidden_size != first.num_attention_heads * first.head_dim,
        "shared experts": any(mixed) and config.num_shared_experts > 0,
        "experts that are chosen with a bias": config.expert_bias,
        "recursion": any(layer.recursion > 1 for layer in layers),
        "alibi": any(layer.positions == "alibi" for layer in layers),
        f"{config.absolute_positions} positions": config.absolute_positions is not None,
        "layers of different heads": _differ(layers, "num_attention_heads", "num_key_value_heads"),
        "feed-forward parts of different widths": any(
            _differ([layer for layer in layers if layer.ffn == kind], "intermediate_size")
            for kind in {layer.ffn for layer in layers}
        ),
    }
    return frozenset(words for words, demanded in found.items() if demanded)


def _differ(layers: list[Any], *attributes: str) -> bool:
    return len({tuple(getattr(layer, name) for name in attributes) for layer in layers}) > 1


def _types(config: EvolmConfig) -> list[str]:
    return config.layer_types or []


def _rope(config: EvolmConfig) -> Values:
    return dict(config.rope_parameters or {})


def _sliding_window(config: EvolmConfig) -> int | None:
    return config.sliding_window if "sliding_attention" in _types(config) else None


def _shared(config: EvolmConfig) -> Values:
    """What all classes are told."""
    first, last = config.per_layer_config[0], config.per_layer_config[config.num_hidden_layers - 1]
    activation = ACTIVATIONS.get(last.ffn, last.ffn)
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": first.num_attention_heads,
        "num_key_value_heads": first.num_key_value_heads,
        "head_dim": first.head_dim,
        "intermediate_size": last.intermediate_size,
        "hidden_act": activation,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_parameters": _rope(config),
        "max_position_embeddings": config.max_position_embeddings,
        "tie_word_embeddings": config.tie_word_embeddings,
        "initializer_range": config.initializer_range,
        "pad_token_id": config.pad_token_id,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": config.eos_token_id,
    }


def _biased(config: EvolmConfig) -> Values:
    return {"attention_bias": config.bias != "none", "mlp_bias": config.bias == "all"}


def _window(config: EvolmConfig) -> Values:
    return {"sliding_window": _sliding_window(config), "layer_types": list(_types(config))}


def _qwen3(config: EvolmConfig) -> Values:
    values = {**_window(config), "attention_bias": config.bias != "none"}
    return {**values, "use_sliding_window": values["sliding_window"] is not None}


def _smollm3(config: EvolmConfig) -> Values:
    turned = [int(layer.positions == "rope") for layer in config.per_layer_config]
    return {**_qwen3(config), **_biased(config), "no_rope_layers": turned}


def _olmo3(config: EvolmConfig) -> Values:
    """Each type of layer is told its rotary positions: what it is not told, it takes from defaults of its own."""
    rope = {kind: _rope(config) for kind in ("full_attention", "sliding_attention")}
    return {**_window(config), "attention_bias": config.bias != "none", "rope_parameters": rope}


def _gemma2(config: EvolmConfig) -> Values:
    return {
        **_window(config),
        "sliding_window": config.sliding_window or config.max_position_embeddings,
        "attention_bias": config.bias != "none",
        "hidden_activation": _shared(config)["hidden_act"],
        "query_pre_attn_scalar": config.per_layer_config[0].head_dim,
        "attn_logit_softcapping": config.attn_logit_softcapping,
        "final_logit_softcapping": config.final_logit_softcapping,
    }


def _mixture(config: EvolmConfig) -> Values:
    return {
        "num_experts_per_tok": config.num_experts_per_tok,
        "sliding_window": _sliding_window(config),
    }


def _qwen3_moe(config: EvolmConfig) -> Values:
    layers = list(config.per_layer_config)
    return {
        **_mixture(config),
        "use_sliding_window": _sliding_window(config) is not None,
        "num_experts": config.num_experts,
        "moe_intermediate_size": layers[-1].intermediate_size,
        "intermediate_size": layers[0].intermediate_size,
        "mlp_only_layers": [index for index, layer in enumerate(layers) if layer.ffn != "moe"],
        "norm_topk_prob": True,
        "attention_bias": config.bias != "none",
    }


def _stablelm(config: EvolmConfig) -> Values:
    rope = {"partial_rotary_factor": 1.0, **_rope(config)}
    return {
        "layer_norm_eps": config.rms_norm_eps,
        "use_parallel_residual": config.parallel_block,
        "use_qkv_bias": config.bias == "qkv",
        "rope_parameters": rope,
    }


def _starcoder2(config: EvolmConfig) -> Values:
    return {
        "norm_epsilon": config.rms_norm_eps,
        "use_bias": config.bias != "none",
        "sliding_window": _sliding_window(config),
    }


def _of(*words: str) -> frozenset[str]:
    return frozenset(words)


HEADS = _of(UNEVEN_HEADS, FREE_HEADS)
SLIDES = _of(SOME_SLIDE, ALL_SLIDE)

CLASSES = (
    Stock(name="LlamaForCausalLM", can=_of(FREE_HEADS, OTHER_GATE, QKV_BIAS, ALL_BIAS), values=_biased),
    Stock(name="Qwen3ForCausalLM", needs=_of(PER_HEAD), can=HEADS | SLIDES | _of(OTHER_GATE, QKV_BIAS), values=_qwen3),
    Stock(
        name="MistralForCausalLM",
        can=HEADS | _of(ALL_SLIDE, OTHER_GATE),
        values=lambda config: {"sliding_window": _sliding_window(config)},
    ),
    Stock(name="MinistralForCausalLM", needs=_of(SOME_SLIDE), can=HEADS | _of(OTHER_GATE), values=_window),
    Stock(
        name="SmolLM3ForCausalLM",
        can=HEADS | SLIDES | _of(NO_POSITIONS, OTHER_GATE, QKV_BIAS, ALL_BIAS),
        values=_smollm3,
    ),
    Stock(
        name="Olmo2ForCausalLM",
        needs=_of(NORMS_AFTER, ALL_HEADS),
        can=HEADS | _of(OTHER_GATE, QKV_BIAS),
        values=lambda config: {"attention_bias": config.bias != "none"},
    ),
    Stock(
        name="Olmo3ForCausalLM",
        needs=_of(NORMS_AFTER, ALL_HEADS),
        can=HEADS | SLIDES | _of(OTHER_GATE, QKV_BIAS),
        values=_olmo3,
    ),
    Stock(name="ArceeForCausalLM", needs=_of(UNGATED), can=_of(FREE_HEADS, QKV_BIAS, ALL_BIAS), values=_biased),
    Stock(
        name="MixtralForCausalLM",
        needs=_of(MIXTURE),
        can=HEADS | _of(ALL_SLIDE),
        values=lambda config: {**_mixture(config), "num_local_experts": config.num_experts},
    ),
    Stock(
        name="Qwen3MoeForCausalLM",
        needs=_of(MIXTURE, PER_HEAD),
        can=HEADS | _of(DENSE_LAYERS, ALL_SLIDE, QKV_BIAS),
        values=_qwen3_moe,
    ),
    Stock(
        name="Gemma2ForCausalLM",
        needs=_of(NORMS_AROUND),
        can=SLIDES | _of(FREE_HEADS, OTHER_GATE, QKV_BIAS, SCORES_BENT, LOGITS_BENT),
        values=_gemma2,
        shifted=True,
    ),
    Stock(
        name="Gemma3ForCausalLM",
        configuration="Gemma3TextConfig",
        needs=_of(NORMS_AROUND, PER_HEAD),
        can=SLIDES | _of(FREE_HEADS, OTHER_GATE, QKV_BIAS, LOGITS_BENT),
        values=lambda config: {**_olmo3(config), **_gemma2(config)},
        shifted=True,
    ),
    Stock(
        name="StableLmForCausalLM",
        configuration="StableLmConfig",
        needs=_of(LAYERNORM),
        can=_of(PARALLEL, PARTLY_TURNED, OTHER_GATE, QKV_BIAS),
        values=_stablelm,
    ),
    Stock(
        name="Starcoder2ForCausalLM",
        needs=_of(LAYERNORM, UNGATED),
        can=HEADS | _of(ALL_SLIDE, QKV_BIAS, ALL_BIAS),
        values=_starcoder2,
        renamed=((".mlp.up_proj.", ".mlp.c_fc."), (".mlp.down_proj.", ".mlp.c_proj.")),
    ),
)
"""In the order in which they are tried: those that serving engines know best come first."""
