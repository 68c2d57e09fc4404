"""Byte-level BPE: every text can be written in it, and what it writes decodes to the same bytes.

A tokenizer is identified by the SHA-256 of its file. Tokens carry that hash and a model is never given the tokens of
another tokenizer: two vocabularies of the same size share few ids.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from functools import cached_property, lru_cache
from pathlib import Path

import numpy as np
import tokenizers
from numpy.typing import NDArray
from tokenizers import decoders, models, pre_tokenizers, trainers

from trainer.data.cache import cached_folder, digest_of
from trainer.data.documents import Documents
from trainer.errors import DataError
from trainer.recipe import SPECIAL_TOKENS
from trainer.recipe import Tokenizer as TokenizerRecipe

PAD, BOS, EOS = range(3)

TRAINING_BYTES = 2**21
"""Text of each source that a tokenizer is trained on: the same share of each, so that it does not depend on the mix."""


class Tokenizer:
    """A trained tokenizer in its `tokenizer.json`."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.digest = hashlib.sha256(file.read_bytes()).hexdigest()

    @cached_property
    def backend(self) -> tokenizers.Tokenizer:
        """The tokenizer of the `tokenizers` library."""
        backend = tokenizers.Tokenizer.from_file(str(self.file))
        backend.encode_special_tokens = True  # "<s>" in a text is three characters, not the beginning of another
        return backend

    @property
    def vocab_size(self) -> int:
        """Entries, special tokens included."""
        return int(self.backend.get_vocab_size())

    def encode(self, documents: Sequence[str]) -> list[list[int]]:
        """The token ids of each document, without special tokens."""
        return [encoding.ids for encoding in self.backend.encode_batch_fast(documents, add_special_tokens=False)]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids; special tokens are left out."""
        return str(self.backend.decode(list(ids), skip_special_tokens=True))

    @cached_property
    def bytes_per_token(self) -> NDArray[np.int32]:
        """How many bytes of text each id stands for; 0 for special tokens. In byte-level BPE a character is a byte."""
        sizes = np.zeros(self.vocab_size, dtype=np.int32)
        for token, index in self.backend.get_vocab().items():
            sizes[index] = 0 if token in SPECIAL_TOKENS else len(token)
        return sizes


def open_tokenizer(recipe: TokenizerRecipe, sources: dict[str, Documents], cache: Path) -> Tokenizer:
    """Train a recipe's tokenizer on the sources' training text, or find it in the cache.

    Raises DataError when the text does not support as many entries.
    """
    key = digest_of("tokenizer", recipe.model_dump(), sorted(documents.digest for documents in sources.values()))

    def build(folder: Path) -> None:
        tokenizer = train_bpe(_training_text(sources), recipe.vocab_size)
        tokenizer.save(str(folder / "tokenizer.json"))

    file = cached_folder(cache, "tokenizers", key, build) / "tokenizer.json"
    return _opened(file, file.stat().st_mtime_ns)


@lru_cache(maxsize=16)
def _opened(file: Path, changed: int) -> Tokenizer:
    """A tokenizer stays open: genomes that differ in their mix alone share it."""
    return Tokenizer(file)


def train_bpe(texts: Iterator[str], vocab_size: int) -> tokenizers.Tokenizer:
    """Train byte-level BPE with GPT-2's split into words, which every exporter knows."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        show_progress=False,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(texts, trainer=trainer)
    found = tokenizer.get_vocab_size()
    if found < vocab_size:
        raise DataError(
            f"data.tokenizer.vocab_size: the training text supports {found} entries, {vocab_size} were asked for. "
            f"Add text, or ask for at most {found}."
        )
    return tokenizer


def _training_text(sources: dict[str, Documents]) -> Iterator[str]:
    for _, documents in sorted(sources.items()):
        split = documents.split("train")
        taken = 0
        for index in range(len(split)):
            text = split.document(index)
            # A document that is longer than what is left is cut: one book must not decide a vocabulary.
            text = text[: max(1, TRAINING_BYTES - taken)]
            yield text
            taken += len(text)
            if taken >= TRAINING_BYTES:
                break
