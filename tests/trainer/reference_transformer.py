"""The model of a recipe once more, written from its formulas: one head, one position, one number format (float64).

Slow and plain on purpose. It shares nothing with the code under test but the names of the weights.
"""

import math

import torch


def reference_logits(weights, recipe, ids, differentiable=False):
    """Logits (T, vocabulary) of one sequence of token ids (T), in float64."""
    model, steps = recipe.model, len(ids)
    weights = {name: (tensor if differentiable else tensor.detach()).double() for name, tensor in weights.items()}
    x = weights["model.embed_tokens.weight"][ids]
    if model.positions == "learned":
        x = x + weights["model.embed_positions.weight"][:steps]
    x = x * model.embedding_multiplier
    if model.positions == "sinusoidal":
        x = x + sinusoids(steps, model.d_model)
    for index, shape in enumerate(model.layers()):
        prefix = f"model.layers.{index}."
        block = {name.removeprefix(prefix): tensor for name, tensor in weights.items() if name.startswith(prefix)}
        x = transformer_block(x, block, shape, recipe)
    x = norm(x, weights, "model.norm", model)
    head = weights["model.embed_tokens.weight" if model.tie_embeddings else "lm_head.weight"]
    return bent(model.logit_multiplier * (x @ head.T), model.logit_softcap)


def transformer_block(x, block, shape, recipe):
    """Attention and feed-forward part, with norms where the placement says."""
    model, placement = recipe.model, recipe.model.norm_placement
    before_ffn = "pre_feedforward_layernorm" if placement == "sandwich" else "post_attention_layernorm"

    def attend(x):
        read = x if placement == "post" else norm(x, block, "input_layernorm", model)
        written = attention(read, block, shape, recipe)
        return written if placement == "pre" else norm(written, block, "post_attention_layernorm", model)

    def think(x):
        name = "input_layernorm" if model.parallel_block else before_ffn
        read = x if placement == "post" else norm(x, block, name, model)
        written = mixture(read, block, model) if shape.ffn == "moe" else ffn(read, block, "mlp.", shape.ffn)
        return written if placement == "pre" else norm(written, block, "post_feedforward_layernorm", model)

    scale, times = model.residual_multiplier, shape.recursion
    if model.parallel_block:
        x = x + scale * attend(x) + scale * think(x)
        times -= 1
    else:
        x = x + scale * attend(x)
    for _ in range(times):
        x = x + scale * think(x)
    return x


def bent(x, cap):
    """Kept between -cap and cap."""
    return cap * torch.tanh(x / cap) if cap else x


def norm(x, weights, name, model):
    """The recipe's norm, with the weights of that name."""
    if model.norm == "layernorm":
        x = x - x.mean(dim=-1, keepdim=True)
    return rms_norm(x, weights[f"{name}.weight"], model.norm_eps) + weights.get(f"{name}.bias", 0.0)


def rms_norm(x, weight, epsilon):
    """x over the root of the mean of its squares, times a weight."""
    return x / (x.square().mean(dim=-1, keepdim=True) + epsilon).sqrt() * weight


def linear(x, block, name):
    """A matrix, and a bias where there is one."""
    return x @ block[f"{name}.weight"].T + block.get(f"{name}.bias", 0.0)


def sinusoids(steps, size):
    """Entry by entry: sines of falling frequency, then their cosines."""
    table = torch.zeros(steps, size, dtype=torch.float64)
    half = (size + 1) // 2
    for position in range(steps):
        for entry in range(size):
            angle = position / 10_000 ** (2 * (entry % half) / size)
            table[position, entry] = math.sin(angle) if entry < half else math.cos(angle)
    return table


def frequencies(turned, recipe):
    """How fast each pair turns, and by how much the turned parts grow (YaRN, arXiv 2309.00071, equations 17 to 22)."""
    model, length = recipe.model, recipe.data.sequence_length
    plain = [model.rope_theta ** (-2 * pair / turned) for pair in range(turned // 2)]
    factor = model.rope_factor
    if model.rope_scaling == "none":
        return plain, 1.0
    if model.rope_scaling == "linear":
        return [frequency / factor for frequency in plain], 1.0
    original = max(1, round(length / factor))

    def pair_of(rotations):  # the pair that turns so many times within the original length
        return turned * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(model.rope_theta))

    low, high = max(math.floor(pair_of(32)), 0), min(math.ceil(pair_of(1)), turned - 1)
    high = high if high != low else high + 0.001
    mixed = []
    for pair, frequency in enumerate(plain):
        stretched = min(max((pair - low) / (high - low), 0.0), 1.0)
        mixed.append(stretched * frequency / factor + (1 - stretched) * frequency)
    return mixed, 0.1 * math.log(factor) + 1.0


def rope(x, recipe):
    """Pairs (i, i + R/2) of the first R of x (T, E) as complex numbers, turned by position times frequency."""
    steps, size = x.shape
    turned = int(size * recipe.model.rope_fraction)
    speeds, growth = frequencies(turned, recipe)
    pairs = torch.complex(x[:, : turned // 2], x[:, turned // 2 : turned])
    angles = torch.arange(steps)[:, None] * torch.tensor(speeds, dtype=torch.float64)
    rotated = pairs * torch.polar(torch.full_like(angles, growth), angles)
    return torch.cat([rotated.real, rotated.imag, x[:, turned:]], dim=-1)


def slope(head, heads):
    """ALiBi's, as its authors' code has it: of a power of two, and between them those of the next one."""
    power = 1
    while 2 * power <= heads:
        power *= 2
    if head < power:
        return 2.0 ** (-8 * (head + 1) / power)
    return 2.0 ** (-8 * (2 * (head - power) + 1) / (2 * power))


def attention(x, block, shape, recipe):
    """Head by head and position by position: a mean of the values that are seen, weighted by softmax(q k / sqrt(E))."""
    model, steps, size = recipe.model, len(x), shape.head_dim
    group = shape.n_heads // shape.n_kv_heads
    queries, keys = linear(x, block, "self_attn.q_proj"), linear(x, block, "self_attn.k_proj")
    values = linear(x, block, "self_attn.v_proj")
    if model.qk_norm == "full":
        queries = rms_norm(queries, block["self_attn.q_norm.weight"], model.norm_eps)
        keys = rms_norm(keys, block["self_attn.k_norm.weight"], model.norm_eps)
    heads = []
    for head in range(shape.n_heads):
        mine, shared = slice(head * size, (head + 1) * size), head // group
        shared = slice(shared * size, (shared + 1) * size)
        query, key, value = queries[:, mine], keys[:, shared], values[:, shared]
        if model.qk_norm in (True, "head"):
            query = rms_norm(query, block["self_attn.q_norm.weight"], model.norm_eps)
            key = rms_norm(key, block["self_attn.k_norm.weight"], model.norm_eps)
        if shape.positions == "rope":
            query, key = rope(query, recipe), rope(key, recipe)
        rows = []
        for t in range(steps):
            first = max(0, t + 1 - model.window) if shape.attention == "sliding" else 0
            scores = bent((key[first : t + 1] @ query[t]) / math.sqrt(size), model.attention_softcap)
            if shape.positions == "alibi":
                distances = torch.arange(t - first, -1, -1, dtype=torch.float64)
                scores = scores - slope(head, shape.n_heads) * distances
            rows.append(scores.softmax(dim=0) @ value[first : t + 1])
        heads.append(torch.stack(rows))
    return linear(torch.cat(heads, dim=-1), block, "self_attn.o_proj")


def silu(x):
    return x / (1 + (-x).exp())


def gelu(x):
    return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def relu(x):
    return x.clamp(min=0)


def ffn(x, block, prefix, kind):
    """A feed-forward part: gated kinds multiply, the others do not."""
    up = linear(x, block, f"{prefix}up_proj")
    if kind in ("swiglu", "geglu", "reglu"):
        bend = {"swiglu": silu, "geglu": gelu, "reglu": relu}[kind]
        hidden = bend(linear(x, block, f"{prefix}gate_proj")) * up
    else:
        hidden = {"gelu": gelu, "silu": silu, "relu2": lambda x: relu(x) ** 2}[kind](up)
    return linear(hidden, block, f"{prefix}down_proj")


def mixture(x, block, model):
    """Token by token and expert by expert: the likeliest experts, weighted by their share of those probabilities, and
    the shared ones. With a bias, the choice is by probability and bias."""
    rows = []
    for token in x:
        odds = (block["mlp.gate.weight"] @ token).exp()
        liked = odds / odds.sum() + block.get("mlp.gate.e_score_correction_bias", 0.0)
        chosen = sorted(range(model.n_experts), key=lambda expert: -liked[expert])[: model.n_active_experts]
        row = torch.zeros_like(token)
        for expert in chosen:
            gate, up = (block["mlp.experts.gate_up_proj"][expert] @ token).chunk(2)
            row += odds[expert] / sum(odds[chosen]) * (block["mlp.experts.down_proj"][expert] @ (silu(gate) * up))
        rows.append(row)
    output = torch.stack(rows)
    return output + ffn(x, block, "mlp.shared_experts.", "swiglu") if model.n_shared_experts else output
