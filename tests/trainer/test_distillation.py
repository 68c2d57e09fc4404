"""Guards learning from a teacher: that it is of the same tokenizer, what it says, what it costs, and that a run with
another teacher is another run."""

import json
import shutil

import pytest
import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM, CohereConfig, Gemma2Config, GraniteConfig

from search_spaces.errors import UsageError
from trainer.checkpoint import read_state
from trainer.cost import costs
from trainer.distillation import Teacher
from trainer.errors import CheckpointError, DataError
from trainer.export.huggingface import export_huggingface
from trainer.loop import train
from trainer.model import build_model
from trainer.objective import training_loss
from trainer.recipe_digest import recipe_digest
from trainer.records import Checkpoints

STEP = 128


@pytest.fixture(scope="module")
def teachers(recipe_of, corpus, tmp_path_factory):
    """Two exported models of the tiny recipe's tokenizer, a trained one and one that is not."""
    folder = tmp_path_factory.mktemp("teachers")
    wide = recipe_of(model={"d_model": 48, "n_layers": 1, "tie_embeddings": False})
    export_huggingface(train(wide, corpus=corpus, tokens=60 * STEP).model, corpus.tokenizer, folder / "good", {})
    export_huggingface(build_model(wide, 1), corpus.tokenizer, folder / "raw", {})
    return folder


@pytest.fixture
def taught(recipe_of, teachers):
    """The tiny recipe with a teacher."""
    return lambda name="good", **train: recipe_of(train={"teacher": str(teachers / name), **train})


# --- which teachers are refused ---------------------------------------------------------------------------------------


def test_a_recipe_without_one_has_none(recipe, corpus):
    assert Teacher.open(recipe, corpus.tokenizer) is None


def test_it_is_looked_for_below_the_roots(recipe_of, corpus, teachers, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipe = recipe_of(train={"teacher": "good"})
    assert Teacher.open(recipe, corpus.tokenizer, [tmp_path, teachers]) is not None
    with pytest.raises(DataError, match=r"train\.teacher 'good': no such folder"):
        Teacher.open(recipe, corpus.tokenizer, [tmp_path])
    shutil.copytree(teachers / "good", tmp_path / "good")
    assert Teacher.open(recipe, corpus.tokenizer) is not None


def test_one_of_another_tokenizer_is_refused(taught, corpus, teachers, tmp_path, recipe_of):
    shutil.copytree(teachers / "good", tmp_path / "other")
    file = tmp_path / "other" / "tokenizer.json"
    values = json.loads(file.read_text())
    values["model"]["vocab"] = {token: 319 - index for token, index in values["model"]["vocab"].items()}
    file.write_text(json.dumps(values))
    recipe = recipe_of(train={"teacher": str(tmp_path / "other")})
    with pytest.raises(DataError, match=r"other: has another tokenizer \(320 entries, the recipe's has 320\)"):
        train(recipe, corpus=corpus, tokens=STEP)
    file.write_text("no JSON")
    with pytest.raises(DataError, match=r"has another tokenizer \(0 entries"):
        train(recipe, corpus=corpus, tokens=STEP)
    file.unlink()
    with pytest.raises(DataError, match=r"has no tokenizer.json"):
        train(recipe, corpus=corpus, tokens=STEP)


def test_a_folder_without_a_model_is_refused(corpus, teachers, tmp_path, recipe_of):
    (tmp_path / "half").mkdir()
    shutil.copy(teachers / "good" / "tokenizer.json", tmp_path / "half")
    with pytest.raises(UsageError, match="half: no exported model there"):
        train(recipe_of(train={"teacher": str(tmp_path / "half")}), corpus=corpus, tokens=STEP)


def test_one_that_reads_less_is_refused(recipe_of, corpus, teachers):
    recipe = recipe_of(data={"sequence_length": 64}, train={"teacher": str(teachers / "good")})
    with pytest.raises(DataError, match=r"reads 32 tokens, data\.sequence_length is 64"):
        Teacher.open(recipe, corpus.tokenizer)


# --- what is learned --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_the_loss_is_that_of_text_and_teacher(taught, corpus, temperature):
    recipe = taught(distillation=0.3, distillation_temperature=temperature)
    teacher, model = Teacher.open(recipe, corpus.tokenizer), build_model(recipe, 0)
    batch = torch.from_numpy(corpus.loader(0).batch(0, 2))
    found = training_loss(model, recipe, batch, teacher=teacher)
    ours, theirs = (
        (one(batch[:, :-1]).logits.flatten(0, 1) / temperature).log_softmax(dim=1) for one in (model, teacher.model)
    )
    nats = functional.cross_entropy(temperature * ours, batch[:, 1:].flatten(), reduction="sum")
    distance = functional.kl_div(ours, theirs, reduction="sum", log_target=True)
    torch.testing.assert_close(found.nats.sum(), nats)
    torch.testing.assert_close(found.objective, 0.7 * nats + 0.3 * temperature**2 * distance, rtol=1e-5, atol=1e-3)
    found.objective.backward()
    assert all(parameter.grad is None for parameter in teacher.model.parameters())
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        (GraniteConfig, {"logits_scaling": 4.0}),
        (Gemma2Config, {"final_logit_softcapping": 3.0, "head_dim": 16}),
        (CohereConfig, {"logit_scale": 0.25}),
        (None, {"logit_multiplier": 0.5, "logit_softcap": 3.0}),
    ],
    ids=["granite", "gemma", "cohere", "evolm"],
)
def test_what_a_class_does_to_its_logits_is_done_to_a_teachers(recipe_of, kind, changes):
    if kind is None:
        model = build_model(recipe_of(model=changes), 0).eval()
    else:
        sizes = {"vocab_size": 320, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
        heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
        model = AutoModelForCausalLM.from_config(kind(**sizes, **heads, **changes, initializer_range=0.5)).eval()
    ids = torch.arange(3, 35).view(2, 16)
    with torch.no_grad():
        lesson = Teacher(model, "", share=0.5, temperature=1.0).lesson(ids)
        logits = lesson.multiplier * lesson.hidden @ lesson.weight.t()
        logits = lesson.softcap * torch.tanh(logits / lesson.softcap) if lesson.softcap else logits
        torch.testing.assert_close(logits, model(ids).logits.flatten(0, 1))
    assert (lesson.multiplier, lesson.softcap) != (1.0, 0.0)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_student_of_a_teacher_alone_comes_nearer_to_it(taught, corpus, precision):
    """And, the teacher having learned something, nearer to the text, of which it sees nothing else."""
    recipe = taught(distillation=1.0, precision=precision)
    seen = []
    train(recipe, lambda progress: seen.append(progress.loss) or True, corpus=corpus, tokens=40 * STEP)
    assert seen[-1] < seen[0] - 0.5


def test_no_share_is_no_teacher(taught, recipe_of, corpus):
    plain, idle = (train(one, corpus=corpus, tokens=4 * STEP) for one in (recipe_of(), taught(distillation=0.0)))
    for one, other in zip(plain.model.parameters(), idle.model.parameters(), strict=True):
        torch.testing.assert_close(one, other)


def test_micro_batches_and_pieces_change_nothing(taught, corpus):
    growing = {"sequence_start": 8, "sequence_ramp_tokens": 256, "adam_eps": 1e-3}
    whole, parts = (
        train(taught(**growing, micro_batch_tokens=size), corpus=corpus, tokens=5 * STEP + 64) for size in (128, 32)
    )
    assert parts.train_loss == pytest.approx(whole.train_loss, abs=1e-6)
    for one, other in zip(parts.model.parameters(), whole.model.parameters(), strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-5)


# --- what it costs, and what a run is known by ------------------------------------------------------------------------


def test_its_forward_pass_is_paid_for(taught, recipe_of, corpus, teachers):
    wide = recipe_of(model={"d_model": 48, "n_layers": 1, "tie_embeddings": False})
    record = train(taught(), corpus=corpus, tokens=2 * STEP)
    assert record.flops == 2 * STEP * (costs(recipe_of()).flops_per_token + 2 * costs(wide).params)


def test_a_run_with_another_teacher_is_another_run(taught, corpus, teachers, tmp_path):
    checkpoints = Checkpoints(latest=tmp_path / "latest")
    train(taught(), lambda progress: False, corpus=corpus, tokens=2 * STEP, checkpoints=checkpoints)
    assert read_state(tmp_path / "latest").teacher == Teacher.open(taught(), corpus.tokenizer).digest
    with pytest.raises(CheckpointError, match="is of another teacher"):
        train(taught("raw"), corpus=corpus, tokens=2 * STEP, start=tmp_path / "latest")
    shutil.copytree(teachers / "good", tmp_path / "moved")  # the same teacher elsewhere is the same
    moved = taught().model_copy(
        update={"train": taught().train.model_copy(update={"teacher": str(tmp_path / "moved")})}
    )
    assert train(moved, corpus=corpus, tokens=2 * STEP, start=tmp_path / "latest").finished


def test_what_is_said_of_a_teacher_counts_where_there_is_one(recipe_of):
    said = {"distillation": 0.9, "distillation_temperature": 2.0}
    assert recipe_digest(recipe_of(train=said)) == recipe_digest(recipe_of())
    changes = [{}, *({key: value} for key, value in said.items())]
    digests = {recipe_digest(recipe_of(train={"teacher": "somewhere", **change})) for change in changes}
    assert len(digests | {recipe_digest(recipe_of())}) == 4
    assert recipe_digest(recipe_of(train={"teacher": "elsewhere"})) in digests
