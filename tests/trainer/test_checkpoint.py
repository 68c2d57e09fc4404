"""Guards checkpoints: whole or absent, given back bit by bit, refused when anything about them has changed."""

import json
import shutil

import pytest
import torch
from safetensors import SafetensorError

from trainer import checkpoint
from trainer.checkpoint import RunState, load_checkpoint, read_state, save_checkpoint
from trainer.errors import CheckpointError
from trainer.model import build_model
from trainer.optim import build_optimizer

FILES = ["model.safetensors", "optimizer.safetensors", "checkpoint.json"]


def state(samples=12, horizon=None):
    return RunState(
        samples=samples, recipe="r", tokenizer="t", corpus="c", seed=3, horizon=horizon, seconds=1.5, flops=2e9
    )


@pytest.fixture
def trained(recipe):
    """A model and its optimiser after two steps."""
    model = build_model(recipe, 0)
    optimizer = build_optimizer(model, recipe)
    ids = torch.arange(3, 35).unsqueeze(0)
    for _ in range(2):
        optimizer.zero_grad()
        model(ids, labels=ids).loss.backward()
        optimizer.step()
    return model, optimizer


@pytest.fixture
def fresh(recipe):
    model = build_model(recipe, 1)
    return model, build_optimizer(model, recipe)


@pytest.fixture
def saved(trained, tmp_path):
    save_checkpoint(tmp_path / "latest", *trained, state())
    return tmp_path / "latest"


def equal(one, other):
    """Whether two (model, optimiser) pairs hold the same bits."""
    pairs = zip(one[0].parameters(), other[0].parameters(), strict=True)
    return all(
        torch.equal(a, b)
        and all(torch.equal(one[1].state[a][key], other[1].state[b][key]) for key in ("exp_avg", "exp_avg_sq", "step"))
        for a, b in pairs
    )


# --- back and forth ---------------------------------------------------------------------------------------------------


def test_what_is_saved_is_what_is_loaded(saved, trained, fresh):
    assert load_checkpoint(saved, *fresh) == state()
    assert equal(trained, fresh)


def test_a_loaded_optimiser_steps_as_the_saved_one_would(saved, trained, fresh):
    load_checkpoint(saved, *fresh)
    ids = torch.arange(3, 35).unsqueeze(0)
    for model, optimizer in (trained, fresh):
        optimizer.zero_grad()
        model(ids, labels=ids).loss.backward()
        optimizer.step()
    assert equal(trained, fresh)


def test_it_is_safetensors_and_json(saved):
    assert sorted(path.name for path in saved.iterdir()) == sorted(FILES)
    manifest = json.loads((saved / "checkpoint.json").read_text())
    assert manifest["state"]["samples"] == 12
    assert set(manifest["files"]) == set(FILES) - {"checkpoint.json"}


def test_the_state_alone_can_be_read(saved):
    assert read_state(saved) == state()


def test_parent_folders_are_made(trained, tmp_path):
    save_checkpoint(tmp_path / "a" / "b" / "latest", *trained, state())
    assert read_state(tmp_path / "a" / "b" / "latest") == state()


# --- replacing --------------------------------------------------------------------------------------------------------


def test_a_new_one_takes_the_place_of_the_old_and_nothing_is_left_beside_it(saved, trained):
    save_checkpoint(saved, *trained, state(samples=20, horizon=40))
    assert read_state(saved) == state(samples=20, horizon=40)
    assert [path.name for path in saved.parent.iterdir()] == ["latest"]


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_the_last_saves_are_kept_the_newest_under_its_own_name(trained, tmp_path, keep):
    for samples in range(1, 6):
        save_checkpoint(tmp_path / "latest", *trained, state(samples), keep=keep)
    names = ["latest", "latest-1", "latest-2"][:keep]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    assert [read_state(tmp_path / name).samples for name in names] == [5, 4, 3][:keep]


def test_a_save_that_fails_leaves_the_old_one(saved, trained, fresh, monkeypatch):
    def full(content, path):
        raise SafetensorError("I/O error: No space left on device (os error 28)")  # what it really raises

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(OSError, match="No space left") as told:
        save_checkpoint(saved, *trained, state(samples=20))
    assert told.value.errno == 28
    assert load_checkpoint(saved, *fresh) == state()
    assert [path.name for path in saved.parent.iterdir()] == ["latest"]


def test_what_a_crash_left_behind_is_not_looked_at(saved, trained, fresh):
    for name in ("latest.tmp-0123abcd", "latest.old-0123abcd"):
        shutil.copytree(saved, saved.with_name(name))
        (saved.with_name(name) / "model.safetensors").write_bytes(b"half")
    assert load_checkpoint(saved, *fresh) == state()
    save_checkpoint(saved, *trained, state(samples=16))
    assert read_state(saved).samples == 16


# --- damage -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", [0.0, 0.5, 0.999])
@pytest.mark.parametrize("name", FILES[:2])
def test_a_flipped_bit_is_noticed(saved, fresh, name, place):
    raw = bytearray((saved / name).read_bytes())
    raw[int(place * len(raw))] ^= 1
    (saved / name).write_bytes(raw)
    with pytest.raises(CheckpointError, match=f"{name}: content differs from its checksum"):
        load_checkpoint(saved, *fresh)


@pytest.mark.parametrize("name", FILES)
def test_a_torn_file_is_noticed(saved, fresh, name):
    raw = (saved / name).read_bytes()
    (saved / name).write_bytes(raw[: len(raw) // 2])
    with pytest.raises(CheckpointError):
        load_checkpoint(saved, *fresh)


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_noticed(saved, name):
    (saved / name).unlink()
    with pytest.raises(CheckpointError, match=f"{saved}: not a complete checkpoint"):
        read_state(saved)


def test_a_missing_or_empty_folder_is_no_checkpoint(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    for name in ("empty", "file", "gone"):
        with pytest.raises(CheckpointError, match="not a complete checkpoint"):
            read_state(tmp_path / name)


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda manifest: manifest["state"].pop("samples"), id="a field less"),
        pytest.param(lambda manifest: manifest["state"].update(surprise=1), id="a field more"),
        pytest.param(lambda manifest: manifest["state"].update(samples="12"), id="a text for a number"),
        pytest.param(lambda manifest: manifest.pop("files"), id="no checksums"),
        pytest.param(lambda manifest: manifest.update(files={"../model.safetensors": "0"}), id="a file elsewhere"),
        pytest.param(lambda manifest: manifest.update(files=None), id="no mapping"),
    ],
)
def test_a_manifest_that_says_something_else_is_refused(saved, change):
    manifest = json.loads((saved / "checkpoint.json").read_text())
    change(manifest)
    (saved / "checkpoint.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError):
        read_state(saved)


@pytest.mark.parametrize("shape", [{"d_model": 48}, {"n_layers": 3}, {"tie_embeddings": False}, {"ffn_dim": 32}])
def test_weights_of_another_shape_are_refused(saved, recipe_of, shape):
    recipe = recipe_of(model=shape)
    model = build_model(recipe, 0)
    with pytest.raises(CheckpointError, match="does not fit this model"):
        load_checkpoint(saved, model, build_optimizer(model, recipe))
