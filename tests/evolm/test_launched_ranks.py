"""Guards training over several processes from the command line: started by torchrun or by evolm, stopped, killed, and
continued by whoever comes next."""

import json
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from evolm.errors import RankError
from evolm.ranks import BYSTANDER, free_port, run_ranks
from trainer.checkpoint import read_state

TOKENS = 20_000

RECIPE = """
version: 1
name: words
data:
  sources: {{web: {{path: "{corpus}/web"}}, code: {{path: "{corpus}/code"}}}}
  tokenizer: {{vocab_size: 300}}
  sequence_length: 32
  held_out: {{max_bytes: 2KiB}}
model: {{d_model: 32, n_layers: 2, n_heads: 2}}
train: {{batch_tokens: 128, learning_rate: 0.001, warmup_steps: 2}}
"""


@pytest.fixture
def recipe_file(tmp_path, words_corpus):
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE.format(corpus=words_corpus))
    return path


def words_of(recipe_file, folder, cache, *more):
    return ["train", str(recipe_file), "--tokens", str(TOKENS), "--cache", str(cache), "--out", str(folder), *more]


# --- watching ranks ---------------------------------------------------------------------------------------------------

FAILS = "import os, sys, time; rank = os.environ['RANK']\n"


def ranks_of(source, world=2):
    return run_ranks([sys.executable, "-S", "-c", FAILS + source], world)


def test_ranks_that_end_well_end_the_run_well(tmp_path):
    assert ranks_of(f"open({str(tmp_path)!r} + '/' + rank, 'w').write(os.environ['WORLD_SIZE'] + rank)", 3) == 0
    assert sorted(path.read_text() for path in tmp_path.iterdir()) == ["30", "31", "32"]


def test_one_failed_rank_ends_the_others_and_is_the_one_that_is_told_of():
    begun = time.monotonic()
    with pytest.raises(RankError) as told:
        ranks_of("if rank == '1': sys.exit('no such thing')\ntime.sleep(60)")
    assert str(told.value) == "rank 1 ended with exit code 1, and the others were ended; it said last:\nno such thing"
    assert time.monotonic() - begun < 20


def test_a_killed_rank_is_told_of_and_not_those_that_noticed():
    with pytest.raises(RankError, match=r"rank 1 ended with SIGKILL, and the others were ended$"):
        ranks_of(f"os.kill(os.getpid(), 9) if rank == '1' else (time.sleep(0.1), sys.exit({BYSTANDER}))")


def test_the_error_of_a_rank_keeps_its_exit_code():
    with pytest.raises(RankError, match="rank 1 ended with exit code 2") as told:
        ranks_of(f"sys.exit(2 if rank == '1' else {BYSTANDER})")
    assert told.value.exit_code == 2


def test_when_all_only_noticed_one_is_heard():
    with pytest.raises(RankError, match=r"another one was gone; it said last:\nNCCL$"):
        ranks_of(f"print('NCCL'); sys.exit({BYSTANDER})")


def signalled(source, number, monkeypatch, **waits):
    """The exit code of ranks whose launcher, this process, is sent a signal once both have begun."""
    for name, seconds in waits.items():
        monkeypatch.setattr(f"evolm.ranks.{name}", seconds)
    launcher = f"import time; os.kill({os.getpid()}, {int(number)}) if rank == '1' else None\n"
    return ranks_of(source.replace("BEGUN", launcher))


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 143)])
def test_ranks_that_cannot_save_yet_end_by_the_signal_that_was_passed_on(monkeypatch, number, code):
    source = f"import signal; signal.signal({int(signal.SIGINT)}, signal.SIG_DFL)\nBEGUN\ntime.sleep(60)"
    assert signalled(source, number, monkeypatch) == code


def test_a_rank_that_ends_by_a_signal_may_take_its_time(monkeypatch):
    """The first one lets its sinks end; the other one has gone long before."""
    handle = "import signal; signal.signal(15, lambda *_: (time.sleep(0.4 * (rank == '0')), sys.exit(143)))\n"
    slow = "time.sleep(0.5)\n"  # so that the first one listens
    source = handle + "if rank == '1':\n " + slow + " BEGUN\ntime.sleep(60)"
    assert signalled(source, signal.SIGTERM, monkeypatch, LAST_SECONDS=0.05) == 143


def test_more_processes_than_gpus_are_refused_before_any_is_started(evolm, recipe_file, monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 3)
    monkeypatch.setattr("evolm.ranks.run_ranks", lambda command, world: world)
    for device, processes, words in (
        ("cuda", 4, "and this machine has 3"),
        ("cuda:1", 2, "is one GPU"),
        ("cuda", 3, ""),
    ):
        said = evolm("train", recipe_file, "--tokens", 1000, "--device", device, "--processes", processes)
        assert (said.code, words in said.err) == (2 if words else processes, True)


@pytest.mark.parametrize(("world", "processes"), [("1", 2), ("2", 3)])
def test_processes_are_not_ignored_by_a_rank_of_somebody_else(evolm, recipe_file, monkeypatch, world, processes):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", world)
    said = evolm("train", recipe_file, "--tokens", 1000, "--processes", processes)
    assert said.code == 2
    assert f"--processes {processes}: the environment has made this process rank 0 of {world}" in said.err


def test_bad_input_is_told_before_torch_is_there_and_before_anything_is_written(recipe_file, tmp_path):
    """A sink, an engine and a recipe that cannot be used, with ranks of our own and without."""
    muon = tmp_path / "muon.yaml"
    muon.write_text(recipe_file.read_text().replace("train: {", "train: {optimizer: muon, "))
    cases = [
        (recipe_file, ["--tokens", "1000", "--sink", "tensorbord"], "did you mean 'tensorboard'"),
        (recipe_file, [], "needs `train.tokens`"),
        (recipe_file, ["--tokens", "1000", "--engine", "fsdp"], "--engine fsdp needs ranks"),
        (muon, ["--tokens", "1000", "--engine", "fsdp", "--processes", "2"], "trains with adamw; muon"),
    ]
    source = (
        "import json, sys\nfrom evolm.cli import main\n"
        "for words in json.loads(sys.argv[1]):\n"
        " sys.argv = ['evolm', 'train', *words]\n"
        " try: main()\n"
        " except SystemExit as ended: print(ended.code, 'torch' in sys.modules)\n"
    )
    out = tmp_path / "out"
    words = [[str(path), *flags, "--out", str(out)] for path, flags, _ in cases]
    done = subprocess.run([sys.executable, "-c", source, json.dumps(words)], capture_output=True, text=True)
    assert done.stdout.splitlines() == ["2 False"] * len(cases), done.stderr
    assert all(told in done.stderr for *_, told in cases), done.stderr
    assert not out.exists()


def test_what_the_first_rank_says_itself_is_not_said_again():
    assert ranks_of("sys.exit(2)") == 2


def test_ranks_have_the_command_line_of_who_started_them(evolm, recipe_file):
    """Flags that do not go together are refused before any process is started."""
    for flags, words in (
        (("--engine", "single", "--processes", 2), "--engine single trains in one process, not 2"),
        (("--engine", "dpp"), "--engine must be one of single, ddp, fsdp, deepspeed, is 'dpp'"),
        (("--engine", "ddp"), "--engine ddp needs ranks: give --processes, or start it by torchrun"),
        (("--zero-stage", 3), "--zero-stage is for --engine deepspeed"),
        (("--offload", "--engine", "fsdp"), "--offload is for --engine deepspeed"),
    ):
        said = evolm("train", recipe_file, "--tokens", 1000, "--out", recipe_file.parent / "out", *flags)
        assert (said.code, words in said.err) == (2, True), said.err


# --- torchrun ---------------------------------------------------------------------------------------------------------


def torchrun(words):
    """Two ranks under torchrun, once they have begun to train."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_addr", "127.0.0.1"]
    command += ["--master_port", str(free_port()), "-m", "evolm", *words]
    started = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=os.environ)
    seen = []
    for line in started.stderr:
        seen.append(line)
        if "tokens/s" in line:
            return started
    pytest.fail("".join(seen))


def ranks_under(process):
    """The ranks that torchrun started, by their number."""
    children = psutil.Process(process.pid).children()
    return {int(child.environ()["RANK"]): child for child in children if "RANK" in child.environ()}


def test_a_run_under_torchrun_is_stopped_killed_and_finished_by_another_engine(evolm, recipe_file, cache, tmp_path):
    folder = tmp_path / "out"
    started = torchrun(words_of(recipe_file, folder, cache, "--engine", "fsdp"))
    started.send_signal(signal.SIGTERM)
    rest = started.communicate(timeout=60)[1]
    assert "interrupted, everything is saved; the same command goes on" in rest
    stopped = read_state(folder / "checkpoints" / "latest").samples
    assert 0 < stopped < TOKENS / 32

    started = torchrun(words_of(recipe_file, folder, cache, "--engine", "deepspeed"))
    ranks_under(started)[1].kill()
    begun = time.monotonic()
    started.communicate(timeout=60)
    assert started.returncode != 0
    assert time.monotonic() - begun < 30
    assert read_state(folder / "checkpoints" / "latest").samples == stopped

    said = evolm(*words_of(recipe_file, folder, cache))
    assert said.code == 0
    assert evolm(*words_of(recipe_file, tmp_path / "alone", cache)).code == 0
    parts, whole = (json.loads((path / "record.json").read_text()) for path in (folder, tmp_path / "alone"))
    assert parts["validation"]["bits_per_byte"] == pytest.approx(whole["validation"]["bits_per_byte"], abs=5e-3)
    assert parts["tokens"] == whole["tokens"]


def test_evolm_starts_its_own_ranks(evolm, recipe_file, cache, tmp_path):
    command = [sys.executable, "-m", "evolm", *words_of(recipe_file, tmp_path / "out", cache), "--processes", "2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("bits_per_byte ") == 1
    assert done.stderr.count("20K/20K tokens") == 1
    assert json.loads((tmp_path / "out" / "record.json").read_text())["tokens"] == TOKENS
