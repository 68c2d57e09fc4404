"""Every space that ships is read, and searched through the real command with a small budget."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from evolm.config import load_space
from trainer.data.corpus import Corpus
from trainer.recipe import Data

SHIPPED = sorted(Path(__file__).parents[2].glob("search_spaces/*.yaml"))
NAMES = [path.stem for path in SHIPPED]


def test_the_spaces_that_the_documents_name_are_there() -> None:
    assert {"demo", "tiny", "data_mix", "architecture", "gpt2_small"} <= set(NAMES)


@pytest.mark.parametrize("path", SHIPPED, ids=NAMES)
def test_is_read_and_its_baseline_is_feasible(path: Path) -> None:
    file = load_space(path)
    assert file.space.genes and file.space.violations(file.space.baseline) == []
    assert file.name.replace("-", "_") == path.stem


@pytest.mark.parametrize("path", SHIPPED, ids=NAMES)
def test_only_holds_heads_that_serving_engines_carry(path: Path) -> None:
    file = load_space(path)
    if file.settings.command is None:
        model = file.space.baseline.values()["model"]
        head = model.get("head_dim") or model["d_model"] // model["n_heads"]
        assert head in (32, 64, 80, 96, 112, 128) or path.stem == "tiny"


SMALL = {
    # The demo and the architecture search as they are, but on fewer tokens and trials.
    "demo": ("tokens: [100K, 400K]", "tokens: [2K, 8K]"),
    "architecture": ("tokens: [500K, 2M]", "tokens: [1K, 4K]"),
    "tiny": ("", ""),
    "cpu": ("tokens: [500K, 4M], eta: 3", "tokens: [8K, 32K]"),
    "data_mix": ("tokens: [2M, 8M]", "tokens: [8K, 32K]"),
    "gpt2_small": ("tokens: [160M, 2560M]", "tokens: [1K, 2K]"),
    "command": ("tokens: [100K, 400K]", "tokens: [4K, 16K]"),
}
SMALLER_MODEL = {
    "gpt2_small": [
        ("vocab_size: 50304", "vocab_size: 300"),
        ("d_model: 768", "d_model: 96"),
        ("head_dim: 64", "head_dim: 8"),
        ("{int: [8, 16], baseline: 12}", "{int: [1, 2]}"),
        ("[1536, 4096], step: 256, baseline: 3072", "[64, 128], step: 64"),
        ("sequence_length: 1024", "sequence_length: 32"),
        ("validation: 0.005, test: 0.005, max_bytes: 4MiB", "max_bytes: 2KiB"),
        ("[262144, 524288], ordered: true, baseline: 524288", "[128, 256]"),
        ("micro_batch_tokens: 32768", "micro_batch_tokens: 64"),
        ("gpus: 1", "gpus: 0"),
    ],
    "command": [
        ("evolm/examples", str(Path(__file__).parents[2] / "evolm/examples")),
        ("{int: [64, 192], step: 32, baseline: 128}", "{int: [32, 64], step: 32, baseline: 64}"),
        ("{int: [2, 6], baseline: 4}", "{int: [1, 2], baseline: 1}"),
    ],
    "data_mix": [("vocab_size: 4096", "vocab_size: 300"), ("sequence_length: 256", "sequence_length: 32")],
    "cpu": [
        ("{choice: [2048, 4096, 8192], ordered: true, baseline: 4096}", "{choice: [280, 300]}"),
        ("sequence_length: 256", "sequence_length: 32"),
        ("{choice: [4096, 8192, 16384], ordered: true}", "{choice: [256, 512]}"),
    ],
}


@pytest.mark.slow
@pytest.mark.xdist_group("python-text")
@pytest.mark.parametrize("path", SHIPPED, ids=NAMES)
def test_is_searched(
    path: Path, evolm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words_corpus: Path, python_cache: Path
) -> None:
    """Through the real command line. Spaces of corpora that a user brings are pointed at generated ones."""
    monkeypatch.chdir(tmp_path)
    text = path.read_text()
    for old, new in [SMALL[path.stem], *SMALLER_MODEL.get(path.stem, [])]:
        assert old in text
        text = text.replace(old, new) if old else text
    make_corpora(tmp_path / "corpus", words_corpus)
    (tmp_path / path.name).write_text(text)
    said = evolm(
        "search", path.name, "--executor", "inline", "--cache", python_cache, "--run", "first", "--trials", "4"
    )
    assert said.code == 0, said.err
    status = json.loads(evolm("status", "first", "--json").out)
    assert status["failures"] == {} and status["front"] >= 1 and sum(status["trials"].values()) == 4
    assert status["trials"]["complete"] >= 1


def make_corpora(folder: Path, words: Path) -> None:
    """What the shipped spaces call corpus/...: the same pseudo-words under the names and formats they expect."""
    import pyarrow
    import pyarrow.parquet

    for name in ("web", "wiki", "books", "code", "news"):
        (folder / name).mkdir(parents=True)
    lines = {name: (words / name / "part.jsonl").read_text() for name in ("web", "code")}
    texts = [json.loads(line)["text"] for line in lines["web"].splitlines()]
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), folder / "web/part.parquet")
    with pyarrow.output_stream(str(folder / "code/part.jsonl.zst"), compression="zstd") as out:
        out.write(lines["code"].encode())
    with pyarrow.output_stream(str(folder / "wiki/part.jsonl.gz"), compression="gzip") as out:
        out.write(lines["web"].replace("a", "o").encode())
    (folder / "books/part.txt").write_text("\n\n".join(text * 9 for text in texts))
    (folder / "news/part.jsonl").write_text(lines["code"].replace("k", "q"))


@pytest.mark.xdist_group("python-text")
def test_the_demo_reads_the_text_of_the_running_python(python_cache: Path) -> None:
    file = load_space(next(path for path in SHIPPED if path.stem == "demo"))
    corpus = Corpus.open(Data.model_validate(file.space.baseline.values()["data"]), python_cache)
    sizes = {name: documents.manifest["bytes"]["train"] for name, documents in corpus.documents.items()}
    assert sizes["code"] > 10**6 and sizes["docs"] > 10**5
