"""What all tests share: an environment of their own, and a small corpus that was made for them."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

os.environ.update(
    TOKENIZERS_PARALLELISM="false", HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1", NO_COLOR="1", RAY_USAGE_STATS_ENABLED="0"
)

SHIPPED = Path(__file__).parent.parent / "search_spaces"


@pytest.fixture(scope="session")
def words_corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two folders of JSONL, `web` and `code`: pseudo-words with different letters, so that a mix matters."""
    root = tmp_path_factory.mktemp("corpus")
    for name, letters, seed in (("web", "aeioustr", 1), ("code", "xyzklmnp", 2)):
        rng = np.random.default_rng(seed)
        lexicon = ["".join(rng.choice(list(letters), rng.integers(2, 7))) for _ in range(400)]
        chance = 1 / np.arange(1, 401)
        chance /= chance.sum()
        lines = []
        for _ in range(300):
            text = " ".join(rng.choice(lexicon, 60, p=chance))
            lines.append(f'{{"text": "{text}"}}')
        (root / name).mkdir()
        (root / name / "part.jsonl").write_text("\n".join(lines) + "\n")
    return root


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One cache for all tests of a process: a corpus is tokenised once."""
    return tmp_path_factory.mktemp("cache")


SPACE = """
version: 1
name: words
data:
  sources:
    web: {{path: "{corpus}/web"}}
    code: {{path: "{corpus}/code"}}
  mix: {{simplex: {{web: 0.5, code: 0.5}}, floor: 0.05}}
  tokenizer: {{vocab_size: 300}}
  sequence_length: 32
  held_out: {{max_bytes: 2KiB}}
model:
  d_model: {{int: [16, 48], step: 16, baseline: 32}}
  n_layers: 1
  n_heads: 1
  head_dim: 16
train:
  learning_rate: {{float: [1e-3, 2e-2], log: true, baseline: 5e-3}}
  batch_tokens: 128
  warmup_steps: 2
objectives: {{bits_per_byte: min, params: min}}
fidelity: {{tokens: [512, 2048], eta: 4}}
budget: {{trials: 6}}
"""


@pytest.fixture(scope="session")
def space_text(words_corpus: Path) -> str:
    """A space whose trials take a few milliseconds."""
    return SPACE.format(corpus=words_corpus)


@pytest.fixture
def space_file(tmp_path: Path, space_text: str) -> Path:
    """That space in a file of one's own."""
    path = tmp_path / "words.yaml"
    path.write_text(space_text)
    return path
