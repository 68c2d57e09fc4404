"""The typed recipe: everything that decides what a training run does, and nothing else.

These models are the one definition of what a recipe may say: field types and ranges stand at the fields, what ties
fields together in `incoherence`. The space language, its error messages and its documentation follow from both.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, NamedTuple, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from search_spaces.errors import nearest

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
"""Names that become folder names, table columns and parts of metric names."""

SPECIAL_TOKENS = ("<pad>", "<s>", "</s>")
"""Ids 0, 1 and 2 of every tokenizer that evolm trains."""

SMALLEST_VOCABULARY = 256 + len(SPECIAL_TOKENS)

Positive = Annotated[int, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]


class Section(BaseModel):
    """A frozen part of a recipe that refuses unknown keys and silent conversions."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class Source(Section):
    """Where the documents of one domain come from."""

    path: str | list[str] = Field(
        description="a file, folder or glob, or several: text, .jsonl, .parquet, .gz, .zst; python:stdlib, python:docs"
    )
    document: Literal["auto", "file", "line", "passage"] = Field(
        "auto", description="what a document is in plain text: a file, a line, or a passage between blank lines"
    )


class Tokenizer(Section):
    """Byte-level byte-pair encoding, trained on equal shares of every source's training text."""

    kind: Literal["bpe"] = Field("bpe", description="byte-level byte-pair encoding")
    vocab_size: int = Field(4096, ge=SMALLEST_VOCABULARY, le=2**20, description="entries, special tokens included")


class Quality(Section):
    """Which training documents the loader draws. Held-out text is never filtered."""

    min_chars: int = Field(0, ge=0, description="shorter documents are left out")
    max_symbol_ratio: Fraction = Field(
        1.0,
        description="documents with a larger share of characters that are neither alphanumeric nor blank are left out",
    )


class HeldOut(Section):
    """What is kept from training: chosen by content hash, so that a document is always on the same side."""

    validation: float = Field(0.05, gt=0, le=0.4, description="share of the documents that the search is scored on")
    test: float = Field(0.05, gt=0, le=0.4, description="share of the documents that only promotion reads")
    max_bytes: int = Field(2**17, ge=1024, description="bytes of held-out text that are scored per domain and split")


class Data(Section):
    """The corpus: its sources, in which proportion they are drawn, and how text becomes sequences of tokens."""

    sources: dict[str, Source] = Field(min_length=1, max_length=256)
    mix: dict[str, Annotated[float, Field(ge=0)]] | None = Field(
        None, description="weight of each source in training tokens; proportional to their size when absent"
    )
    tokenizer: Tokenizer = Tokenizer()
    quality: Quality = Quality()
    sequence_length: int = Field(256, ge=8, le=2**20, description="tokens per training sequence")
    held_out: HeldOut = HeldOut()


class Layer(NamedTuple):
    """The shape of one transformer block."""

    n_heads: int
    n_kv_heads: int
    head_dim: int
    ffn: str
    ffn_dim: int


PerLayer = Positive | list[Positive]

GATED = ("swiglu", "moe")
"""Kinds of feed-forward part with a third matrix, the gate."""


class Model(Section):
    """A decoder-only transformer: pre-norm RMSNorm blocks with rotary positions. Lists give one value per layer."""

    d_model: Positive = Field(256, description="width of the residual stream")
    n_layers: int = Field(6, gt=0, le=1024, description="blocks")
    n_heads: PerLayer = Field(4, description="query heads")
    n_kv_heads: PerLayer | None = Field(None, description="key and value heads; as many as query heads when absent")
    head_dim: Positive | None = Field(None, description="d_model / n_heads when absent")
    ffn: Literal["swiglu", "gelu", "relu2", "moe"] = Field(
        "swiglu", description="kind of the feed-forward part; moe is a mixture of experts, each a swiglu"
    )
    ffn_dim: PerLayer | None = Field(
        None,
        description="hidden units, of each expert in moe; "
        "8/3 d_model for swiglu and moe, otherwise 4 d_model, to a multiple of 32, when absent",
    )
    n_experts: int = Field(0, ge=0, description="experts of each mixture; 0 without one")
    n_active_experts: int = Field(
        2, gt=0, description="experts that each token uses; with 1, nothing but balance_loss trains the router"
    )
    balance_loss: float = Field(
        0.01, ge=0, description="weight of the load-balancing loss, which training adds to its own"
    )
    qk_norm: bool = Field(True, description="RMSNorm of each query and key head")
    tie_embeddings: bool = Field(True, description="one matrix for input and output embeddings")
    rope_theta: float = Field(10_000.0, gt=0, description="base of the rotary frequencies")
    norm_eps: float = Field(1e-6, gt=0, description="added to the mean square in RMSNorm")
    init_std: float = Field(0.02, gt=0, description="standard deviation of the initial weights")

    def layers(self) -> list[Layer]:
        """The shape of every block; call `incoherence` first, lists of the wrong length raise IndexError here."""
        heads = _per_layer(self.n_heads, self.n_layers)
        kv_heads = heads if self.n_kv_heads is None else _per_layer(self.n_kv_heads, self.n_layers)
        widths = _per_layer(self.ffn_dim or self._default_ffn_dim(), self.n_layers)
        return [
            Layer(h, kv, self.head_dim or self.d_model // h, self.ffn, width)
            for h, kv, width in zip(heads, kv_heads, widths, strict=True)
        ]

    def _default_ffn_dim(self) -> int:
        width = (8 / 3 if self.ffn in GATED else 4) * self.d_model
        return max(32, round(width / 32) * 32)


class Train(Section):
    """The optimisation: how many tokens, in which batches, with which step sizes."""

    tokens: Positive | None = Field(None, description="training tokens; a search takes them from `fidelity`")
    optimizer: Literal["adamw"] = Field("adamw", description="how gradients become steps")
    learning_rate: float = Field(1e-3, gt=0, le=1, description="its peak, after warmup")
    beta1: float = Field(0.9, ge=0, lt=1, description="decay of the mean of gradients")
    beta2: float = Field(0.95, ge=0, lt=1, description="decay of the mean of squared gradients")
    adam_eps: float = Field(1e-8, gt=0, description="added to the root of the mean square")
    weight_decay: float = Field(0.1, ge=0, description="decoupled, on matrices only")
    grad_clip: float = Field(1.0, gt=0, description="largest norm of the gradient")
    batch_tokens: Positive = Field(16_384, description="tokens per optimiser step")
    micro_batch_tokens: Positive | None = Field(
        None, description="tokens per forward pass; chosen by evolm when absent; changes memory, never results"
    )
    schedule: Literal["wsd", "constant"] = Field("wsd", description="warmup-stable-decay, or constant after warmup")
    warmup_steps: int = Field(40, ge=0, description="steps over which the learning rate rises from zero")
    decay_fraction: float = Field(0.2, gt=0, le=1, description="share of the tokens over which wsd decays to zero")
    precision: Literal["fp32", "bf16"] = Field("fp32", description="dtype of the matrix products; weights stay fp32")
    seed: int = Field(0, ge=0, lt=2**31, description="seed of initial weights and data order")


class Recipe(Section):
    """A complete training recipe."""

    data: Data
    model: Model = Model()
    train: Train = Train()

    @model_validator(mode="after")
    def _coherent(self) -> Self:
        if words := incoherence(self):
            raise ValueError(words)
        return self


SECTIONS = ("data", "model", "train")


def incoherence(recipe: Recipe) -> str | None:
    """Why fields that are each legal do not make a recipe together, or None. Genomes that do so are never launched."""
    model, data, train = recipe.model, recipe.data, recipe.train
    for field in ("n_heads", "n_kv_heads", "ffn_dim"):
        value = getattr(model, field)
        if isinstance(value, list) and len(value) != model.n_layers:
            return f"model.{field} has {len(value)} items for {model.n_layers} layers"
    for index, layer in enumerate(model.layers()):
        if model.head_dim is None and model.d_model % layer.n_heads:
            return f"model.d_model = {model.d_model} is no multiple of n_heads = {layer.n_heads} (set head_dim)"
        if layer.n_heads % layer.n_kv_heads:
            return f"layer {index}: n_heads = {layer.n_heads} is no multiple of n_kv_heads = {layer.n_kv_heads}"
        if layer.head_dim % 2:
            return f"layer {index}: head_dim = {layer.head_dim} is odd, rotary positions need pairs"
    if model.head_dim is None and len({layer.head_dim for layer in model.layers()}) > 1:
        return "model.n_heads differs between layers, so model.head_dim must be given"
    if words := _incoherent_experts(model):
        return words
    if data.mix is not None:
        if strange := sorted(set(data.mix) - set(data.sources)):
            close = nearest(strange[0], data.sources)
            advice = f"did you mean '{close}'?" if close else f"there are {', '.join(data.sources)}"
            return f"data.mix names '{strange[0]}', which is no source; {advice}"
        if forgotten := sorted(set(data.sources) - set(data.mix)):
            return f"data.mix gives no weight to source '{forgotten[0]}'"
        if sum(data.mix.values()) <= 0:
            return "data.mix must give some source a positive weight"
    if train.batch_tokens < data.sequence_length:
        return f"train.batch_tokens = {train.batch_tokens} is less than one sequence ({data.sequence_length})"
    bad = [name for name in data.sources if not NAME.fullmatch(name)]
    if bad:
        return f"source name '{bad[0]}' must match {NAME.pattern}"
    return None


def _incoherent_experts(model: Model) -> str | None:
    if model.ffn != "moe":
        words = f"model.n_experts = {model.n_experts} goes with ffn 'moe', not '{model.ffn}'"
        return words if model.n_experts else None
    if model.n_experts < 2:
        return f"model.n_experts = {model.n_experts} is too few for ffn 'moe', which takes at least 2"
    if model.n_active_experts > model.n_experts:
        return f"model.n_active_experts = {model.n_active_experts} is more than n_experts = {model.n_experts}"
    return None


def defaults() -> dict[str, Any]:
    """What a recipe says where its writer says nothing, as a nested mapping; sources have none."""
    named = {name: field.default for name, field in Data.model_fields.items() if not field.is_required()}
    data = {name: value.model_dump() if isinstance(value, BaseModel) else value for name, value in named.items()}
    return {"data": data, "model": Model().model_dump(), "train": Train().model_dump()}


def _per_layer(value: int | list[int], n_layers: int) -> list[int]:
    return [value] * n_layers if isinstance(value, int) else value
