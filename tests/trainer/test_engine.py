"""Guards generation: the same text for the same seed, never more than was asked for or than the context holds."""

import pytest
import torch

from search_spaces.errors import UsageError
from trainer.export.huggingface import export_huggingface
from trainer.loop import train
from trainer.serving.engine import Engine, Sampling

CONTEXT = 32
GREEDY = Sampling(temperature=0.0, max_tokens=10)


@pytest.fixture(scope="module")
def folder(recipe_of, corpus, tmp_path_factory):
    model = train(recipe_of(model={"tie_embeddings": False}), corpus=corpus, tokens=40 * 128).model
    folder = tmp_path_factory.mktemp("engine") / "hf"
    export_huggingface(model, corpus.tokenizer, folder, {})
    return folder


@pytest.fixture(scope="module")
def engine(folder):
    return Engine(folder)


@pytest.fixture(scope="module")
def tokens(engine):
    """The number of tokens of a text, the one that begins it included."""
    return lambda text: len(engine.tokenizer(text).input_ids)


def sampled(engine, **options):
    return engine.generate("A tale", Sampling(**{"max_tokens": 12, **options}))


def test_a_text_begins_with_its_prompt(engine):
    for prompt in ("A tale", "", "Grüße 🦜 ", "two\nlines"):
        assert engine.generate(prompt, GREEDY).startswith(prompt)


def test_at_temperature_0_the_text_is_always_the_same(engine):
    assert engine.generate("A tale", GREEDY) == engine.generate("A tale", GREEDY)
    assert sampled(engine, temperature=0.0, seed=1) == sampled(engine, temperature=0.0, seed=2)


def test_the_same_seed_gives_the_same_text_and_another_another(engine):
    assert sampled(engine, seed=1) == sampled(engine, seed=1)
    assert len({sampled(engine, seed=seed) for seed in range(6)}) > 1


def test_without_a_seed_texts_differ(engine):
    assert len({sampled(engine, temperature=2.0) for _ in range(6)}) > 1


@pytest.mark.parametrize("narrow", [{"top_k": 1}, {"top_p": 1e-6}, {"temperature": 1e-4}])
def test_sampling_among_one_token_is_taking_the_likeliest(engine, narrow):
    assert sampled(engine, seed=3, **narrow) == sampled(engine, temperature=0.0)


def test_top_k_and_top_p_leave_all_tokens_in_by_default(engine):
    assert (Sampling().top_k, Sampling().top_p) == (0, 1.0)
    assert len({sampled(engine, temperature=50.0, seed=seed) for seed in range(8)}) == 8


@pytest.mark.parametrize("limit", [1, 5, 12])
def test_no_more_tokens_than_asked_for(engine, tokens, limit):
    text = sampled(engine, temperature=0.0, max_tokens=limit)
    assert tokens("A tale") < tokens(text) <= tokens("A tale") + limit


def test_no_more_tokens_than_the_context_holds(engine, tokens):
    assert tokens(engine.generate("A tale", Sampling(temperature=0.0, max_tokens=1000))) <= CONTEXT


def test_a_prompt_that_leaves_room_for_one_token_gets_one(engine, tokens):
    prompt = "a" * (CONTEXT - 2)
    while tokens(prompt) < CONTEXT - 1:
        prompt += "z"
    assert tokens(prompt) == CONTEXT - 1
    assert engine.generate(prompt, GREEDY).startswith(prompt)


def test_a_prompt_that_fills_the_context_is_refused(engine, tokens):
    prompt = "tale " * CONTEXT
    with pytest.raises(UsageError) as error:
        engine.generate(prompt, GREEDY)
    assert str(error.value) == f"the prompt has {tokens(prompt)} tokens, the model's context is {CONTEXT}"


def test_padding_and_the_beginning_of_a_text_are_never_the_next_token(folder):
    """With weights that make both likelier than anything else, the next likeliest token is taken."""
    engine = Engine(folder)
    letter = engine.tokenizer.convert_tokens_to_ids("a")
    with torch.no_grad():
        for weight in engine.model.parameters():
            weight.zero_()
        engine.model.get_input_embeddings().weight.fill_(1)
        engine.model.model.norm.weight.fill_(1)
        engine.model.lm_head.weight[[engine.tokenizer.pad_token_id, engine.tokenizer.bos_token_id]] = 2
        engine.model.lm_head.weight[letter] = 1
    assert engine.generate("A tale", Sampling(temperature=0.0, max_tokens=4)) == "A taleaaaa"


def test_a_text_may_end_by_itself(folder):
    engine = Engine(folder)
    with torch.no_grad():
        for weight in engine.model.parameters():
            weight.zero_()
    assert engine.generate("A tale", GREEDY) == "A tale"  # all tokens are as likely: </s> is the first that is allowed


def test_a_missing_folder_is_said(tmp_path):
    with pytest.raises(UsageError, match="no exported model there"):
        Engine(tmp_path / "gone")
