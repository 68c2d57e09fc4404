"""Guards the stage of full training: a folder that belongs to one recipe, goes on where it stopped, and ends once."""

import json

import pytest
import torch

from trainer.checkpoint import read_state
from trainer.errors import CheckpointError, DataError
from trainer.loop import train
from trainer.stages.pretrain import Stage, load_final, pretrain, write_json

TOKENS = 8 * 128


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "runs" / "stage"


def go(recipe, corpus, folder, **options):
    return pretrain(recipe, corpus, folder, **{"tokens": TOKENS, "seed": 0, **options})


def stop_after(steps):
    return lambda progress: progress.tokens < steps * 128


def weights(model):
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


# --- what it leaves ---------------------------------------------------------------------------------------------------


def test_a_stage_leaves_recipe_metrics_and_final_weights(recipe, corpus, folder):
    record = go(recipe, corpus, folder)
    assert record.finished
    assert sorted(path.name for path in folder.iterdir()) == ["final", "metrics.jsonl", "recipe.json"]
    assert read_state(folder / "final").samples == 32
    assert json.loads((folder / "recipe.json").read_text()) == {
        "recipe": recipe.model_dump(mode="json"),
        "tokens": TOKENS,
        "seed": 0,
    }


def test_it_trains_what_the_loop_trains(recipe, corpus, folder):
    record = go(recipe, corpus, folder, seed=3)
    plain = train(recipe, corpus=corpus, tokens=TOKENS, seed=3)
    assert torch.equal(weights(record.model), weights(plain.model))


def test_metrics_are_progress_line_by_line(recipe, corpus, folder):
    steps = []
    go(recipe, corpus, folder, report=lambda progress: steps.append(progress) or True)
    found = lines(folder)
    assert [line["tokens"] for line in found] == [128 * n for n in range(1, 9)]
    assert [line["loss"] for line in found] == [step.loss for step in steps]


def test_a_long_run_writes_about_a_hundred_lines(recipe_of, corpus, folder):
    go(recipe_of(model={"d_model": 8, "n_layers": 1}, train={"batch_tokens": 32}), corpus, folder, tokens=32 * 300)
    assert 90 <= len(lines(folder)) <= 110


def test_the_final_model_can_be_loaded(recipe, corpus, folder):
    record = go(recipe, corpus, folder)
    model = load_final(Stage(folder), recipe)
    assert not model.training
    assert torch.equal(weights(model), weights(record.model))


def test_the_final_model_is_that_of_its_recipe_alone(recipe, recipe_of, corpus, folder):
    go(recipe, corpus, folder)
    with pytest.raises(CheckpointError, match="is of another recipe"):
        load_final(Stage(folder), recipe_of(train={"learning_rate": 0.02}))


# --- going on ---------------------------------------------------------------------------------------------------------


def test_a_stopped_stage_goes_on_where_it_stopped(recipe, corpus, folder):
    first = go(recipe, corpus, folder, report=stop_after(3))
    assert not first.finished
    second = go(recipe, corpus, folder)
    assert second.finished
    assert (first.tokens, second.tokens) == (3 * 128, TOKENS)
    assert [line["tokens"] for line in lines(folder)] == [128 * n for n in range(1, 9)]
    assert torch.equal(weights(second.model), weights(train(recipe, corpus=corpus, tokens=TOKENS).model))


def test_a_stage_whose_checkpoint_is_torn_begins_anew(recipe, corpus, folder):
    go(recipe, corpus, folder, report=stop_after(3))
    (folder / "checkpoints" / "latest" / "model.safetensors").write_bytes(b"torn")
    record = go(recipe, corpus, folder)
    assert record.finished
    assert record.flops == train(recipe, corpus=corpus, tokens=TOKENS).flops


def test_checkpoints_are_written_on_the_way(recipe, corpus, folder):
    def die(progress):
        if progress.tokens == 6 * 128:
            raise KeyboardInterrupt
        return True

    with pytest.raises(KeyboardInterrupt):
        go(recipe, corpus, folder, report=die, checkpoint_seconds=0.0)
    assert read_state(folder / "checkpoints" / "latest").samples == 5 * 4


def test_a_finished_stage_is_not_run_again(recipe, corpus, folder):
    go(recipe, corpus, folder)
    Stage(folder).finish({"tokens": TOKENS})
    steps = []
    assert go(recipe, corpus, folder, report=lambda progress: steps.append(progress) or True) is None
    assert steps == []


def test_finishing_drops_what_only_an_unfinished_stage_needs(recipe, corpus, folder):
    go(recipe, corpus, folder, report=stop_after(3))
    stage = Stage(folder)
    assert stage.record() is None
    stage.finish({"tokens": 1})
    assert stage.record() == {"tokens": 1}
    assert not (folder / "checkpoints").exists()


# --- one folder, one run ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("other", [{"tokens": 2 * TOKENS}, {"seed": 1}])
def test_a_folder_of_another_length_or_seed_is_refused(recipe, corpus, folder, other):
    go(recipe, corpus, folder, report=stop_after(1))
    with pytest.raises(DataError, match="holds another recipe, length or seed; give this one another folder"):
        go(recipe, corpus, folder, **other)


def test_a_folder_of_another_recipe_is_refused(recipe, recipe_of, corpus, folder):
    go(recipe, corpus, folder, report=stop_after(1))
    with pytest.raises(DataError, match=f"{folder}: holds another recipe"):
        go(recipe_of(train={"learning_rate": 0.02}), corpus, folder)


def test_json_is_replaced_as_a_whole(tmp_path):
    write_json(tmp_path / "a.json", {"a": 1})
    write_json(tmp_path / "a.json", {"a": 2})
    assert json.loads((tmp_path / "a.json").read_text()) == {"a": 2}
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]
