"""Guards bits per byte and perplexity, against numbers that were worked out by hand with a tiny model."""

import math
from dataclasses import dataclass

import numpy as np
import pytest

from fitness.loss import DomainLoss, loss_metrics, score_domains

BIT = math.log(2)


class Counter:
    """A language model that is surprised by token t to t bits, whatever came before."""

    def token_nats(self, windows):
        return (windows[:, 1:] * BIT).astype(np.float32)


@dataclass
class Sample:
    """Held-out text: windows of tokens, and the bytes of each but the first."""

    tokens: np.ndarray
    bytes_of: np.ndarray

    @classmethod
    def of(cls, tokens, bytes_of):
        return cls(np.array(tokens, dtype=np.int64), np.array(bytes_of, dtype=np.int64))


WEB = Sample.of([[0, 4, 2], [9, 3, 3]], [[2, 1], [3, 2]])  # 12 bits, 8 bytes, 4 tokens
CODE = Sample.of([[0, 6, 6]], [[1, 3]])  # 12 bits, 4 bytes, 2 tokens


def metrics(domains, target=None):
    return loss_metrics(score_domains(Counter(), domains), target)


def test_bits_per_byte_are_all_bits_over_all_bytes():
    assert metrics({"web": WEB})["bits_per_byte/web"] == pytest.approx(12 / 8)


def test_the_first_token_of_a_window_is_given_and_not_predicted():
    other = Sample.of([[5, 4, 2], [1, 3, 3]], WEB.bytes_of)
    assert metrics({"web": other}) == metrics({"web": WEB})


def test_special_tokens_do_not_count():
    """Tokens that stand for no bytes add neither bits nor bytes, and no token to the perplexity."""
    plain, special = Sample.of([[0, 4, 2]], [[2, 2]]), Sample.of([[0, 4, 2, 1000]], [[2, 2, 0]])
    assert metrics({"web": special}) == pytest.approx(metrics({"web": plain}))


def test_totals_are_kept_per_domain():
    losses = score_domains(Counter(), {"web": WEB, "code": CODE})
    assert losses["web"] == DomainLoss(nats=pytest.approx(12 * BIT), bytes=8, tokens=4)
    assert losses["code"] == DomainLoss(nats=pytest.approx(12 * BIT), bytes=4, tokens=2)


def test_without_a_target_all_domains_weigh_the_same():
    found = metrics({"web": WEB, "code": CODE})
    assert found["bits_per_byte"] == pytest.approx((12 / 8 + 12 / 4) / 2)


def test_a_target_weighs_the_domains():
    found = metrics({"web": WEB, "code": CODE}, {"web": 3, "code": 1})
    assert found["bits_per_byte"] == pytest.approx((3 * 12 / 8 + 1 * 12 / 4) / 4)
    assert found["bits_per_byte/code"] == pytest.approx(12 / 4)


def test_a_domain_outside_the_target_is_measured_but_has_no_weight():
    found = metrics({"web": WEB, "code": CODE}, {"web": 1})
    assert found["bits_per_byte"] == found["bits_per_byte/web"] == pytest.approx(12 / 8)


def test_perplexity_is_per_token():
    assert metrics({"web": WEB})["perplexity"] == pytest.approx(2 ** (12 / 4))
    assert metrics({"code": CODE})["perplexity"] == pytest.approx(2 ** (12 / 2))


def test_perplexity_over_a_target_is_a_geometric_mean():
    assert metrics({"web": WEB, "code": CODE})["perplexity"] == pytest.approx(2 ** ((3 + 6) / 2))


def test_the_perplexity_of_a_hopeless_model_is_still_a_number():
    hopeless = Sample.of([[0, 5000]], [[1]])
    assert math.isfinite(metrics({"web": hopeless})["perplexity"])


def test_a_coarser_tokenizer_does_not_change_bits_per_byte():
    """The same text in two tokenizations, equally surprising in total."""
    letters, words = Sample.of([[0, 1, 2, 3, 2]], [[1, 1, 1, 1]]), Sample.of([[0, 3, 5]], [[2, 2]])
    assert metrics({"web": letters})["bits_per_byte"] == pytest.approx(metrics({"web": words})["bits_per_byte"])
    assert metrics({"web": letters})["perplexity"] < metrics({"web": words})["perplexity"]


class Exact:
    """A language model that is surprised by token t to t nats, which float32 holds exactly."""

    def token_nats(self, windows):
        return windows[:, 1:].astype(np.float32)


def test_sums_are_kept_in_double_precision():
    """In the model's own float32 the sum would be a multiple of 8."""
    text = Sample.of([[0, 2**26, *[1] * 999]], np.ones((1, 1000)))
    assert score_domains(Exact(), {"web": text})["web"].nats == 2**26 + 999


def test_a_uniform_model_needs_the_entropy_of_its_vocabulary():
    uniform = Sample.of([[0, 8, 8, 8]], [[1, 1, 1]])  # 8 bits a token of 256, one byte each
    assert metrics({"bytes": uniform})["bits_per_byte"] == pytest.approx(8)
    assert metrics({"bytes": uniform})["perplexity"] == pytest.approx(256)
