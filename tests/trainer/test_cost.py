"""Guards the exact costs: each formula against the built model, torch's own counter, and the tensors really kept."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch.utils.flop_counter import FlopCounterMode
from transformers.cache_utils import DynamicCache

import trainer
from trainer.checkpoint import RunState, save_checkpoint
from trainer.cost import (
    MICRO_BATCH_TOKENS,
    NAMES,
    activation_bytes_per_token,
    costs,
    exact_functions,
    micro_batch_tokens,
)
from trainer.model import build_model
from trainer.model.modeling_evolm import EvolmExperts
from trainer.objective import training_loss
from trainer.optim import build_optimizer

SHAPES = {
    "mha": {},
    "gqa": {"n_heads": 4, "n_kv_heads": 2},
    "mqa": {"n_heads": 4, "n_kv_heads": 1},
    "free head size": {"n_heads": 3, "head_dim": 10},
    "per layer": {"n_heads": [4, 2], "n_kv_heads": [2, 1], "ffn_dim": [48, 96], "head_dim": 8},
    "gelu": {"ffn": "gelu"},
    "relu2": {"ffn": "relu2"},
    "moe": {"ffn": "moe", "n_experts": 4},
    "moe, three of five, per layer": {"ffn": "moe", "n_experts": 5, "n_active_experts": 3, "ffn_dim": [48, 96]},
    "moe without balance": {"ffn": "moe", "n_experts": 2, "n_active_experts": 1, "balance_loss": 0.0},
    "no qk-norm": {"qk_norm": False},
    "untied": {"tie_embeddings": False},
}

every_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())


@st.composite
def shapes(draw):
    layers = draw(st.integers(1, 4))
    kv_heads = draw(st.lists(st.integers(1, 4), min_size=layers, max_size=layers))
    groups = draw(st.lists(st.integers(1, 3), min_size=layers, max_size=layers))
    return {
        "d_model": draw(st.integers(1, 64)),
        "n_layers": layers,
        "n_heads": [heads * group for heads, group in zip(kv_heads, groups, strict=True)],
        "n_kv_heads": kv_heads,
        "head_dim": 2 * draw(st.integers(1, 16)),
        **draw(
            st.sampled_from([{"ffn": "swiglu"}, {"ffn": "gelu"}, {"ffn": "relu2"}])
            | st.fixed_dictionaries(
                {"ffn": st.just("moe"), "n_experts": st.integers(4, 8), "n_active_experts": st.integers(1, 4)}
            )
        ),
        "ffn_dim": draw(st.none() | st.lists(st.integers(1, 90), min_size=layers, max_size=layers)),
        "qk_norm": draw(st.booleans()),
        "tie_embeddings": draw(st.booleans()),
    }


any_shape = settings(derandomize=True, deadline=None, max_examples=20)


def random_ids(recipe, rows):
    """Sequences of one token more than the model reads."""
    shape = rows, recipe.data.sequence_length + 1
    return torch.randint(recipe.data.tokenizer.vocab_size, shape, generator=torch.Generator().manual_seed(0))


# --- parameters -------------------------------------------------------------------------------------------------------


@any_shape
@given(shape=shapes())
def test_parameters_are_those_of_the_model(recipe_of, shape):
    recipe = recipe_of(model=shape)
    model = build_model(recipe, 0)
    found = costs(recipe)
    assert found.params == sum(parameter.numel() for parameter in model.parameters())
    experts = [module for module in model.modules() if isinstance(module, EvolmExperts)]
    unused = sum(expert.numel() for module in experts for stack in module.parameters() for expert in stack)
    unused = unused * (recipe.model.n_experts - recipe.model.n_active_experts) // max(1, recipe.model.n_experts)
    assert found.active_params == found.params - unused
    embeddings = {id(module.weight): module.weight.numel() for module in (model.model.embed_tokens, model.lm_head)}
    assert found.embedding_params == sum(embeddings.values())


# --- FLOPs ------------------------------------------------------------------------------------------------------------


def flops_per_token(recipe, run):
    """What torch counts while `run(model, ids)` runs, with attention written out: the fused kernel is not counted."""
    model, ids = build_model(recipe, 0), random_ids(recipe, rows=2)[:, 1:]
    model.set_attn_implementation("eager")
    with FlopCounterMode(display=False) as counter:
        run(model, ids)
    return counter.get_total_flops() / ids.numel()


@any_shape
@given(shape=shapes())
@torch.no_grad()
def test_forward_flops_are_what_torch_counts(recipe_of, shape):
    recipe = recipe_of(model=shape)
    assert flops_per_token(recipe, lambda model, ids: model(ids)) == costs(recipe).forward_flops_per_token


@every_shape
@pytest.mark.parametrize("length", [8, 64])
def test_training_flops_are_what_torch_counts(recipe_of, shape, length):
    recipe = recipe_of(model=shape, data={"sequence_length": length})
    assert (
        flops_per_token(recipe, lambda model, ids: model(ids).logits.sum().backward()) == costs(recipe).flops_per_token
    )


# --- memory -----------------------------------------------------------------------------------------------------------


def bytes_kept(recipe, rows):
    """Bytes of the tensors that autograd keeps for the backward pass, without the parameters themselves."""
    model, ids = build_model(recipe, 0), random_ids(recipe, rows)
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage  # held, so that no address is used twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        held = training_loss(model, recipe, ids)
    assert held[0] > 0
    return sum(storage.nbytes() for storage in kept.values())


def head_gradient(recipe):
    """The loss computes it in the forward pass; it does not grow with the batch."""
    return 4 * recipe.data.tokenizer.vocab_size * recipe.model.d_model


@every_shape
def test_activation_memory_in_fp32_is_what_autograd_keeps(recipe_of, shape):
    recipe = recipe_of(model={"d_model": 64, **shape})
    kept = bytes_kept(recipe, rows=16) - head_gradient(recipe)
    assert kept / (16 * 32) == pytest.approx(activation_bytes_per_token(recipe, 4), rel=0.005)


@every_shape
def test_each_further_token_in_fp32_takes_what_the_formula_says_and_its_ids(recipe_of, shape):
    recipe = recipe_of(model=shape)
    per_token = (bytes_kept(recipe, rows=6) - bytes_kept(recipe, rows=2)) / (4 * 32)
    assert per_token == activation_bytes_per_token(recipe, 4) + 8 * 33 / 32  # what is read and what is to be said


@every_shape
def test_activation_memory_in_bf16_is_near_what_autograd_keeps(recipe_of, shape):
    recipe = recipe_of(model={"d_model": 64, **shape}, train={"precision": "bf16"})
    found = costs(recipe)
    norms = sum(p.numel() for name, p in build_model(recipe, 0).named_parameters() if "norm" in name)
    casted = 2 * (found.params - found.embedding_params - norms)
    kept = bytes_kept(recipe, rows=16) - head_gradient(recipe) - casted
    assert kept / (16 * 32) == pytest.approx(activation_bytes_per_token(recipe, 2), rel=0.15)


def test_training_memory_is_state_head_gradient_and_the_activations_of_a_micro_batch(recipe_of):
    recipe = recipe_of(train={"micro_batch_tokens": 64})
    params = costs(recipe).params
    expected = 16 * params + head_gradient(recipe) + 64 * activation_bytes_per_token(recipe, 4)
    assert costs(recipe).train_memory == expected


def test_smaller_micro_batches_and_bf16_need_less_memory(recipe_of):
    train = {"batch_tokens": 4096}
    memory = [
        costs(recipe_of(train={**train, **change})).train_memory
        for change in ({}, {"micro_batch_tokens": 2048}, {"micro_batch_tokens": 2048, "precision": "bf16"})
    ]
    assert memory == sorted(memory, reverse=True)
    assert len(set(memory)) == 3


@every_shape
@torch.no_grad()
def test_kv_bytes_are_those_of_the_cache_in_bf16(recipe_of, shape):
    recipe = recipe_of(model=shape)
    model, ids = build_model(recipe, 0).to(torch.bfloat16), random_ids(recipe, rows=3)[:, 1:]
    cache = DynamicCache(config=model.config)
    model(ids, past_key_values=cache, use_cache=True)
    kept = sum(tensor.nbytes for layer in cache.layers for tensor in (layer.keys, layer.values))
    assert costs(recipe).kv_bytes_per_token == kept / ids.numel()


@every_shape
def test_checkpoint_bytes_are_those_of_its_tensors(recipe_of, shape, tmp_path):
    recipe = recipe_of(model=shape)
    model = build_model(recipe, 0)
    optimizer = build_optimizer(model, recipe)
    training_loss(model, recipe, random_ids(recipe, rows=1))[0].backward()
    optimizer.step()
    state = RunState(samples=1, recipe="r", tokenizer="t", corpus="c", seed=0, horizon=None, seconds=0.0, flops=0.0)
    save_checkpoint(tmp_path / "checkpoint", model, optimizer, state)
    tensors = {}
    for name in ("model", "optimizer"):
        tensors |= load_file(tmp_path / "checkpoint" / f"{name}.safetensors")
    stored = sum(tensor.nbytes for name, tensor in tensors.items() if not name.endswith(".step"))
    assert costs(recipe).checkpoint_bytes == stored


# --- micro-batches ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("length", "batch", "micro", "expected"),
    [
        (32, 128, None, 128),
        (32, 100_000, None, MICRO_BATCH_TOKENS),
        (1000, 100_000, None, 4000),
        (8192, 100_000, None, 8192),
        (32, 128, 64, 64),
        (32, 128, 95, 64),
        (32, 128, 1, 32),
        (32, 100, 128, 96),
        (32, 32, 128, 32),
    ],
)
def test_a_micro_batch_is_whole_sequences_at_least_one_at_most_the_batch(recipe_of, length, batch, micro, expected):
    recipe = recipe_of(data={"sequence_length": length}, train={"batch_tokens": batch, "micro_batch_tokens": micro})
    assert micro_batch_tokens(recipe) == expected


# --- by name ----------------------------------------------------------------------------------------------------------


def test_every_cost_is_a_function_of_a_genome(recipe):
    functions = exact_functions()
    assert set(functions) == set(NAMES)
    genome = recipe.model_dump(mode="json")
    for name, function in functions.items():
        assert function(genome) == getattr(costs(recipe), name)


def test_costs_are_known_without_torch():
    """Thousands of genomes are costed by processes that never train."""
    words = "import sys, trainer.cost, trainer.recipe_check; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", words], cwd=Path(trainer.__file__).parents[1]).returncode == 0
