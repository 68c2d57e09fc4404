"""The corpus of a recipe: what its `data` section stands for, ready to be drawn from and scored on."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainer.data.cache import cached_folder, digest_of
from trainer.data.documents import SPLITS, Documents
from trainer.data.loader import Loader
from trainer.data.shards import Shard, open_shard, write_shard
from trainer.data.sources import Roots
from trainer.data.tokenizer import PAD, Tokenizer, open_tokenizer
from trainer.errors import DataError
from trainer.recipe import Data, HeldOut, Source


@dataclass(frozen=True)
class HeldOutText:
    """Held-out text of one domain as windows to be scored.

    `tokens` has shape (windows, sequence_length + 1), each window beginning with the last token of the one before.
    `bytes_of` has shape (windows, sequence_length): the bytes of text that each predicted token stands for, 0 for
    special tokens and padding, whose loss is not counted.
    """

    tokens: NDArray[np.int64]
    bytes_of: NDArray[np.int64]


class Corpus:
    """Sources, tokenizer and token shards of a recipe's data section. Opening builds what the cache lacks."""

    def __init__(
        self, data: Data, documents: dict[str, Documents], tokenizer: Tokenizer, folders: dict[str, Path]
    ) -> None:
        self.data, self.documents, self.tokenizer = data, documents, tokenizer
        self._folders = folders

    @classmethod
    def open(cls, data: Data, cache: Path, roots: Roots = (), tick: Callable[[], None] = lambda: None) -> Corpus:
        """Read, split, tokenise: each step once per content, in the cache. `tick` is called now and then while it is
        tokenised. Raises DataError."""
        documents = {
            name: _documents(name, source, data.held_out, cache, roots) for name, source in data.sources.items()
        }
        tokenizer = open_tokenizer(data.tokenizer, documents, cache)
        folders = {name: _tokens(one, tokenizer, cache, tick) for name, one in documents.items()}
        return cls(data, documents, tokenizer, folders)

    @property
    def digest(self) -> str:
        """Identifies the documents, their split and the tokenizer."""
        return digest_of({name: one.digest for name, one in self.documents.items()}, self.tokenizer.digest)

    @property
    def weights(self) -> dict[str, float]:
        """The mix: as the recipe gives it, or each source by the bytes of its training text. Sums to one."""
        given = self.data.mix or {name: one.manifest["bytes"]["train"] for name, one in self.documents.items()}
        total = sum(given.values())
        return {name: weight / total for name, weight in given.items()}

    def shard(self, source: str, split: str) -> Shard:
        """The tokens of one split of one source."""
        return open_shard(self._folders[source], split, self.tokenizer)

    def loader(self, seed: int) -> Loader:
        """The training samples."""
        shards = {name: self.shard(name, "train") for name in self.documents}
        return Loader(shards, self.weights, self.data.quality, self.data.sequence_length, seed)

    def held_out(self, split: str, max_bytes: int | None = None) -> dict[str, HeldOutText]:
        """The held-out text of every domain, at most `max_bytes` (by default the recipe's) of each."""
        limit = max_bytes or self.data.held_out.max_bytes
        return {name: self._held_out(name, split, limit) for name in sorted(self.documents)}

    def _held_out(self, source: str, split: str, max_bytes: int) -> HeldOutText:
        shard, length = self.shard(source, split), self.data.sequence_length
        # Documents stand in the order of their hashes: the first ones are a random choice. A document has at least one
        # byte and two special tokens, so this much is enough.
        stream = np.asarray(shard.tokens[: 3 * max_bytes + 3], dtype=np.int64)
        sizes = self.tokenizer.bytes_per_token[stream]
        stream = stream[: int(np.searchsorted(np.cumsum(sizes), max_bytes, side="right"))]
        windows = max(1, -(-(len(stream) - 1) // length))
        padded = np.full(windows * length + 1, PAD, dtype=np.int64)
        padded[: len(stream)] = stream
        tokens = np.stack([padded[i * length : i * length + length + 1] for i in range(windows)])
        return HeldOutText(tokens, self.tokenizer.bytes_per_token[tokens[:, 1:]].astype(np.int64))

    def manifest(self) -> dict[str, Any]:
        """Where the corpus comes from: per source its paths, counts, bytes, digest; the tokenizer's hash; the mix."""
        return {
            "digest": self.digest,
            "tokenizer": {"sha256": self.tokenizer.digest, "vocab_size": self.tokenizer.vocab_size},
            "weights": self.weights,
            "sources": {name: one.manifest for name, one in self.documents.items()},
        }


def _documents(name: str, source: Source, held_out: HeldOut, cache: Path, roots: Roots) -> Documents:
    """The documents of one source; what is wrong with them is told under the source's name."""
    try:
        return Documents.open(name, source, held_out, cache, roots)
    except DataError as error:
        prefix = f"data.sources.{name}: "
        raise DataError(prefix + str(error).removeprefix(prefix)) from None


def _tokens(documents: Documents, tokenizer: Tokenizer, cache: Path, tick: Callable[[], None]) -> Path:
    def build(folder: Path) -> None:
        for split in SPLITS:
            write_shard(folder, split, documents.split(split), tokenizer, tick)
        about = {"documents": documents.digest, "tokenizer": tokenizer.digest}
        (folder / "manifest.json").write_text(json.dumps(about, indent=1))

    return cached_folder(cache, "tokens", digest_of("tokens", documents.digest, tokenizer.digest), build, tick)
