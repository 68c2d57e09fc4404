"""Guards training in fp16: the loss is scaled, overflows cost a step and no run, and the scale is in the checkpoint.

On this machine there may be no GPU: what is tested is the loop itself, past the refusal that guards CPUs from it.
"""

import math

import pytest
import torch

from search_spaces.errors import UsageError
from trainer.checkpoint import read_state
from trainer.errors import Diverged
from trainer.loop import train
from trainer.loss_scale import SMALLEST, LossScale
from trainer.optim import build_optimizer
from trainer.records import Checkpoints

STEP = 128
CPU = torch.device("cpu")


@pytest.fixture
def anywhere(monkeypatch):
    """fp16 is let through."""
    monkeypatch.setattr("trainer.loop.unusable_precision", lambda precision, device: None)


def test_on_a_cpu_it_is_refused(recipe_of, corpus):
    with pytest.raises(UsageError, match=r"train.precision 'fp16' is for GPUs: .* use bf16 or fp32"):
        train(recipe_of(train={"precision": "fp16"}), corpus=corpus, tokens=STEP)


class One(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(2, 2))
        self.bias = torch.nn.Parameter(torch.ones(2))


@pytest.fixture
def one(recipe_of):
    """A small module, its optimiser and a scale."""
    module = One()
    return module, build_optimizer(module, recipe_of()), LossScale(CPU)


def test_gradients_have_their_own_size_when_they_are_used(one):
    module, optimizer, scale = one
    scale.scaled((3 * module.weight).sum()).backward()
    assert (module.weight.grad > 3 * 2**15).all()
    scale.unscale(optimizer)
    torch.testing.assert_close(module.weight.grad, torch.full((2, 2), 3.0))
    scale.step(optimizer)
    assert not torch.equal(module.weight.detach(), torch.ones(2, 2))


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_an_overflow_leaves_the_weights_and_halves_the_scale(recipe_of, optimizer):
    module, scale = One(), LossScale(CPU)
    optimizer = build_optimizer(module, recipe_of(train={"optimizer": optimizer}))
    before = scale.state()["scale"]
    scale.scaled((3e38 * module.weight).sum() + module.bias.sum()).backward()
    scale.unscale(optimizer)
    scale.step(optimizer)
    assert torch.equal(module.weight.detach(), torch.ones(2, 2))
    assert torch.equal(module.bias.detach(), torch.ones(2))
    assert scale.state()["scale"] == before / 2


def test_a_step_that_is_skipped_leaves_weights_and_scale(one):
    module, optimizer, scale = one
    before = scale.state()["scale"]
    scale.scaled(module.weight.sum()).backward()
    scale.unscale(optimizer)
    scale.step(optimizer, skip=True)
    assert torch.equal(module.weight.detach(), torch.ones(2, 2))
    assert scale.state()["scale"] == before


def test_which_overflows_are_the_scales_fault():
    scale = LossScale(CPU)
    assert scale.overflowed(1, 5.0, float("inf"))
    assert not scale.overflowed(1, 5.0, 1.0)
    assert not scale.overflowed(1, float("nan"), float("nan"))  # no scale makes a loss infinite
    scale.load({**scale.state(), "scale": SMALLEST / 2})
    scale.scaled(torch.ones(1, requires_grad=True).sum()).backward()  # the scale is made when it is first used
    with pytest.raises(Diverged, match="step 9: gradient norm inf in fp16"):
        scale.overflowed(9, 5.0, float("inf"))


@pytest.mark.usefixtures("anywhere")
def test_a_run_in_fp16_follows_one_in_fp32(recipe_of, corpus):
    losses = {}
    for precision in ("fp32", "fp16"):
        told = losses.setdefault(precision, [])
        recipe = recipe_of(model={"n_layers": 1}, train={"precision": precision})
        train(recipe, lambda p, told=told: told.append(p.loss) or True, corpus=corpus, tokens=4 * STEP)
    assert losses["fp16"] == pytest.approx(losses["fp32"], abs=0.03)
    assert losses["fp16"] != losses["fp32"]


@pytest.mark.usefixtures("anywhere")
def test_an_overflow_is_no_divergence_and_its_scale_is_kept(recipe_of, corpus, tmp_path, monkeypatch):
    """From a scale that is too large: the first steps are left out, the run goes on, stops and goes on again."""
    recipe = recipe_of(model={"n_layers": 1}, train={"precision": "fp16", "skip_spikes": 6.0})
    scaler = torch.amp.GradScaler
    monkeypatch.setattr("torch.amp.GradScaler", lambda kind: scaler(kind, init_scale=2.0**127))
    seen, whole = [], train(recipe, corpus=corpus, tokens=4 * STEP, checkpoints=Checkpoints(final=tmp_path / "whole"))
    train(
        recipe,
        lambda progress: seen.append(progress) or len(seen) < 2,
        corpus=corpus,
        tokens=4 * STEP,
        checkpoints=Checkpoints(latest=tmp_path / "latest"),
    )
    assert not math.isfinite(seen[0].gradient_norm)
    assert seen[0].skipped_steps == 0
    state = read_state(tmp_path / "latest")
    assert state.scaler["scale"] == 2.0**125
    assert state.spikes["losses"] == []
    rest = train(recipe, corpus=corpus, tokens=4 * STEP, start=tmp_path / "latest")
    assert all(torch.equal(a, b) for a, b in zip(rest.model.parameters(), whole.model.parameters(), strict=True))
