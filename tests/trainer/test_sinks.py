"""Sinks: what they are given, and that nothing they do, or fail to do, touches a run."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from search_spaces.errors import UsageError
from trainer import sinks as module
from trainer.sinks import BUILT_IN, RunInfo, Sinks, check_sinks, sink_names, unknown_sink

RECIPE = {"model": {"d_model": 32, "n_layers": 2}, "train": {"learning_rate": 0.01, "tokens": None}}


@pytest.fixture
def run(tmp_path: Path) -> RunInfo:
    return RunInfo(folder=tmp_path / "trials" / "7", home=tmp_path, group="demo-1", name="trial-7", recipe=RECIPE)


class Kept:
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.calls: list[Any] = []

    def open(self, run: RunInfo) -> None:
        self.calls.append(("open", run.name, threading.current_thread()))

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self.calls.append((step, dict(values)))

    def close(self) -> None:
        self.calls.append("close")


@pytest.fixture
def plugged(monkeypatch: pytest.MonkeyPatch):
    """Make a sink known under a name, as an entry point does."""

    def plug(name: str, make: Any) -> None:
        class Point:
            def __init__(self) -> None:
                self.name = name

            def load(self) -> Any:
                return make

        known = list(module.entry_points(group="evolm.sinks"))

        def points(group: str, name: str | None = None) -> list[Any]:
            assert group == "evolm.sinks"
            return [one for one in [*known, Point()] if name in (None, one.name)]

        monkeypatch.setattr(module, "entry_points", points)

    return plug


# --- what is given ----------------------------------------------------------------------------------------------------


def test_a_sink_is_opened_told_all_lines_in_order_and_closed_in_a_thread_of_its_own(run: RunInfo, plugged: Any) -> None:
    sink, said = Kept(), []
    plugged("kept", lambda: sink)
    with Sinks(["kept"], run, said.append) as sinks:
        for step in range(100):
            sinks.write(step, {"loss": 1.0 / (step + 1)})
    (opened, name, thread), *lines, closed = sink.calls
    assert (opened, name, closed) == ("open", "trial-7", "close") and thread is not threading.current_thread()
    assert lines == [(step, {"loss": 1.0 / (step + 1)}) for step in range(100)] and said == []


def test_only_finite_numbers_are_given(run: RunInfo, plugged: Any) -> None:
    sink = Kept()
    plugged("kept", lambda: sink)
    values = {
        "loss": 2,
        "mfu": None,
        "rate": float("nan"),
        "far": float("inf"),
        "name": "x",
        "yes": True,
        "loss/web": 1.5,
    }
    with Sinks(["kept"], run, print) as sinks:
        sinks.write(3, values)
    assert sink.calls[1] == (3, {"loss": 2.0, "loss/web": 1.5})


def test_without_sinks_there_are_no_threads(run: RunInfo) -> None:
    before = threading.active_count()
    with Sinks([], run, print) as sinks:
        sinks.write(1, {"loss": 1.0})
        assert threading.active_count() == before


# --- what fails -------------------------------------------------------------------------------------------------------


class Failing(Kept):
    """Raises in one method, or in its making."""

    def __init__(self, where: str) -> None:
        super().__init__()
        self.where = where
        self.fail("init")

    def fail(self, where: str) -> None:
        self.calls.append(where)
        if where == self.where:
            raise ValueError(f"no {where}\n  here")

    def open(self, run: RunInfo) -> None:
        self.fail("open")

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self.fail("write")

    def close(self) -> None:
        self.fail("close")


@pytest.mark.parametrize("where", ["init", "open", "write", "close"])
def test_a_sink_that_fails_is_told_once_and_dropped_and_the_others_go_on(
    where: str, run: RunInfo, plugged: Any
) -> None:
    good, said = Kept(), []
    plugged("bad", lambda: Failing(where))
    plugged("good", lambda: good)
    with Sinks(["bad", "good"], run, said.append) as sinks:
        for step in range(20):
            sinks.write(step, {"loss": 1.0})
    assert said == [f"sink 'bad' failed and is dropped: ValueError: no {where} here; metrics.jsonl has everything"]
    assert len(good.calls) == 22


def test_a_sink_that_ends_the_program_is_told_like_any_that_fails(run: RunInfo, plugged: Any) -> None:
    def leave() -> Any:
        sys.exit("no licence")

    said: list[str] = []
    plugged("leaving", leave)
    with Sinks(["leaving"], run, said.append) as sinks:
        sinks.write(0, {"loss": 1.0})
    assert said == ["sink 'leaving' failed and is dropped: SystemExit: no licence; metrics.jsonl has everything"]


def test_a_sink_that_hangs_is_left_behind_and_a_run_waits_for_nothing_but_its_end(run: RunInfo, plugged: Any) -> None:
    release, said = threading.Event(), []

    class Hanging(Kept):
        def write(self, step: int, values: Mapping[str, float]) -> None:
            release.wait(20)

    plugged("hanging", Hanging)
    sinks = Sinks(["hanging"], run, said.append)
    begun = time.perf_counter()
    for step in range(5 * module.WAITING):  # many more than are kept for it
        sinks.write(step, {"loss": 1.0})
    sinks.close(0.05)
    assert time.perf_counter() - begun < 5
    release.set()
    assert said == ["sink 'hanging' did not end in time and is left behind; metrics.jsonl has everything"]


def test_lines_that_a_slow_sink_missed_are_counted(run: RunInfo, plugged: Any) -> None:
    begin, said = threading.Event(), []

    class Late(Kept):
        def open(self, run: RunInfo) -> None:
            begin.wait(20)

    plugged("late", Late)
    sinks = Sinks(["late"], run, said.append)
    for step in range(module.WAITING + 5):
        sinks.write(step, {"loss": 1.0})
    begin.set()
    sinks.close()
    assert len(said) == 1 and said[0].startswith("sink 'late' was too slow for ")


def test_what_ends_a_run_at_once_waits_for_no_sink(run: RunInfo, plugged: Any) -> None:
    release = threading.Event()

    class Hanging(Kept):
        def open(self, run: RunInfo) -> None:
            release.wait(20)

    plugged("hanging", Hanging)
    begun = time.perf_counter()
    with pytest.raises(KeyboardInterrupt), Sinks(["hanging"], run, lambda text: None):
        raise KeyboardInterrupt
    assert time.perf_counter() - begun < 5
    release.set()


# --- names ------------------------------------------------------------------------------------------------------------


def test_names_are_those_built_in_and_plugged_in(plugged: Any) -> None:
    assert set(BUILT_IN) == {"tensorboard", "mlflow", "wandb"} <= set(sink_names())
    plugged("carrier-pigeon", Kept)
    assert "carrier-pigeon" in sink_names() and unknown_sink(["carrier-pigeon", "wandb"]) is None
    check_sinks(["carrier-pigeon"])


def test_an_unknown_sink_is_told_with_the_nearest() -> None:
    with pytest.raises(UsageError, match=r"unknown sink 'tensorbord'; did you mean 'tensorboard'?"):
        check_sinks(["tensorbord"])
    with pytest.raises(UsageError, match="unknown sink 'xyzzy'; there are mlflow, tensorboard, wandb"):
        check_sinks(["xyzzy"])


@pytest.mark.parametrize("name", BUILT_IN)
def test_a_sink_whose_package_is_missing_is_told_with_what_to_install(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "find_spec", lambda package: None)
    extra = BUILT_IN[name][2]
    with pytest.raises(
        UsageError, match=rf"sink '{name}' needs .* pip install {name} \(it is in evolm's extra `{extra}`"
    ):
        check_sinks([name])


def test_a_plain_folder_of_its_name_is_no_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As W&B leaves one, of its runs, in the working directory."""
    (tmp_path / "evolm_lookalike" / "offline-run-1").mkdir(parents=True)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(BUILT_IN, "lookalike", (Kept, "evolm_lookalike", "track"))
    assert find_spec("evolm_lookalike") is not None
    with pytest.raises(UsageError, match="which is not installed"):
        check_sinks(["lookalike"])


def test_the_extras_are_those_of_the_project() -> None:
    import tomllib

    extras = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    for _, package, extra in BUILT_IN.values():
        assert any(line.startswith(package) for line in extras[extra])


# --- the three that are built in --------------------------------------------------------------------------------------


def installed(name: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(find_spec(name) is None, reason=f"{name} is not installed")


def go(name: str, run: RunInfo) -> list[str]:
    """Two launches of a trial of three lines each."""
    said: list[str] = []
    for first in (0, 2):
        sinks = Sinks([name], run, said.append)
        for step in range(first, first + 3):
            sinks.write(step, {"loss": 3.0 - step, "loss/web": 1.0 * step})
        sinks.close(120)
    return said


@installed("tensorboard")
@pytest.mark.filterwarnings("ignore")
def test_tensorboard_reads_what_was_written(run: RunInfo) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert go("tensorboard", run) == []
    assert [path.name for path in run.home.iterdir()] == ["trials"]
    read = EventAccumulator(str(run.folder / "tensorboard"))
    read.Reload()
    assert sorted(read.Tags()["scalars"]) == ["loss", "loss/web"]
    assert {(one.step, one.value) for one in read.Scalars("loss")} == {(step, 3.0 - step) for step in range(5)}


@installed("mlflow")
@pytest.mark.filterwarnings("ignore")
def test_mlflow_keeps_runs_in_the_run_folder(run: RunInfo, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlflow.tracking import MlflowClient

    monkeypatch.chdir(run.home)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert go("mlflow", run) == []
    assert {path.name for path in run.home.iterdir()} <= {"mlflow.db", "mlflow.lock", "mlflow"}
    client = MlflowClient(f"sqlite:///{run.home / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("demo-1")
    found = client.search_runs([experiment.experiment_id])
    assert [one.info.status for one in found] == ["FINISHED"] * 2
    assert found[0].data.params == {"model.d_model": "32", "model.n_layers": "2", "train.learning_rate": "0.01"}
    assert {m.step for m in client.get_metric_history(found[-1].info.run_id, "loss/web")} == {0, 1, 2}


def test_wandb_writes_where_each_run_is_and_where_its_user_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a stand-in for the package: of two searches in one process, the second does not write into the first's."""
    seen: list[dict[str, str]] = []
    fake = ModuleType("wandb")
    fake.Settings = lambda **values: None  # type: ignore[attr-defined]
    fake.init = lambda **values: seen.append(dict(os.environ))  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.setattr(module, "_OURS", {})
    for name in ("CACHE", "CONFIG", "DATA"):
        monkeypatch.setenv(f"WANDB_{name}_DIR", "mine")
    for name in ("CACHE", "DATA"):
        monkeypatch.delenv(f"WANDB_{name}_DIR")
    homes = [tmp_path / "first", tmp_path / "second"]
    for home in homes:
        home.mkdir()
        module.WandB().open(RunInfo(folder=home, home=home, group="g", name="n"))
    assert [Path(one["WANDB_CACHE_DIR"]) for one in seen] == [home / "wandb" / "cache" for home in homes]
    assert [Path(one["WANDB_DATA_DIR"]) for one in seen] == [home / "wandb" / "data" for home in homes]
    assert [one["WANDB_CONFIG_DIR"] for one in seen] == ["mine", "mine"]


@installed("wandb")
@pytest.mark.filterwarnings("ignore")
def test_wandb_is_offline_and_in_the_run_folder(run: RunInfo, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MODE", "CACHE_DIR", "CONFIG_DIR", "DATA_DIR"):
        monkeypatch.delenv(f"WANDB_{name}", raising=False)
    assert go("wandb", run) == []
    assert [path.name for path in run.home.iterdir()] == ["wandb"]
    assert len(list((run.home / "wandb").glob("offline-run-*/run-*.wandb"))) == 2


def broken_module(name: str) -> ModuleType:
    """A module whose every attribute raises whatever is done with it."""

    class Broken(ModuleType):
        def __getattr__(self, attribute: str) -> Any:
            if attribute.startswith("__"):
                raise AttributeError(attribute)

            def fail(*args: Any, **options: Any) -> Any:
                raise RuntimeError(f"{attribute} is broken")

            return fail

    return Broken(name)


@pytest.mark.parametrize("name", BUILT_IN)
def test_a_package_that_raises_in_everything_hurts_no_run(
    name: str, run: RunInfo, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_installed", lambda package: True)
    monkeypatch.setenv("WANDB_CACHE_DIR", str(run.home))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(run.home))
    monkeypatch.setenv("WANDB_DATA_DIR", str(run.home))
    for package in ("torch.utils.tensorboard", "mlflow", "mlflow.tracking", "mlflow.entities", "wandb"):
        monkeypatch.setitem(sys.modules, package, broken_module(package))
    said: list[str] = []
    with Sinks([name], run, said.append) as sinks:
        for step in range(3):
            sinks.write(step, {"loss": 1.0})
    assert len(said) == 1 and said[0].startswith(f"sink '{name}' failed and is dropped: RuntimeError: ")
    assert "is broken" in said[0]
