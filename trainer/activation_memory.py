"""What autograd keeps between the forward and the backward pass, operation by operation. No torch.

The tests sum the tensors that are really saved on a CPU. Elsewhere it is not more: kernels for GPUs keep no
probabilities.
"""

from __future__ import annotations

from trainer.attention_kernels import attention_kernel, kept_positions
from trainer.recipe import Layer, Model, Recipe

KEPT_PER_UNIT = {"swiglu": 4, "geglu": 4, "reglu": 3, "gelu": 2, "silu": 2, "relu2": 2}
"""Tensors kept of each hidden unit: what goes into the activation, what comes out, the other factor and the product;
relu keeps its result alone."""


def activation_bytes_per_token(recipe: Recipe, size: int) -> float:
    """Bytes that autograd keeps per token between forward and backward, with activations of `size` bytes.

    Logits are not among them: the loss turns them into gradients a few rows at a time. With gradient checkpointing,
    what each block reads, and the activations of one block.
    """
    model = recipe.model
    blocks = [_block(layer, recipe, size) for layer in model.layers()]
    within = 4 * model.d_model * len(blocks) + max(blocks) if recipe.train.gradient_checkpointing else sum(blocks)
    embeddings = 4 * model.d_model if model.dropout else 0  # what its dropout multiplies by
    # The last norm, whose output is gone when the loss is there, and the gradient of the hidden state.
    return embeddings + within + _norm(model) + model.d_model * size


def mask_bytes(recipe: Recipe, size: int) -> int:
    """Bytes of the masks that attention is given, once for each kind of layer whatever the batch."""
    length, kernel, kinds = recipe.data.sequence_length, attention_kernel(recipe, "cpu"), set()
    for layer in recipe.model.layers():
        masked = layer.attention == "sliding" and kernel != "blocked"
        if masked or layer.positions == "alibi" or kernel == "eager":
            kinds.add((layer.attention, layer.n_heads if layer.positions == "alibi" else 1))
    return sum(heads * length * length * size for _, heads in kinds)


def _norm(model: Model) -> int:
    """A norm but for its output: in fp32 the input, or of RMSNorm what it is divided down to; its statistics."""
    return 4 * model.d_model + (8 if model.norm == "layernorm" else 4)


def _block(layer: Layer, recipe: Recipe, size: int) -> float:
    model = recipe.model
    width = model.d_model
    before = width * size + (_norm(model) if model.norm_placement != "post" else 0)  # what is read by matrices
    after = (_norm(model) if model.norm_placement != "pre" else 0) + (width * size if model.dropout else 0)
    branches, runs = 1 + layer.recursion, layer.recursion
    read = branches - int(model.parallel_block)  # a parallel block reads both from the same
    return (
        read * before + branches * after + _attention(layer, recipe, size) + runs * _feed_forward(layer, recipe, size)
    )


def _attention(layer: Layer, recipe: Recipe, size: int) -> float:
    model, length = recipe.model, recipe.data.sequence_length
    query, key = layer.n_heads * layer.head_dim, layer.n_kv_heads * layer.head_dim
    normed = {False: 0, True: layer.n_heads + layer.n_kv_heads, "head": layer.n_heads + layer.n_kv_heads, "full": 2}
    norms = (4 * (query + key) if model.qk_norm else 0) + 4 * normed[model.qk_norm]  # the output is the query
    kernel = attention_kernel(recipe, "cpu")
    if kernel == "blocked":  # query, key, value, output and probabilities
        window = model.window if layer.attention == "sliding" else None
        return (2 * query + 2 * key + layer.n_heads * kept_positions(length, window) / length) * size + norms
    if kernel == "eager":
        # Query, key, value and output, each of all heads; weights in fp32 and as they are used, bent scores.
        scores = 4 + (size if size != 4 else 0) + (size if model.attention_softcap else 0)
        scores += 2 * size if model.attention_dropout else 0  # what it multiplies by, and the product
        return 4 * query * size + scores * layer.n_heads * length + norms
    if layer.attention == "sliding" or layer.positions == "alibi":
        key = query  # with a mask, each query head gets its own copy
    part = layer.positions == "rope" and model.rope_fraction < 1
    outputs = 2 if part else 1  # where a part of each head was turned, heads are laid out anew, and so is the output
    return ((1 + outputs) * query + 2 * key) * size + 4 * layer.n_heads + norms  # the last: log-sums of scores


def _feed_forward(layer: Layer, recipe: Recipe, size: int) -> float:
    if layer.ffn == "moe":
        return _mixture(layer, recipe, size)
    return KEPT_PER_UNIT[layer.ffn] * layer.ffn_dim * size


def _mixture(layer: Layer, recipe: Recipe, size: int) -> float:
    """For each expert that is used: what happens in it, its input and output, its number and two places in the sort,
    its probability before and after they are made to sum to one. Their sum; the probabilities of all experts, once more
    for the balance, which also keeps the load of each sequence; the router's input, which is fp32; shared experts."""
    model = recipe.model
    hidden = KEPT_PER_UNIT["swiglu"] * layer.ffn_dim * size
    chosen = hidden + 2 * model.d_model * size + 3 * 8 + 2 * 4
    balanced = model.balance == "loss" and model.balance_loss > 0
    probabilities = 4 * model.n_experts * (2 + 1 / recipe.data.sequence_length if balanced else 1)
    routed = model.n_active_experts * chosen + 4 + probabilities + (4 - size) * model.d_model
    routed += 4 * (model.n_experts + 1) if model.router_z_loss else 0  # logits and their log-sum
    return routed + model.n_shared_experts * hidden
