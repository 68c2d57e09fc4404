"""The two searches of chaos.py: how each is started, and how its state on the disk is read."""

from __future__ import annotations

import json
import os
import re
import sqlite3
import subprocess
import sys
import uuid
from collections import Counter
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import psutil

from fitness.errors import StorageError
from fitness.ledger import Ledger
from search_spaces.genome import Values


class Evolm:
    """`evolm search`, then `evolm resume` as often as it takes."""

    name = "evolm"

    def __init__(self, folder: Path, space: Path, cache: Path) -> None:
        self.mark, self.env = environment(folder)
        self.folder = folder
        self.run = folder / "runs" / "chaos"
        self._search = ["search", str(space), "--run", "chaos", "--cache", str(cache)]

    def command(self) -> list[str]:
        begun = (self.run / "ledger.db").is_file()
        return [sys.executable, "-m", "evolm", *(["resume", "chaos"] if begun else self._search)]

    def counts(self) -> list[Path]:
        return list(self.run.glob("trials/*/metrics.jsonl"))

    def acknowledged(self, output: str) -> dict[int, float]:
        told = re.findall(r"^trial +(\d+)  rung 1/1  bits_per_byte (\S+)", output, re.MULTILINE)
        return {int(number): float(value) for number, value in told}

    def known(self) -> dict[int, float | None]:
        try:
            with closing(Ledger.open(self.run / "ledger.db")) as ledger:
                trials = list(ledger.trials.values())
        except StorageError:  # not begun, or told by `check`
            return {}
        done = [trial for trial in trials if trial.state in ("complete", "failed", "infeasible")]
        return {trial.id: trial.metrics.get("bits_per_byte") for trial in done}

    def worker(self, trial: psutil.Process) -> psutil.Process | None:
        return trial.parent()

    def check(self, recipes: Sequence[Values], flops: float) -> str:
        """Whether the ledger is whole, its genomes those of the other side, and its proposals the same once more; what
        it knows of the FLOPs that were spent."""
        with closing(sqlite3.connect(f"file:{self.run / 'ledger.db'}?mode=ro", uri=True)) as connection:
            sqlite = str(connection.execute("PRAGMA integrity_check").fetchone()[0])
        try:
            with closing(Ledger.open(self.run / "ledger.db")) as ledger:
                same = all(trial.genome == recipes[trial.id - 1] for trial in ledger.trials.values())
                charged = sum(trial.flops for trial in ledger.trials.values())
                failed = Counter(str(one.reason) for one in ledger.trials.values() if one.state == "failed")
        except StorageError as error:
            return str(error)
        command = [sys.executable, "-m", "evolm", "replay", str(self.run), "--verify"]
        verified = subprocess.run(command, capture_output=True, env=self.env, check=False).returncode == 0
        words = [f"SQLite {sqlite}", "genomes as planned" if same else "OTHER GENOMES"]
        words += ["verified by replay" if verified else "REPLAY DIFFERS"]
        words += [f"{100 * charged / max(flops, 1):.0f} % of the FLOPs in the ledger"]
        return ", ".join(words + [f"{count} failed: {reason}" for reason, count in failed.items()])


class Tune:
    """A Tuner, and `Tuner.restore` as often as it takes."""

    name = "Ray Tune"

    def __init__(self, folder: Path, plan: dict[str, Any]) -> None:
        self.mark, self.env = environment(folder)
        self.env["PYTHONPATH"] = os.pathsep.join(
            filter(None, [str(Path(__file__).parent), os.environ.get("PYTHONPATH")])
        )
        self.folder, self.plan = folder, folder / "plan.json"
        for place in ("counts", "work", "storage"):
            (folder / place).mkdir()
            plan[place] = str(folder / place)
        self._told, self._heard = folder / "acknowledged.jsonl", 0
        self._told.touch()
        self.plan.write_text(json.dumps({**plan, "acknowledged": str(self._told)}))

    def command(self) -> list[str]:
        return [sys.executable, str(Path(__file__).with_name("chaos_tune.py")), str(self.plan)]

    def counts(self) -> list[Path]:
        return list(self.folder.glob("counts/*/metrics.jsonl"))

    def acknowledged(self, output: str) -> dict[int, float]:
        text = self._told.read_bytes()
        whole = text[self._heard : text.rfind(b"\n") + 1]
        self._heard += len(whole)
        told = [json.loads(line) for line in whole.splitlines()]
        return {one["trial"]: one["bits_per_byte"] for one in told if one["bits_per_byte"] is not None}

    def known(self) -> dict[int, float | None]:
        """By the newest state of the experiment, which is the one that is restored."""
        states = sorted(self.folder.glob("storage/chaos/experiment_state-*.json"))
        try:
            trials = json.loads(states[-1].read_text())["trial_data"] if states else []
        except ValueError:
            return {}
        found = [(json.loads(about), json.loads(run)) for about, run in trials]
        return {
            about["config"]["trial"]: run["last_result"].get("bits_per_byte")
            for about, run in found
            if about["status"] in ("TERMINATED", "ERROR")
        }

    def worker(self, trial: psutil.Process) -> psutil.Process | None:
        return trial

    def check(self, recipes: Sequence[Values], flops: float) -> str:
        """Whether Tune's own reader can read the experiment, and what states it tells."""
        program = (
            "import sys, collections, json; from ray.tune import ExperimentAnalysis; "
            "found = ExperimentAnalysis(sys.argv[1]).trials or []; "
            "print(json.dumps(collections.Counter(trial.status for trial in found)))"
        )
        command = [sys.executable, "-c", program, str(self.folder / "storage" / "chaos")]
        read = subprocess.run(command, capture_output=True, text=True, env=self.env, check=False)
        if read.returncode != 0:
            return f"not readable: {(read.stderr.strip().splitlines() or ['?'])[-1][:200]}"
        states = json.loads(read.stdout.splitlines()[-1])
        return "read by Tune: " + ", ".join(f"{count} {state.lower()}" for state, count in sorted(states.items()))


def environment(folder: Path) -> tuple[str, dict[str, str]]:
    """The mark by which the processes of one side are found, and the environment that carries it."""
    folder.mkdir()
    name, value = "EVOLM_CHAOS", uuid.uuid4().hex
    ray = folder / "ray"
    ray.mkdir()
    quiet = {"RAY_USAGE_STATS_ENABLED": "0", "TOKENIZERS_PARALLELISM": "false", "NO_COLOR": "1"}
    return f"{name}={value}", {**os.environ, **quiet, name: value, "RAY_TMPDIR": str(ray)}
