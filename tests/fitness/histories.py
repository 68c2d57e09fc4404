"""What the tests of the ledger share: trials, and things that happen to them."""

import sqlite3
from contextlib import closing

from search_spaces import Genome


def propose(ledger, text=None, **options):
    values = {"x": len(ledger.trials)} | ({} if text is None else {"text": text})
    return ledger.propose(Genome.of(values), **{"operator": "random", "seen": ledger.seq, **options})


def tell(ledger, trial, rung, *, top=False, loss=1.0, lease=None):
    if ledger.trials[trial].state in ("proposed", "paused") and rung > ledger.trials[trial].rung:
        ledger.start(trial, rung, {"pid": 1})
    return ledger.result(
        trial, rung, tokens=10.0**rung, metrics={"loss": loss}, flops=100, seconds=2, top=top, lease=lease
    )


def happen(ledger, trial, *events):
    """Let a trial go through some events, each one word."""
    for event in events:
        rung = ledger.trials[trial].rung + 1
        match event:
            case "start":
                ledger.start(trial, rung, {"pid": 1})
            case "result" | "top":
                tell(ledger, trial, rung, top=event == "top")
            case "lost":
                ledger.fail(trial, "lost", "node went away", flops=5, seconds=1, final=False)
            case "crash":
                ledger.fail(trial, "crashed", "a bug", flops=5, seconds=1)
            case "infeasible":
                ledger.infeasible(trial, "no such shape")
            case "stop":
                ledger.stop(trial)
            case "late":
                ledger.fail(trial, "crashed", flops=7, seconds=3, lease=10_000)
    return ledger.trials[trial]


NEXT = {
    "proposed": ["start", "start", "stop"],
    "running": ["result", "result", "top", "lost", "crash", "infeasible", "late"],
    "paused": ["start", "start", "stop", "late"],
}


def one_more(ledger, rng):
    """Something that can happen next, to some trial or to a new one."""
    going = ledger.in_state("proposed", "running", "paused")
    if not going or rng.random() < 0.2:
        propose(ledger)
    else:
        trial = rng.choice(going)
        happen(ledger, trial.id, rng.choice(NEXT[trial.state]))


def rows(path):
    """Everything in the file but when it was written."""
    with closing(sqlite3.connect(path)) as connection:
        trials = connection.execute("SELECT id, digest, genome, parents, operator, seen FROM trials ORDER BY id")
        events = connection.execute("SELECT seq, trial, kind, rung, body, lease FROM events ORDER BY seq")
        return trials.fetchall(), events.fetchall()
