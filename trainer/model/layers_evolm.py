"""What blocks are made of besides attention: norms, feed-forward parts and mixtures of experts.

Exported folders carry a copy of this file: it imports torch, transformers and its configuration alone.

Shapes: B sequences, T tokens, N tokens of all sequences, D = hidden_size, F = intermediate_size, X experts, of which
each token uses A.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from .configuration_evolm import EvolmConfig


def activation_dtype(x: torch.Tensor) -> torch.dtype:
    """The dtype of what is computed from x: that of autocast where it is on."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


class _RMSNorm(torch.autograd.Function):
    """RMSNorm with its gradient written down: on a CPU torch takes three times as long, operation by operation."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float, dtype: torch.dtype) -> torch.Tensor:
        x = x.float()
        scale = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        unit = x * scale
        ctx.save_for_backward(unit, scale, weight)
        return (unit * weight).to(dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        unit, scale, weight = ctx.saved_tensors
        gradient, weight = gradients[0].float(), weight.float()
        product = gradient * unit
        along = (product @ weight).div_(-unit.shape[-1]).unsqueeze(-1)
        to_x = (gradient * weight).addcmul_(unit, along).mul_(scale)
        return to_x, product.flatten(0, -2).sum(dim=0), None, None


class EvolmRMSNorm(nn.RMSNorm):
    """x / rms(x) * weight over the last dimension (Zhang and Sennrich 2019, arXiv 1910.07467, equation 4), in fp32.

    Under autocast the result is cast once, here, and not once by each of the matrices that read it.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.device.type == "cpu" and torch.is_grad_enabled() and not torch.compiler.is_compiling():
            return _RMSNorm.apply(x, self.weight, self.eps, activation_dtype(x))
        normed = functional.rms_norm(x.float(), self.normalized_shape, self.weight.float(), self.eps)
        return normed.to(activation_dtype(x))


class EvolmLayerNorm(nn.LayerNorm):
    """(x - mean(x)) / std(x) * weight, plus a bias where all maps have one (Ba et al. 2016, arXiv 1607.06450), in fp32,
    cast as `EvolmRMSNorm` casts."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        bias = None if self.bias is None else self.bias.float()
        normed = functional.layer_norm(x.float(), self.normalized_shape, self.weight.float(), bias, self.eps)
        return normed.to(activation_dtype(x))


def norm_of(config: EvolmConfig) -> EvolmRMSNorm | EvolmLayerNorm:
    """A norm of the residual stream."""
    if config.norm == "layernorm":
        return EvolmLayerNorm(config.hidden_size, eps=config.rms_norm_eps, bias=config.bias == "all")
    return EvolmRMSNorm(config.hidden_size, eps=config.rms_norm_eps)


def relu2(x: torch.Tensor) -> torch.Tensor:
    """max(x, 0)^2 (So et al. 2021, arXiv 2109.08668)."""
    return functional.relu(x).square()


Activation = Callable[[torch.Tensor], torch.Tensor]

GATED: dict[str, Activation] = {"swiglu": functional.silu, "geglu": functional.gelu, "reglu": functional.relu}
PLAIN: dict[str, Activation] = {"gelu": functional.gelu, "silu": functional.silu, "relu2": relu2}


class EvolmMLP(nn.Module):
    """The position-wise part of a block: (B, T, D) -> (B, T, D) through F hidden units.

    swiglu, geglu, reglu: down(f(gate x) * up x) with f silu, gelu (exact) or relu (Shazeer 2020, arXiv 2002.05202,
    equations 5 and 6); gelu, silu, relu2: down(f(up x)).
    """

    def __init__(self, config: EvolmConfig, ffn: str, width: int) -> None:
        super().__init__()
        size, bias = config.hidden_size, config.bias == "all"
        self.gated = ffn in GATED
        self.activation = GATED[ffn] if self.gated else PLAIN[ffn]
        if self.gated:
            self.gate_proj = nn.Linear(size, width, bias=bias)
        self.up_proj = nn.Linear(size, width, bias=bias)
        self.down_proj = nn.Linear(width, size, bias=bias)
        self.down_proj.writes_to_residual = True

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.gated:
            return self.down_proj(self.activation(self.gate_proj(x)) * self.up_proj(x))
        return self.down_proj(self.activation(self.up_proj(x)))


class EvolmRouter(nn.Module):
    """How much each token likes each expert: (B, T, D) -> logits (B, T, X), in fp32 whatever the precision around.

    With `expert_bias`, it holds what is added to the probabilities when experts are chosen, and then only (DeepSeek-V3,
    arXiv 2412.19437, section 2.1.2): it is not trained but moved between steps.
    """

    e_score_correction_bias: torch.Tensor | None

    def __init__(self, config: EvolmConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.hidden_size))
        bias = torch.zeros(config.num_experts, dtype=torch.float32) if config.expert_bias else None
        self.register_buffer("e_score_correction_bias", bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return functional.linear(x.float(), self.weight.float())


class EvolmExperts(nn.Module):
    """X swiglu networks of F hidden units, their weights stacked; the gate's rows come before those of `up`.

    `loads` counts how many tokens used each expert in training since the model was made, `balanced` is what it was when
    the router's bias was last moved.
    """

    loads: torch.Tensor
    balanced: torch.Tensor

    def __init__(self, config: EvolmConfig, width: int) -> None:
        super().__init__()
        self.num_experts = config.num_experts
        self.gate_up_proj = nn.Parameter(torch.empty(self.num_experts, 2 * width, config.hidden_size))
        self.down_proj = nn.Parameter(torch.empty(self.num_experts, config.hidden_size, width))
        for name in ("loads", "balanced"):
            self.register_buffer(name, torch.zeros(self.num_experts, dtype=torch.int64), persistent=False)

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """Tokens (N, D), the experts of each (N, A) and their weights (N, A) -> weighted sums (N, D).

        Tokens are sorted by expert, so that each expert is one product of matrices; none is left out.
        """
        count, active = top_k_index.shape
        chosen = top_k_index.flatten()
        order = chosen.argsort(stable=True)
        loads = chosen.bincount(minlength=self.num_experts)
        if self.training:
            self.loads += loads
        parts = hidden_states.index_select(0, order // active).split(loads.tolist())
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
    """A mixture of experts: every token through its A likeliest experts, weighted by their probabilities made to sum to
    one (Mixtral, arXiv 2401.04088, section 2.1), and through the shared experts, which are one swiglu
    (DeepSeekMoE, arXiv 2401.06066, section 3.2)."""

    def __init__(self, config: EvolmConfig, layer: Any) -> None:
        super().__init__()
        self.top_k = config.num_experts_per_tok
        self.gate = EvolmRouter(config)
        self.experts = EvolmExperts(config, layer.intermediate_size)
        shared = config.num_shared_experts * layer.intermediate_size
        self.shared_experts = EvolmMLP(config, "swiglu", shared) if shared else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, T, D) -> (B, T, D)."""
        probabilities = self.gate(x).flatten(0, 1).softmax(dim=-1)
        bias = self.gate.e_score_correction_bias
        if bias is None:
            weights, chosen = probabilities.topk(self.top_k)
        else:
            chosen = (probabilities.detach() + bias).topk(self.top_k).indices
            weights = probabilities.gather(-1, chosen)
        weights = weights / weights.sum(dim=-1, keepdim=True)
        output = self.experts(x.flatten(0, 1), chosen, weights).view_as(x)
        return output if self.shared_experts is None else output + self.shared_experts(x)


__all__ = [
    "EvolmExperts",
    "EvolmLayerNorm",
    "EvolmMLP",
    "EvolmMixture",
    "EvolmRMSNorm",
    "EvolmRouter",
    "activation_dtype",
    "norm_of",
]
