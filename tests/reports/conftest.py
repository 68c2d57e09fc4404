"""Runs that never ran: the data of a report, made up, the same every time."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from fitness.objectives import Objective, minimised, read_objectives
from fitness.pareto import Normaliser, knee, nondominated
from fitness.trial import Rung, Trial
from reports.frame import RunData
from search_spaces.errors import Path
from search_spaces.genome import Genome

RUNGS = (1_000_000, 4_000_000)

GENES: list[Path] = [
    ("data", "mix"),
    ("data", "tokenizer", "vocab_size"),
    ("model", "d_model"),
    ("model", "n_layers"),
    ("model", "n_heads"),
    ("model", "ffn"),
    ("train", "learning_rate"),
    ("train", "batch_tokens"),
]

MakeRun = Callable[..., RunData]


def genome(rng: np.random.Generator, sources: Sequence[str]) -> dict[str, Any]:
    weights = rng.dirichlet(np.full(len(sources), 2.0))
    layers = int(rng.integers(2, 9))
    return {
        "data": {
            "mix": {name: round(float(weight), 6) for name, weight in zip(sources, weights, strict=True)},
            "tokenizer": {"kind": "bpe", "vocab_size": int(rng.choice([2048, 4096, 8192]))},
        },
        "model": {
            "d_model": int(rng.integers(1, 9)) * 64,
            "n_layers": layers,
            "n_heads": [int(rng.choice([2, 4, 8])) for _ in range(layers)],
            "ffn": str(rng.choice(["swiglu", "relu2"])),
        },
        "train": {
            "learning_rate": float(f"{10 ** rng.uniform(-4, -2):.6g}"),
            "batch_tokens": int(rng.choice([16384, 32768, 65536])),
        },
    }


def baseline(sources: Sequence[str]) -> dict[str, Any]:
    return {
        "data": {
            "mix": {name: round(1 / len(sources), 6) for name in sources},
            "tokenizer": {"kind": "bpe", "vocab_size": 4096},
        },
        "model": {"d_model": 256, "n_layers": 4, "n_heads": [4, 4, 4, 4], "ffn": "swiglu"},
        "train": {"learning_rate": 0.0004, "batch_tokens": 32768},
    }


def metrics(values: Mapping[str, Any], tokens: float, noise: float) -> dict[str, float]:
    """A loss that falls with size and tokens and has an optimum in the learning rate and in the mix."""
    model, mix = values["model"], values["data"]["mix"]
    params = (
        12.0 * model["n_layers"] * model["d_model"] ** 2 + values["data"]["tokenizer"]["vocab_size"] * model["d_model"]
    )
    off = np.log10(values["train"]["learning_rate"]) + 2.7 + 0.1 * np.log10(params)
    even = sum((weight - 1 / len(mix)) ** 2 for weight in mix.values())
    loss = 0.75 + 22 / params**0.28 + 240 / tokens**0.42 + 0.05 * off**2 + 0.25 * even + noise
    parts = {f"bits_per_byte/{name}": float(loss + 0.2 * (1 / len(mix) - weight)) for name, weight in mix.items()}
    return {
        "bits_per_byte": float(loss),
        **parts,
        "params": params,
        "kv_bytes_per_token": 64.0 * model["n_layers"] * float(np.mean(model["n_heads"])),
        "tokens_per_second": float(3e9 / params),
    }


def curve(loss: float, tokens: int, lines: int, rung: int) -> list[dict[str, Any]]:
    """A trunk that falls with the tokens, and a branch at its end that falls faster; the next rung leaves the trunk
    where the branch began."""
    start = 0.8 * RUNGS[rung - 1] if rung else tokens / lines
    told = [
        {
            "tokens": int(at),
            "total_tokens": tokens,
            "loss": float(loss * 2 + 40 / at**0.25 - 0.5 * max(0.0, at / tokens - 0.8) + 0.02 * np.sin(at)),
            "learning_rate": 1e-3,
        }
        for at in np.linspace(start, tokens, lines)
    ]
    return [*told, {"rung": rung, "tokens": tokens, "bits_per_byte": loss}]


def front_of(trials: Sequence[Trial], objectives: Sequence[Objective]) -> list[Trial]:
    told = [trial for trial in trials if trial.rungs and trial.state not in ("failed", "infeasible")]
    top = [trial for trial in told if trial.rung == max(other.rung for other in told)]
    keep = nondominated(minimised([trial.metrics for trial in top], objectives))
    front = [trial for trial, kept in zip(top, keep, strict=True) if kept]
    return sorted(front, key=lambda trial: objectives[0].sign * trial.metrics[objectives[0].metric])


def volumes_of(trials: Sequence[Trial], objectives: Sequence[Objective]) -> list[tuple[Trial, float]]:
    top = max((trial.rung for trial in trials), default=0)
    told = sorted(
        (t for t in trials if t.rungs and t.rung == top and t.state != "failed"), key=lambda t: t.rungs[-1].seq
    )
    if not told:
        return []
    points = minimised([trial.metrics for trial in told], objectives)
    normaliser = Normaliser(points[:8], [goal.metric == "params" for goal in objectives])
    return [(trial, normaliser.hypervolume(points[: i + 1])) for i, trial in enumerate(told)]


def assembled(
    trials: Sequence[Trial],
    *,
    objectives: Mapping[str, str] | None = None,
    name: str = "made-up-1",
    curves: Mapping[int, list[dict[str, Any]]] | None = None,
    **changes: Any,
) -> RunData:
    """The data of a run with these trials; the front and the rest follow from them."""
    goals = read_objectives(objectives or {"bits_per_byte": "min", "params": "min"})
    front = front_of(trials, goals)
    points = minimised([trial.metrics for trial in front], goals)
    bend = knee(points) if len(front) else None
    return replace(
        RunData(
            name=name,
            path=f"runs/{name}",
            state="finished",
            objectives=goals,
            genes=GENES,
            trials=list(trials),
            front=front,
            knee=front[bend if bend is not None else len(front) // 2].id if front else None,
            baseline=1 if trials else None,
            hypervolumes=volumes_of(trials, goals),
            rungs=list(RUNGS),
            settings={"algorithm": "auto", "seed": 7, "trials": max(200, len(trials)), "hours": None},
            meta={
                "evolm": "0.1.0",
                "corpus": {
                    "digest": "8f3f71a6d852333b55594737113265e3",
                    "sources": {
                        "code": {"documents": {"train": 479, "test": 30}, "bytes": {"train": 6639071, "test": 602210}}
                    },
                    "tokenizer": {"sha256": "894ed0c4a5ce66334eed7fe67458d9863ad6430c85bb26fbbccac02754da1915"},
                },
                "settings": {},
                "roots": ["/home/somebody/private"],
                "cache": "/home/somebody/cache",
            },
            seconds=5580.0,
            space="version: 1\nname: made-up  # <not a tag> & so on\n",
            curves=curves or {},
            began=1_760_000_000.0,
            ended=1_760_005_580.0,
        ),
        **changes,
    )


def invented(
    count: int = 60,
    *,
    sources: Sequence[str] = ("web", "code", "books"),
    objectives: Mapping[str, str] | None = None,
    failures: bool = True,
    lines: int = 40,
    **changes: Any,
) -> RunData:
    """A run of `count` trials on two rungs: a third is promoted, and some fail."""
    rng = np.random.default_rng(0)
    trials, curves, seq = [], {}, 0
    for number in range(1, count + 1):
        values = genome(rng, sources) if number > 1 else baseline(sources)
        noise = float(rng.normal(0, 0.01))
        rungs: list[Rung] = []
        state, reason, message = "paused", None, ""
        if failures and number % 11 == 5:
            state, reason, message = _FAILURES[number // 11 % len(_FAILURES)]
        else:
            for rung in range(2 if number == 1 or number % 3 == 1 else 1):
                seq += 3
                told = metrics(values, RUNGS[rung], noise)
                cost = 6 * told["params"] * RUNGS[rung]
                rungs.append(Rung(rung=rung, tokens=RUNGS[rung], metrics=told, flops=cost, seconds=40.0, seq=seq))
                curves.setdefault(number, []).extend(curve(rungs[0].metrics["bits_per_byte"], RUNGS[rung], lines, rung))
            state = "complete" if len(rungs) == 2 else "paused"
        trials.append(
            Trial(
                id=number,
                frozen=Genome.of(values),
                parents=(number // 2, number // 3) if number > 12 else (),
                operator="baseline" if number == 1 else "random" if number < 13 else "crossover",
                seen=seq,
                state=state,
                reason=reason,
                message=message,
                rungs=tuple(rungs),
                attempts=max(1, len(rungs)),
                flops=sum(rung.flops for rung in rungs) or 1e12,
                seconds=40.0 * max(1, len(rungs)),
                ended=seq if state == "complete" else None,
            )
        )
    return assembled(trials, objectives=objectives, **{"curves": curves, **changes})


@pytest.fixture(scope="session")
def made_up() -> MakeRun:
    """A function that makes up a run of so many trials."""
    return invented


@pytest.fixture(scope="session")
def run_of() -> MakeRun:
    """A function that makes a run of given trials."""
    return assembled


@pytest.fixture(scope="session")
def hostile() -> RunData:
    """A run in which whatever can be a string is an attack."""
    attack = "</script><img src=x onerror=alert(1)>"
    data = invented(
        40,
        sources=(attack, '<a href="https://evil.example/">x</a>', "javascript:alert(1)"),
        name=attack,
        path=attack,
        state=attack,
        space=attack,
        settings={"algorithm": attack, "seed": attack, attack: attack},
        meta={"evolm": attack, "corpus": {"digest": attack, "sources": {attack: {"digest": attack}}}},
    )
    trials = [
        replace(trial, message=attack if trial.id % 2 else "<!--<script>", operator=attack) for trial in data.trials
    ]
    front = {trial.id for trial in data.front}
    return replace(data, trials=trials, front=[trial for trial in trials if trial.id in front])


_FAILURES: tuple[tuple[Any, Any, str], ...] = (
    ("failed", "oom", "torch.OutOfMemoryError: tried to allocate 2.0 GiB"),
    ("failed", "diverged", "the loss was nan after 212992 tokens"),
    ("failed", "crashed", 'Traceback (most recent call last):\n  File "train.py", line 3\nValueError: <boom> & bust'),
    ("infeasible", None, "n_heads % n_kv_heads: 4 % 3"),
)
