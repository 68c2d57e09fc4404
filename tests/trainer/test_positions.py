"""Guards positions: closed forms of angles, slopes and sinusoids, and what a model knows of places with each kind."""

import math

import pytest
import torch
from model_shapes import random_ids, shaken

from trainer.model import build_model, config_of
from trainer.model.positions_evolm import EvolmRotary, additive, alibi_slopes, rotate, sinusoids, with_distances


@pytest.fixture
def model_of(recipe_of):
    return lambda **model: shaken(build_model(recipe_of(model=model), 0))


@pytest.mark.parametrize(
    ("heads", "exponents"),
    [
        (1, [8]),
        (2, [4, 8]),
        (8, [1, 2, 3, 4, 5, 6, 7, 8]),
        (3, [4, 8, 2]),
        (6, [2, 4, 6, 8, 1, 3]),
        (12, [1, 2, 3, 4, 5, 6, 7, 8, 0.5, 1.5, 2.5, 3.5]),
    ],
)
def test_slopes_are_those_of_the_paper_and_its_code(heads, exponents):
    expected = torch.tensor([2.0**-exponent for exponent in exponents])
    torch.testing.assert_close(alibi_slopes(heads, torch.device("cpu")), expected)


def test_distances_are_added_where_a_key_is_seen():
    like = torch.empty(0)
    mask = with_distances(None, 2, range(2, 4), range(1, 4), 2, like)
    lowest = torch.finfo(torch.float32).min
    row = torch.tensor([[-1.0, 0.0, lowest], [lowest, -1.0, 0.0]])  # queries 2 and 3, keys 1 to 3, a window of 2
    for head, slope in enumerate((2**-4, 2**-8)):
        torch.testing.assert_close(mask[0, head], torch.where(row < -1, row, row * slope))


def test_a_mask_for_all_sequences_is_made_additive_once():
    seen = torch.ones(1, 1, 3, 3, dtype=torch.bool).tril()
    mask = additive(seen.expand(5, -1, -1, -1), torch.float32)
    assert mask.shape == (1, 1, 3, 3)
    assert torch.equal(mask == 0, seen)
    assert (mask[~seen] == -math.inf).all()
    each = seen.repeat(5, 1, 1, 1)
    assert additive(each, torch.float32) is each


def test_sinusoids_are_those_of_the_paper():
    table = sinusoids(torch.arange(50)[None], 6)[0]
    for position in (0, 1, 49):
        for pair in range(3):
            angle = position / 10_000 ** (2 * pair / 6)
            assert table[position, pair].item() == pytest.approx(math.sin(angle), abs=1e-5)
            assert table[position, 3 + pair].item() == pytest.approx(math.cos(angle), abs=1e-5)
    assert sinusoids(torch.arange(4)[None], 5).shape == (1, 4, 5)


@pytest.mark.parametrize(
    "model", [{}, {"rope_fraction": 0.5}, {"rope_scaling": "yarn", "rope_factor": 8.0}], ids=["whole", "half", "yarn"]
)
def test_scores_depend_on_distance_alone(recipe_of, model):
    rotary = EvolmRotary(config_of(recipe_of(model=model)))
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(1, 1, 1, 16, generator=generator) for _ in range(2))
    scores = []
    for first in (0, 5, 300):
        turned = [
            rotate(x, rotary(torch.tensor([[place]]), torch.float32)) for x, place in ((query, first + 7), (key, first))
        ]
        scores.append((turned[0] * turned[1]).sum())
    torch.testing.assert_close(torch.stack(scores), scores[0].expand(3), atol=1e-4, rtol=1e-4)


def test_a_part_of_each_head_is_left_as_it_is(recipe_of):
    rotary = EvolmRotary(config_of(recipe_of(model={"rope_fraction": 0.25})))
    x = torch.randn(2, 3, 9, 16, generator=torch.Generator().manual_seed(0))
    turned = rotate(x, rotary(torch.arange(9)[None], torch.float32))
    assert torch.equal(turned[..., 4:], x[..., 4:])
    assert not torch.isclose(turned[:, :, 1:, :4], x[:, :, 1:, :4]).all(dim=-1).any()


def test_frequencies_stay_exact_when_the_model_is_cast(model_of):
    model = model_of(rope_scaling="yarn", rope_factor=4.0)
    before = model.model.rotary.inv_freq.clone()
    assert torch.equal(model.to(torch.bfloat16).model.rotary.inv_freq, before)
    cos, _ = model.model.rotary(torch.tensor([[1000, 1001]]), torch.float32)
    assert (cos[..., 0, :] - cos[..., 1, :]).abs().max() > 0.1


@pytest.mark.parametrize("positions", ["rope", "alibi", "learned", "sinusoidal"])
@torch.no_grad()
def test_the_order_of_earlier_tokens_is_known(model_of, positions):
    model, ids = model_of(positions=positions), random_ids(rows=1)
    swapped = ids[:, [1, 0, *range(2, 16)]]
    assert (model(ids).logits - model(swapped).logits)[:, -1].abs().max() > 1e-3


@torch.no_grad()
def test_without_positions_a_single_block_does_not_know_it(model_of):
    model, ids = model_of(positions="none", n_layers=1), random_ids(rows=1)
    swapped = ids[:, [1, 0, *range(2, 16)]]
    torch.testing.assert_close(model(swapped).logits[:, -1], model(ids).logits[:, -1], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("positions", ["rope", "none"])
@torch.no_grad()
def test_what_has_left_every_window_is_forgotten(model_of, positions):
    """Two layers with a window of 3 see four tokens back."""
    model, ids = model_of(attention="sliding", window=3, positions=positions), random_ids(rows=1)
    changed = ids.clone()
    changed[:, 5] = (changed[:, 5] + 1) % 320
    moved = (model(changed).logits - model(ids).logits)[0].abs().amax(dim=-1) > 1e-6
    assert moved.tolist() == [5 <= place < 10 for place in range(16)]


@torch.no_grad()
def test_kernels_that_cannot_add_distances_are_refused(model_of):
    model = model_of(positions="alibi")
    model.config._attn_implementation = "flex_attention"
    model.model.masks = lambda *_: dict.fromkeys(model.model.mask_kinds)
    with pytest.raises(ValueError, match="attention 'flex_attention' cannot add alibi's distances: take sdpa or eager"):
        model.model.distances(None, ("full_attention", 2), torch.zeros(1, 4, 32), None, 0)
