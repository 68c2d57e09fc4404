"""The model of a recipe once more, written from its formulas: one head, one position, one number format (float64).

Slow and plain on purpose. It shares nothing with the code under test but the names of the weights.
"""

import math

import torch


def reference_logits(weights, recipe, ids, differentiable=False):
    """Logits (T, vocabulary) of one sequence of token ids (T), in float64."""
    model = recipe.model
    weights = {name: (tensor if differentiable else tensor.detach()).double() for name, tensor in weights.items()}
    x = weights["model.embed_tokens.weight"][ids]
    for index, shape in enumerate(model.layers()):
        block = {
            name.removeprefix(f"model.layers.{index}."): tensor
            for name, tensor in weights.items()
            if name.startswith(f"model.layers.{index}.")
        }
        x = x + attention(rms_norm(x, block["input_layernorm.weight"], model.norm_eps), block, shape, model)
        normed = rms_norm(x, block["post_attention_layernorm.weight"], model.norm_eps)
        x = x + (mixture(normed, block, model) if shape.ffn == "moe" else ffn(normed, block, shape.ffn))
    x = rms_norm(x, weights["model.norm.weight"], model.norm_eps)
    head = weights["model.embed_tokens.weight" if model.tie_embeddings else "lm_head.weight"]
    return x @ head.T


def rms_norm(x, weight, epsilon):
    """x over the root of the mean of its squares, times a weight."""
    return x / (x.square().mean(dim=-1, keepdim=True) + epsilon).sqrt() * weight


def rope(x, theta):
    """Pairs (i, i + E/2) of x (T, E) as complex numbers, turned by position times theta^(-2i/E)."""
    steps, size = x.shape
    pairs = torch.complex(x[:, : size // 2], x[:, size // 2 :])
    angles = torch.arange(steps)[:, None] * theta ** (-2 * torch.arange(size // 2).double() / size)
    turned = pairs * torch.polar(torch.ones_like(angles), angles)
    return torch.cat([turned.real, turned.imag], dim=-1)


def attention(x, block, shape, model):
    """Head by head and position by position: a mean of the values so far, weighted by softmax(q k / sqrt(E))."""
    steps, size = len(x), shape.head_dim
    group = shape.n_heads // shape.n_kv_heads
    heads = []
    for head in range(shape.n_heads):
        mine, shared = slice(head * size, (head + 1) * size), head // group
        shared = slice(shared * size, (shared + 1) * size)
        query = x @ block["self_attn.q_proj.weight"][mine].T
        key = x @ block["self_attn.k_proj.weight"][shared].T
        value = x @ block["self_attn.v_proj.weight"][shared].T
        if model.qk_norm:
            query = rms_norm(query, block["self_attn.q_norm.weight"], model.norm_eps)
            key = rms_norm(key, block["self_attn.k_norm.weight"], model.norm_eps)
        query, key = rope(query, model.rope_theta), rope(key, model.rope_theta)
        rows = []
        for t in range(steps):
            scores = (key[: t + 1] @ query[t]) / math.sqrt(size)
            rows.append(scores.softmax(dim=0) @ value[: t + 1])
        heads.append(torch.stack(rows))
    return torch.cat(heads, dim=-1) @ block["self_attn.o_proj.weight"].T


def ffn(x, block, kind):
    """swiglu, gelu (exact) or relu2."""
    up = x @ block["mlp.up_proj.weight"].T
    if kind == "swiglu":
        gate = x @ block["mlp.gate_proj.weight"].T
        hidden = gate / (1 + (-gate).exp()) * up
    elif kind == "gelu":
        hidden = up * 0.5 * (1 + torch.erf(up / math.sqrt(2)))
    else:
        hidden = up.clamp(min=0) ** 2
    return hidden @ block["mlp.down_proj.weight"].T


def mixture(x, block, model):
    """Token by token and expert by expert: the likeliest experts, weighted by their share of those probabilities."""
    rows = []
    for token in x:
        odds = (block["mlp.gate.weight"] @ token).exp()
        chosen = sorted(range(model.n_experts), key=lambda expert: -odds[expert])[: model.n_active_experts]
        row = torch.zeros_like(token)
        for expert in chosen:
            gate, up = (block["mlp.experts.gate_up_proj"][expert] @ token).chunk(2)
            hidden = gate / (1 + (-gate).exp()) * up
            row += odds[expert] / sum(odds[chosen]) * (block["mlp.experts.down_proj"][expert] @ hidden)
        rows.append(row)
    return torch.stack(rows)
