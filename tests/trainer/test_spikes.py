"""Guards steps that are skipped: which ones, that they change nothing, and that a run that keeps spiking ends."""

import math
import statistics

import pytest
import torch

from trainer.checkpoint import read_state
from trainer.errors import Diverged
from trainer.loop import train
from trainer.model import build_model
from trainer.objective import training_loss
from trainer.records import Checkpoints
from trainer.stability import LEAST, MOST_SKIPPED, WINDOW, Spikes

STEP = 128


def wave(step):
    """A loss that goes up and down."""
    return 4.0 + math.sin(step)


def seen(spikes, steps, loss=wave, norm=lambda step: 1.0 + 0.1 * math.cos(step)):
    return [spikes.skip(step, loss(step), norm(step)) for step in range(steps)]


@pytest.mark.parametrize("which", ["loss", "norm"])
def test_what_is_more_than_so_many_deviations_above_the_mean_is_skipped(which):
    """The threshold is that of the statistics module, from either side."""
    for sign, skipped in ((1, True), (-1, False)):
        spikes = Spikes(3.0)
        assert not any(seen(spikes, 50))
        known = list(spikes.losses if which == "loss" else spikes.norms)
        value = statistics.fmean(known) + 3.0 * statistics.pstdev(known) + sign * 1e-6
        pair = (value, 1.0) if which == "loss" else (4.0, value)
        assert spikes.skip(50, *pair) is skipped


def test_low_values_are_no_spikes():
    spikes = Spikes(1.0)
    seen(spikes, 50)
    assert not spikes.skip(50, -100.0, 0.0)


def test_the_first_steps_are_never_skipped():
    spikes = Spikes(0.5)
    assert not any(spikes.skip(step, 10.0**step, 1.0) for step in range(LEAST))


def test_a_skipped_step_is_not_compared_with():
    spikes = Spikes(3.0)
    seen(spikes, 50)
    before = list(spikes.losses)
    assert spikes.skip(50, 1e6, 1.0)
    assert list(spikes.losses) == before
    assert (spikes.skipped, spikes.in_a_row) == (1, 1)
    assert not spikes.skip(51, 4.0, 1.0)
    assert (spikes.skipped, spikes.in_a_row) == (1, 0)


def test_only_the_last_steps_are_compared_with():
    spikes = Spikes(3.0)
    seen(spikes, 20, loss=lambda step: 100.0 + step)
    seen(spikes, WINDOW)
    assert len(spikes.losses) == WINDOW
    assert spikes.skip(0, 50.0, 1.0)


def test_too_many_in_a_row_are_no_spike():
    spikes = Spikes(3.0)
    seen(spikes, 50)
    for step in range(MOST_SKIPPED):
        assert spikes.skip(step, 1e6, 1.0)
    with pytest.raises(Diverged, match=r"step 7: 33 steps in a row .* more than 3 deviations above those before"):
        spikes.skip(7, 1e6, 1.0)


# --- in a run ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def spoilt(monkeypatch):
    """Losses are a thousand times as large in some steps; gives the weights after every step."""
    path, models = [], []

    def built(*args):
        models.append(build_model(*args))
        return models[-1]

    def losses(model, recipe, batch, **options):
        found = training_loss(model, recipe, batch, **options)
        factor = 1000.0 if len(path) in spoilt_steps else 1.0
        return found._replace(objective=factor * found.objective, nats=factor * found.nats)

    spoilt_steps = {45}
    monkeypatch.setattr("trainer.engines.single.build_model", built)
    monkeypatch.setattr("trainer.engines.single.training_loss", losses)

    def watch(progress):
        path.append((progress, torch.cat([one.detach().flatten() for one in models[-1].parameters()])))
        return True

    watch.path, watch.steps = path, spoilt_steps
    return watch


def test_a_spoilt_step_changes_no_weight_and_is_counted(recipe_of, corpus, spoilt):
    record = train(recipe_of(train={"skip_spikes": 50.0}), spoilt, corpus=corpus, tokens=60 * STEP)
    assert (record.finished, record.skipped_steps) == (True, 1)
    assert [progress.skipped_steps for progress, _ in spoilt.path] == [0] * 45 + [1] * 15
    assert spoilt.path[45][0].loss > 1000  # told as it was
    moved = [not torch.equal(one[1], other[1]) for one, other in zip(spoilt.path, spoilt.path[1:], strict=False)]
    assert moved == [True] * 44 + [False] + [True] * 14
    assert record.train_loss < 5


def test_without_it_the_spoilt_step_is_taken(recipe_of, corpus, spoilt):
    with pytest.raises(Diverged):
        train(recipe_of(), spoilt, corpus=corpus, tokens=60 * STEP)


def test_a_run_that_keeps_spiking_ends(recipe_of, corpus, spoilt):
    spoilt.steps.update(range(45, 200))
    with pytest.raises(Diverged, match="step 78: 33 steps in a row"):
        train(recipe_of(train={"skip_spikes": 50.0}), spoilt, corpus=corpus, tokens=200 * STEP)
    assert len(spoilt.path) == 45 + 32


def test_what_is_no_number_ends_the_run_as_ever(recipe_of, corpus, spoilt):
    spoilt.steps.clear()
    with pytest.raises(Diverged, match=r"step 1: loss .*, gradient norm nan"):
        train(recipe_of(model={"init_std": 1e38}, train={"skip_spikes": 50.0}), spoilt, corpus=corpus, tokens=STEP)


def test_without_spikes_it_is_the_same_run(recipe_of, corpus):
    plain, guarded = (
        train(recipe_of(train={"skip_spikes": deviations}), corpus=corpus, tokens=40 * STEP).model
        for deviations in (0.0, 50.0)
    )
    assert all(torch.equal(one, other) for one, other in zip(plain.parameters(), guarded.parameters(), strict=True))


@pytest.mark.parametrize("stop", [40, 46], ids=["before", "after"])
def test_a_run_that_goes_on_skips_as_if_it_had_not_stopped(recipe_of, corpus, spoilt, tmp_path, stop):
    recipe = recipe_of(train={"skip_spikes": 50.0})
    whole = train(recipe, spoilt, corpus=corpus, tokens=60 * STEP)
    spoilt.path.clear()
    checkpoints = Checkpoints(latest=tmp_path / "latest")
    report = lambda progress: spoilt(progress) and len(spoilt.path) < stop  # noqa: E731
    train(recipe, report, corpus=corpus, tokens=60 * STEP, checkpoints=checkpoints)
    state = read_state(tmp_path / "latest")
    assert len(state.spikes["losses"]) == min(stop, 45)
    rest = train(recipe, spoilt, corpus=corpus, tokens=60 * STEP, start=tmp_path / "latest")
    assert rest.skipped_steps == whole.skipped_steps == 1
    for one, other in zip(rest.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(one, other)
