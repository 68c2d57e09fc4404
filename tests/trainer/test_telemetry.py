"""Guards what a run tells of itself: each number against one that is computed in another way."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch

from trainer import telemetry as module
from trainer.cost import costs
from trainer.evaluate import TokenScorer
from trainer.loop import train
from trainer.metrics_log import MetricsLog, read_metrics
from trainer.model import build_model
from trainer.optim import build_optimizer
from trainer.records import Progress
from trainer.sinks import RunInfo, Sinks
from trainer.telemetry import Meter, Telemetry, gradient_norms, memory_of, peak_of

CPU = torch.device("cpu")


def progress(**values: Any) -> Progress:
    fields = {
        "tokens": 100, "total_tokens": 1000, "flops": 5e6, "loss": 3.0, "learning_rate": 0.01, "gradient_norm": 1.5,
        "tokens_per_second": 50.0, "micro_batch_tokens": 32, "oom_backoffs": 0, "skipped_steps": 0, "step": 1,
    }  # fmt: skip
    return Progress(**{**fields, **values})


def logged(recipe, corpus, folder: Path, **options: Any) -> tuple[list[dict[str, Any]], list[Progress]]:
    """The lines of a run, and all that it reported."""
    steps: list[Progress] = []
    with MetricsLog(folder / "metrics.jsonl") as log:
        telemetry = Telemetry(recipe, CPU, log, every=options.pop("every", 0.0))

        def report(one: Progress) -> bool:
            steps.append(one)
            telemetry(one)
            return True

        train(recipe, report, corpus=corpus, **options)
    return list(read_metrics(folder / "metrics.jsonl")), steps


# --- the meter --------------------------------------------------------------------------------------------------------


def test_the_loss_of_each_source_is_the_mean_over_the_tokens_drawn_of_it(recipe_of, corpus, tmp_path: Path) -> None:
    """With steps too small to change a weight, against the scorer of held-out text, window by window."""
    recipe = recipe_of(train={"learning_rate": 1e-12, "batch_tokens": 128, "weight_decay": 0.0})
    lines, _ = logged(recipe, corpus, tmp_path, tokens=40 * 128, every=0.25)
    loader, scorer = corpus.loader(0), TokenScorer(build_model(recipe, 0), recipe)
    begun = 0
    assert [line["step"] for line in lines] == [1, 11, 21, 31, 40]
    for line in lines:
        count = line["step"] * 4
        windows, sources = loader.batch(begun, count - begun), loader.sources(begun, count - begun)
        nats = scorer.token_nats(windows).mean(axis=1)
        for number, name in enumerate(loader.names):
            if (sources == number).any():
                assert line[f"loss/{name}"] == pytest.approx(float(nats[sources == number].mean()), rel=1e-5)
            else:
                assert f"loss/{name}" not in line
        begun = count


def test_the_losses_of_a_step_make_up_its_loss(recipe, corpus, tmp_path: Path) -> None:
    lines, _ = logged(recipe, corpus, tmp_path, tokens=12 * 128)
    loader = corpus.loader(0)
    for line in lines:
        sources = loader.sources(4 * (line["step"] - 1), 4)
        weights = np.bincount(sources, minlength=2) / 4
        parts = [line.get(f"loss/{name}", 0.0) for name in loader.names]
        assert float(weights @ parts) == pytest.approx(line["loss"], rel=1e-5)


def test_micro_batches_change_no_loss_of_a_source(recipe_of, corpus, tmp_path: Path) -> None:
    found = []
    for micro in (128, 32):
        folder = tmp_path / str(micro)
        folder.mkdir()
        lines, _ = logged(recipe_of(train={"micro_batch_tokens": micro}), corpus, folder, tokens=4 * 128)
        found.append([{name: value for name, value in line.items() if name.startswith("loss/")} for line in lines])
    for one, other in zip(*found, strict=True):
        assert one == pytest.approx(other, rel=1e-4)


def test_pieces_of_a_sample_count_for_its_source(corpus) -> None:
    """A sequence may be trained on in pieces, which come one after the other."""
    loader = corpus.loader(0)
    meter = Meter(loader, CPU)
    sources = loader.sources(0, 6)
    nats = torch.arange(6.0)[:, None].expand(6, 32).reshape(-1)  # sample i loses i
    meter.add(0, 6, nats)
    found = meter.details(6, {})
    for number, name in enumerate(loader.names):
        assert found[f"loss/{name}"] == pytest.approx(float(np.arange(6)[sources == number].mean()))
    assert not any(name.startswith("loss/") for name in meter.details(6, {}))  # nothing since


def test_the_largest_and_the_mean_load_of_experts_are_those_since_they_were_last_asked_for(corpus, recipe_of) -> None:
    moe = {"ffn": "moe", "n_experts": 4, "n_active_experts": 2, "n_dense_layers": 1}
    model = build_model(recipe_of(model=moe), 0)
    meter, loads = Meter(corpus.loader(0), CPU, model), model.model.layers[1].mlp.experts.loads
    loads += torch.tensor([10, 6, 4, 0])  # of ten tokens
    first = meter.details(6, {})
    loads += torch.tensor([1, 1, 1, 1])
    second = meter.details(6, {})
    for found, most in ((first, 1.0), (second, 0.5)):
        experts = {name: value for name, value in found.items() if name.startswith("experts/")}
        assert experts == {"experts/1/most": pytest.approx(most), "experts/1/mean": pytest.approx(0.5)}
    assert meter.details(6, {})["experts/1/most"] == 0.0  # nothing since


def test_what_was_drawn_of_each_source_stands_beside_what_was_asked_for(recipe_of, cache, tmp_path: Path) -> None:
    from trainer.data.corpus import Corpus

    recipe = recipe_of(data={"mix": {"tales": 0.8, "ledgers": 0.2}})
    lines, _ = logged(recipe, Corpus.open(recipe.data, cache), tmp_path, tokens=50 * 128)
    last = lines[-1]
    assert last["tokens/tales"] + last["tokens/ledgers"] == last["tokens"] == 50 * 128
    assert (last["mix/tales"], last["mix/ledgers"]) == (pytest.approx(0.8), pytest.approx(0.2))
    assert last["share/tales"] == last["tokens/tales"] / last["tokens"] == pytest.approx(0.8, abs=0.02)
    record = train(recipe, corpus=Corpus.open(recipe.data, cache), tokens=50 * 128)
    assert last["epochs/tales"] == record.epochs_by_source["tales"]


# --- gradients --------------------------------------------------------------------------------------------------------


def test_norms_by_kind_are_those_of_the_parameters_and_make_up_the_whole(recipe_of) -> None:
    recipe = recipe_of(model={"tie_embeddings": False})
    model = build_model(recipe, 0)
    optimizer = build_optimizer(model, recipe)
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    norms = gradient_norms(optimizer.param_groups)
    assert set(norms) == {"embedding", "hidden", "head", "vector"}
    assert float(norms["head"]) == pytest.approx(float(model.lm_head.weight.grad.norm()), rel=1e-6)
    whole = math.sqrt(sum(float((one.grad.double() ** 2).sum()) for one in model.parameters()))
    assert math.hypot(*map(float, norms.values())) == pytest.approx(whole, rel=1e-6)


def test_groups_of_one_kind_are_one(recipe) -> None:
    one, other = (torch.nn.Parameter(torch.zeros(2)) for _ in range(2))
    one.grad, other.grad = torch.tensor([3.0, 0.0]), torch.tensor([0.0, 4.0])
    groups = [
        {"kind": "hidden", "params": [one]},
        {"kind": "hidden", "params": [other]},
        {"kind": "head", "params": []},
    ]
    assert {kind: float(norm) for kind, norm in gradient_norms(groups).items()} == {"hidden": 5.0}


def test_a_run_is_clipped_by_the_norm_over_all_kinds(recipe_of, corpus, tmp_path: Path) -> None:
    lines, steps = logged(recipe_of(train={"grad_clip": 0.05}), corpus, tmp_path, tokens=6 * 128)
    for line, step in zip(lines, steps, strict=True):
        kinds = [value for name, value in line.items() if name.startswith("gradient_norm/")]
        assert len(kinds) == 3 and math.hypot(*kinds) == pytest.approx(line["gradient_norm"], rel=1e-5)
        assert line["gradient_norm"] == step.gradient_norm > 0.05


def test_clipping_is_that_of_torch(recipe, corpus) -> None:
    from trainer.engines import Setup
    from trainer.engines.single import Single

    engine = Single(recipe, 0, CPU, Setup())
    batch = torch.from_numpy(corpus.loader(0).batch(0, 4))
    engine.backward(engine.forward(batch, last=True).objective / 128)
    gradients = [one.grad.clone() for one in engine.model.parameters()]
    norm = engine.clip(0.1)
    copies = [torch.nn.Parameter(torch.zeros_like(one)) for one in gradients]
    for copy, gradient in zip(copies, gradients, strict=True):
        copy.grad = gradient
    assert float(norm) == pytest.approx(float(torch.nn.utils.clip_grad_norm_(copies, 0.1)), rel=1e-6)
    for copy, parameter in zip(copies, engine.model.parameters(), strict=True):
        torch.testing.assert_close(copy.grad, parameter.grad, rtol=1e-5, atol=1e-9)


# --- lines ------------------------------------------------------------------------------------------------------------


def test_a_line_has_everything(recipe, corpus, tmp_path: Path) -> None:
    (line, *_), _ = logged(recipe, corpus, tmp_path, tokens=4 * 128)
    plain = {
        "step", "tokens", "total_tokens", "flops", "loss", "learning_rate", "gradient_norm", "tokens_per_second",
        "flops_per_second", "mfu", "memory", "micro_batch_tokens", "oom_backoffs", "skipped_steps",
    }  # fmt: skip
    by = {f"{what}/{name}" for what in ("tokens", "share", "mix", "epochs") for name in ("tales", "ledgers")}
    kinds = {f"gradient_norm/{kind}" for kind in ("embedding", "hidden", "vector")}
    assert plain | by | kinds <= set(line) and line["mfu"] is None
    assert set(line) - plain - by - kinds <= {"loss/tales", "loss/ledgers"}


def test_lines_come_every_so_many_tokens_the_first_and_the_last_step_among_them(recipe, corpus, tmp_path: Path) -> None:
    lines, steps = logged(recipe, corpus, tmp_path, tokens=100 * 128, every=0.1)
    assert [line["step"] for line in lines] == [*range(1, 100, 10), 100] and len(steps) == 100


def test_a_line_waits_for_a_step_whose_loss_was_looked_at(recipe, tmp_path: Path) -> None:
    asked = []

    def details() -> dict[str, float]:
        asked.append(1)
        return {}

    with MetricsLog(tmp_path / "metrics.jsonl") as log:
        telemetry = Telemetry(recipe, CPU, log)
        for step in range(1, 31):
            telemetry(progress(step=step, tokens=step * 100, looked=step % 10 == 0, details=details))
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [10, 20, 30] and len(asked) == 3


def test_rates_are_those_since_the_line_before(recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([10.0, 14.0])
    monkeypatch.setattr(module.time, "perf_counter", lambda: next(clock))
    with MetricsLog(tmp_path / "metrics.jsonl") as log:
        telemetry = Telemetry(recipe, CPU, log)
        first = telemetry.line(progress())
        second = telemetry.line(progress(tokens=700, flops=45e6, tokens_per_second=1.0))
    assert first["tokens_per_second"] == 50 and first["flops_per_second"] == 50 * costs(recipe).flops_per_token
    assert (second["tokens_per_second"], second["flops_per_second"]) == (150, 1e7)


def test_utilisation_is_over_what_all_devices_can_do(
    recipe_of, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recipe_of(train={"precision": "bf16"})
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(module, "memory_of", lambda device: 1)
    with MetricsLog(tmp_path / "metrics.jsonl") as log:
        one = Telemetry(recipe, "cuda", log).line(progress(tokens_per_second=1e6))
        eight = Telemetry(recipe, "cuda:3", log, devices=8).line(progress(tokens_per_second=1e6))
    assert one["mfu"] == pytest.approx(1e6 * costs(recipe).flops_per_token / 989.4e12)
    assert eight["mfu"] == pytest.approx(one["mfu"] / 8)


def test_a_peak_is_that_of_the_precision_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "NVIDIA A100-SXM4-80GB")
    assert [peak_of(torch.device("cuda"), one) for one in ("bf16", "fp16", "fp32")] == [312e12, 312e12, 19.5e12]
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "high")
    assert peak_of(torch.device("cuda"), "fp32") == 156e12
    assert peak_of(CPU, "bf16") is None
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "NVIDIA Of The Future")
    assert peak_of(torch.device("cuda"), "bf16") is None


def test_memory_on_a_cpu_is_what_the_process_holds() -> None:
    assert memory_of(CPU) == pytest.approx(psutil.Process(os.getpid()).memory_info().rss, rel=0.2)


def test_every_line_goes_to_the_sinks_too(recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = []

    class Heard(Sinks):
        def write(self, step: int, values: Any) -> None:
            given.append((step, dict(values)))

    run = RunInfo(folder=tmp_path, home=tmp_path, group="g", name="n")
    with MetricsLog(tmp_path / "metrics.jsonl") as log, Heard([], run, print) as sinks:
        telemetry = Telemetry(recipe, CPU, log, sinks)
        telemetry(progress(step=4))
        telemetry.scores({"rung": 0, "bits_per_byte": 1.25})
    assert [values for _, values in given] == list(read_metrics(tmp_path / "metrics.jsonl"))
    assert [step for step, _ in given] == [4, 4] and given[1][1]["bits_per_byte"] == 1.25


def test_watching_a_run_changes_nothing_of_it(recipe, corpus, tmp_path: Path) -> None:
    _, watched = logged(recipe, corpus, tmp_path, tokens=10 * 128)
    plain: list[Progress] = []
    train(recipe, lambda one: plain.append(one) or True, corpus=corpus, tokens=10 * 128)
    assert [(one.loss, one.gradient_norm) for one in watched] == [(one.loss, one.gradient_norm) for one in plain]
