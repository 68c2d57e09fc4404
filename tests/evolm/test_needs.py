"""What a space needs of the machine is told before anything is launched: extras, GPUs, and rungs that train anew."""

from __future__ import annotations

from pathlib import Path

import pytest

from evolm.config import load_space
from evolm.needs import refuse_unmet, retrained
from search_spaces.errors import SpaceError
from trainer import extras


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without the extra."""
    monkeypatch.setattr(extras, "find_spec", lambda name: None)


def with_train(space_file: Path, line: str) -> Path:
    """The space with one line more in `train`."""
    text = space_file.read_text()
    assert "\ntrain:\n" in text
    space_file.write_text(text.replace("\ntrain:\n", f"\ntrain:\n  {line}\n"))
    return space_file


INSTALL = "needs the extra `optim`: pip install 'evolm[optim]'"


@pytest.mark.usefixtures("bare")
@pytest.mark.parametrize("line", ["optimizer: lion", "optimizer: {choice: [adamw, lion], baseline: adamw}"])
@pytest.mark.parametrize("command", [("validate",), ("search",)], ids=lambda command: command[0])
def test_a_missing_extra_is_told_at_its_line(evolm, space_file: Path, line: str, command: tuple[str, ...]) -> None:
    with_train(space_file, line)
    said = evolm(*command, space_file)
    number = 1 + space_file.read_text().splitlines().index(f"  {line}")
    assert said.code == 2
    assert INSTALL in said.err and f"{space_file}:{number}:" in said.err
    assert not Path("runs").exists()


@pytest.mark.usefixtures("bare")
def test_what_needs_no_extra_is_not_asked_for_one(evolm, space_file: Path) -> None:
    with_train(space_file, "optimizer: {choice: [adamw, muon, adafactor]}")
    assert evolm("validate", space_file, "--draws", "10").code == 0


def test_with_the_extra_all_are_there(evolm, space_file: Path) -> None:
    with_train(space_file, "optimizer: {choice: [adamw, lion, soap, adan, ademamix]}")
    assert evolm("validate", space_file, "--draws", "10").code == 0


@pytest.mark.parametrize("gpus", [0, 1])
@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("precision: {choice: [bf16, fp16]}", r"train.precision 'fp16' is for GPUs: .* use bf16 or fp32"),
        ("attention_kernel: flex", r"train.attention_kernel 'flex' has no backward pass on a CPU"),
    ],
)
def test_what_only_a_gpu_can_do_takes_one(space_file: Path, gpus: int, line: str, words: str) -> None:
    with_train(space_file, line)
    text = space_file.read_text()
    assert "resources:" not in text
    space_file.write_text(text + f"resources: {{gpus: {gpus}}}\n")
    file = load_space(space_file)
    if gpus:
        refuse_unmet(file)
        return
    with pytest.raises(SpaceError, match=words):
        refuse_unmet(file)


RECIPE = """
version: 1
data: {{sources: {{a: {{path: nowhere}}}}}}
train: {{tokens: 1000, {line}}}
"""


@pytest.mark.usefixtures("bare")
@pytest.mark.parametrize(
    ("line", "words"), [("optimizer: soap", INSTALL), ("precision: fp16", "train.precision 'fp16' is for GPUs")]
)
def test_a_recipe_is_refused_before_its_folder_is_made(evolm, tmp_path: Path, line: str, words: str) -> None:
    (tmp_path / "recipe.yaml").write_text(RECIPE.format(line=line))
    said = evolm("train", tmp_path / "recipe.yaml")
    assert said.code == 2 and words in said.err
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("schedule: cosine", ["cosine"]),
        ("schedule: {choice: [wsd, linear, polynomial]}", ["linear", "polynomial"]),
        ("schedule: {choice: [wsd, constant]}", []),
    ],
)
def test_rungs_that_train_anew_are_told(evolm, space_file: Path, line: str, told: list[str]) -> None:
    with_train(space_file, line)
    text = space_file.read_text()
    rungs = len(load_space(space_file).settings.fidelity.rungs)
    assert rungs == 1 or retrained(load_space(space_file)) == told
    several = "\n".join(
        "fidelity: {tokens: [1024, 4096]}" if one.startswith("fidelity:") else one for one in text.splitlines()
    )
    space_file.write_text(several + "\n")
    assert retrained(load_space(space_file)) == told
    said = evolm("validate", space_file, "--draws", "10")
    assert said.code == 0 and ("each of the 2 rungs trains anew" in said.out) == bool(told)


FSDP, DEEPSPEED = "{processes: 2, engine: fsdp}", "{processes: 2, engine: deepspeed}"


@pytest.mark.parametrize(
    ("resources", "line", "words"),
    [
        (FSDP, "optimizer: {choice: [muon, adafactor]}", ["trains with adamw; muon", "trains with adamw; adafactor"]),
        (FSDP, "optimizer: {choice: [adamw, muon], baseline: adamw}", ["trains with adamw; muon"]),
        (FSDP, "compile: always", ["engine fsdp does not compile blocks"]),
        (FSDP, "ema: 0.99", []),
        (FSDP, "optimizer: {expr: \"'muon'\"}", ["trains with adamw; muon"]),
        (DEEPSPEED, "ema: {float: [0, 0.99], step: 0.33, baseline: 0}", ["no train.ema, which is 0.99"]),
        (DEEPSPEED, "skip_spikes: {choice: [0, 4]}", ["no train.skip_spikes, which is 4"]),
        (DEEPSPEED, 'ema: {expr: "0.9"}', ["no train.ema, which is 0.9"]),
        (DEEPSPEED, "ema: 0", []),
        ("{processes: 2}", "optimizer: muon", []),
    ],
)
def test_what_the_engine_cannot_train_is_told_at_its_line(
    space_file: Path, resources: str, line: str, words: list[str]
) -> None:
    with_train(space_file, line)
    space_file.write_text(space_file.read_text() + f"resources: {resources}\n")
    if not words:
        refuse_unmet(load_space(space_file))
        return
    file = load_space(space_file)
    with pytest.raises(SpaceError) as told:
        refuse_unmet(file)
    rules = [problem.rule for problem in told.value.problems]
    assert len(rules) == len(words) and all(word in rule for word, rule in zip(words, rules, strict=True)), rules
    number = 1 + space_file.read_text().splitlines().index(f"  {line}")
    assert {problem.line for problem in told.value.problems} == {number}


def test_fp16_is_not_for_fsdp(space_file: Path) -> None:
    with_train(space_file, "precision: {choice: [bf16, fp16]}")
    space_file.write_text(space_file.read_text() + "resources: {gpus: 2, engine: fsdp}\n")
    with pytest.raises(SpaceError, match="engine fsdp trains in fp32 or bf16") as told:
        refuse_unmet(load_space(space_file))
    assert len(told.value.problems) == 1


@pytest.mark.parametrize("said", ["nowhere", "{choice: [nowhere, here]}"])
def test_a_teacher_has_to_be_there(space_file: Path, said: str) -> None:
    Path("here").mkdir()
    Path("here/config.json").touch()
    with pytest.raises(SpaceError, match=r"train.teacher: no exported model there") as error:
        refuse_unmet(load_space(with_train(space_file, f"teacher: {said}")))
    assert "nowhere" in str(error.value) and "is here" not in str(error.value)


def test_one_that_is_there_will_do(space_file: Path) -> None:
    Path("here").mkdir()
    Path("here/config.json").touch()
    refuse_unmet(load_space(with_train(space_file, "teacher: here")))
