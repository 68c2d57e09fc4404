"""The optimisation of a recipe."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from trainer.recipe.base import Fraction, Positive, Section

OPTIMIZERS_OF_EXTRA = ("lion", "soap", "adan", "ademamix")
"""Optimisers that are those of the package pytorch-optimizer (the extra `optim`)."""


WITHOUT_TRUNK = ("cosine", "linear", "polynomial")
"""Schedules whose every step depends on the length of the run: a longer one has nothing in common with it."""


class Train(Section):
    """The optimisation: how many tokens, in which batches, with which step sizes."""

    tokens: Positive | None = Field(None, description="training tokens; a search takes them from `fidelity`")

    optimizer: Literal["adamw", "muon", "adafactor", "lion", "soap", "adan", "ademamix"] = Field(
        "adamw",
        description="how gradients become steps; muon is for the blocks' matrices, adamw for the rest; "
        "lion, soap, adan and ademamix need the extra `optim`",
    )
    learning_rate: float = Field(1e-3, gt=0, le=1, description="its peak, after warmup")
    beta1: float = Field(0.9, ge=0, lt=1, description="decay of the mean of gradients, where an optimiser has one")
    beta2: float = Field(0.95, ge=0, lt=1, description="decay of the mean of squared gradients, likewise")
    adam_eps: float = Field(1e-8, gt=0, description="added to the root of the mean square, likewise")
    momentum: float = Field(0.95, ge=0, lt=1, description="decay of the mean of gradients in muon")
    weight_decay: float = Field(0.1, ge=0, description="decoupled; embeddings, norms and biases are not decayed")
    grad_clip: float = Field(1.0, gt=0, description="largest norm of the gradient")

    batch_tokens: Positive = Field(16_384, description="tokens per optimiser step")
    batch_start_tokens: Positive | None = Field(
        None, description="tokens of the first steps: the batch grows from there, doubling, over batch_ramp_tokens"
    )
    batch_ramp_tokens: int = Field(0, ge=0, description="training tokens after which the batch is whole")
    sequence_start: Positive | None = Field(
        None, description="tokens that sequences are cut to at first: they grow, doubling, over sequence_ramp_tokens"
    )
    sequence_ramp_tokens: int = Field(0, ge=0, description="training tokens after which sequences are whole")

    schedule: Literal["wsd", "constant", "cosine", "linear", "polynomial"] = Field(
        "wsd",
        description="the learning rate after warmup: stable and then decaying (wsd), constant, or decaying from there "
        "on, for which every rung trains anew",
    )
    warmup_steps: int = Field(40, ge=0, description="steps over which the learning rate rises from zero")
    decay_fraction: float = Field(0.2, gt=0, le=1, description="share of the tokens over which wsd decays")
    decay_power: float = Field(2.0, gt=0, description="exponent of a polynomial schedule, (1 - p)^power")
    final_fraction: Fraction = Field(0.0, description="share of its peak that a learning rate decays to")

    z_loss: float = Field(0.0, ge=0, description="weight of the squared log-sum of the logits, in the loss")
    ema: float = Field(0.0, ge=0, lt=1, description="decay of a mean of the weights, which is scored in their place")
    skip_spikes: float = Field(
        0.0, ge=0, description="steps whose loss or gradient is so many deviations above the last ones are skipped"
    )
    teacher: str | None = Field(None, description="folder of an exported model to learn from, of the same tokenizer")
    distillation: Fraction = Field(0.5, description="share of the loss that is the distance to the teacher")
    distillation_temperature: float = Field(1.0, gt=0, description="what both models' logits are divided by for that")

    parameterization: Literal["standard", "completep"] = Field(
        "standard", description="completep: what is tuned at base_d_model and base_n_layers holds at other sizes"
    )
    base_d_model: Positive = Field(256, description="width at which completep changes nothing")
    base_n_layers: Positive = Field(6, description="depth at which completep changes nothing")

    precision: Literal["fp32", "bf16", "fp16"] = Field(
        "fp32", description="dtype of the matrix products; weights stay fp32; fp16 is for GPUs"
    )
    micro_batch_tokens: Positive | None = Field(
        None,
        description="tokens per forward pass; chosen by evolm when absent; changes memory, and results by rounding "
        "alone (with dropout, also by which values are dropped)",
    )
    gradient_checkpointing: bool = Field(
        False, description="blocks are run again in the backward pass: less memory, a third more work, same results"
    )
    attention_kernel: Literal["auto", "blocked", "sdpa", "flex", "eager"] = Field(
        "auto",
        description="how attention is computed: changes speed, results by rounding alone; blocked is for CPUs",
    )
    compile: Literal["auto", "never", "always"] = Field(
        "auto", description="torch.compile for the blocks: where it pays, never or always; changes speed"
    )
    seed: int = Field(0, ge=0, lt=2**31, description="seed of initial weights, data order and dropout")


def incoherent_train(train: Train, sequence_length: int) -> str | None:
    """Why the fields of an optimisation do not go together, or None."""
    for field in ("batch_tokens", "batch_start_tokens"):
        value = getattr(train, field)
        if value is not None and value < sequence_length:
            return f"train.{field} = {value} is less than one sequence ({sequence_length})"
    for start, ramp in (("batch_start_tokens", "batch_ramp_tokens"), ("sequence_start", "sequence_ramp_tokens")):
        if (getattr(train, start) is None) != (getattr(train, ramp) == 0):
            return f"train.{start} and train.{ramp} go together"
    if train.batch_start_tokens is not None and train.batch_start_tokens > train.batch_tokens:
        return f"train.batch_start_tokens = {train.batch_start_tokens} is more than batch_tokens = {train.batch_tokens}"
    if train.sequence_start is not None:
        pieces, rest = divmod(sequence_length, train.sequence_start)
        if rest or pieces & (pieces - 1):
            return (
                f"train.sequence_start = {train.sequence_start} must be data.sequence_length = {sequence_length} "
                "divided by a power of two"
            )
    return None
