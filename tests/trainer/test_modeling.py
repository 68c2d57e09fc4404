"""Guards the model: against a reference written from the formulas, and against itself in every way it is run."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference_transformer import reference_logits
from torch.nn import functional
from transformers import AutoConfig, AutoModelForCausalLM

from trainer.model import EvolmConfig, EvolmForCausalLM, build_model, config_of

VOCABULARY = 320


def random_ids(rows=2, length=16, seed=0):
    return torch.randint(3, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


def shaken(model, seed=1):
    """The model with every weight, norms too, moved away from where initialisation puts it."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


@pytest.fixture
def model_of(recipe_of):
    return lambda seed=0, **model: shaken(build_model(recipe_of(model=model), seed))


PER_LAYER = {"n_heads": [4, 2], "n_kv_heads": [2, 1], "ffn_dim": [48, 96], "head_dim": 8}

MOE = {"ffn": "moe", "n_experts": 4}

SHAPES = {
    "mha": {},
    "gqa": {"n_heads": 4, "n_kv_heads": 2},
    "mqa": {"n_heads": 4, "n_kv_heads": 1},
    "free head size": {"n_heads": 3, "head_dim": 10},
    "per layer": PER_LAYER,
    "one layer": {"n_layers": 1},
    "gelu": {"ffn": "gelu"},
    "relu2": {"ffn": "relu2"},
    "moe": MOE,
    "moe, three of five, per layer": {**PER_LAYER, **MOE, "n_experts": 5, "n_active_experts": 3},
    "no qk-norm": {"qk_norm": False},
    "untied": {"tie_embeddings": False},
    "rope and eps": {"rope_theta": 500.0, "norm_eps": 1e-2},
}

every_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())


# --- the function it computes -----------------------------------------------------------------------------------------


@every_shape
@torch.no_grad()
def test_logits_are_those_of_the_formulas(recipe_of, model_of, shape):
    model, ids = model_of(**shape), random_ids()
    for row, logits in zip(ids, model(ids).logits, strict=True):
        expected = reference_logits(model.state_dict(), recipe_of(model=shape), row)
        assert (logits - expected).abs().max() < 2e-5 * expected.abs().max()


@st.composite
def shapes(draw):
    layers = draw(st.integers(1, 3))
    kv_heads = draw(st.lists(st.integers(1, 3), min_size=layers, max_size=layers))
    groups = draw(st.lists(st.integers(1, 3), min_size=layers, max_size=layers))
    return {
        "d_model": draw(st.integers(4, 24)),
        "n_layers": layers,
        "n_heads": [heads * group for heads, group in zip(kv_heads, groups, strict=True)],
        "n_kv_heads": kv_heads,
        "head_dim": 2 * draw(st.integers(1, 6)),
        **draw(
            st.sampled_from([{"ffn": "swiglu"}, {"ffn": "gelu"}, {"ffn": "relu2"}])
            | st.fixed_dictionaries(
                {"ffn": st.just("moe"), "n_experts": st.integers(4, 8), "n_active_experts": st.integers(1, 4)}
            )
        ),
        "ffn_dim": draw(st.lists(st.integers(1, 40), min_size=layers, max_size=layers)),
        "qk_norm": draw(st.booleans()),
        "tie_embeddings": draw(st.booleans()),
        "rope_theta": draw(st.sampled_from([10.0, 10_000.0, 1e6])),
    }


@settings(derandomize=True, deadline=None, max_examples=12)
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
@torch.no_grad()
def test_eager_attention_equals_the_fused_kernel(model_of, shape):
    model, ids = model_of(**shape), random_ids()
    fused = model(ids).logits
    model.set_attn_implementation("eager")
    torch.testing.assert_close(model(ids).logits, fused, atol=1e-5, rtol=1e-4)


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
    model, ids = model_of(**shape), random_ids()
    padded = torch.cat([torch.zeros(2, 5, dtype=torch.int64), ids], dim=1)
    mask = torch.cat([torch.zeros(2, 5, dtype=torch.int64), torch.ones_like(ids)], dim=1)
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0) if given_positions else None
    logits = model(padded, attention_mask=mask, position_ids=positions).logits[:, 5:]
    torch.testing.assert_close(logits, model(ids).logits, atol=1e-4, rtol=1e-4)


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


# --- mixtures of experts ----------------------------------------------------------------------------------------------


@pytest.fixture
def mixture_of(recipe_of):
    """A mixture by itself: 32 wide, its router and experts drawn wide enough to matter."""

    def build(**model):
        recipe = recipe_of(model={**MOE, "n_layers": 1, "init_std": 0.5, **model})
        return build_model(recipe, 0).model.layers[0].mlp

    return build


def test_one_expert_of_all_is_that_expert(mixture_of):
    """With one expert for each token its weight is one, whatever its probability."""
    mixture = mixture_of(n_active_experts=1)
    x = torch.randn(2, 9, 32, generator=torch.Generator().manual_seed(0))
    likeliest = mixture.gate(x).argmax(dim=-1)
    assert len(likeliest.unique()) == 4
    for token, expert, output in zip(x.flatten(0, 1), likeliest.flatten(), mixture(x).flatten(0, 1), strict=True):
        gate, up = (mixture.experts.gate_up_proj[expert] @ token).chunk(2)
        expected = mixture.experts.down_proj[expert] @ (functional.silu(gate) * up)
        torch.testing.assert_close(output, expected, atol=1e-5, rtol=1e-5)


def test_experts_that_are_alike_are_one_expert(mixture_of):
    """Weights sum to one, and no token is left out however many want the same expert."""
    mixture = mixture_of(n_active_experts=3)
    with torch.no_grad():
        for stack in (mixture.experts.gate_up_proj, mixture.experts.down_proj):
            stack.copy_(stack[:1].expand_as(stack).clone())
        mixture.gate.weight.mul_(100)
    x = torch.randn(1, 50, 32, generator=torch.Generator().manual_seed(0)).abs()
    gate, up = functional.linear(x, mixture.experts.gate_up_proj[0]).chunk(2, dim=-1)
    expected = functional.linear(functional.silu(gate) * up, mixture.experts.down_proj[0])
    torch.testing.assert_close(mixture(x), expected, atol=1e-4, rtol=1e-4)


def test_the_gradient_reaches_the_router_and_the_experts_that_were_used_alone(mixture_of):
    mixture = mixture_of(n_experts=8)
    x = torch.randn(1, 2, 32, generator=torch.Generator().manual_seed(0))
    used = set(mixture.gate(x).topk(2).indices.flatten().tolist())
    mixture(x).square().sum().backward()
    assert mixture.gate.weight.grad.abs().max() > 0
    for stack in (mixture.experts.gate_up_proj, mixture.experts.down_proj):
        assert {index for index, gradient in enumerate(stack.grad) if gradient.abs().max() > 0} == used
    assert 2 <= len(used) < 8


def test_gradients_of_a_mixture_are_those_of_the_formula(recipe_of):
    """Every weight's, against the derivative of the reference, in which every expert is a formula."""
    recipe = recipe_of(model=MOE)
    model, ids = shaken(build_model(recipe, 0)), random_ids(rows=1, length=9)
    model(ids).logits.square().sum().backward()
    copies = {name: weight.detach().clone().requires_grad_() for name, weight in model.named_parameters()}
    reference_logits(copies, recipe, ids[0], differentiable=True).square().sum().backward()
    for name, weight in model.named_parameters():
        scale = copies[name].grad.abs().max()
        assert (weight.grad - copies[name].grad).abs().max() < 1e-4 * scale, name


def test_the_router_is_exact_in_bf16(mixture_of):
    mixture = mixture_of()
    x = torch.randn(1, 4, 32, generator=torch.Generator().manual_seed(0)).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = mixture.gate(x)
        assert mixture(x).dtype == torch.bfloat16
    assert torch.equal(logits, x.float() @ mixture.gate.weight.T)


@torch.no_grad()
def test_what_the_routers_said_can_be_asked_for(model_of):
    model, ids = model_of(**MOE), random_ids()
    asked = model.model(ids, output_router_logits=True)
    assert [logits.shape for logits in asked.router_logits] == [(2, 16, 4)] * 2
    assert model.model(ids).router_logits is None
    assert torch.equal(asked.last_hidden_state, model.model(ids).last_hidden_state)


# --- initial weights --------------------------------------------------------------------------------------------------


def test_weights_come_from_the_seed_alone(recipe):
    torch.manual_seed(123)
    before = torch.random.get_rng_state()
    one, same, other = (build_model(recipe, seed).state_dict() for seed in (0, 0, 1))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not torch.equal(one["model.embed_tokens.weight"], other["model.embed_tokens.weight"])


@pytest.mark.parametrize("shape", [{}, {**MOE, "n_experts": 32}], ids=["dense", "moe"])
def test_what_writes_to_the_residual_stream_begins_smaller(recipe_of, shape):
    recipe = recipe_of(model={"d_model": 128, "n_layers": 8, "n_heads": 4, "init_std": 0.05, **shape})
    for name, weight in build_model(recipe, 0).named_parameters():
        if "norm" in name:
            assert torch.equal(weight, torch.ones_like(weight))
        else:
            residual = "o_proj" in name or "down_proj" in name
            assert weight.std().item() == pytest.approx(0.05 / (4 if residual else 1), rel=0.05)


def test_tied_embeddings_are_one_tensor(recipe_of):
    tied, untied = (build_model(recipe_of(model={"tie_embeddings": tie}), 0) for tie in (True, False))
    assert tied.lm_head.weight is tied.model.embed_tokens.weight
    assert untied.lm_head.weight is not untied.model.embed_tokens.weight


# --- saving -----------------------------------------------------------------------------------------------------------


@every_shape
@torch.no_grad()
def test_what_is_saved_is_what_is_loaded(model_of, shape, tmp_path):
    model, ids = model_of(**shape), random_ids()
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert type(loaded) is EvolmForCausalLM
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
