"""The command line: what each command prints, and the exit code of everything that can be wrong."""

from __future__ import annotations

import csv
import io
import json
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from evolm.cli import app


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


# --- help -------------------------------------------------------------------------------------------------------------


def test_help_is_there_before_one_has_looked_away() -> None:
    """Under 0.4 s is the promise; seconds of a processor, as the machine does other things too."""

    def spent() -> float:
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        return used.ru_utime + used.ru_stime

    times = []
    for _ in range(3):
        began = spent()
        subprocess.run([sys.executable, "-m", "evolm", "--help"], check=True, capture_output=True)
        times.append(spent() - began)
    assert min(times) < 0.4


def test_help_imports_nothing_heavy() -> None:
    script = (
        "import sys; sys.argv = ['evolm', '--help']\n"
        "import evolm.cli\n"
        "try: evolm.cli.main()\n"
        "except SystemExit: pass\n"
        "print([m for m in ('torch', 'ray', 'pandas', 'optuna', 'transformers', 'plotly', 'deap', 'numpy')"
        " if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize("command", [command.callback.__name__ for command in app.registered_commands])
def test_every_command_explains_itself(evolm, command: str) -> None:
    said = evolm(command, "--help")
    assert said.code == 0 and f"evolm {command}" in said.out and len(said.out.splitlines()) > 5


def test_version_and_bad_usage(evolm) -> None:
    assert evolm("--version").out.startswith("evolm ")
    assert evolm("serch").code == 2
    assert evolm("search", "--run").code == 2
    assert evolm("search", "space.yaml", "--trials", "many").code == 2


# --- search -----------------------------------------------------------------------------------------------------------


def test_a_search_tells_its_front_its_report_and_what_to_do_next(evolm, space_file: Path, cache: Path) -> None:
    said = evolm("search", space_file, "--executor", "inline", "--cache", cache, "--run", "first")
    assert said.code == 0
    assert "run first: " in said.out and "bits_per_byte" in said.out
    assert "report: runs/first/report.html" in said.out or "runs/first/report.html" in said.out
    assert "evolm promote " in said.out and Path("runs/first/report.html").is_file()
    assert sum(line.startswith("trial ") for line in said.err.splitlines()) >= 6
    assert Path("runs/first/space.yaml").read_text() == space_file.read_text()


def test_a_search_writes_nowhere_else(evolm, space_file: Path, cache: Path, tmp_path: Path) -> None:
    before = {path for path in tmp_path.rglob("*") if path != space_file}
    evolm("search", space_file, "--executor", "inline", "--cache", cache, "--run", "first", "--trials", "1")
    made = set(tmp_path.rglob("*")) - before - {space_file}
    assert all(path.is_relative_to(tmp_path / "runs") for path in made)


def test_naming_a_run_again_continues_it_with_the_same_space_only(evolm, space_file: Path, cache: Path) -> None:
    options = ("--executor", "inline", "--cache", cache, "--run", "first")
    evolm("search", space_file, *options, "--trials", "2")
    more = evolm("search", space_file, *options, "--trials", "3")
    assert more.code == 0 and len(json.loads(evolm("export", "first", "--to", "json").out)["trials"]) == 3
    space_file.write_text(space_file.read_text().replace("batch_tokens: 128", "batch_tokens: 64"))
    other = evolm("search", space_file, *options)
    assert other.code == 2
    assert "train.batch_tokens: 128 -> 64" in other.err and "evolm resume" in other.err


def test_resume_keeps_what_decides_the_genomes(evolm, space_file: Path, cache: Path) -> None:
    options = ("--executor", "inline", "--cache", cache)
    evolm("search", space_file, *options, "--run", "first", "--trials", "2")
    said = evolm("search", space_file, *options, "--run", "first", "--seed", "7")
    assert said.code == 2 and "was begun with seed 0, not 7" in said.err
    said = evolm("resume", "first", "--executor", "inline", "--trials", "4")
    assert said.code == 0 and len(json.loads(evolm("export", "first", "--to", "json").out)["trials"]) == 4


def test_same_seed_and_space_same_genomes_and_results(evolm, space_file: Path, cache: Path) -> None:
    for name in ("one", "two"):
        evolm("search", space_file, "--executor", "inline", "--cache", cache, "--run", name)
    one, two = (json.loads(evolm("export", name, "--to", "json").out)["trials"] for name in ("one", "two"))
    assert [trial["digest"] for trial in one] == [trial["digest"] for trial in two]
    loss = "bits_per_byte"
    assert [trial["metrics"].get(loss) for trial in one] == [trial["metrics"].get(loss) for trial in two]


# --- everyday mistakes ------------------------------------------------------------------------------------------------


def wrong(said, code: int, *words: str) -> None:
    """One message, its exit code, and no traceback."""
    assert said.code == code, said
    assert said.err.count("error: ") == 1 and "Traceback" not in said.err, said.err
    for word in words:
        assert word in said.err, said.err


def test_a_space_that_is_not_there(evolm) -> None:
    wrong(evolm("search", "missing.yaml"), 2, "missing.yaml: no such file")


def test_an_unknown_key(evolm, space_file: Path) -> None:
    space_file.write_text(space_file.read_text().replace("d_model", "d_modle"))
    wrong(evolm("search", space_file), 2, "words.yaml:13:3: model.d_modle: unknown key", "did you mean 'd_model'?")
    assert not Path("runs").exists()


def test_a_corpus_that_is_not_there(evolm, space_file: Path, words_corpus: Path, cache: Path) -> None:
    space_file.write_text(space_file.read_text().replace(f"{words_corpus}/web", f"{words_corpus}/wbe"))
    said = evolm("search", space_file, "--executor", "inline", "--cache", cache)
    wrong(said, 2, "no such file or folder", "did you mean")
    assert not any(Path("runs").glob("*"))  # nothing was begun, nothing is left


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "no text in"),
        (b"\n  \n\n", "no text in"),
        (b"\x7fELF\x00\x01\x02" * 99, "1 binary file"),
        (b"\xff\xfe\xfa" * 99, "not UTF-8"),
        (b"one short line", "leave none for"),
    ],
)  # fmt: skip
def test_a_corpus_without_text(
    evolm, space_file: Path, words_corpus: Path, cache: Path, content: bytes, words: str
) -> None:
    Path("bad").write_bytes(content)
    space_file.write_text(space_file.read_text().replace(f'"{words_corpus}/web"', "bad"))
    said = evolm("search", space_file, "--executor", "inline", "--cache", cache)
    wrong(said, 2, "data.sources.web:", words)


def test_a_vocabulary_that_the_text_cannot_fill(evolm, space_file: Path, cache: Path) -> None:
    space_file.write_text(space_file.read_text().replace("vocab_size: 300", "vocab_size: {choice: [300, 60000]}"))
    said = evolm("search", space_file, "--executor", "inline", "--cache", cache)
    wrong(said, 2, "the training text supports", "60000 were asked for")


def test_a_space_that_nothing_fits(evolm, space_file: Path, cache: Path) -> None:
    text = space_file.read_text().replace("d_model: {int: [16, 48], step: 16, baseline: 32}", "d_model: 32")
    text = text.replace("learning_rate: {float: [1e-3, 2e-2], log: true, baseline: 5e-3}", "learning_rate: 5e-3")
    space_file.write_text(text.replace("mix: {simplex: {web: 0.5, code: 0.5}, floor: 0.05}", "mix: {web: 1, code: 1}"))
    said = evolm("search", space_file, "--executor", "inline", "--cache", cache, "--run", "one")
    assert said.code == 0 and len(json.loads(evolm("export", "one", "--to", "json").out)["trials"]) == 1


def test_nothing_that_completes_ends_with_three(evolm, space_file: Path, cache: Path) -> None:
    text = space_file.read_text().replace("{float: [1e-3, 2e-2], log: true, baseline: 5e-3}", "1.0")
    space_file.write_text(text.replace("warmup_steps: 2", "warmup_steps: 0\n  grad_clip: 1e9\n  beta2: 0.0"))
    said = evolm("search", space_file, "--executor", "inline", "--cache", cache, "--trials", "2", "--run", "bad")
    wrong(said, 3, "ended without a completed trial: 2 diverged")
    status = json.loads(evolm("status", "bad", "--json").out)
    assert status["failures"] == {"diverged": 2} and status["front"] == 0


def test_a_run_in_use(evolm, finished_run: Path) -> None:
    from evolm.run_folder import RunFolder

    with RunFolder(finished_run).locked():
        wrong(evolm("resume", finished_run), 4, "run 'first' is in use by process")


def test_a_damaged_ledger(evolm, finished_run: Path, tmp_path: Path) -> None:
    shutil.copytree(finished_run, tmp_path / "torn")
    for extra in ("ledger.db-wal", "ledger.db-shm"):
        (tmp_path / "torn" / extra).unlink(missing_ok=True)
    (tmp_path / "torn/ledger.db").write_bytes(b"no database at all" * 400)
    wrong(evolm("status", "./torn"), 5, "the file is damaged")


def test_unknown_names(evolm, finished_run: Path) -> None:
    wrong(evolm("front", "nowhere"), 2, "no run 'nowhere'")
    wrong(evolm("show", finished_run, "999"), 2, "has no trial '999'; there are 1 to 6, `best` and `knee`")
    wrong(evolm("show", finished_run, "bset"), 2, "has no trial 'bset'")
    wrong(evolm("promote", finished_run, "0"), 2, "has no trial '0'")
    wrong(evolm("export", finished_run, "--to", "xml"), 2, "--to must be one of csv, parquet, json")
    wrong(evolm("search", "space.yaml", "--executor", "slurm"), 2, "--executor must be one of ray, inline")
    wrong(evolm("search", "space.yaml", "--run", "a b"), 2, "no such file")


# --- looking ----------------------------------------------------------------------------------------------------------


def test_the_front_as_json(evolm, finished_run: Path) -> None:
    body = json.loads(evolm("front", finished_run, "--json").out)
    assert (body["schema_version"], body["run"]) == (1, "first")
    assert body["objectives"] == {"bits_per_byte": "min", "params": "min"}
    losses = [trial["metrics"]["bits_per_byte"] for trial in body["front"]]
    sizes = [trial["metrics"]["params"] for trial in body["front"]]
    assert losses == sorted(losses) and sizes == sorted(sizes, reverse=True)
    expected = {
        "id", "digest", "genome", "state", "reason", "message", "metrics", "rungs", "parents", "operator", "flops",
        "seconds", "attempts",
    }  # fmt: skip
    assert set(body["front"][0]) == expected


def test_a_trial_has_its_metrics_at_every_rung(evolm, finished_run: Path) -> None:
    trial = json.loads(evolm("show", finished_run, "best", "--json").out)["trial"]
    assert [rung["tokens"] for rung in trial["rungs"]] == [512, 2048]
    metrics = trial["metrics"]
    assert metrics == trial["rungs"][-1]["metrics"]
    domains = [metrics["bits_per_byte/web"], metrics["bits_per_byte/code"]]
    assert metrics["bits_per_byte"] == pytest.approx(sum(domains) / 2)
    assert metrics["perplexity"] > 1 and metrics["params"] > 0
    mix = trial["genome"]["data"]["mix"]
    assert metrics["tokens/web"] / 2048 == pytest.approx(mix["web"], abs=2 / 64)


def test_show_says_what_changed_from_the_baseline(evolm, finished_run: Path) -> None:
    said = evolm("show", finished_run, "2")
    assert "against the baseline:" in said.out and "train.learning_rate: 0.005 -> " in said.out


def test_status_counts(evolm, finished_run: Path) -> None:
    status = json.loads(evolm("status", finished_run, "--json").out)
    assert sum(status["trials"].values()) == 6 and status["state"] == "finished"
    assert status["flops"] > 0 and status["workers"] == [] and status["failures"] == {}
    assert {"run", "state", "trials", "failures", "front", "hypervolume", "flops", "seconds", "workers"} <= set(status)


def test_export_speaks_csv_json_and_parquet(evolm, finished_run: Path) -> None:
    rows = list(csv.DictReader(io.StringIO(evolm("export", finished_run).out)))
    assert len(rows) == 6 and float(rows[0]["data.mix.web"]) == 0.5 and rows[0]["operator"] == "baseline"
    assert len(json.loads(evolm("export", finished_run, "--to", "json").out)["trials"]) == 6
    assert evolm("export", finished_run, "--to", "parquet").code == 2
    evolm("export", finished_run, "--to", "parquet", "--out", "trials.parquet")
    import pandas

    frame = pandas.read_parquet("trials.parquet")
    assert len(frame) == 6 and frame["bits_per_byte"].notna().all()


def test_the_report_is_written_where_one_says(evolm, finished_run: Path) -> None:
    assert evolm("report", finished_run, "--out", "page.html").out == "page.html\n"
    assert Path("page.html").read_text().startswith("<!")


def test_the_python_interface_reads_the_same_run(finished_run: Path) -> None:
    import evolm as package

    run = package.load(finished_run)
    assert len(run.trials()) == 6 and run.front()[0] == run.trial("best")
    frame = run.trials_frame()
    assert len(frame) == 6 and {"bits_per_byte", "params", "model.d_model", "data.mix.web"} <= set(frame.columns)
    assert run.figure("front").data


def test_reading_never_writes(evolm, finished_run: Path) -> None:
    ledger = finished_run / "ledger.db"
    before = ledger.read_bytes()
    for command in (("front",), ("status",), ("export",), ("show", "1")):
        evolm(command[0], finished_run, *command[1:])
    assert ledger.read_bytes() == before


# --- what is named wrongly, or cannot be had --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "code", "expected"),
    [
        (("search", "SPACE", "--seed", "99999999999999999999"), 2, "--seed"),
        (("search", "SPACE", "--run", ""), 2, "run name '' must match"),
        (("search", "SPACE", "--algorithm", "bayes"), 2, "unknown algorithm 'bayes'"),
        (("search", "SPACE", "--cache", "SPACE"), 2, ""),
        (("export", "RUN", "--out", "nowhere/x.csv"), 2, "nowhere/x.csv: No such file"),
        (("show", "RUN", "\u00b2"), 2, "has no trial '\u00b2'"),
        (("show", "RUN", "0"), 2, "has no trial '0'"),
        (("resume", "RUN", "--trials", "1", "--executor", "inline"), 2, "has 6 already"),
        (("train", "RECIPE", "--device", "tpu"), 2, "device 'tpu' cannot be used here"),
        (("train", "RECIPE", "--device", "cuda:77"), 2, "device 'cuda:77' cannot be used here"),
        (("train", "RECIPE", "--target", "{"), 2, "must be JSON"),
        (("train", "RECIPE", "--target", '{"wbe": 1}'), 2, "must give weights to some of web"),
        (("train", "RECIPE", "--target", '{"web": -1}'), 2, "weights must be numbers of at least 0"),
        (("train", "RECIPE", "--out", "SPACE/below"), 5, "Not a directory"),
        (("generate", "RUN", "--prompt", "a"), 2, "no exported model there"),
    ],
)
def test_a_mistake_ends_in_words_and_leaves_nothing(
    evolm, space_file: Path, finished_run: Path, cache: Path, words: tuple[str, ...], code: int, expected: str
) -> None:
    Path("recipe.yaml").write_text(
        "version: 1\ndata: {sources: {web: {path: nothing}}}\nmodel: {d_model: 16, n_heads: 1}\ntrain: {tokens: 1K}\n"
    )
    named = {"SPACE": str(space_file), "RUN": str(finished_run), "RECIPE": "recipe.yaml"}
    replaced = [named.get(word, word.replace("SPACE/", f"{space_file}/")) for word in words]
    said = evolm(*replaced, *(["--executor", "inline"] if words[0] == "search" else []))
    assert said.code == code and expected in said.err and "Traceback" not in said.err, said.err
    assert not Path("runs").exists() or not any(Path("runs").glob("*/ledger.db"))


def test_a_gpu_that_is_not_there_is_told_before_the_first_trial(evolm, space_file: Path, cache: Path) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has one")
    space_file.write_text(space_file.read_text() + "resources: {gpus: 1}\n")
    said = evolm("search", space_file, "--executor", "inline", "--cache", cache, "--run", "first")
    assert said.code == 2 and "device 'cuda' cannot be used here" in said.err
    space_file.write_text(space_file.read_text().replace("gpus: 1", "gpus: 0"))
    assert evolm("search", space_file, "--executor", "inline", "--cache", cache, "--run", "first").code == 0


def test_a_larger_budget_is_kept(evolm, finished_run: Path, tmp_path: Path) -> None:
    shutil.copytree(finished_run, tmp_path / "first")
    assert evolm("resume", tmp_path / "first", "--trials", "7", "--executor", "inline").code == 0
    again = evolm("resume", tmp_path / "first", "--executor", "inline")
    assert again.code == 0 and "all 7 trials of the budget were tried; for more, give --trials N" in again.err
    assert "--trials 14" in (tmp_path / "first/report.html").read_text()


def test_data_that_is_not_there_is_told_at_its_line(evolm, space_file: Path, cache: Path) -> None:
    space_file.write_text(space_file.read_text().replace("/web", "/wbe"))
    said = evolm("search", space_file, "--executor", "inline", "--cache", cache)
    assert said.code == 2 and f"{space_file}:6:10: data.sources.web: data source '" in said.err
    assert "no such file or folder; did you mean" in said.err


def test_an_empty_folder_is_told_at_its_line(evolm, space_file: Path, cache: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    text = space_file.read_text()
    line = next(line for line in text.splitlines() if line.strip().startswith("web:"))
    space_file.write_text(text.replace(line, f"    web: {{path: {tmp_path / 'empty'}}}"))
    said = evolm("search", space_file, "--executor", "inline", "--cache", cache)
    assert said.code == 2 and f"{space_file}:6:10: data.sources.web: no text in" in said.err
