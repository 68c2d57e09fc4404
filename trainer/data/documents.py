"""One source's documents: exact duplicates dropped, split by content hash, stored as text with their signals.

A document's side depends on its text alone. So equal documents are always on the same side, in whatever source they
stand, and a document never changes sides when others come or go.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from trainer.data.cache import cached_folder, digest_of
from trainer.data.sources import Roots, Skipped, fingerprint, read_documents
from trainer.errors import DataError
from trainer.recipe import HeldOut, Source

SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class Split:
    """The documents of one split, in the order of their hashes: the same whatever order the files came in.

    `text` is all of them end to end as UTF-8, document i being `text[offsets[i] : offsets[i + 1]]`; `chars` and
    `symbol_ratio` are signals, one number a document.
    """

    text: NDArray[np.uint8]
    offsets: NDArray[np.int64]
    chars: NDArray[np.int64]
    symbol_ratio: NDArray[np.float32]

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def document(self, index: int) -> str:
        """The text of one document."""
        return bytes(self.text[self.offsets[index] : self.offsets[index + 1]]).decode("utf-8")


@dataclass(frozen=True)
class Documents:
    """One source, read and split. `digest` identifies the documents and how they were split, not the files."""

    folder: Path
    digest: str
    manifest: dict[str, Any]

    @classmethod
    def open(cls, name: str, source: Source, held_out: HeldOut, cache: Path, roots: Roots = ()) -> Documents:
        """Read a source, or find it in the cache. Raises DataError when it holds no usable text."""
        shares = [held_out.validation, held_out.test]
        key = digest_of("documents", fingerprint(source, roots), shares)
        folder = cached_folder(cache, "documents", key, lambda new: _build(name, source, held_out, roots, new))
        manifest = json.loads((folder / "manifest.json").read_text())
        return cls(folder, manifest["digest"], manifest)

    def split(self, name: str) -> Split:
        """The documents of one split, memory-mapped."""
        offsets = np.load(self.folder / f"{name}.offsets.npy")
        text = self.folder / f"{name}.text"
        return Split(
            text=np.memmap(text, dtype=np.uint8, mode="r") if text.stat().st_size else np.zeros(0, np.uint8),
            offsets=offsets,
            chars=np.load(self.folder / f"{name}.chars.npy"),
            symbol_ratio=np.load(self.folder / f"{name}.symbol_ratio.npy"),
        )


class _Side:
    """One split while it is being written, in the order of arrival."""

    def __init__(self, stream: BinaryIO) -> None:
        self.stream = stream
        self.hashes: list[bytes] = []
        self.sizes: list[int] = []
        self.chars: list[int] = []
        self.symbol_ratio: list[float] = []

    def add(self, key: bytes, raw: bytes, text: str) -> None:
        self.stream.write(raw)
        self.hashes.append(key)
        self.sizes.append(len(raw))
        self.chars.append(len(text))
        self.symbol_ratio.append(symbol_ratio(text))


def symbol_ratio(text: str) -> float:
    """The share of characters that are neither letters, digits nor blank."""
    return sum(not (c.isalnum() or c.isspace()) for c in text) / max(1, len(text))


def side_of(key: bytes, held_out: HeldOut) -> str:
    """The split of a document, from its 128-bit hash."""
    position = int.from_bytes(key[:8], "big") / 2**64
    if position < held_out.test:
        return "test"
    return "validation" if position < held_out.test + held_out.validation else "train"


def _build(name: str, source: Source, held_out: HeldOut, roots: Roots, folder: Path) -> None:
    skipped = Skipped()
    seen: set[bytes] = set()
    with (
        (folder / "train.arrived").open("w+b") as train,
        (folder / "validation.arrived").open("w+b") as validation,
        (folder / "test.arrived").open("w+b") as test,
    ):
        sides = {"train": _Side(train), "validation": _Side(validation), "test": _Side(test)}
        for text in read_documents(source, roots, skipped):
            if not text.strip():
                skipped.add("blank document", name)
                continue
            raw = text.encode("utf-8", errors="replace")  # lone surrogates, which JSON can hold, have no UTF-8
            key = hashlib.blake2b(raw, digest_size=16).digest()
            if key in seen:
                skipped.add("exact duplicate", text[:40].strip().replace("\n", " "))
                continue
            seen.add(key)
            sides[side_of(key, held_out)].add(key, raw, text)
        _refuse_empty(name, source, sides, skipped)
        for split, side in sides.items():
            _write_in_order(folder, split, side)
    digest = hashlib.blake2b(digest_size=16)
    for key in sorted(seen):
        digest.update(key)
    manifest = {
        "digest": digest_of(digest.hexdigest(), held_out.validation, held_out.test),
        "source": source.model_dump(),
        "documents": {split: len(side.sizes) for split, side in sides.items()},
        "bytes": {split: sum(side.sizes) for split, side in sides.items()},
        "skipped": dict(skipped.counts),
    }
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1))


def _refuse_empty(name: str, source: Source, sides: dict[str, _Side], skipped: Skipped) -> None:
    total = sum(len(side.sizes) for side in sides.values())
    passed = f" Passed over: {skipped}." if skipped.counts else ""
    where = source.path if isinstance(source.path, str) else ", ".join(source.path)
    if total == 0:
        raise DataError(f"data.sources.{name}: no text in {where}.{passed}")
    empty = [split for split, side in sides.items() if not side.sizes]
    if empty:
        raise DataError(
            f"data.sources.{name}: {total} documents in {where} leave none for {' and '.join(empty)}.{passed} "
            "Add text, raise data.held_out, or set `document: passage` or `document: line`."
        )


def _write_in_order(folder: Path, split: str, side: _Side) -> None:
    """Rewrite a split in the order of its hashes; only one document is in memory at a time."""
    order = sorted(range(len(side.hashes)), key=lambda i: side.hashes[i])
    starts = np.concatenate([[0], np.cumsum(side.sizes)])
    side.stream.flush()
    with (folder / f"{split}.text").open("wb") as out:
        for i in order:
            side.stream.seek(int(starts[i]))
            out.write(side.stream.read(side.sizes[i]))
    (folder / f"{split}.arrived").unlink()
    sizes = np.array([side.sizes[i] for i in order], dtype=np.int64)
    np.save(folder / f"{split}.offsets.npy", np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64))
    np.save(folder / f"{split}.chars.npy", np.array([side.chars[i] for i in order], dtype=np.int64))
    np.save(folder / f"{split}.symbol_ratio.npy", np.array([side.symbol_ratio[i] for i in order], dtype=np.float32))
