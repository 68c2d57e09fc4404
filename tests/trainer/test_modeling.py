"""Guards the model: against a reference written from the formulas, and against itself in every way it is run."""

import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from model_shapes import MOE, PER_LAYER, SHAPES, SLIDING, VOCABULARY, random_ids, shaken, shapes
from reference_transformer import reference_logits
from torch.nn import functional
from transformers import AutoConfig, AutoModelForCausalLM

from trainer.attention_kernels import attention_kernel
from trainer.model import EvolmConfig, EvolmForCausalLM, build_model, config_of


@pytest.fixture
def model_of(recipe_of):
    return lambda seed=0, **model: shaken(build_model(recipe_of(model=model), seed))


every_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())


# --- the function it computes -----------------------------------------------------------------------------------------


@every_shape
@torch.no_grad()
def test_logits_are_those_of_the_formulas(recipe_of, model_of, shape):
    model, ids = model_of(**shape), random_ids()
    for row, logits in zip(ids, model(ids).logits, strict=True):
        expected = reference_logits(model.state_dict(), recipe_of(model=shape), row)
        assert (logits - expected).abs().max() < 2e-5 * expected.abs().max()


@settings(derandomize=True, deadline=None, max_examples=40)
@given(shape=shapes())
@torch.no_grad()
def test_any_shape_computes_the_formulas(recipe_of, shape):
    recipe = recipe_of(model=shape)
    model, ids = shaken(build_model(recipe, 0)), random_ids(rows=1, length=9)
    expected = reference_logits(model.state_dict(), recipe, ids[0])
    assert (model(ids).logits[0] - expected).abs().max() < 2e-5 * expected.abs().max()


@every_shape
@torch.no_grad()
def test_a_later_token_never_moves_an_earlier_logit(model_of, shape):
    model, ids = model_of(**shape), random_ids()
    reference = model(ids).logits
    for position in range(1, ids.shape[1], 4):
        changed = ids.clone()
        changed[:, position] = (changed[:, position] + 1) % VOCABULARY
        logits = model(changed).logits
        assert torch.equal(logits[:, :position], reference[:, :position])
        assert not torch.allclose(logits[:, position:], reference[:, position:])


# --- the ways it is run -----------------------------------------------------------------------------------------------


@every_shape
@pytest.mark.parametrize("kernel", ["sdpa", "evolm_blocked"])
@torch.no_grad()
def test_eager_attention_equals_faster_kernels(model_of, shape, kernel):
    if "attention_softcap" in shape:
        pytest.skip("they know no softcap")
    model, ids = model_of(**shape), random_ids()
    model.set_attn_implementation(kernel)
    faster = model(ids).logits
    model.set_attn_implementation("eager")
    torch.testing.assert_close(model(ids).logits, faster, atol=1e-5, rtol=1e-4)


@pytest.mark.skipif(
    not torch.cuda.is_available(), reason="flex attention is compiled, a minute for each shape on a CPU"
)
@pytest.mark.parametrize("name", ["mha", "gqa", "sliding and full", "attention softcap"])
def test_flex_attention_equals_eager_on_a_gpu(model_of, name):
    model, ids = model_of(**SHAPES[name]).to("cuda"), random_ids(length=256).to("cuda")
    found = []
    for kernel in ("eager", "flex_attention"):
        model.set_attn_implementation(kernel)
        model.zero_grad()
        output = model(ids, labels=ids)
        output.loss.backward()
        found.append((output.logits.detach(), model.model.layers[0].self_attn.q_proj.weight.grad.clone()))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-3)


@every_shape
@pytest.mark.parametrize("pieces", [[16], [8, 8], [5, 1, 1, 9], [1] * 16], ids=str)
@torch.no_grad()
def test_the_cache_changes_nothing(model_of, shape, pieces):
    model, ids = model_of(**shape), random_ids()
    logits, past = [], None
    for part in ids.split(pieces, dim=1):
        output = model(part, past_key_values=past, use_cache=True)
        past = output.past_key_values
        logits.append(output.logits)
    torch.testing.assert_close(torch.cat(logits, dim=1), model(ids).logits, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("given_positions", [True, False])
@every_shape
@torch.no_grad()
def test_padding_on_the_left_changes_nothing(model_of, shape, given_positions):
    if not given_positions and shape.get("positions") in ("learned", "sinusoidal"):
        pytest.skip("these positions count from the left of the batch where none are given")
    model, ids = model_of(**shape), random_ids()
    padded = torch.cat([torch.zeros(2, 5, dtype=torch.int64), ids], dim=1)
    mask = torch.cat([torch.zeros(2, 5, dtype=torch.int64), torch.ones_like(ids)], dim=1)
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0) if given_positions else None
    logits = model(padded, attention_mask=mask, position_ids=positions).logits[:, 5:]
    torch.testing.assert_close(logits, model(ids).logits, atol=1e-4, rtol=1e-4)


@every_shape
@torch.no_grad()
def test_padding_and_cache_together_change_nothing(model_of, shape):
    model, ids = model_of(**shape), random_ids()
    padded = torch.cat([torch.zeros(2, 5, dtype=torch.int64), ids], dim=1)
    mask = (torch.arange(21) >= 5).long().expand(2, -1)
    logits, past, end = [], None, 0
    for part in padded.split([9, 1, 4, 7], dim=1):
        start, end = end, end + part.shape[1]
        positions = (torch.arange(start, end) - 5).clamp(min=0).unsqueeze(0)
        output = model(part, attention_mask=mask[:, :end], position_ids=positions, past_key_values=past, use_cache=True)
        past = output.past_key_values
        logits.append(output.logits)
    torch.testing.assert_close(torch.cat(logits, dim=1)[:, 5:], model(ids).logits, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_sequences_do_not_see_each_other(model_of):
    model, ids = model_of(), random_ids(rows=3)
    together = model(ids).logits
    for row in range(3):
        torch.testing.assert_close(model(ids[row : row + 1]).logits[0], together[row], atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_embeddings_may_be_given_instead_of_ids(model_of):
    model, ids = model_of(), random_ids()
    embedded = model(inputs_embeds=model.get_input_embeddings()(ids)).logits
    assert torch.equal(embedded, model(ids).logits)


def test_ids_and_embeddings_together_are_refused(model_of):
    model, ids = model_of(), random_ids()
    for inputs in ({}, {"input_ids": ids, "inputs_embeds": model.get_input_embeddings()(ids)}):
        with pytest.raises(ValueError, match="give either input_ids or inputs_embeds"):
            model(**inputs)


@torch.no_grad()
def test_only_the_last_logits_can_be_asked_for(model_of):
    model, ids = model_of(), random_ids()
    torch.testing.assert_close(model(ids, logits_to_keep=3).logits, model(ids).logits[:, -3:])


@torch.no_grad()
def test_the_loss_of_labels_is_the_cross_entropy_shifted_by_one(model_of):
    model, ids = model_of(), random_ids()
    labels = ids.clone()
    labels[:, :4] = -100
    output = model(ids, labels=labels)
    expected = functional.cross_entropy(output.logits[:, 3:-1].flatten(0, 1), ids[:, 4:].flatten())
    torch.testing.assert_close(output.loss, expected)


@every_shape
def test_it_generates_what_it_thinks_likeliest(model_of, shape):
    model, ids = model_of(**shape), random_ids(rows=1, length=5)
    generated = model.generate(ids, max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert generated.shape == (1, 11)
    with torch.no_grad():
        assert torch.equal(model(generated[:, :-1]).logits[0, 4:].argmax(dim=-1), generated[0, 5:])


# --- training ---------------------------------------------------------------------------------------------------------


def gradients(model, ids):
    model.zero_grad()
    model(ids, labels=ids).loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


@every_shape
def test_every_weight_gets_a_gradient(model_of, shape):
    assert all(gradient.abs().max() > 0 for gradient in gradients(model_of(**shape), random_ids()).values())


def test_gradient_checkpointing_changes_no_gradient(model_of):
    model, ids = model_of(**PER_LAYER).train(), random_ids()
    runs = []
    model.model.layers[0].mlp.register_forward_pre_hook(lambda *_: runs.append("forward"))
    expected = gradients(model, ids)
    assert len(runs) == 1
    model.activation_checkpointing_enable()
    for name, gradient in gradients(model, ids).items():
        torch.testing.assert_close(gradient, expected[name])
    assert len(runs) == 3  # once more, and once again in the backward pass


@every_shape
@torch.no_grad()
def test_bf16_is_close_to_fp32(model_of, shape):
    model, ids = model_of(**shape), random_ids()
    reference = model(ids).logits
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(ids).logits
    assert logits.dtype == torch.bfloat16
    assert (logits.float() - reference).abs().mean() < 0.03 * reference.abs().mean()


# --- initial weights --------------------------------------------------------------------------------------------------


def test_weights_come_from_the_seed_alone(recipe):
    torch.manual_seed(123)
    before = torch.random.get_rng_state()
    one, same, other = (build_model(recipe, seed).state_dict() for seed in (0, 0, 1))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not torch.equal(one["model.embed_tokens.weight"], other["model.embed_tokens.weight"])


@pytest.mark.parametrize(
    ("shape", "branches"),
    [({}, 16), ({**MOE, "n_experts": 32}, 16), ({"recursion": 3}, 32), ({"bias": "all", "norm": "layernorm"}, 16)],
    ids=["dense", "moe", "recursive", "biased"],
)
def test_what_writes_to_the_residual_stream_begins_smaller(recipe_of, shape, branches):
    recipe = recipe_of(model={"d_model": 128, "n_layers": 8, "n_heads": 4, "init_std": 0.05, **shape})
    for name, weight in build_model(recipe, 0).named_parameters():
        if name.endswith(".bias"):
            assert not weight.any()
        elif "norm" in name:
            assert torch.equal(weight, torch.ones_like(weight))
        else:
            residual = "o_proj" in name or "down_proj" in name
            assert weight.std().item() == pytest.approx(0.05 / (branches**0.5 if residual else 1), rel=0.05)


ZERO_SHAPES = ("mha", "norms after", "norms around", "parallel", "moe", "recursion", "bias of all", "layernorm")


@pytest.mark.parametrize("shape", [SHAPES[name] for name in ZERO_SHAPES], ids=ZERO_SHAPES)
def test_blocks_that_begin_as_zero_pass_on_what_they_read_and_learn(recipe_of, shape):
    model, ids = build_model(recipe_of(model={**shape, "zero_init": True}), 0).train(), random_ids()
    hidden = model.model(ids).last_hidden_state
    torch.testing.assert_close(hidden, model.model.norm(model.model.embed_tokens(ids)))
    model(ids, labels=ids).loss.backward()
    moved = [name for name, weight in model.named_parameters() if weight.grad is not None and weight.grad.any()]
    for layer in range(2):
        assert any(name.startswith(f"model.layers.{layer}.") for name in moved)


def test_tied_embeddings_are_one_tensor(recipe_of):
    tied, untied = (build_model(recipe_of(model={"tie_embeddings": tie}), 0) for tie in (True, False))
    assert tied.lm_head.weight is tied.model.embed_tokens.weight
    assert untied.lm_head.weight is not untied.model.embed_tokens.weight


# --- head and dropout -------------------------------------------------------------------------------------------------


@every_shape
@torch.no_grad()
def test_the_head_is_what_turns_hidden_states_into_logits(model_of, shape):
    model, ids = model_of(**shape), random_ids()
    head = model.head()
    logits = head.multiplier * model.model(ids).last_hidden_state @ head.weight.T
    if head.softcap:
        logits = head.softcap * torch.tanh(logits / head.softcap)
    torch.testing.assert_close(model(ids).logits, logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("field", ["dropout", "attention_dropout"])
@pytest.mark.parametrize("shape", [{}, {"norm_placement": "post"}, {"parallel_block": True}, SLIDING], ids=str)
@torch.no_grad()
def test_dropout_is_of_training_alone(model_of, shape, field):
    model, plain, ids = model_of(**shape, **{field: 0.2}), model_of(**shape), random_ids()
    torch.testing.assert_close(model(ids).logits, plain(ids).logits, atol=1e-5, rtol=1e-4)
    torch.manual_seed(0)
    first, second = (model.train()(ids).logits for _ in range(2))
    assert not torch.allclose(first, second)
    torch.manual_seed(0)
    assert torch.equal(model(ids).logits, first)


@torch.no_grad()
def test_dropout_leaves_expectations_as_they_are(recipe_of):
    """What a layer that is linear in its dropout gives on average: the embeddings before the first block."""
    model, ids = build_model(recipe_of(model={"dropout": 0.5}), 0).train(), random_ids()
    torch.manual_seed(0)
    embedded = model.model.embed_tokens(ids)
    draws = torch.stack([model.model.embed(embedded, torch.arange(16)[None]) for _ in range(400)])
    assert ((draws == 0).float().mean() - 0.5).abs() < 0.01
    assert (draws.mean(dim=0) - embedded).abs().mean() < 0.1 * embedded.abs().mean()


def test_a_softcap_chooses_a_kernel_that_knows_it(recipe_of):
    bent = recipe_of(model={"attention_softcap": 5.0})
    assert [attention_kernel(bent, kind) for kind in ("cpu", "cuda")] == ["eager", "flex"]
    dropped = recipe_of(model={"attention_softcap": 5.0, "attention_dropout": 0.1})
    distant = recipe_of(model={"attention_softcap": 5.0, "positions": ["rope", "alibi"]})
    assert [attention_kernel(recipe, "cuda") for recipe in (dropped, distant)] == ["eager", "eager"]
    assert build_model(bent, 0).config._attn_implementation == "eager"


# --- saving -----------------------------------------------------------------------------------------------------------


@every_shape
@torch.no_grad()
def test_what_is_saved_is_what_is_loaded(model_of, shape, tmp_path):
    model, ids = model_of(**shape), random_ids()
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert type(loaded) is EvolmForCausalLM
    loaded.set_attn_implementation(model.config._attn_implementation)
    assert torch.equal(loaded(ids).logits, model(ids).logits)


def test_what_differs_between_layers_survives_saving(recipe_of, tmp_path):
    recipe = recipe_of(model=PER_LAYER)
    config_of(recipe).save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert type(loaded) is EvolmConfig
    assert loaded.is_heterogeneous
    found = [
        (layer.num_attention_heads, layer.num_key_value_heads, layer.head_dim, layer.intermediate_size)
        for layer in (loaded.per_layer_config[index] for index in range(2))
    ]
    assert found == [(4, 2, 8, 48), (2, 1, 8, 96)]


def test_layers_that_are_alike_are_said_once(recipe_of):
    alike = recipe_of(model={"n_heads": [4, 4], "n_kv_heads": [2, 2], "ffn_dim": [48, 48], "head_dim": 8})
    assert not config_of(alike).is_heterogeneous


def test_the_configuration_says_what_the_recipe_says(recipe_of):
    config = config_of(recipe_of(data={"sequence_length": 64}, model={"rope_theta": 5e5, "norm_eps": 1e-5}))
    assert config.rope_parameters["rope_theta"] == 5e5
    assert config.rms_norm_eps == 1e-5
    assert config.max_position_embeddings == 64
    assert (config.pad_token_id, config.bos_token_id, config.eos_token_id) == (0, 1, 2)


def test_modules_have_the_same_order_in_every_process():
    """Whatever Python's seed of hashes is: ranks exchange parameters in that order."""
    script = (
        "from trainer.model import EvolmConfig, EvolmForCausalLM\n"
        "config = EvolmConfig(hidden_size=8, head_dim=8, num_attention_heads=1, num_key_value_heads=1, "
        "num_hidden_layers=1, intermediate_size=8, vocab_size=16, norm_placement='sandwich')\n"
        "print([name for name, _ in EvolmForCausalLM(config).named_modules()])"
    )
    told = {
        subprocess.run(
            [sys.executable, "-c", script],
            env={**os.environ, "PYTHONHASHSEED": str(seed)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in (0, 1, 2)
    }
    assert len(told) == 1
