"""Guards the two refusals: a model that sees what it has to predict is found out, and an honest one is not."""

import pytest
import torch
from torch.nn import functional
from transformers.modeling_outputs import CausalLMOutputWithPast

from trainer.errors import Leak
from trainer.gates import check_causality, check_floor
from trainer.loop import train
from trainer.model import EvolmForCausalLM, build_model, config_of


class Peeking(EvolmForCausalLM):
    """Adds to each logit something of the tokens that come `ahead` positions later, times `strength`."""

    ahead = 1
    strength = 10.0

    def forward(self, input_ids, **kwargs):
        logits = super().forward(input_ids, **kwargs).logits
        later = functional.one_hot(input_ids, self.config.vocab_size).float().roll(-self.ahead, dims=1)
        later[:, -self.ahead :] = 0
        return CausalLMOutputWithPast(logits=logits + self.strength * later)


@pytest.fixture
def peeking(recipe):
    model = Peeking(config_of(recipe))

    def build(**settings):
        for name, value in settings.items():
            setattr(model, name, value)
        return model

    return build


def test_an_honest_model_passes(recipe_of):
    for shape in ({}, {"n_layers": 1, "n_heads": 4, "n_kv_heads": 1}, {"ffn": "relu2", "qk_norm": False}):
        model = build_model(recipe_of(model=shape), 0)
        check_causality(model)
        check_floor(model)


def test_a_trained_model_passes(recipe, corpus):
    model = train(recipe, corpus=corpus, tokens=32 * 200).model
    check_causality(model)
    check_floor(model)


@pytest.mark.parametrize("ahead", [1, 2, 7, 15])
def test_a_model_that_looks_ahead_is_found_out(peeking, ahead):
    with pytest.raises(Leak, match=r"changing the tokens from position \d+ on moved an earlier logit by"):
        check_causality(peeking(ahead=ahead))


def test_a_trace_of_the_next_token_is_enough(peeking):
    with pytest.raises(Leak):
        check_causality(peeking(strength=1e-3))


def test_attention_without_its_mask_is_found_out(recipe, monkeypatch):
    model = build_model(recipe, 0)
    check_causality(model)
    everything = torch.ones(1, 1, 32, 32, dtype=torch.bool)
    monkeypatch.setattr("trainer.model.modeling_evolm.create_causal_mask", lambda **kwargs: everything)
    with pytest.raises(Leak):
        check_causality(model)


def test_a_model_that_copies_the_next_token_is_below_the_entropy_of_random_tokens(peeking):
    with pytest.raises(Leak, match=r"loss [\d.]+ on random tokens is below their entropy, 5.768 nats"):
        check_floor(peeking(strength=20.0))


def test_a_model_that_knows_a_little_of_the_next_token_is_too(peeking):
    with pytest.raises(Leak):
        check_floor(peeking(strength=3.0))


def test_a_model_that_is_worse_than_guessing_is_no_leak(recipe):
    model = build_model(recipe, 0)
    with torch.no_grad():
        model.lm_head.weight *= 50
    check_floor(model)


def test_the_gates_leave_the_random_state_alone(recipe):
    model = build_model(recipe, 0)
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    check_causality(model)
    check_floor(model)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_a_run_of_a_leaking_model_is_refused_before_its_first_step(recipe, corpus, monkeypatch):
    everything = torch.ones(1, 1, 32, 32, dtype=torch.bool)
    monkeypatch.setattr("trainer.model.modeling_evolm.create_causal_mask", lambda **kwargs: everything)
    steps = []
    with pytest.raises(Leak) as error:
        train(recipe, lambda progress: steps.append(progress) or True, corpus=corpus, tokens=1000)
    assert error.value.reason == "leak"
    assert steps == []
