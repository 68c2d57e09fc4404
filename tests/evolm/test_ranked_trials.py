"""Guards trials over several processes: one outcome of all, and nobody left waiting."""

import time

import psutil
import pytest

from evolm.executors.base import Job
from evolm.executors.ranked import run_over_ranks
from evolm.launch import start
from evolm.worker import run_recipe


def a_job(**more):
    values = {"trial": 3, "lease": 7, "rung": 0, "top": True, "tokens": 1, "genome": {}, "seed": 0, "folder": "/tmp"}
    return Job(**{**values, **more})


def in_its_place(job, tell):
    """A rank of the tests: does what the genome says for its number."""
    import os

    from evolm.executors.base import TrialProgress

    rank = os.environ["RANK"]
    tell(TrialProgress(trial=job.trial, tokens=10 + int(rank), flops=5.0))
    deed = job.genome.get(rank, "end")
    if deed == "die":
        os._exit(9)
    if deed == "notice":
        time.sleep(0.1)
        return job.failed("lost", "noticed", flops=3.0, seconds=1.0)
    if deed == "stop":
        return job.failed("interrupted", "stopped and saved")
    if deed == "wait":
        time.sleep(60)
    return job.told({"rank": float(rank)}, flops=2.0, seconds=1.0)


def _noticed(outcome):
    return outcome.message in ("noticed", "ended before it could save")


def over_ranks(genome, tell=lambda progress: True, world=2):
    return run_over_ranks(in_its_place, a_job(genome=genome), tell, world, _noticed)


def test_the_first_rank_tells_for_all():
    heard = []
    outcome = over_ranks({}, lambda progress: heard.append(progress.tokens) or True, world=3)
    assert (outcome.kind, outcome.metrics, outcome.flops) == ("result", {"rank": 0.0}, 2.0)
    assert set(heard) <= {0, 10}


@pytest.mark.parametrize("first", ["notice", "wait"])
def test_the_rank_that_died_is_told_of_and_the_others_are_ended(monkeypatch, first):
    monkeypatch.setattr("evolm.executors.ranked.LAST_SECONDS", 0.3 if first == "wait" else 20.0)
    begun = time.monotonic()
    outcome = over_ranks({"0": first, "1": "die"})
    assert (outcome.kind, outcome.reason) == ("fail", "crashed")
    assert outcome.message == "rank 1: its process ended with exit code 9"
    assert time.monotonic() - begun < 30
    assert not [one for one in psutil.Process().children(recursive=True) if "evolm.executors.cell" in one.cmdline()]


def test_a_rank_that_was_stopped_lets_the_first_one_finish(monkeypatch):
    """The second one has saved and ended; the first one is waiting for its sinks."""
    monkeypatch.setattr("evolm.executors.ranked.LAST_SECONDS", 0.0)
    outcome = over_ranks({"0": "notice", "1": "stop"})
    assert (outcome.reason, outcome.message) == ("interrupted", "rank 1: stopped and saved")
    assert outcome.flops == 3.0  # what the first one told itself


def no_cell(*args, **options):
    raise OSError(11, "no more processes")


class Lost:
    """A cell that cannot be spoken to."""

    progress = None

    def __init__(self, *args, **options):
        pass

    run = no_cell

    def cancel(self, lease):
        pass

    def close(self):
        pass


@pytest.mark.parametrize("cell", [no_cell, Lost], ids=["not started", "not spoken to"])
def test_ranks_that_cannot_be_had_are_a_failure_of_their_trial_alone(monkeypatch, tmp_path, cell):
    monkeypatch.setattr("evolm.executors.ranked.Cell", cell)
    context = {"cache": "", "roots": [], "documents": {}, "target": None, "processes": 2}
    outcome = run_recipe(a_job(context=context, folder=str(tmp_path)), lambda progress: True)
    assert (outcome.kind, outcome.reason, "no more processes" in outcome.message) == ("fail", "crashed", True)


RESOURCES = "resources: {{cpus: 1, processes: 2{more}}}\n"


def test_a_search_of_trials_over_two_processes_finds_what_one_process_finds(space_text, tmp_path, cache):
    """One trial, which is stopped by nobody: metrics of two ranks beside those of one process."""
    found = {}
    for name, more in (("alone", ""), ("two", RESOURCES.format(more=", engine: fsdp"))):
        path = tmp_path / f"{name}.yaml"
        path.write_text(space_text.replace("tokens: [512, 2048]", "tokens: 1024") + more)
        ended = start(path, run=str(tmp_path / name), executor="inline", cache=cache, trials=1)
        (trial,) = ended.run.trials()
        assert trial.state == "complete", trial
        found[name] = trial.metrics
    for metric in ("bits_per_byte", "train_loss", "params", "tokens/web"):
        assert found["two"][metric] == pytest.approx(found["alone"][metric], abs=1e-4)


@pytest.mark.parametrize(
    ("resources", "words"),
    [
        ("{gpus: 2, processes: 3}", "processes = 3 must be one for each of gpus = 2"),
        ("{gpus: 2, engine: single}", "engine single trains in one process; take ddp, fsdp or deepspeed"),
        ("{engine: fsdp}", "engine fsdp is for several processes: give processes, or gpus above 1"),
        ("{engine: dpp}", "did you mean 'ddp'"),
    ],
)
def test_resources_that_do_not_go_together_are_refused(evolm, space_file, resources, words):
    space_file.write_text(space_file.read_text() + f"resources: {resources}\n")
    said = evolm("validate", space_file)
    assert said.code == 2
    assert words in said.err


@pytest.mark.parametrize(("key", "value"), [("processes", "2"), ("engine", "ddp")])
def test_another_trainer_starts_its_own_processes(evolm, tmp_path, key, value):
    path = tmp_path / "s.yaml"
    lines = ["version: 1", "trial: {command: [python]}", "train: {x: {float: [0, 1]}}", "objectives: {loss: min}"]
    path.write_text("\n".join([*lines, "fidelity: {tokens: 1K}", f"resources: {{gpus: 2, {key}: {value}}}\n"]))
    said = evolm("validate", path)
    assert said.code == 2
    assert f"{path}:6:" in said.err and f"resources.{key}: is about evolm's own trainer" in said.err
