"""A small world to train in: two made-up domains of text, and recipes that are trained in a blink.

`tales` is prose in invented words, one document a JSONL record; `ledgers` is lines of numbers and symbols, one document
a line. Both come from a seeded generator, so every run of the tests sees the same text.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from trainer.data.corpus import Corpus
from trainer.recipe import Recipe

RecipeOf = Callable[..., Recipe]


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def lexicon(rng: random.Random, size: int) -> list[str]:
    """Invented words of one to three syllables."""
    syllables = [onset + vowel for onset in ("b", "d", "k", "l", "m", "n", "r", "s", "t", "v") for vowel in "aeiou"]
    return ["".join(rng.choice(syllables) for _ in range(rng.randint(1, 3))) for _ in range(size)]


def tale(rng: random.Random, words: list[str]) -> str:
    """A few sentences."""
    sentences = (" ".join(rng.choice(words) for _ in range(rng.randint(4, 9))) for _ in range(rng.randint(2, 5)))
    return " ".join(sentence.capitalize() + "." for sentence in sentences)


def ledger(rng: random.Random, words: list[str]) -> str:
    """One line of items and amounts."""
    items = (f"{rng.choice(words)}: {rng.randint(1, 99)} x {rng.randint(1, 9)}.50" for _ in range(rng.randint(2, 5)))
    return " | ".join(items) + f" = {rng.randint(100, 9999)}"


@pytest.fixture(scope="session")
def domains() -> dict[str, list[str]]:
    """The documents of each domain, before they are split."""
    rng = random.Random(20240501)
    words = lexicon(rng, 120)
    return {
        "tales": [tale(rng, words) for _ in range(300)],
        "ledgers": [ledger(rng, words) for _ in range(400)],
    }


@pytest.fixture(scope="session")
def corpus_folder(tmp_path_factory: pytest.TempPathFactory, domains: dict[str, list[str]]) -> Path:
    """The two domains in files: tales.jsonl and ledgers.txt."""
    folder = tmp_path_factory.mktemp("corpus")
    (folder / "tales.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in domains["tales"]))
    (folder / "ledgers.txt").write_text("".join(text + "\n" for text in domains["ledgers"]))
    return folder


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of corpora that all tests share."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def recipe_of(corpus_folder: Path) -> RecipeOf:
    """A tiny recipe over the two domains, with changes to its sections: `recipe_of(model={"n_layers": 1})`."""

    def build(
        data: dict[str, Any] | None = None, model: dict[str, Any] | None = None, train: dict[str, Any] | None = None
    ) -> Recipe:
        sources = {
            "tales": {"path": str(corpus_folder / "tales.jsonl")},
            "ledgers": {"path": str(corpus_folder / "ledgers.txt"), "document": "line"},
        }
        held_out = {"validation": 0.1, "test": 0.1, "max_bytes": 2048}
        return Recipe.model_validate(
            {
                "data": {
                    "sources": sources,
                    "tokenizer": {"vocab_size": 320},
                    "sequence_length": 32,
                    "held_out": held_out,
                    **(data or {}),
                },
                "model": {"d_model": 32, "n_layers": 2, "n_heads": 2, **(model or {})},
                "train": {"batch_tokens": 128, "warmup_steps": 2, "learning_rate": 0.01, **(train or {})},
            }
        )

    return build


@pytest.fixture(scope="session")
def recipe(recipe_of: RecipeOf) -> Recipe:
    """The tiny recipe as it is."""
    return recipe_of()


@pytest.fixture(scope="session")
def corpus(recipe: Recipe, cache: Path) -> Corpus:
    """The corpus of the tiny recipe, opened."""
    return Corpus.open(recipe.data, cache)
