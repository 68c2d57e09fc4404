"""The shape of a recipe's model: a decoder-only transformer whose blocks may differ from each other."""

from __future__ import annotations

from typing import Annotated, Any, Literal, NamedTuple

from pydantic import Field

from trainer.recipe.base import Positive, Section

Attention = Literal["full", "sliding"]
Positions = Literal["rope", "none", "alibi", "learned", "sinusoidal"]
LayerPositions = Literal["rope", "none", "alibi"]

PerLayer = Positive | list[Positive]
ZeroOrMore = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(ge=0, lt=1)]

ABSOLUTE = ("learned", "sinusoidal")
"""Positions of the whole model, which are added to the embeddings."""

GATED = ("swiglu", "geglu", "reglu", "moe")
"""Kinds of feed-forward part with a third matrix, the gate."""


class Layer(NamedTuple):
    """The shape of one transformer block."""

    n_heads: int
    n_kv_heads: int
    head_dim: int
    ffn: str
    ffn_dim: int
    attention: str = "full"
    positions: str = "rope"
    recursion: int = 1


class Model(Section):
    """A decoder-only transformer. Where a field takes a list, it gives one value per layer."""

    d_model: Positive = Field(256, description="width of the residual stream")
    n_layers: int = Field(6, gt=0, le=1024, description="blocks")

    n_heads: PerLayer = Field(4, description="query heads")
    n_kv_heads: PerLayer | None = Field(None, description="key and value heads; as many as query heads when absent")
    head_dim: Positive | None = Field(None, description="d_model / n_heads when absent")
    attention: Attention | list[Attention] = Field(
        "full", description="what a token attends to: all tokens before it, or the last `window` of them"
    )
    window: int = Field(128, ge=2, description="tokens that a sliding layer attends to, the present one included")
    qk_norm: bool | Literal["head", "full"] = Field(
        True, description="RMSNorm of queries and keys: of each head (true or head), or of all heads at once (full)"
    )
    attention_softcap: ZeroOrMore = Field(
        0.0, description="attention scores are bent to stay below it, c * tanh(score / c); 0 leaves them"
    )

    positions: Positions | list[LayerPositions] = Field(
        "rope", description="how a token knows its place; in a list, rope, alibi or none for each layer"
    )
    rope_theta: float = Field(10_000.0, gt=0, description="base of the rotary frequencies")
    rope_fraction: float = Field(1.0, gt=0, le=1, description="share of each head that rotary positions turn")
    rope_scaling: Literal["none", "linear", "yarn"] = Field(
        "none", description="how rotary positions are stretched to a longer context"
    )
    rope_factor: float = Field(
        1.0, ge=1, description="how many times longer than before the context is, with rope_scaling"
    )

    ffn: Literal["swiglu", "geglu", "reglu", "gelu", "silu", "relu2", "moe"] = Field(
        "swiglu", description="kind of the feed-forward part; moe is a mixture of experts, each a swiglu"
    )
    ffn_dim: PerLayer | None = Field(
        None,
        description="hidden units, of each expert in moe; "
        "8/3 d_model for gated kinds and moe, otherwise 4 d_model, to a multiple of 32, when absent",
    )
    recursion: PerLayer = Field(
        1, description="times that the feed-forward part is run on its own result: depth without parameters"
    )

    n_experts: int = Field(0, ge=0, description="experts of each mixture; 0 without one")
    n_active_experts: int = Field(
        2, gt=0, description="experts that each token uses; with 1, nothing but balance_loss trains the router"
    )
    n_shared_experts: int = Field(0, ge=0, description="experts that every token uses besides, as one swiglu")
    n_dense_layers: int = Field(0, ge=0, description="first layers that have one swiglu in place of a mixture")
    dense_ffn_dim: Positive | None = Field(
        None, description="hidden units of those; those of all experts that a token uses, when absent"
    )
    balance: Literal["loss", "bias"] = Field(
        "loss", description="what keeps experts evenly used: a loss, or a bias on the choice that is not trained"
    )
    balance_loss: float = Field(
        0.01, ge=0, description="weight of the load-balancing loss, which training adds to its own"
    )
    balance_rate: float = Field(1e-3, ge=0, description="how far the bias moves at each step, with balance bias")
    router_z_loss: float = Field(0.0, ge=0, description="weight of the squared log-sum of the router's logits")

    norm: Literal["rmsnorm", "layernorm"] = Field("rmsnorm", description="kind of norm")
    norm_placement: Literal["pre", "post", "sandwich"] = Field(
        "pre", description="norm before attention and feed-forward part, on what they add to the stream, or both"
    )
    norm_eps: float = Field(1e-6, gt=0, description="added to the mean square or variance in norms")
    parallel_block: bool = Field(False, description="attention and feed-forward part read the same, side by side")
    bias: Literal["none", "qkv", "all"] = Field(
        "none",
        description="which linear maps add a bias: none, queries, keys and values, or all but head, routers and "
        "experts, LayerNorms too",
    )
    dropout: Share = Field(0.0, description="share of the embeddings' and branches' values that training zeroes")
    attention_dropout: Share = Field(0.0, description="share of the attention weights that training zeroes")

    tie_embeddings: bool = Field(True, description="one matrix for input and output embeddings")
    embedding_multiplier: float = Field(1.0, gt=0, description="on what the embeddings give, but not on sinusoids")
    residual_multiplier: float = Field(1.0, gt=0, description="on what each branch adds to the stream")
    logit_multiplier: float = Field(1.0, gt=0, description="on the logits, before they are bent")
    logit_softcap: ZeroOrMore = Field(0.0, description="logits are bent to stay below it, as scores are; 0 leaves them")
    init_std: float = Field(0.02, gt=0, description="standard deviation of the initial weights")
    zero_init: bool = Field(False, description="what writes to the stream begins as zero: every block as identity")

    def layers(self) -> list[Layer]:
        """The shape of every block; call `incoherence` first, lists of the wrong length raise ValueError here."""
        heads = _per_layer(self.n_heads, self.n_layers)
        kv_heads = heads if self.n_kv_heads is None else _per_layer(self.n_kv_heads, self.n_layers)
        widths = _per_layer(self.ffn_dim or self.default_ffn_dim(), self.n_layers)
        per_layer = zip(
            heads,
            kv_heads,
            widths,
            _per_layer(self.attention, self.n_layers),
            _per_layer("none" if self.positions in ABSOLUTE else self.positions, self.n_layers),
            _per_layer(self.recursion, self.n_layers),
            strict=True,
        )
        return [
            Layer(
                n_heads=h,
                n_kv_heads=kv,
                head_dim=self.head_dim or self.d_model // h,
                ffn="swiglu" if dense else self.ffn,
                ffn_dim=self._dense_ffn_dim(width) if dense else width,
                attention=attention,
                positions=positions,
                recursion=recursion,
            )
            for index, (h, kv, width, attention, positions, recursion) in enumerate(per_layer)
            for dense in [self.ffn == "moe" and index < self.n_dense_layers]
        ]

    def default_ffn_dim(self) -> int:
        """Hidden units of a feed-forward part, or of each expert, where the recipe does not say."""
        width = (8 / 3 if self.ffn in GATED else 4) * self.d_model
        return max(32, round(width / 32) * 32)

    def _dense_ffn_dim(self, expert: int) -> int:
        return self.dense_ffn_dim or expert * (self.n_active_experts + self.n_shared_experts)


PER_LAYER = ("n_heads", "n_kv_heads", "attention", "positions", "ffn_dim", "recursion")
"""Fields that take a list with one value per layer."""


def incoherent_model(model: Model) -> str | None:
    """Why the fields of a model do not go together, or None."""
    for field in PER_LAYER:
        value = getattr(model, field)
        if isinstance(value, list) and len(value) != model.n_layers:
            return f"model.{field} has {len(value)} items for {model.n_layers} layers"
    for index, layer in enumerate(model.layers()):
        if model.head_dim is None and model.d_model % layer.n_heads:
            return f"model.d_model = {model.d_model} is no multiple of n_heads = {layer.n_heads} (set head_dim)"
        if layer.n_heads % layer.n_kv_heads:
            return f"layer {index}: n_heads = {layer.n_heads} is no multiple of n_kv_heads = {layer.n_kv_heads}"
        if layer.positions == "rope" and (words := _incoherent_pairs(layer.head_dim, model.rope_fraction)):
            return f"layer {index}: {words}"
    if model.head_dim is None and len({layer.head_dim for layer in model.layers()}) > 1:
        return "model.n_heads differs between layers, so model.head_dim must be given"
    return _incoherent_stretch(model) or _incoherent_experts(model)


def _incoherent_pairs(head_dim: int, fraction: float) -> str | None:
    turned = int(head_dim * fraction)
    if fraction == 1.0:
        return f"head_dim = {head_dim} is odd, rotary positions need pairs" if turned % 2 else None
    if turned % 2 or turned == 0:
        return f"rope_fraction = {fraction:g} of head_dim = {head_dim} is {turned}, rotary positions need pairs"
    return None


def _incoherent_stretch(model: Model) -> str | None:
    if model.rope_scaling == "none" and model.rope_factor != 1.0:
        return f"model.rope_factor = {model.rope_factor:g} goes with rope_scaling linear or yarn, not none"
    if model.rope_scaling == "yarn" and model.rope_theta <= 1.0:
        return f"model.rope_theta = {model.rope_theta:g} is too small for rope_scaling yarn, which takes more than 1"
    return None


def _incoherent_experts(model: Model) -> str | None:
    if model.ffn != "moe":
        for field in ("n_experts", "n_shared_experts", "n_dense_layers"):
            if value := getattr(model, field):
                return f"model.{field} = {value} goes with ffn 'moe', not '{model.ffn}'"
        return None
    if model.n_experts < 2:
        return f"model.n_experts = {model.n_experts} is too few for ffn 'moe', which takes at least 2"
    if model.n_active_experts > model.n_experts:
        return f"model.n_active_experts = {model.n_active_experts} is more than n_experts = {model.n_experts}"
    if model.n_dense_layers >= model.n_layers:
        return f"model.n_dense_layers = {model.n_dense_layers} leaves no mixture in n_layers = {model.n_layers}"
    return None


def _per_layer(value: Any, n_layers: int) -> list[Any]:
    return value if isinstance(value, list) else [value] * n_layers
