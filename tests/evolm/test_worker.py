"""The trial boundary: whatever goes wrong inside a trial becomes an outcome with the right reason."""

from __future__ import annotations

import errno
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from evolm.errors import DataError, Leak
from evolm.executors import fence
from evolm.executors.base import Job, Outcome, TrialProgress
from evolm.run_folder import final_checkpoint, latest_checkpoint, rung_checkpoint, saves
from evolm.worker import Context, run_recipe
from trainer.cost import costs
from trainer.recipe import Recipe

Make = Callable[..., Job]


@pytest.fixture
def make(tmp_path: Path, words_corpus: Path, cache: Path) -> Make:
    def make_job(**changes: Any) -> Job:
        genome = {
            "data": {
                "sources": {name: {"path": str(words_corpus / name)} for name in ("web", "code")},
                "mix": {"web": 0.5, "code": 0.5},
                "tokenizer": {"vocab_size": 300},
                "sequence_length": 32,
                "held_out": {"max_bytes": 2048},
                **changes.pop("data", {}),
            },
            "model": {"d_model": 16, "n_layers": 1, "n_heads": 1, **changes.pop("model", {})},
            "train": {"batch_tokens": 128, "learning_rate": 5e-3, "warmup_steps": 2, **changes.pop("train", {})},
        }
        shared = {"cache": str(cache), "documents": changes.pop("documents", {}), **changes.pop("context", {})}
        context = Context(roots=[], target=None, **shared)
        values = {"rung": 0, "top": True, "tokens": 1024, **changes}
        return Job(
            trial=1, lease=1, genome=genome, seed=0, folder=str(tmp_path / "1"), context=context.as_dict(), **values
        )

    return make_job


def go_on(progress: TrialProgress) -> bool:
    return True


def run(job: Job) -> Outcome:
    return run_recipe(job, go_on)


def test_a_trial_tells_losses_costs_and_what_it_drew(make: Make) -> None:
    outcome = run(make())
    assert outcome.kind == "result" and outcome.flops > 0 and outcome.seconds > 0
    assert {"bits_per_byte", "bits_per_byte/web", "bits_per_byte/code", "perplexity", "train_loss"} <= set(
        outcome.metrics
    )
    assert outcome.metrics["tokens/web"] + outcome.metrics["tokens/code"] == 1024


def test_it_keeps_a_log_of_its_own(make: Make) -> None:
    job = make()
    run(job)
    lines = [json.loads(line) for line in (Path(job.folder) / "metrics.jsonl").read_text().splitlines()]
    assert lines[0]["tokens"] == 128 and lines[-2]["tokens"] == 1024
    assert lines[-1]["rung"] == 0 and "bits_per_byte" in lines[-1]


def test_a_rung_leaves_what_the_next_one_starts_from(make: Make) -> None:
    job = make(top=False)
    run(job)
    assert rung_checkpoint(job.folder, 0).is_dir()
    continued, whole = run(make(rung=1, tokens=4096)), run(make(rung=7, tokens=4096))
    # The trunk ends with the last whole batch before 80 % of the first rung; what comes before it is not paid twice.
    assert continued.flops / whole.flops == pytest.approx((4096 - 768) / 4096)
    assert continued.metrics["bits_per_byte"] == whole.metrics["bits_per_byte"]


@pytest.mark.parametrize("schedule", ["cosine", "linear", "polynomial"])
def test_a_schedule_without_a_trunk_trains_every_rung_anew_and_is_charged_for_it(make: Make, schedule: str) -> None:
    train = {"schedule": schedule}
    job = make(top=False, train=train, context={"checkpoint_seconds": 0.0})  # saves are left behind too
    run(job)
    assert not rung_checkpoint(job.folder, 0).exists() and latest_checkpoint(job.folder).is_dir()
    again = run(make(rung=1, tokens=4096, train=train))
    whole = run(make(rung=7, tokens=4096, train=train))
    assert again.flops == whole.flops == costs(Recipe.model_validate(job.genome)).flops_per_token * 4096
    assert again.metrics["bits_per_byte"] == whole.metrics["bits_per_byte"]


def test_a_stopped_trial_saves_and_goes_on(make: Make) -> None:
    job = make()
    stopped = run_recipe(job, lambda progress: progress.tokens < 512)
    assert (stopped.kind, stopped.reason) == ("fail", "interrupted")
    assert latest_checkpoint(job.folder).is_dir()
    rest = run(job)
    assert rest.kind == "result"
    assert stopped.flops + rest.flops == costs(Recipe.model_validate(job.genome)).flops_per_token * job.tokens


def test_a_torn_checkpoint_is_passed_over_in_words(make: Make) -> None:
    job = make(top=False)
    run(job)
    weights = rung_checkpoint(job.folder, 0) / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    outcome = run(make(rung=1, tokens=2048))
    assert outcome.kind == "result" and "content differs from its checksum" in outcome.message


def test_of_several_saves_the_newest_that_is_whole_is_used(make: Make) -> None:
    """A save is made after every step; the trial is stopped, and its last save is damaged."""
    job = make(context={"keep_last": 3, "checkpoint_seconds": 0.0})
    stopped = run_recipe(job, lambda progress: progress.tokens < 512)
    latest, *older = saves(latest_checkpoint(job.folder))
    assert [path.name for path in older] == ["latest-1", "latest-2"]
    (latest / "optimizer.safetensors").unlink()
    rest = run(job)
    assert rest.kind == "result" and "not a complete checkpoint" in rest.message
    per_token = costs(Recipe.model_validate(job.genome)).flops_per_token
    assert rest.flops == per_token * (job.tokens - 384)  # from the save before, of one step less
    assert stopped.flops == per_token * 512


def test_a_trial_tells_that_it_moves_while_its_corpus_is_tokenised(make: Make, tmp_path: Path) -> None:
    told: list[TrialProgress] = []

    def tell(progress: TrialProgress) -> bool:
        told.append(progress)
        return True

    job = make(context={"cache": str(tmp_path / "cache")})
    assert run_recipe(job, tell).kind == "result"
    prepared = [progress.prepared for progress in told if progress.tokens == 0]
    assert prepared == list(range(1, 1 + len(prepared))) and len(prepared) >= 6  # two sources of three splits
    told.clear()
    assert run_recipe(job, tell).kind == "result"
    assert all(progress.tokens for progress in told)  # the corpus is open


def test_final_weights_are_saved_where_they_are_wanted(make: Make) -> None:
    for keep in (False, True):
        job = make(context={"keep_final": keep})
        run(job)
        assert final_checkpoint(job.folder).is_dir() == keep


def test_a_launch_waits_for_the_one_before_it_and_gives_up_in_words(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fence, "FENCE_SECONDS", 0.0)
    job = make()
    with fence.fenced(Path(job.folder)):
        outcome = run(job)
    assert (outcome.kind, outcome.reason) == ("fail", "lost")
    assert "an earlier launch of this trial is still at work there" in outcome.message
    assert run(job).kind == "result"


@pytest.mark.parametrize(
    ("changes", "kind", "reason", "words"),
    [
        ({"train": {"learning_rate": 1.0, "warmup_steps": 0, "beta2": 0.0}}, "fail", "diverged", "worse than guessing"),
        ({"data": {"quality": {"min_chars": 10**6}}}, "infeasible", None, "leaves nothing of source 'code'"),
        ({"documents": {"web": "0" * 32}}, "fatal", None, "is not what it was when the run began"),
        ({"model": {"d_model": "wide"}}, "fail", "crashed", "ValidationError"),
    ],
)  # fmt: skip
def test_reasons(make: Make, changes: dict[str, Any], kind: str, reason: str | None, words: str) -> None:
    outcome = run(make(**changes))
    assert (outcome.kind, outcome.reason) == (kind, reason)
    assert words in outcome.message


@pytest.mark.parametrize(
    ("error", "kind", "reason"),
    [
        (Leak("it looks ahead"), "fail", "leak"),
        (MemoryError(), "fail", "oom"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), "fail", "oom"),
        (RuntimeError("shapes do not match"), "fail", "crashed"),
        (ZeroDivisionError(), "fail", "crashed"),
        (OSError(errno.ENOSPC, "No space left on device"), "fatal", None),
        (DataError("no text"), "infeasible", None),
    ],
)
def test_what_training_raises(
    make: Make, monkeypatch: pytest.MonkeyPatch, error: Exception, kind: str, reason: str | None
) -> None:
    def train(*args: object, **kwargs: object) -> None:
        raise error

    monkeypatch.setattr("trainer.loop.train", train)
    job = make()
    outcome = run(job)
    assert (outcome.kind, outcome.reason) == (kind, reason)
    assert outcome.fatal == ("storage" if kind == "fatal" else None)
    if reason == "crashed":
        assert "Traceback" in (Path(job.folder) / "error.log").read_text()
