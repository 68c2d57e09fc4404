"""The corpus of a recipe: where its text comes from and how it becomes tokens."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import Field

from search_spaces.errors import nearest
from trainer.recipe.base import Fraction, Section

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
"""Names that become folder names, table columns and parts of metric names."""

SPECIAL_TOKENS = ("<pad>", "<s>", "</s>")
"""Ids 0, 1 and 2 of every tokenizer that evolm trains."""

SMALLEST_VOCABULARY = 256 + len(SPECIAL_TOKENS)


class Source(Section):
    """Where the documents of one domain come from."""

    path: str | list[str] = Field(
        description="a file, folder or glob, or several: text, .jsonl, .parquet, .gz, .zst; python:stdlib, python:docs"
    )
    document: Literal["auto", "file", "line", "passage"] = Field(
        "auto", description="what a document is in plain text: a file, a line, or a passage between blank lines"
    )


class Tokenizer(Section):
    """Byte-level byte-pair encoding, trained on equal shares of every source's training text."""

    kind: Literal["bpe"] = Field("bpe", description="byte-level byte-pair encoding")
    vocab_size: int = Field(4096, ge=SMALLEST_VOCABULARY, le=2**20, description="entries, special tokens included")


class Quality(Section):
    """Which training documents the loader draws. Held-out text is never filtered."""

    min_chars: int = Field(0, ge=0, description="shorter documents are left out")
    max_symbol_ratio: Fraction = Field(
        1.0,
        description="documents with a larger share of characters that are neither alphanumeric nor blank are left out",
    )


class HeldOut(Section):
    """What is kept from training: chosen by content hash, so that a document is always on the same side."""

    validation: float = Field(0.05, gt=0, le=0.4, description="share of the documents that the search is scored on")
    test: float = Field(0.05, gt=0, le=0.4, description="share of the documents that only promotion reads")
    max_bytes: int = Field(2**17, ge=1024, description="bytes of held-out text that are scored per domain and split")


class Data(Section):
    """The corpus: its sources, in which proportion they are drawn, and how text becomes sequences of tokens."""

    sources: dict[str, Source] = Field(min_length=1, max_length=256)
    mix: dict[str, Annotated[float, Field(ge=0)]] | None = Field(
        None, description="weight of each source in training tokens; proportional to their size when absent"
    )
    tokenizer: Tokenizer = Tokenizer()
    quality: Quality = Quality()
    sequence_length: int = Field(256, ge=8, le=2**20, description="tokens per training sequence")
    held_out: HeldOut = HeldOut()


def incoherent_data(data: Data) -> str | None:
    """Why the fields of a corpus do not go together, or None."""
    if data.mix is not None:
        if strange := sorted(set(data.mix) - set(data.sources)):
            close = nearest(strange[0], data.sources)
            advice = f"did you mean '{close}'?" if close else f"there are {', '.join(data.sources)}"
            return f"data.mix names '{strange[0]}', which is no source; {advice}"
        if forgotten := sorted(set(data.sources) - set(data.mix)):
            return f"data.mix gives no weight to source '{forgotten[0]}'"
        if sum(data.mix.values()) <= 0:
            return "data.mix must give some source a positive weight"
    bad = [name for name in data.sources if not NAME.fullmatch(name)]
    if bad:
        return f"source name '{bad[0]}' must match {NAME.pattern}"
    return None
