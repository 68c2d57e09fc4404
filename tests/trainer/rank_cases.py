"""Run as one of several ranks: trains the cases of a JSON file one after the other, and the first rank writes down what
came of them. `python rank_cases.py CASES.json RESULTS.json`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from trainer.data.corpus import Corpus
from trainer.engines import Setup, open_ranks
from trainer.loop import train
from trainer.recipe import Recipe
from trainer.records import Checkpoints


def run(case, ranks):
    """Train one case; losses and gradient norms of its steps."""
    recipe = Recipe.model_validate(case["recipe"])
    corpus = ranks.tell(lambda: Corpus.open(recipe.data, Path(case["cache"])) and None)
    corpus = Corpus.open(recipe.data, Path(case["cache"]))
    losses, norms = [], []

    def report(progress):
        losses.append(progress.loss)
        norms.append(progress.gradient_norm)
        return not (case.get("stop_by") == ranks.rank and len(losses) == case["stop_after"])

    path = {key: Path(case[key]) if key in case else None for key in ("start", "latest", "final")}
    record = train(
        recipe,
        report,
        corpus=corpus,
        tokens=case["tokens"],
        start=path["start"],
        checkpoints=Checkpoints(latest=path["latest"], final=path["final"]),
        setup=Setup(ranks=ranks, **case["setup"]),
    )
    assert (record.model is None) == (not ranks.first)
    return {"losses": losses, "norms": norms, "finished": record.finished}


def main(cases_file, results_file):
    torch.set_num_threads(1)
    results = {}
    with open_ranks() as (ranks, _):
        for name, case in json.loads(Path(cases_file).read_text()).items():
            results[name] = run(case, ranks)
            if ranks.first:
                Path(results_file).write_text(json.dumps(results))


if __name__ == "__main__":
    main(*sys.argv[1:])
