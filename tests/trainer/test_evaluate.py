"""Guards the scores of a trained model: the loss of each token, and from it bits per byte of held-out text."""

import math

import numpy as np
import pytest
import torch

from fitness.loss import loss_metrics, score_domains
from trainer import evaluate
from trainer.evaluate import TokenScorer
from trainer.loop import train
from trainer.model import build_model


@pytest.fixture(scope="module")
def model(recipe, corpus):
    return train(recipe, corpus=corpus, tokens=32 * 100).model


@pytest.fixture(scope="module")
def windows(corpus):
    return corpus.held_out("validation")["tales"].tokens


def log_likelihoods(model, windows):
    ids = torch.from_numpy(windows)
    with torch.no_grad():
        scores = model(ids[:, :-1]).logits.log_softmax(dim=-1)
    return scores.gather(2, ids[:, 1:, None])[:, :, 0].numpy()


def test_each_token_loses_its_negative_log_likelihood(model, recipe, windows):
    nats = TokenScorer(model, recipe).token_nats(windows)
    assert nats.shape == (len(windows), recipe.data.sequence_length)
    np.testing.assert_allclose(nats, -log_likelihoods(model, windows), rtol=1e-4, atol=1e-5)


def test_batches_do_not_matter(model, recipe, windows, monkeypatch):
    together = TokenScorer(model, recipe).token_nats(windows)
    monkeypatch.setattr(evaluate, "TOKENS_PER_BATCH", {"cpu": 100})
    np.testing.assert_allclose(TokenScorer(model, recipe).token_nats(windows), together, rtol=1e-4, atol=1e-5)


def test_a_recipe_in_bf16_is_scored_in_bf16(model, recipe, recipe_of, windows):
    exact = TokenScorer(model, recipe).token_nats(windows)
    rounded = TokenScorer(model, recipe_of(train={"precision": "bf16"})).token_nats(windows)
    assert rounded.dtype == np.float32
    assert not np.array_equal(rounded, exact)
    assert rounded.mean() == pytest.approx(exact.mean(), rel=0.01)


def test_a_model_without_training_needs_the_entropy_of_its_vocabulary(recipe, corpus):
    text = corpus.held_out("validation")
    losses = score_domains(TokenScorer(build_model(recipe, 0), recipe), text)
    for name, loss in losses.items():
        assert loss.nats_per_token == pytest.approx(math.log(320), rel=0.02)
        assert loss.bytes == text[name].bytes_of.sum()
        assert loss.tokens == (text[name].bytes_of > 0).sum()


def test_training_lowers_bits_per_byte_of_text_that_was_held_out(model, recipe, corpus):
    trained, guessing = (
        loss_metrics(score_domains(TokenScorer(one, recipe), corpus.held_out("test")))
        for one in (model, build_model(recipe, 0))
    )
    for name in ("bits_per_byte", "bits_per_byte/tales", "bits_per_byte/ledgers", "perplexity"):
        assert trained[name] < 0.85 * guessing[name]


def test_windows_are_scored_one_by_one(model, recipe, windows):
    """What comes after a window does not change what it loses."""
    scorer = TokenScorer(model, recipe)
    np.testing.assert_allclose(scorer.token_nats(windows[:5]), scorer.token_nats(windows)[:5], rtol=1e-4, atol=1e-5)


def test_scoring_leaves_no_gradients_behind(model, recipe, windows):
    model.zero_grad(set_to_none=True)
    TokenScorer(model, recipe).token_nats(windows)
    assert all(parameter.grad is None for parameter in model.parameters())
