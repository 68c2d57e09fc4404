"""Guards the mean of the weights: what it is, that it is what is scored and saved, and that training goes on from the
weights themselves."""

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from trainer.averaging import Average
from trainer.checkpoint import load_weights, read_state
from trainer.errors import CheckpointError
from trainer.loop import train
from trainer.model import build_model
from trainer.records import Checkpoints
from trainer.stages.pretrain import Stage, load_final, pretrain

STEP = 128


def walked(decay, steps):
    """A mean over a walk of weights, and the walk."""
    module = nn.Linear(3, 2)
    average, path = Average(module, decay), []
    for step in range(steps):
        with torch.no_grad():
            module.weight.copy_(torch.randn(2, 3, generator=torch.Generator().manual_seed(step)))
        average.update(step)
        path.append(module.weight.detach().double().clone())
    return module, average, path


@pytest.mark.parametrize("decay", [0.3, 0.9, 0.999])
@pytest.mark.parametrize("steps", [1, 2, 17])
def test_it_is_the_exponential_mean_of_all_steps(decay, steps):
    _, average, path = walked(decay, steps)
    weights = [decay ** (steps - 1 - index) for index in range(steps)]
    expected = sum(weight * one for weight, one in zip(weights, path, strict=True)) / sum(weights)
    torch.testing.assert_close(average.state()["weight"].double(), expected, rtol=1e-5, atol=1e-6)


def test_the_model_has_it_for_a_while_and_then_its_own_weights_again():
    module, average, path = walked(0.5, 4)
    mean = average.state()["weight"].clone()
    with average.in_place():
        torch.testing.assert_close(module.weight.detach(), mean)
    assert torch.equal(module.weight.detach().double(), path[-1])
    assert torch.equal(average.state()["weight"], mean)


def test_an_error_in_between_leaves_the_weights():
    module, average, path = walked(0.5, 4)
    with pytest.raises(ZeroDivisionError), average.in_place():
        _ = 1 / 0
    assert torch.equal(module.weight.detach().double(), path[-1])


@pytest.fixture
def runs(recipe_of, corpus, tmp_path, monkeypatch):
    """A run with a mean and the same without; returns their records and the weights after each step of the latter."""
    path, models = [], []

    def built(*args):
        models.append(build_model(*args))
        return models[-1]

    monkeypatch.setattr("trainer.engines.single.build_model", built)

    def watch(progress):
        path.append({name: one.detach().double().clone() for name, one in models[-1].named_parameters()})
        return True

    def go(ema, report):
        checkpoints = Checkpoints(final=tmp_path / f"{ema}")
        recipe = recipe_of(train={"ema": ema})
        return train(recipe, report, corpus=corpus, tokens=6 * STEP, checkpoints=checkpoints)

    return go(0.0, watch), go(0.8, lambda progress: True), path


def test_what_is_trained_is_the_same_and_what_is_given_is_the_mean(runs, tmp_path):
    plain, averaged, path = runs
    assert averaged.train_loss == plain.train_loss
    shares = [0.8 ** (5 - index) for index in range(6)]
    for name, found in averaged.model.named_parameters():
        expected = sum(share * one[name] for share, one in zip(shares, path, strict=True)) / sum(shares)
        torch.testing.assert_close(found.detach().double(), expected, rtol=1e-5, atol=1e-6)
        assert torch.equal(load_file(tmp_path / "0.8" / "model.safetensors")[name], found)
        assert torch.equal(load_file(tmp_path / "0.8" / "raw.safetensors")[name].double(), path[-1][name])


def test_a_checkpoint_without_a_mean_has_no_third_file(runs, tmp_path):
    assert {file.name for file in (tmp_path / "0.0").iterdir()} == {
        "model.safetensors",
        "optimizer.safetensors",
        "checkpoint.json",
    }


def test_the_weights_that_are_judged_can_be_loaded_alone(runs, recipe_of, tmp_path):
    _, averaged, _ = runs
    model = build_model(recipe_of(), 1)
    assert load_weights(tmp_path / "0.8", model) == read_state(tmp_path / "0.8")
    for one, other in zip(model.parameters(), averaged.model.parameters(), strict=True):
        assert torch.equal(one, other)
    with pytest.raises(CheckpointError, match="does not fit this model"):
        load_weights(tmp_path / "0.8", build_model(recipe_of(model={"d_model": 48}), 0))


def test_a_damaged_raw_file_is_noticed(runs, tmp_path):
    file = tmp_path / "0.8" / "raw.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    with pytest.raises(CheckpointError, match=r"raw\.safetensors: content differs from its checksum"):
        read_state(tmp_path / "0.8")


def test_a_finished_stage_gives_the_mean(recipe_of, corpus, tmp_path):
    recipe = recipe_of(train={"ema": 0.9})
    record = pretrain(recipe, corpus, tmp_path, tokens=6 * STEP, seed=0)
    loaded = load_final(Stage(tmp_path), recipe)
    assert all(
        torch.equal(one, other) for one, other in zip(loaded.parameters(), record.model.parameters(), strict=True)
    )
