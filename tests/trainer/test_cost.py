"""Guards the exact costs: each formula against the built model, torch's own counter, and the tensors really kept."""

import subprocess
import sys
from pathlib import Path
from typing import get_args

import model_shapes
import pytest
import torch
from hypothesis import given, settings
from model_shapes import shapes
from safetensors.torch import load_file
from torch.utils.flop_counter import FlopCounterMode
from transformers.cache_utils import DynamicCache

import trainer
from trainer.activation_memory import activation_bytes_per_token, mask_bytes
from trainer.checkpoint import RunState, save_checkpoint
from trainer.cost import (
    MICRO_BATCH_TOKENS,
    NAMES,
    costs,
    exact_functions,
    micro_batch_tokens,
    sharded_memory,
    train_memory,
)
from trainer.model import build_model
from trainer.model.modeling_evolm import EvolmExperts
from trainer.objective import training_loss
from trainer.optim import build_optimizer
from trainer.parameter_groups import kind_of
from trainer.recipe import OPTIMIZERS_OF_EXTRA, Train
from trainer.weights import weights

SHAPES = {
    **model_shapes.SHAPES,
    "moe without balance": {"ffn": "moe", "n_experts": 2, "n_active_experts": 1, "balance_loss": 0.0},
    "dropout": {"dropout": 0.1},
    "dropout, norms around": {"dropout": 0.1, "norm_placement": "sandwich"},
}

every_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())


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
    embeddings = [module for module in model.modules() if isinstance(module, torch.nn.Embedding)]
    tensors = {id(module.weight): module.weight.numel() for module in (*embeddings, model.lm_head)}
    assert found.embedding_params == sum(tensors.values())


@any_shape
@given(shape=shapes())
def test_each_weight_is_one_of_the_model_and_of_its_kind(recipe_of, shape):
    recipe = recipe_of(model=shape)
    named = build_model(recipe, 0).named_parameters()
    built = sorted((kind_of(name, parameter), tuple(parameter.shape)) for name, parameter in named)
    assert built == sorted((weight.kind, weight.shape) for weight in weights(recipe))


# --- FLOPs ------------------------------------------------------------------------------------------------------------


def flops_per_token(recipe, run):
    """What torch counts while `run(model, ids)` runs, with attention written out: the fused kernel is not counted."""
    model, ids = build_model(recipe, 0), random_ids(recipe, rows=2)[:, 1:]
    model.set_attn_implementation("eager")
    with FlopCounterMode(display=False) as counter:
        run(model, ids)
    return counter.get_total_flops() / ids.numel()


def beyond_windows(recipe):
    """What attention that is written out computes in vain: scores of tokens that a sliding layer does not see."""
    length = recipe.data.sequence_length
    unseen = max(0, length - recipe.model.window)
    sliding = [layer for layer in recipe.model.layers() if layer.attention == "sliding"]
    return sum(4 * layer.n_heads * layer.head_dim * unseen for layer in sliding)


@any_shape
@given(shape=shapes())
@torch.no_grad()
def test_forward_flops_are_what_torch_counts(recipe_of, shape):
    recipe = recipe_of(model=shape)
    counted = flops_per_token(recipe, lambda model, ids: model(ids))
    assert costs(recipe).forward_flops_per_token == counted - beyond_windows(recipe)


@every_shape
@pytest.mark.parametrize("length", [8, 64])
def test_training_flops_are_what_torch_counts(recipe_of, shape, length):
    recipe = recipe_of(model=shape, data={"sequence_length": length})
    counted = flops_per_token(recipe, lambda model, ids: model(ids).logits.sum().backward())
    assert costs(recipe).flops_per_token == counted - 3 * beyond_windows(recipe)


# --- memory -----------------------------------------------------------------------------------------------------------


def bytes_kept(recipe, rows):
    """Bytes of the tensors that autograd keeps for the backward pass, without the parameters themselves."""
    model, ids = build_model(recipe, 0), random_ids(recipe, rows)
    if recipe.train.gradient_checkpointing:
        model.activation_checkpointing_enable()
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
    kept = bytes_kept(recipe, rows=16) - head_gradient(recipe) - mask_bytes(recipe, 4)
    assert kept / (16 * 32) == pytest.approx(activation_bytes_per_token(recipe, 4), rel=0.005)


WINDOWED = {"n_heads": 4, "n_kv_heads": 2, "attention": ["full", "sliding"], "window": 5}


@pytest.mark.parametrize("kernel", ["blocked", "sdpa", "eager"])
@pytest.mark.parametrize("shape", [{}, WINDOWED, {"rope_fraction": 0.5}], ids=["plain", "windowed", "part of heads"])
def test_every_attention_kernel_keeps_what_is_said_of_it(recipe_of, kernel, shape):
    recipe = recipe_of(model={"d_model": 64, **shape}, train={"attention_kernel": kernel})
    kept = bytes_kept(recipe, rows=16) - head_gradient(recipe) - mask_bytes(recipe, 4)
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
    kept = bytes_kept(recipe, rows=16) - head_gradient(recipe) - casted - mask_bytes(recipe, 2)
    assert kept / (16 * 32) == pytest.approx(activation_bytes_per_token(recipe, 2), rel=0.15)


def test_gradient_checkpointing_keeps_what_blocks_read_and_is_charged_for_one_block_besides(recipe_of):
    saving = recipe_of(model={"n_layers": 3}, train={"gradient_checkpointing": True})
    one, two = (activation_bytes_per_token(recipe_of(model={"n_layers": layers}), 4) for layers in (1, 2))
    kept = (bytes_kept(saving, rows=6) - bytes_kept(saving, rows=2)) / (4 * 32) - 8 * 33 / 32
    assert activation_bytes_per_token(saving, 4) == kept + (two - one)


def test_the_widest_block_is_the_one_that_is_charged(recipe_of):
    train = {"gradient_checkpointing": True}
    widths = [recipe_of(model={"ffn_dim": width}, train=train) for width in ([64, 64], [64, 96], [96, 64], [96, 96])]
    found = [activation_bytes_per_token(recipe, 4) for recipe in widths]
    assert found[0] < found[1] == found[2] == found[3]


def test_training_memory_is_state_head_gradient_and_the_activations_of_a_micro_batch(recipe_of):
    recipe = recipe_of(train={"micro_batch_tokens": 64})
    params = costs(recipe).params
    expected = 16 * params + head_gradient(recipe) + 64 * activation_bytes_per_token(recipe, 4)
    assert costs(recipe).train_memory == expected


@pytest.mark.parametrize("world", [1, 4])
@pytest.mark.parametrize(
    ("engine", "stage", "offload", "whole", "cut"),
    [
        ("ddp", 2, False, 16, 0),
        ("fsdp", 2, False, 0, 16),
        ("deepspeed", 1, False, 8, 12),  # and a copy of the weights
        ("deepspeed", 2, False, 4, 16),
        ("deepspeed", 3, False, 0, 20),
        ("deepspeed", 2, True, 4, 4),
    ],
)
def test_what_is_cut_over_ranks_takes_its_part_of_each(recipe_of, engine, stage, offload, whole, cut, world):
    """Bytes of each parameter, for AdamW in fp32; blocks that are gathered come on top."""
    recipe = recipe_of()
    alone, found = (
        sharded_memory(recipe, name, world, zero_stage=stage, offload=offload) for name in ("single", engine)
    )
    if world == 1:
        assert found == alone == train_memory(recipe)
        return
    assert alone.total == costs(recipe).train_memory
    held = found.total - found.gathered - found.passing
    assert held == pytest.approx(costs(recipe).params * (whole + cut / world))
    assert found.passing == alone.passing
    assert (found.gathered > 0) == (whole == 0)


def test_smaller_micro_batches_and_bf16_need_less_memory(recipe_of):
    train = {"batch_tokens": 4096}
    memory = [
        costs(recipe_of(train={**train, **change})).train_memory
        for change in ({}, {"micro_batch_tokens": 2048}, {"micro_batch_tokens": 2048, "precision": "bf16"})
    ]
    assert memory == sorted(memory, reverse=True)
    assert len(set(memory)) == 3


def bytes_cached(recipe):
    """Of the cache in bf16 for each of three sequences, after all their tokens."""
    model, ids = build_model(recipe, 0).to(torch.bfloat16), random_ids(recipe, rows=3)[:, 1:]
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids, past_key_values=cache, use_cache=True)
    return sum(tensor.nbytes for layer in cache.layers for tensor in (layer.keys, layer.values)) / 3


@every_shape
def test_kv_bytes_are_those_of_the_cache(recipe_of, shape):
    """Between two tokens, sliding layers keep their window but for the token that leaves it next."""
    recipe = recipe_of(model=shape)
    sliding = [layer for layer in recipe.model.layers() if layer.attention == "sliding"]
    leaving = sum(4 * layer.n_kv_heads * layer.head_dim for layer in sliding)
    assert costs(recipe).kv_bytes == bytes_cached(recipe) + leaving


@every_shape
def test_kv_bytes_per_token_are_those_of_the_cache_within_all_windows(recipe_of, shape):
    recipe = recipe_of(model={**shape, "window": 64})
    assert costs(recipe).kv_bytes_per_token == bytes_cached(recipe) / 32
    assert costs(recipe).kv_bytes == bytes_cached(recipe)


def bytes_saved(recipe, folder):
    """Of the tensors in a checkpoint after one step, without the step counters."""
    model = build_model(recipe, 0)
    optimizer = build_optimizer(model, recipe)
    losses = training_loss(model, recipe, random_ids(recipe, rows=1))
    (losses.objective if losses.balance is None else losses.objective + losses.balance).backward()
    optimizer.step()
    state = RunState(samples=1, recipe="r", tokenizer="t", corpus="c", seed=0, horizon=None, seconds=0.0, flops=0.0)
    save_checkpoint(folder, model, optimizer, state)
    tensors = {}
    for name in ("model", "optimizer"):
        tensors |= load_file(folder / f"{name}.safetensors")
    return sum(tensor.nbytes for name, tensor in tensors.items() if not name.endswith(".step"))


@every_shape
def test_checkpoint_bytes_are_those_of_its_tensors(recipe_of, shape, tmp_path):
    recipe = recipe_of(model=shape)
    assert costs(recipe).checkpoint_bytes == bytes_saved(recipe, tmp_path / "checkpoint")


@pytest.mark.parametrize("optimizer", get_args(Train.model_fields["optimizer"].annotation))
@pytest.mark.parametrize("shape", [{"ffn": "gelu", "tie_embeddings": False}, {"ffn": "moe", "n_experts": 4}], ids=str)
def test_checkpoint_bytes_are_those_of_each_optimizer(recipe_of, shape, optimizer, tmp_path):
    if optimizer in OPTIMIZERS_OF_EXTRA:
        pytest.importorskip("pytorch_optimizer", reason="the extra `optim`")
    recipe = recipe_of(model=shape, train={"optimizer": optimizer})
    assert costs(recipe).checkpoint_bytes == bytes_saved(recipe, tmp_path / "checkpoint")


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
