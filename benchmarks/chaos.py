"""A search under fire: evolm on Ray, and the same search under Ray Tune, with a random fault every 20 seconds.

    python benchmarks/chaos.py [--minutes 10] [--every 20] [--rounds 1] [--seed 0] [--only evolm|tune] [--out FILE.json]

Both train the same recipes (random search over a small space of models, on the text of this Python's own installation)
in the same order, with the same seeds, steps, checkpoint interval and scores, two at a time on one thread each, one
after the other for the same time on the same machine. There is one rung: Tune has no promotion to compare with. A
supervisor starts either anew at once whenever its controller ends (`evolm resume`, `Tuner.restore`). Faults have the
same kinds at the same times:

    trial   SIGKILL for the process that trains (Tune: for the worker, which is the same process)
    worker  SIGKILL for the Ray worker of a trial
    kill    SIGKILL for the controller
    term    SIGTERM for the controller (Tune: passed on as the SIGINT after which it saves)
    raylet  SIGKILL for Ray's node
    gcs     SIGKILL for Ray's head
    hang    SIGSTOP for the Ray worker of a trial; only with `--faults`: evolm gives a silent worker up after 120 s, Ray
            and Tune never do

Counted in the same way on both sides: results that a controller called complete (evolm prints a line, a callback of
Tune's writes one) and those of them that the state on the disk did not know after the controller had ended
("forgotten": they are run again) or does not know at the end ("missing"); FLOPs by the lines that each launch writes
into a metrics.jsonl of its trial, fifty a trial, so up to 2 % of each broken launch are not seen; useful are those of
the trials that are complete at the end, under way the furthest that unfinished ones had come, wasted the rest. Time
without training is from the last line under one controller to the first launch under a later one.

Other work on the machine slows every start, and counts like faults: when trials of one side ran much faster than those
of the other, the table says that they do not compare. With `--rounds` the sides take turns, ended in order in between.
How Tune is set up is told in chaos_tune.py; TUNE_* variables of the environment reach it. The corpus is built before
the clock starts. Everything lies in a temporary folder, that of Ray too, and every process is ended.
"""

from __future__ import annotations

import argparse
import json
import signal
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from datetime import date
from pathlib import Path
from typing import Any

from chaos_faults import ENDING, FAULTS, OTHER_FAULTS, schedule
from chaos_sides import Evolm, Tune
from chaos_supervisor import Story, Supervisor

from evolm.config import SpaceFile, load_space
from evolm.search import Search
from search_spaces.genome import Values
from trainer.cost import costs
from trainer.data.corpus import Corpus
from trainer.recipe import Data, Recipe

WORKERS = 2
CHECKPOINT_SECONDS = 6
TRIALS_A_MINUTE = 10
"""More than two threads can train."""

ALIKE = 1.25
"""Ratio of the speeds of training up to which the two sides had the same machine."""

SPACE = """
version: 1
name: chaos
data:
  sources:
    code: {path: "python:stdlib"}
    docs: {path: "python:docs"}
  mix: {simplex: {code: 0.5, docs: 0.5}, floor: 0.1}
  tokenizer: {vocab_size: 1024}
  sequence_length: 128
  held_out: {max_bytes: 16KiB}
model:
  d_model: {int: [64, 128], step: 32, baseline: 96}
  n_layers: {int: [2, 4], baseline: 3}
  n_heads: {expr: "model.d_model / 32"}
  head_dim: 32
  n_kv_heads: 1
  ffn: {choice: [swiglu, gelu, relu2]}
train:
  learning_rate: {float: [1e-3, 1e-2], log: true, baseline: 4e-3}
  batch_tokens: 1024
  warmup_steps: 10
objectives: {bits_per_byte: min, params: min}
fidelity: {tokens: TOKENS}
budget: {trials: TRIALS}
search: {algorithm: random, seed: SEED}
resources: {cpus: 1, max_concurrent: WORKERS}
checkpoints: {minutes: MINUTES}
"""


def planned(file: SpaceFile) -> list[Values]:
    """The genomes that the search will propose: random search does not look at results."""
    search = Search(
        file.space,
        file.settings.objectives,
        algorithm=file.settings.algorithm,
        seed=file.settings.seed,
        fidelity=file.settings.fidelity,
    )
    return [search.ask_new().genome for _ in range(file.settings.trials)]


def write_space(path: Path, options: argparse.Namespace) -> SpaceFile:
    text = SPACE
    values = {
        "TOKENS": options.tokens,
        "TRIALS": max(4, round(TRIALS_A_MINUTE * options.minutes)),
        "SEED": options.seed,
        "WORKERS": WORKERS,
        "MINUTES": CHECKPOINT_SECONDS / 60,
    }
    for name, value in values.items():
        text = text.replace(f": {name}", f": {value}")
    path.write_text(text)
    return load_space(path)


def figures(side: Evolm | Tune, story: Story, recipes: Sequence[Values], prices: Sequence[float]) -> dict[str, Any]:
    """What the story comes to."""
    hit = [fault for fault in story.faults if fault.hit is not None]
    known = side.known()
    in_time = {number for when, number, _ in story.acknowledged if when <= story.seconds}
    complete = {number for number, value in known.items() if value is not None}
    horizon = max((launch.total_tokens for launch in story.launches), default=0)
    furthest: dict[int, int] = {}
    for launch in story.launches:
        furthest[launch.trial] = max(furthest.get(launch.trial, 0), launch.tokens)
    spent = sum(launch.flops for launch in story.launches)
    useful = sum(horizon * prices[number - 1] for number in complete)
    under_way = sum(tokens * prices[number - 1] for number, tokens in furthest.items() if number not in known)
    told = Counter(number for _, number, _ in story.acknowledged)
    first_told = {number: when for when, number, _ in reversed(story.acknowledged)}
    pauses = [length for _, length, _ in story.outages]
    return {
        "faults": dict(Counter(fault.kind for fault in hit)),
        "faults that hit nothing": len(story.faults) - len(hit),
        "controllers": len(story.sessions),
        "ended without being asked": sum(session.unasked for session in story.sessions),
        "stalls ended by the supervisor": story.stalls,
        "cannot go on": story.hopeless,
        "seconds": story.seconds,
        "acknowledged in time": len(in_time),
        "complete at the end": len(complete),
        "failed": sum(value is None for value in known.values()),
        "forgotten": len(story.forgotten),
        "missing": len(story.missing),
        "told twice": sum(count > 1 for count in told.values()),
        "launched again when told": sum(
            launch.trial in first_told and launch.began > first_told[launch.trial] + 1 for launch in story.launches
        ),
        "launches": len(story.launches),
        "flops": spent,
        "useful flops": useful,
        "under way flops": under_way,
        "wasted flops": spent - useful - under_way,
        "wasted share": (spent - useful - under_way) / spent if spent else 0.0,
        "pauses": len(pauses),
        "pause median": statistics.median(pauses) if pauses else 0.0,
        "pause longest": max(pauses, default=0.0),
        "pauses in all": sum(pauses),
        "tokens a second": statistics.median([speed for launch in story.launches for speed in launch.speeds] or [0.0]),
        "load": story.load,
        "ended in order": story.ended_in_order,
        "outlived": max(session.outlived for session in story.sessions),
        "orphans": story.orphans,
        "state": side.check(recipes, spent),
    }


def endure(sides: Sequence[Evolm | Tune], options: argparse.Namespace, prices: Sequence[float]) -> list[Story]:
    """Every side's whole time, in rounds in which they take turns."""
    began = time.monotonic()
    seconds = 60 * options.minutes
    supervisors = [
        Supervisor(side, schedule(options.faults, seconds, options.every, options.seed), side.folder, prices)
        for side in sides
    ]
    for number in range(1, options.rounds + 1):
        for side, supervisor in zip(sides, supervisors, strict=True):

            def say(text: str, name: str = side.name, clock: Supervisor = supervisor) -> None:
                spent = f"{time.monotonic() - began:6.1f} s"
                print(f"{spent}  {name:8} {clock.now:6.1f} s  {text}", file=sys.stderr, flush=True)

            if not supervisor.done:
                supervisor.run(seconds * number / options.rounds, say)
    return [supervisor.tell() for supervisor in supervisors]


def events(story: Story) -> dict[str, Any]:
    """What happened, for the file."""
    return {
        "faults": [fault.as_dict() for fault in story.faults],
        "controllers": [session.as_dict() for session in story.sessions],
        "acknowledged": story.acknowledged,
        "forgotten": story.forgotten,
        "missing": story.missing,
        "outages": story.outages,
        "tracebacks": [session.output.name for session in story.sessions if "Traceback" in printed(session.output)],
    }


def printed(file: Path) -> str:
    return file.read_text(errors="replace")


def keep_logs(place: Path, story: Story, side: Evolm | Tune) -> None:
    """Copy what controllers printed, what the trials counted, and the ledger."""
    place.mkdir(parents=True, exist_ok=True)
    files = [session.output for session in story.sessions]
    if isinstance(side, Evolm):
        files += [*side.run.glob("ledger.db*"), *side.run.glob("trials/*/error.log")]
    for file in files:
        (place / file.name).write_bytes(file.read_bytes())
    for file in side.counts():
        (place / f"metrics-{file.parent.name}.jsonl").write_bytes(file.read_bytes())


# --- telling --------------------------------------------------------------------------------------------------------


ROWS: list[tuple[str, Callable[[dict[str, Any]], float | str], str]] = [
    ("faults", lambda f: sum(f["faults"].values()), "d"),
    ("  of those that end a controller", lambda f: sum(f["faults"].get(kind, 0) for kind in ENDING), "d"),
    ("  that found nothing to hit", lambda f: f["faults that hit nothing"], "d"),
    ("controllers started", lambda f: f["controllers"], "d"),
    ("  ended without being asked to", lambda f: f["ended without being asked"], "d"),
    ("  stuck for 120 s, then killed", lambda f: f["stalls ended by the supervisor"], "d"),
    ("trials acknowledged in time", lambda f: f["acknowledged in time"], "d"),
    ("trials complete at the end", lambda f: f["complete at the end"], "d"),
    ("trials failed for good", lambda f: f["failed"], "d"),
    ("launches", lambda f: f["launches"], "d"),
    ("acknowledged, then forgotten", lambda f: f["forgotten"], "d"),
    ("acknowledged, missing at the end", lambda f: f["missing"], "d"),
    ("launched again though acknowledged", lambda f: f["launched again when told"], "d"),
    ("FLOPs spent", lambda f: f["flops"], ".3g"),
    ("FLOPs of complete trials", lambda f: f["useful flops"], ".3g"),
    ("FLOPs wasted", lambda f: f["wasted flops"], ".3g"),
    ("  share of those spent (%)", lambda f: 100 * f["wasted share"], ".1f"),
    ("pauses without training", lambda f: f["pauses"], "d"),
    ("  median (s)", lambda f: f["pause median"], ".1f"),
    ("  longest (s)", lambda f: f["pause longest"], ".1f"),
    ("  in all (s)", lambda f: f["pauses in all"], ".0f"),
    ("tokens a second of a trial, median", lambda f: f["tokens a second"], ".0f"),
    ("load of the machine, mean", lambda f: f["load"], ".1f"),
    ("a controller was outlived by (s)", lambda f: f["outlived"], ".1f"),
    ("processes left behind", lambda f: len(f["orphans"]), "d"),
]


def table(found: dict[str, dict[str, Any]]) -> str:
    """Both columns and their ratio."""
    names = list(found)
    lines = [f"{'':36}" + "".join(f"{name:>12}" for name in names) + (f"{'ratio':>9}" if len(names) > 1 else "")]
    for label, value, form in ROWS:
        values = [value(found[name]) for name in names]
        line = f"{label:36}" + "".join(f"{format(one, form):>12}" for one in values)
        if len(values) > 1 and values[1]:
            line += f"{values[0] / values[1]:9.2f}"
        lines.append(line)
    for name in names:
        kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(found[name]["faults"].items()))
        lines.append(f"{name}: {kinds}; {found[name]['state']}")
        if found[name]["cannot go on"]:
            lines.append(f"{name} could not go on: {found[name]['cannot go on']}")
        if not found[name]["ended in order"]:
            lines.append(f"{name} did not end when it was asked to, and was killed")
        lines += [f"{name} left behind: {words}" for words in found[name]["orphans"]]
    if (unlike := unequal(found)) is not None:
        lines.append(unlike)
    return "\n".join(lines)


def unequal(found: dict[str, dict[str, Any]]) -> str | None:
    """A sentence when the machine was not the same for both sides: other work on it counts like faults."""
    speeds = [one["tokens a second"] for one in found.values()]
    if min(speeds) > 0 and max(speeds) / min(speeds) <= ALIKE:
        return None
    words = " and ".join(f"{speed:.0f}" for speed in speeds)
    return f"NOT COMPARABLE: trials ran at {words} tokens a second; --rounds has the sides take turns"


def log_row(ours: dict[str, Any], theirs: dict[str, Any], options: argparse.Namespace) -> str:
    """A line for docs/LOG.md."""

    def told(found: dict[str, Any]) -> str:
        return (
            f"{found['complete at the end']} trials complete, {found['failed']} failed, "
            f"{found['forgotten']} acknowledged results forgotten, {found['missing']} missing at the end, "
            f"{100 * found['wasted share']:.1f} % of the FLOPs wasted, "
            f"{found['pause median']:.0f} s without training after a controller's end (longest "
            f"{found['pause longest']:.0f} s), {len(found['orphans'])} processes left behind"
        )

    kinds = "" if set(options.faults) == set(FAULTS) else f" ({', '.join(options.faults)})"
    what = f"{options.minutes:g} minutes on Ray with a random fault{kinds} every {options.every:g} s, beside Ray Tune"
    counts = f"{sum(ours['faults'].values())} and {sum(theirs['faults'].values())} faults"
    counts += f", machine load {ours['load']:.1f} and {theirs['load']:.1f}"
    counts += f", {ours['tokens a second']:.0f} and {theirs['tokens a second']:.0f} tokens/s a trial"
    if unequal({"ours": ours, "theirs": theirs}) is not None:
        counts = "**Not comparable, the machine was busier on one side.** " + counts
    return f"| {date.today()} | {what} | {counts}. evolm: {told(ours)}. Ray Tune: {told(theirs)} | `chaos.py` |"


def options_of() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--every", type=float, default=20, help="seconds between faults")
    parser.add_argument(
        "--rounds", type=int, default=1, help="turns that the sides take, where other work comes and goes"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the genomes, the training and the faults")
    parser.add_argument("--only", choices=("evolm", "tune"), help="one side alone")
    parser.add_argument("--faults", nargs="+", choices=(*FAULTS, *OTHER_FAULTS), default=list(FAULTS))
    parser.add_argument("--tokens", type=int, default=300_000, help="of each trial")
    parser.add_argument("--logs", type=Path, help="folder for what the controllers printed")
    parser.add_argument("--out", type=Path, help="file for all figures and events")
    return parser.parse_args()


def main() -> None:
    options = options_of()
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # so that everything is ended
    found: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory(prefix="chaos-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        cache = folder / "cache"
        file = write_space(folder / "space.yaml", options)
        recipes = planned(file)
        prices = [costs(Recipe.model_validate(recipe)).flops_per_token for recipe in recipes]
        Corpus.open(Data.model_validate(file.space.baseline.values()["data"]), cache, [])
        plan = {
            "recipes": recipes,
            "cache": str(cache),
            "tokens": options.tokens,
            "seed": options.seed,
            "checkpoint_seconds": CHECKPOINT_SECONDS,
            "workers": WORKERS,
        }
        sides: list[Evolm | Tune] = []
        if options.only != "tune":
            sides.append(Evolm(folder / "evolm", folder / "space.yaml", cache))
        if options.only != "evolm":
            sides.append(Tune(folder / "tune", plan))
        for side, story in zip(sides, endure(sides, options, prices), strict=True):
            found[side.name] = {**figures(side, story, recipes, prices), "events": events(story)}
            if options.logs is not None:
                keep_logs(options.logs / side.folder.name, story, side)
    print(table(found))
    if len(found) > 1:
        print(log_row(*found.values(), options))
    if options.out is not None:
        options.out.write_text(json.dumps({**vars(options), "out": None, "logs": None, "sides": found}, default=str))


if __name__ == "__main__":
    main()
