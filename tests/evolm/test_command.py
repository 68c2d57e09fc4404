"""Somebody else's trainer: whatever a program does, its trial becomes an outcome with the right reason, and nothing of
it is left behind."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from evolm.errors import BadMetrics, SpaceError
from evolm.executors import command as commands
from evolm.executors.base import Job, Limits, Outcome, TrialProgress
from evolm.executors.command import Command, check_command, run_command
from evolm.executors.limits import Watch
from evolm.executors.processes import marked
from evolm.run_folder import final_checkpoint
from fitness.objectives import check_metrics, read_objectives
from search_spaces.yaml_source import read_yaml

START = """
import json, os, shutil, signal, subprocess, sys, time
from pathlib import Path

tokens, checkpoint = int(os.environ["EVOLM_TOKENS"]), Path(os.environ["EVOLM_CHECKPOINT"])

def write(text):
    with open(os.environ["EVOLM_METRICS"], "a") as file:
        file.write(text)

def tell(**values):
    write(json.dumps(values) + "\\n")

def until(condition):
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)
"""

Launch = Callable[..., Outcome]


@pytest.fixture(autouse=True)
def looked_at_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(commands, "LOOK_SECONDS", 0.01)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "trials").mkdir()
    return tmp_path / "trials/1"


@pytest.fixture
def make(tmp_path: Path, folder: Path) -> Callable[..., Job]:
    def make_job(program: str | list[str], **changes: Any) -> Job:
        if isinstance(program, str):
            (tmp_path / "program.py").write_text(START + program)
            program = ["python", "-S", "-E", "program.py"]
        objectives = changes.pop("objectives", ["loss"])
        context = Command(command=program, objectives=objectives, roots=[str(tmp_path)])
        plain = {"rung": 0, "top": True, "tokens": 1000, "genome": {"train": {"lr": 0.5}}, "seed": 7}
        values = {**plain, "folder": str(folder), "context": context.as_dict(), **changes}
        return Job(trial=1, lease=3, **values)

    return make_job


@pytest.fixture
def launch(make: Callable[..., Job], folder: Path) -> Launch:
    """Run a program; whatever it does, none of its processes is left."""

    def run(
        program: str | list[str], tell: Callable[[TrialProgress], bool] = lambda _: True, **changes: Any
    ) -> Outcome:
        outcome = run_command(make(program, **changes), tell)
        assert left(folder) == []
        return outcome

    return run


def left(folder: Path) -> list[psutil.Process]:
    found = marked(f"EVOLM_METRICS={folder}/metrics.jsonl")
    return [process for process in found if process.status() != psutil.STATUS_ZOMBIE]


def ended(outcome: Outcome) -> tuple[str, str | None]:
    return outcome.kind, outcome.reason


# --- what goes in and comes out ---------------------------------------------------------------------------------------


def test_a_recipe_goes_in_and_metrics_come_out(launch: Launch, folder: Path) -> None:
    outcome = launch(
        "recipe = json.loads(Path(os.environ['EVOLM_RECIPE']).read_text())\n"
        "tell(tokens=500, loss=9.0)\n"
        "tell(tokens=tokens, loss=recipe['train']['lr'] + int(os.environ['EVOLM_SEED']), accuracy=1, flops=60.5)\n"
        "(checkpoint / 'weights').write_text('w')\n"
    )
    assert ended(outcome) == ("result", None) and outcome.metrics == {"loss": 7.5, "accuracy": 1}
    assert outcome.flops == 60.5 and outcome.seconds > 0
    assert (outcome.trial, outcome.lease, outcome.rung) == (1, 3, 0)
    assert (final_checkpoint(folder) / "weights").read_text() == "w"


def test_names_in_braces_say_the_same_as_the_environment(launch: Launch, tmp_path: Path) -> None:
    names = ["recipe", "tokens", "checkpoint", "metrics", "seed"]
    (tmp_path / "program.py").write_text(
        START + f"assert sys.argv[1:] == ['--' + os.environ['EVOLM_' + name.upper()] for name in {names}] + "
        "['{}', '{other}']\ntell(loss=1)"
    )
    arguments = [*(f"--{{{name}}}" for name in names), "{}", "{other}"]
    assert launch(["python", "-S", "-E", "program.py", *arguments]).kind == "result"


def test_a_folder_with_braces_in_its_name_is_taken_as_it_is(launch: Launch, tmp_path: Path) -> None:
    (tmp_path / "{tokens}").mkdir()
    program = ["sh", "-c", '[ -d "$0" ] && echo \'{"loss": 1}\' >> {metrics}', "{checkpoint}"]
    place = tmp_path / "{tokens}/1"
    outcome = launch([*program[:2], program[2].replace("{metrics}", '"$EVOLM_METRICS"'), program[3]], folder=str(place))
    assert outcome.kind == "result"


def test_python_is_that_of_evolm_also_for_what_the_program_starts(
    launch: Launch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    outcome = launch(
        "tell(loss=1)\n"
        f"assert sys.executable == {sys.executable!r}\n"
        f"assert shutil.which('python') == {os.path.join(os.path.dirname(sys.executable), 'python')!r}\n"
        f"assert os.getcwd() == {str(tmp_path)!r}"
    )
    assert outcome.kind == "result", outcome.message


@pytest.mark.parametrize("given", [None, "/mine"])
def test_the_python_path_is_that_of_where_the_search_began_and_not_a_workers(
    make: Callable[..., Job], monkeypatch: pytest.MonkeyPatch, given: str | None
) -> None:
    if given is None:
        monkeypatch.delenv("PYTHONPATH", raising=False)
    else:
        monkeypatch.setenv("PYTHONPATH", given)
    job = make(f"assert os.environ.get('PYTHONPATH') == {given!r}\ntell(loss=1)")
    monkeypatch.setenv("PYTHONPATH", "/where/evolm/is")
    assert run_command(job, lambda _: True).kind == "result"


def test_progress_is_heard_while_it_runs(launch: Launch, tmp_path: Path) -> None:
    heard: list[TrialProgress] = []

    def listen(progress: TrialProgress) -> bool:
        heard.append(progress)
        if progress.tokens == 500:
            (tmp_path / "heard").touch()
        return True

    outcome = launch(
        "tell(tokens=500, loss=2.5, tokens_per_second=40, flops=1e3)\n"
        f"until(Path({str(tmp_path / 'heard')!r}).exists)\n"
        "tell(tokens=float('nan'), flops=-1, loss=3.0)\ntell(tokens=tokens, loss=1.0)",
        listen,
    )
    assert outcome.kind == "result" and heard[0].tokens == 0
    said = {"loss": 2.5, "tokens_per_second": 40.0, "flops": 1000.0}
    assert TrialProgress(trial=1, tokens=500, total_tokens=1000, **said) in heard


# --- from rung to rung ------------------------------------------------------------------------------------------------

GOES_ON = """
state = checkpoint / "tokens"
began = int(state.read_text()) if state.exists() else 0
state.write_text(str(tokens))
tell(tokens=tokens, loss=1 / tokens, began=began, flops=tokens - began)
"""


def test_a_second_launch_goes_on_from_the_checkpoint(launch: Launch) -> None:
    first, second = launch(GOES_ON), launch(GOES_ON, rung=1, tokens=4000)
    assert (first.metrics["began"], second.metrics["began"]) == (0, 1000)
    assert (first.flops, second.flops, second.rung) == (1000, 3000, 1)


def test_only_lines_of_this_launch_count(launch: Launch) -> None:
    launch(GOES_ON)
    outcome = launch("tell(tokens=tokens, accuracy=1)", rung=1)
    assert ended(outcome) == ("fail", "bad_metrics") and "no line of this launch has loss" in outcome.message
    assert outcome.flops == 0


def test_a_line_that_an_earlier_launch_left_torn_is_not_met_again(launch: Launch) -> None:
    torn = launch("write('{\"tokens\": 12')\nos.kill(os.getpid(), signal.SIGKILL)")
    assert ended(torn) == ("fail", "crashed") and "SIGKILL" in torn.message
    assert launch(GOES_ON).kind == "result"


def test_a_program_that_writes_its_file_anew_is_read_from_its_beginning(launch: Launch) -> None:
    launch("for step in range(30): tell(tokens=step, loss=9.0, step=step)")
    outcome = launch("Path(os.environ['EVOLM_METRICS']).unlink()\nfor n in range(40): tell(loss=n / 2)")
    assert outcome.metrics == {"loss": 19.5}


# --- metrics ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"loss": NaN}', "metric 'loss' must be finite, is nan"),
        ('{"loss": -Infinity}', "metric 'loss' must be finite, is -inf"),
        ('{"loss": 1' + "0" * 400 + "}", "metric 'loss' must be finite, is inf"),
        ('{"loss": "1.5"}', "metric 'loss' must be a number, is '1.5'"),
        ('{"loss": null}', "metric 'loss' must be a number, is None"),
        ('{"loss": true}', "metric 'loss' must be a number, is True"),
        ('{"loss": [1]}', r"metric 'loss' must be a number, is \[1\]"),
    ],
)
def test_what_is_no_number_reaches_the_search_which_refuses_it(launch: Launch, line: str, words: str) -> None:
    outcome = launch(f"write({line!r} + chr(10))")
    assert outcome.kind == "result"
    with pytest.raises(BadMetrics, match=words):
        check_metrics(outcome.metrics, read_objectives(["loss"]))


def test_what_is_no_objective_may_be_no_number(launch: Launch) -> None:
    outcome = launch(f"tell(loss=1, a=float('nan'), b=float('-inf'), c='1', d=2.5)\nwrite({'  '!r})")
    assert ended(outcome) == ("result", None) and outcome.metrics == {"loss": 1, "d": 2.5}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "no line of this launch has loss"),
        ('{"accuracy": 1}\n', "no line of this launch has loss"),
        ('{"loss": 1}\nloss: 2\n', "a line that is no JSON object: 'loss: 2'"),
        ('{"loss": 1}\n{"loss": 2', "a line that is no JSON object: '{\"loss\": 2'"),
        ('{"loss": 1}\n[1, 2]\n', "a line that is no JSON object: '[1, 2]'"),
        ('{"loss": 1}\n' + "[" * 200_000 + "\n", "a line that is no JSON object: '[[["),
        ('{"loss": 1' + " " * 2**20 + "}\n", "a line that is no JSON object"),
        ('{"loss": 1, "tokens": 899}\n', "its last result is of 899 tokens, asked for were 1,000"),
    ],
)
def test_metrics_that_cannot_be_used(launch: Launch, tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "lines").write_text(text)
    outcome = launch("write(Path('lines').read_text())")
    assert ended(outcome) == ("fail", "bad_metrics") and words in outcome.message
    assert len(outcome.message) < 400


def test_metrics_that_are_no_text(launch: Launch) -> None:
    outcome = launch(["sh", "-c", r'printf "\377\376\n" >> "$EVOLM_METRICS"'])
    assert ended(outcome) == ("fail", "bad_metrics") and "no JSON object" in outcome.message


def test_whole_batches_blank_lines_and_a_last_line_without_an_end_are_fine(launch: Launch) -> None:
    outcome = launch("write('\\n\\n  \\n')\nwrite(json.dumps({'loss': 2.0, 'tokens': 960}))")
    assert outcome.metrics == {"loss": 2.0}


def test_a_file_of_many_lines_is_read_to_its_end(launch: Launch) -> None:
    outcome = launch('write(\'\'.join(f\'{{"loss": 1, "note": "{"x" * 90}", "n": {n}}}\\n\' for n in range(30000)))')
    assert outcome.metrics == {"loss": 1, "n": 29999}


# --- how it ends ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("program", "words"),
    [
        ("tell(loss=1)\nsys.exit(3)", "ended with exit code 3: it printed nothing"),
        (
            "tell(loss=1)\nraise ValueError('no \\x1b[31msuch\\x07 layer')",
            "exit code 1: ValueError: no  [31msuch  layer",
        ),
        ("tell(loss=1)\nos.kill(os.getpid(), signal.SIGSEGV)", "ended with SIGSEGV"),
        ("tell(loss=1)\nos.kill(os.getpid(), 40)", "ended with signal 40"),
    ],
)
def test_a_program_that_fails_has_crashed_whatever_it_told_before(launch: Launch, program: str, words: str) -> None:
    outcome = launch(program)
    assert ended(outcome) == ("fail", "crashed") and words in outcome.message


@pytest.mark.parametrize(
    ("line", "kind", "reason", "words"),
    [
        ("failed='diverged', message='loss is nan', flops=5", "fail", "diverged", "loss is nan"),
        ("failed='oom'", "fail", "oom", "says that it is oom"),
        ("failed='infeasible', message='heads of 7'", "infeasible", None, "heads of 7"),
        ("failed='bored', message=3", "fail", "crashed", "bored: 3"),
        ("failed=['a'], message='x' * 9999", "fail", "crashed", "['a']: xxx"),
        # Not its own to know: these would be tried again without end.
        ("failed='interrupted'", "fail", "crashed", "interrupted"),
        ("failed='lost'", "fail", "crashed", "lost"),
    ],
)
@pytest.mark.parametrize("code", [0, 1])
def test_a_failure_that_it_tells_itself(
    launch: Launch, line: str, kind: str, reason: str | None, words: str, code: int
) -> None:
    outcome = launch(f"tell(loss=1)\ntell({line})\nsys.exit({code})")
    assert ended(outcome) == (kind, reason) and outcome.message.startswith(words) and len(outcome.message) < 600
    assert outcome.flops == (5 if "flops" in line else 0)


def test_a_line_that_says_that_nothing_failed_is_no_failure(launch: Launch) -> None:
    assert launch("tell(loss=1, failed=False)").kind == "result"


def test_what_it_prints_is_kept_within_bounds(launch: Launch, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(commands, "LOG_BYTES", 10_000)
    program = "print('é' * 99, flush=True)\nfor n in range(20000): print(n, 'words')\nsys.exit('the end')"
    outcome = launch(program)
    kept = [folder / "output.log", folder / "output.log.1"]
    assert outcome.message == "ended with exit code 1: the end"
    assert all(0 < path.stat().st_size < 10_000 + 2**16 + 1 for path in kept)
    assert "".join(path.read_text() for path in reversed(kept)).endswith("\n19998 words\n19999 words\nthe end\n")
    assert launch("tell(loss=1)").kind == "result"
    assert "evolm: rung 0, 1000 tokens: " in kept[0].read_text()


def test_printing_without_end_ends_with_the_time_that_it_has(launch: Launch, folder: Path) -> None:
    outcome = launch(["sh", "-c", "while :; do echo 0123456789; done"], limits=Limits(seconds=0.5))
    assert ended(outcome) == ("fail", "timeout")
    assert (folder / "output.log").stat().st_size > 1000


@pytest.mark.parametrize(
    ("program", "words"),
    [
        (["no-such-program-here"], "no-such-program-here: No such file or directory"),
        (["./plain.txt"], "./plain.txt: Permission denied"),
        (["./empty.bin"], "./empty.bin: Exec format error"),
    ],
)
def test_a_program_that_cannot_be_started(launch: Launch, tmp_path: Path, program: list[str], words: str) -> None:
    (tmp_path / "plain.txt").write_text("words")
    (tmp_path / "empty.bin").write_bytes(bytes(100))
    (tmp_path / "empty.bin").chmod(0o755)
    outcome = launch(program)
    assert ended(outcome) == ("fail", "crashed") and outcome.message.startswith(words)
    assert f"(on {os.uname().nodename})" in outcome.message


def test_a_folder_that_this_node_does_not_have(make: Callable[..., Job], tmp_path: Path) -> None:
    job = make("tell(loss=1)")
    job.context["roots"][0] = str(tmp_path / "elsewhere")
    outcome = run_command(job, lambda _: True)
    assert ended(outcome) == ("fail", "crashed") and str(tmp_path / "elsewhere") in outcome.message


# --- limits -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("program", "limits", "reason", "words"),
    [
        ("tell(tokens=1, flops=3)\nsignal.pause()", Limits(silent_seconds=1), "timeout", "no progress for 1 s"),
        ("print('hm', flush=True)\nsignal.pause()", Limits(silent_seconds=0.2), "timeout", "no progress for 0.2 s"),
        (
            "while True: tell(step=1); time.sleep(0.01)",
            Limits(silent_seconds=10, seconds=0.3),
            "timeout",
            "took longer than 0.3 s",
        ),
        ("x = bytearray(300 << 20)\nsignal.pause()", Limits(memory=100 << 20), "oom", "its limit is 100MiB"),
        (
            "children = [os.fork() for _ in range(2)]\nx = bytearray(60 << 20)\nsignal.pause()",
            Limits(memory=100 << 20),
            "oom",
            "its limit is 100MiB",
        ),
    ],
)
def test_a_program_that_takes_more_than_it_may(
    launch: Launch, program: str, limits: Limits, reason: str, words: str
) -> None:
    outcome = launch(program, limits=limits)
    assert ended(outcome) == ("fail", reason) and words in outcome.message
    assert outcome.flops == (3 if "flops=3" in program else 0) and 0.1 < outcome.seconds < 20


def test_memory_that_processes_share_is_counted_once(launch: Launch, tmp_path: Path) -> None:
    looks = 0

    def look(progress: TrialProgress) -> bool:
        nonlocal looks
        looks += progress.tokens == 1
        if looks == 5:
            (tmp_path / "go").touch()
        return True

    outcome = launch(
        "x = bytearray(60 << 20)\n"
        "if any(os.fork() == 0 for _ in range(3)): signal.pause()\n"
        f"tell(tokens=1)\nuntil(Path({str(tmp_path / 'go')!r}).exists)\ntell(loss=1)",
        look,
        limits=Limits(memory=150 << 20, seconds=30),
    )
    assert outcome.kind == "result" and looks >= 5


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        ("tell(tokens=tokens, loss=1)", None),
        ("tell(tokens=500, loss=2)\ntell(tokens=tokens, loss=1)\ntell(saved=True)", None),
        ("tell(tokens=500)\ntell(loss=1)", None),
        # These may as well be of half the training.
        ("tell(tokens=tokens - 1, loss=1)", "timeout"),
        ("tell(loss=2)\ntell(loss=1)", "timeout"),
        ("tell(loss=1)\ntell(step=2)", "timeout"),
        ("tell(tokens=tokens)", "timeout"),
        ("write('words\\n')\ntell(tokens=tokens, loss=1)", "timeout"),
    ],
)
def test_a_result_that_it_told_before_it_hung_counts_when_it_is_the_last_one(
    launch: Launch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lines: str, expected: str | None
) -> None:
    hangs = tmp_path / "hangs"
    monkeypatch.setattr(Watch, "broken", lambda _: ("timeout", "too late") if hangs.exists() else None)
    outcome = launch(f"{lines}\nPath('hangs').touch()\nsignal.pause()")
    assert outcome.reason == expected and outcome.message.endswith("too late")
    assert outcome.metrics == ({} if expected else {"loss": 1})


def test_a_failure_that_it_told_before_it_hung_is_its_reason(launch: Launch) -> None:
    program = "tell(failed='diverged', message='loss is nan')\nsignal.pause()"
    outcome = launch(program, limits=Limits(silent_seconds=1))
    assert ended(outcome) == ("fail", "diverged")


# --- what it leaves behind --------------------------------------------------------------------------------------------

LEAVES = {
    "a child that ignores SIGTERM": "if os.fork() == 0:\n    stay()\n",
    "one in another session, whose parent is gone": (
        "if (child := os.fork()) == 0:\n    os.setsid()\n    if os.fork():\n        os._exit(0)\n    stay()\n"
        "os.waitpid(child, 0)\n"
    ),
    "one without our words in its environment": (
        "subprocess.Popen([sys.executable, '-S', '-E', '-c', "
        '\'import signal; open("stays", "w").write(str(__import__("os").getpid())); signal.pause()\'], env={})\n'
    ),
}

STAY = """
def stay():
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    Path("stays").write_text(str(os.getpid()))
    while True:
        signal.pause()

"""


@pytest.mark.parametrize("how", ["ends", "crashes", "hangs"])
@pytest.mark.parametrize("leaves", LEAVES.values(), ids=LEAVES)
def test_nothing_that_it_started_is_left(
    launch: Launch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, leaves: str, how: str
) -> None:
    monkeypatch.setattr(commands, "GRACE_SECONDS", 0.05)
    end = {"ends": "tell(loss=1)", "crashes": "sys.exit(1)", "hangs": "tell(tokens=1)\nstay()"}[how]
    wait = "until(lambda: Path('stays').is_file() and Path('stays').read_text())\n"
    outcome = launch(STAY + leaves + wait + end, lambda progress: progress.tokens < 1)
    assert outcome.reason == {"ends": None, "crashes": "crashed", "hangs": "interrupted"}[how]
    pid, deadline = int((tmp_path / "stays").read_text()), time.monotonic() + 10
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline, "it is left"


def test_what_an_earlier_launch_left_is_ended_before_the_next_one(launch: Launch, folder: Path) -> None:
    """Its supervisor was killed, and could not."""
    mark = {"EVOLM_METRICS": f"{folder}/metrics.jsonl"}
    with subprocess.Popen(["sleep", "60"], env={**os.environ, **mark}) as old:
        assert [process.pid for process in left(folder)] == [old.pid]
        assert launch("tell(loss=1)").kind == "result"
        assert old.wait(0) == -9


# --- being asked to end -----------------------------------------------------------------------------------------------

SAVES = """
def save(*_):
    (checkpoint / "step").write_text(str(step))
    sys.exit(0)

signal.signal(signal.SIGTERM, save)
state = checkpoint / "step"
step = began = int(state.read_text()) if state.exists() else 0
limit = tokens if began else 10**9
while step < limit:
    step += 1
    if step % 100 == 0:
        tell(tokens=min(step, tokens - 1), loss=1 / step, flops=step - began)
        time.sleep(0.002)
tell(tokens=step, loss=1 / step, began=began, flops=step - began)
"""


def test_a_program_that_is_asked_to_end_saves_and_the_next_launch_goes_on(launch: Launch, folder: Path) -> None:
    """Although its lines of progress look like results."""
    stopped = launch(SAVES, lambda progress: progress.tokens < 300)
    assert ended(stopped) == ("fail", "interrupted") and stopped.flops >= 300
    saved = int((final_checkpoint(folder) / "step").read_text())
    rest = launch(SAVES, tokens=saved + 1000)
    assert rest.kind == "result" and rest.metrics["began"] == saved and rest.flops == 1000


def test_a_program_that_had_just_told_its_result_has_ended(launch: Launch) -> None:
    program = "signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))\ntell(tokens=tokens, loss=1)\nsignal.pause()"
    outcome = launch(program, lambda progress: progress.tokens < 1000)
    assert ended(outcome) == ("result", None) and outcome.metrics == {"loss": 1}


def test_a_result_that_does_not_say_how_far_it_is_does_not_count_when_it_was_asked_to_end(launch: Launch) -> None:
    program = "signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))\ntell(loss=1, flops=1)\nsignal.pause()"
    assert ended(launch(program, lambda progress: progress.flops == 0)) == ("fail", "interrupted")


def test_a_program_that_ends_by_the_signal_is_interrupted(launch: Launch) -> None:
    assert ended(launch("signal.pause()", lambda _: False)) == ("fail", "interrupted")


def test_a_program_that_does_not_end_is_killed(launch: Launch, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(commands, "GRACE_SECONDS", 0.2)
    program = "signal.signal(signal.SIGTERM, signal.SIG_IGN)\ntell(tokens=1)\nwhile True: signal.pause()"
    outcome = launch(program, lambda progress: progress.tokens < 1, limits=Limits(seconds=20, silent_seconds=20))
    assert ended(outcome) == ("fail", "interrupted") and "did not end within 0.2 s of SIGTERM" in outcome.message


def test_time_that_runs_out_while_it_saves_is_no_failure(
    launch: Launch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saving, looks = tmp_path / "saving", 0
    monkeypatch.setattr(Watch, "broken", lambda _: ("timeout", "too late") if saving.exists() else None)

    def look(progress: TrialProgress) -> bool:
        nonlocal looks
        looks += saving.exists()
        if looks == 3:
            (tmp_path / "go").touch()
        return progress.tokens < 1

    program = (
        "def save(*_):\n    Path('saving').touch()\n    until(Path('go').exists)\n    sys.exit(0)\n"
        "signal.signal(signal.SIGTERM, save)\ntell(tokens=1)\nwhile True: signal.pause()"
    )
    assert ended(launch(program, look)) == ("fail", "interrupted") and looks >= 3


# --- storage ----------------------------------------------------------------------------------------------------------


def test_a_vanished_folder_ends_the_run(launch: Launch, folder: Path) -> None:
    shutil.rmtree(folder.parent)
    outcome = launch("tell(loss=1)")
    assert (outcome.kind, outcome.fatal) == ("fatal", "storage")
    assert outcome.message.startswith(f"{folder.parent} is not there on ")


def test_a_folder_that_vanishes_while_it_runs_ends_the_run(launch: Launch, folder: Path) -> None:
    outcome = launch("shutil.rmtree(checkpoint.parents[2])")
    assert outcome.fatal == "storage" and f"{folder.parent} is not there on " in outcome.message


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a file that is always full stands for the disk")
@pytest.mark.parametrize("met_by", ["recipe.json", "probe"])
def test_a_full_disk_ends_the_run_whoever_meets_it(launch: Launch, folder: Path, met_by: str) -> None:
    folder.mkdir()
    (folder / met_by).symlink_to("/dev/full")
    outcome = launch("sys.exit('cannot write')")
    assert (outcome.kind, outcome.fatal) == ("fatal", "storage")
    assert "No space left on device; free some space, then run `evolm resume`" in outcome.message


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a file that is always full stands for the disk")
def test_what_it_prints_does_not_hold_it_up_when_the_disk_is_full(launch: Launch, folder: Path) -> None:
    folder.mkdir()
    (folder / "output.log").symlink_to("/dev/full")
    assert launch("print('words ' * 2**17)\ntell(loss=1)", limits=Limits(seconds=20)).kind == "result"


def test_one_launch_at_a_time_holds_the_folder(launch: Launch, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import fcntl

    from evolm.executors import fence

    monkeypatch.setattr(fence, "FENCE_SECONDS", 0.1)
    folder.mkdir()
    with (folder / "lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert ended(launch("tell(loss=1)")) == ("fail", "lost")
    assert launch("tell(loss=1)").kind == "result"


# --- before the first trial -------------------------------------------------------------------------------------------


def check(tmp_path: Path, command: str) -> None:
    (tmp_path / "space.yaml").write_text(f"version: 1\ntrial:\n  command: {command}\n")
    document = read_yaml(tmp_path / "space.yaml")
    check_command(document.value["trial"]["command"], tmp_path, document)


@pytest.mark.parametrize(
    "command",
    ["[python, program.py, '{recipe}']", "[python, -m, package]", "[sh, -c, 'echo ${recipes} {x} {}']", "[./run]"],
)
def test_a_program_that_can_be_started(tmp_path: Path, command: str) -> None:
    (tmp_path / "program.py").touch()
    (tmp_path / "run").touch(0o755)
    check(tmp_path, command)


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("[no-such-program]", "trial.command[0]: there is no program 'no-such-program'"),
        ("[./gone]", "trial.command[0]: there is no file "),
        ("[./plain]", "trial.command[0]: cannot be run: "),
        ("[./folder]", "trial.command[0]: cannot be run: "),
        ("[python, gone.py]", "trial.command[1]: there is no file "),
        ("[sh, '{recpie}']", "trial.command[1]: unknown name '{recpie}'"),
    ],
)
def test_a_program_that_could_not_be_started_is_told_at_its_line(tmp_path: Path, command: str, words: str) -> None:
    (tmp_path / "plain").touch(0o644)
    (tmp_path / "folder").mkdir()
    with pytest.raises(SpaceError) as told:
        check(tmp_path, command)
    assert words in str(told.value) and "space.yaml:3:" in str(told.value) and "= " in str(told.value)
    assert told.value.exit_code == 2


# --- a whole search ---------------------------------------------------------------------------------------------------

SPACE = """
version: 1
name: mine
trial: {command: [python, -S, -E, program.py]}
train: {lr: {float: [0.1, 1.0]}}
objectives: {loss: min}
fidelity: {tokens: [1K, 4K], eta: 4}
budget: {trials: 8}
checkpoints: {keep_best: 1}
"""

LEARNS = """
lr = json.loads(Path(os.environ["EVOLM_RECIPE"]).read_text())["train"]["lr"]
if lr > 0.8:
    tell(failed="diverged", message="too fast")
    sys.exit()
state = checkpoint / "tokens"
began = int(state.read_text()) if state.exists() else 0
state.write_text(str(tokens))
tell(tokens=tokens, loss=(lr - 0.4) ** 2 + 1 / tokens, began=began, flops=tokens - began)
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "space.yaml").write_text(SPACE)
    (tmp_path / "program.py").write_text(START + LEARNS)
    return tmp_path


@pytest.mark.parametrize(
    "executor",
    ["inline", pytest.param("ray", marks=[pytest.mark.ray, pytest.mark.xdist_group("ray")])],
)
def test_a_search_with_it(evolm, here: Path, executor: str) -> None:
    said = evolm("search", "space.yaml", "--executor", executor)
    assert said.code == 0, said.err
    trials = json.loads(evolm("export", "mine-1", "--to", "json").out)["trials"]
    assert len(trials) == 8 and {trial["state"] for trial in trials} >= {"complete", "paused"}
    for trial in trials:
        too_fast = trial["genome"]["train"]["lr"] > 0.8
        assert (trial["state"], trial["reason"]) == ("failed", "diverged") if too_fast else trial["reason"] is None
        told = [(rung["tokens"], rung["metrics"]["began"]) for rung in trial["rungs"]]
        assert told == [(1000, 0), (4000, 1000)][: len(told)] and trial["flops"] == (told[-1][0] if told else 0)
    best = min((trial for trial in trials if trial["state"] == "complete"), key=lambda trial: trial["metrics"]["loss"])
    (kept,) = [
        path
        for path in Path("runs/mine-1/trials").glob("*/checkpoints/final")
        if (path / "tokens").read_text() == "4000"
    ]
    assert kept.parts[-3] == str(best["id"])
    said = evolm("promote", "mine-1", "best")
    assert said.code == 2 and "was trained by a `trial.command`" in said.err


def test_a_program_that_is_not_there_is_told_before_the_first_trial(evolm, here: Path) -> None:
    (here / "space.yaml").write_text(SPACE.replace("-S, -E, program.py", "gone.py"))
    said = evolm("search", "space.yaml", "--executor", "inline")
    assert said.code == 2 and "space.yaml:4:" in said.err and "there is no file" in said.err
    assert not Path("runs").exists()


# --- the one that ships -----------------------------------------------------------------------------------------------

SMALL = {"model": {"width": 32, "depth": 1}, "train": {"batch": 2, "context": 16, "warmup_steps": 2}}


@pytest.fixture
def example(make: Callable[..., Job]) -> Callable[..., Job]:
    program = Path(__file__).parents[2] / "evolm/examples/train_gpt.py"
    given = {"genome": SMALL, "tokens": 640, "objectives": ["bits_per_byte", "params"]}
    return lambda **changes: make(["python", str(program)], **{**given, **changes})


def lines_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_the_example_goes_on_as_if_it_had_never_stopped(
    example: Callable[..., Job], tmp_path: Path, folder: Path
) -> None:
    first = run_command(example(), lambda _: True)
    assert first.kind == "result", first.message
    assert first.metrics["bits_per_byte"] < 8.2 and first.metrics["params"] > 10_000 and first.flops > 0
    stopped = run_command(example(rung=1, tokens=64_000), lambda progress: progress.tokens < 3200)
    assert ended(stopped) == ("fail", "interrupted"), stopped.message
    rest = run_command(example(rung=1, tokens=6400), lambda _: True)
    (tmp_path / "whole").mkdir()
    whole = run_command(example(rung=1, tokens=6400, folder=str(tmp_path / "whole/1")), lambda _: True)
    assert rest.metrics == whole.metrics and rest.metrics["bits_per_byte"] < first.metrics["bits_per_byte"]
    assert rest.flops < whole.flops


@pytest.mark.slow
def test_the_example_tells_when_it_diverges(example: Callable[..., Job]) -> None:
    genome = {**SMALL, "train": {**SMALL["train"], "learning_rate": 1e30, "grad_clip": 1e30}}
    outcome = run_command(example(genome=genome), lambda _: True)
    assert ended(outcome) == ("fail", "diverged") and "at step " in outcome.message


@pytest.mark.slow
def test_the_example_runs_by_itself(tmp_path: Path) -> None:
    program = Path(__file__).parents[2] / "evolm/examples/train_gpt.py"
    with subprocess.Popen([sys.executable, str(program)], cwd=tmp_path) as process:
        deadline = time.monotonic() + 60
        while not (tmp_path / "out/metrics.jsonl").exists():
            assert time.monotonic() < deadline and process.poll() is None
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
    assert lines_of(tmp_path / "out")[0]["tokens"] == 20_480
    assert (tmp_path / "out/checkpoint.safetensors").stat().st_size > 10**6
