"""Shapes of models that tests of several subjects share: one for each gene, and any of them together."""

import torch
from hypothesis import strategies as st

VOCABULARY = 320

PER_LAYER = {"n_heads": [4, 2], "n_kv_heads": [2, 1], "ffn_dim": [48, 96], "head_dim": 8}

MOE = {"ffn": "moe", "n_experts": 4}

SLIDING = {"attention": ["full", "sliding"], "window": 5}

SHAPES = {
    "mha": {},
    "gqa": {"n_heads": 4, "n_kv_heads": 2},
    "mqa": {"n_heads": 4, "n_kv_heads": 1},
    "free head size": {"n_heads": 3, "head_dim": 10},
    "per layer": PER_LAYER,
    "one layer": {"n_layers": 1},
    "sliding": {"attention": "sliding", "window": 5},
    "sliding, smallest window": {"attention": "sliding", "window": 2},
    "sliding and full": SLIDING,
    "no positions": {"positions": "none"},
    "no positions on some layers, sliding on others": {**SLIDING, "positions": ["none", "rope"]},
    "alibi": {"positions": "alibi"},
    "alibi, three heads of six, sliding": {**SLIDING, "positions": "alibi", "n_heads": [3, 6], "head_dim": 8},
    "alibi and rope": {"positions": ["rope", "alibi"], "n_heads": 4, "n_kv_heads": 2},
    "learned positions": {"positions": "learned"},
    "sinusoidal positions": {"positions": "sinusoidal"},
    "rope on half of each head": {"rope_fraction": 0.5},
    "rope stretched linearly": {"rope_scaling": "linear", "rope_factor": 4.0},
    "rope stretched by yarn": {"rope_scaling": "yarn", "rope_factor": 4.0, "rope_theta": 100.0},
    "rope and eps": {"rope_theta": 500.0, "norm_eps": 1e-2},
    "no qk-norm": {"qk_norm": False},
    "qk-norm of all heads": {"qk_norm": "full", "n_heads": 4, "n_kv_heads": 2},
    "layernorm": {"norm": "layernorm"},
    "norms after": {"norm_placement": "post"},
    "norms around": {"norm_placement": "sandwich"},
    "parallel": {"parallel_block": True},
    "parallel, norms around, recursive": {"parallel_block": True, "norm_placement": "sandwich", "recursion": 2},
    "parallel, norms after": {"parallel_block": True, "norm_placement": "post"},
    "geglu": {"ffn": "geglu"},
    "reglu": {"ffn": "reglu"},
    "gelu": {"ffn": "gelu"},
    "silu": {"ffn": "silu"},
    "relu2": {"ffn": "relu2"},
    "recursion": {"recursion": [1, 3]},
    "bias of queries, keys and values": {"bias": "qkv"},
    "bias of all": {"bias": "all", "norm": "layernorm", "ffn": "gelu"},
    "attention softcap": {"attention_softcap": 2.0},
    "logit softcap": {"logit_softcap": 3.0},
    "multipliers": {"embedding_multiplier": 3.0, "residual_multiplier": 0.4, "logit_multiplier": 0.5},
    "untied": {"tie_embeddings": False},
    "moe": MOE,
    "moe, three of five, per layer": {**PER_LAYER, **MOE, "n_experts": 5, "n_active_experts": 3},
    "moe, shared experts and a dense layer": {**MOE, "n_shared_experts": 2, "n_dense_layers": 1},
    "moe, dense layer of its own width": {**MOE, "n_dense_layers": 1, "dense_ffn_dim": 40},
    "moe, bias": {**MOE, "balance": "bias"},
    "moe, recursive": {**MOE, "recursion": 2},
}
"""By what is special about them; everything else is as in the tiny recipe, 32 wide and two layers deep."""


def random_ids(rows=2, length=16, seed=0):
    return torch.randint(3, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def shaken(model, seed=1):
    """The model with every weight, norms and biases too, moved away from where initialisation puts it."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer += 0.05 * torch.randn(buffer.shape, generator=generator)
    return model.eval()


@st.composite
def shapes(draw):
    """Any of the genes together, for a sequence length of 32."""
    layers = draw(st.integers(1, 3))
    per_layer = {"min_size": layers, "max_size": layers}
    kv_heads = draw(st.lists(st.integers(1, 3), **per_layer))
    groups = draw(st.lists(st.integers(1, 3), **per_layer))
    chance = st.sampled_from([0.0, 0.0, 3.0])
    shape = {
        "d_model": draw(st.integers(4, 24)),
        "n_layers": layers,
        "n_heads": [heads * group for heads, group in zip(kv_heads, groups, strict=True)],
        "n_kv_heads": kv_heads,
        "head_dim": 4 * draw(st.integers(1, 3)),
        "attention": draw(st.lists(st.sampled_from(["full", "sliding"]), **per_layer)),
        "window": draw(st.integers(2, 12)),
        "qk_norm": draw(st.sampled_from([False, True, "head", "full"])),
        "attention_softcap": draw(chance),
        "positions": draw(
            st.sampled_from(["learned", "sinusoidal"])
            | st.lists(st.sampled_from(["rope", "none", "alibi"]), **per_layer)
        ),
        "rope_theta": draw(st.sampled_from([10.0, 10_000.0, 1e6])),
        "rope_fraction": draw(st.sampled_from([1.0, 0.5])),
        **draw(
            st.just({})
            | st.fixed_dictionaries(
                {"rope_scaling": st.sampled_from(["linear", "yarn"]), "rope_factor": st.sampled_from([1.0, 2.0, 8.0])}
            )
        ),
        "ffn_dim": draw(st.lists(st.integers(1, 40), **per_layer)),
        "recursion": draw(st.lists(st.integers(1, 3), **per_layer)),
        "norm": draw(st.sampled_from(["rmsnorm", "layernorm"])),
        "norm_placement": draw(st.sampled_from(["pre", "post", "sandwich"])),
        "parallel_block": draw(st.booleans()),
        "bias": draw(st.sampled_from(["none", "qkv", "all"])),
        "tie_embeddings": draw(st.booleans()),
        "embedding_multiplier": draw(st.sampled_from([1.0, 5.0])),
        "residual_multiplier": draw(st.sampled_from([1.0, 0.3])),
        "logit_multiplier": draw(st.sampled_from([1.0, 0.3])),
        "logit_softcap": draw(chance),
        "zero_init": draw(st.booleans()),
    }
    mixture = {
        "ffn": st.just("moe"),
        "n_experts": st.integers(4, 8),
        "n_active_experts": st.integers(1, 4),
        "n_shared_experts": st.integers(0, 2),
        "n_dense_layers": st.integers(0, layers - 1),
        "balance": st.sampled_from(["loss", "bias"]),
    }
    plain = st.sampled_from(["swiglu", "geglu", "reglu", "gelu", "silu", "relu2"])
    return {**shape, **draw(st.fixed_dictionaries({"ffn": plain}) | st.fixed_dictionaries(mixture))}
