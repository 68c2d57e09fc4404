"""Tokens of one split of one source: a file of ids behind a header, and where each document begins.

The header names the tokenizer by its hash; opening the file with another tokenizer is refused.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from trainer.data.documents import Split
from trainer.data.tokenizer import BOS, EOS, Tokenizer
from trainer.errors import DataError

MAGIC = b"EVOLMTOK"
VERSION = 1
_HEADER = struct.Struct("<8sIIQ32s8x")  # magic, version, bytes per token, tokens, SHA-256 of the tokenizer
BATCH_BYTES = 2**20


@dataclass(frozen=True)
class Shard:
    """The token stream of one split: document i is `tokens[offsets[i] : offsets[i + 1]]`, `<s>` and `</s>` included."""

    tokens: NDArray[np.uint16] | NDArray[np.uint32]
    offsets: NDArray[np.int64]
    chars: NDArray[np.int64]
    symbol_ratio: NDArray[np.float32]

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each document."""
        return np.diff(self.offsets)


def write_shard(
    folder: Path, name: str, split: Split, tokenizer: Tokenizer, tick: Callable[[], None] = lambda: None
) -> None:
    """Tokenise one split; documents are encoded in batches of about a mebibyte of text, with a `tick` before each."""
    kind = np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32
    lengths: list[int] = []
    with (folder / f"{name}.tokens").open("wb") as out:
        out.write(b"\0" * _HEADER.size)
        for batch in _batches(split):
            tick()
            for ids in tokenizer.encode(batch):
                out.write(np.array([BOS, *ids, EOS], dtype=kind).tobytes())
                lengths.append(len(ids) + 2)
        count = sum(lengths)
        out.seek(0)
        digest = bytes.fromhex(tokenizer.digest)
        out.write(_HEADER.pack(MAGIC, VERSION, np.dtype(kind).itemsize, count, digest))
    np.save(folder / f"{name}.offsets.npy", np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64))
    np.save(folder / f"{name}.chars.npy", split.chars)
    np.save(folder / f"{name}.symbol_ratio.npy", split.symbol_ratio)


def open_shard(folder: Path, name: str, tokenizer: Tokenizer) -> Shard:
    """Memory-map a shard. Raises DataError when it is torn or was written with another tokenizer."""
    file = folder / f"{name}.tokens"
    advice = "delete that folder of the cache and run again"
    try:
        with file.open("rb") as stream:
            header = stream.read(_HEADER.size)
        magic, version, size, count, digest = _HEADER.unpack(header)
    except (OSError, struct.error) as error:
        raise DataError(f"{file}: not a token shard ({error}); {advice}") from None
    if magic != MAGIC or version != VERSION:
        raise DataError(f"{file}: not a token shard of version {VERSION}; {advice}")
    if digest.hex() != tokenizer.digest:
        raise DataError(
            f"{file}: written with tokenizer {digest.hex()[:12]}, but the model's is {tokenizer.digest[:12]}; "
            "tokens of one tokenizer mean nothing to another"
        )
    if file.stat().st_size != _HEADER.size + count * size:
        raise DataError(f"{file}: torn, holds {file.stat().st_size} bytes for {count} tokens; {advice}")
    kind = np.uint16 if size == 2 else np.uint32
    try:
        return Shard(
            tokens=np.memmap(file, dtype=kind, mode="r", offset=_HEADER.size, shape=(count,)),
            offsets=np.load(folder / f"{name}.offsets.npy"),
            chars=np.load(folder / f"{name}.chars.npy"),
            symbol_ratio=np.load(folder / f"{name}.symbol_ratio.npy"),
        )
    except (OSError, ValueError) as error:
        raise DataError(f"{folder}: not a whole shard ({error}); {advice}") from None


def _batches(split: Split) -> Iterator[list[str]]:
    batch: list[str] = []
    size = 0
    for index in range(len(split)):
        text = split.document(index)
        batch.append(text)
        size += len(text)
        if size >= BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
