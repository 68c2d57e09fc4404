"""Training batches as a pure function of (seed, position, weights): there is no state to save and none to lose.

Training is one long row of samples, each a window of `sequence_length + 1` tokens from one source. Which source sample
i comes from and which window of it are both computed from i, so a run that stops after any sample goes on with the
next one, in batches of any size, on any number of devices. Genomes with the same seed share their randomness: two
mixes differ in the data only where their weights differ.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainer.data.shards import Shard
from trainer.errors import DataError
from trainer.recipe import Quality

GOLDEN = (math.sqrt(5) - 1) / 2


def stream_seed(*parts: Any) -> int:
    """A 64-bit seed that depends on its parts alone: every named stream of randomness has its own."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "big")


class SourceStream:
    """The training documents of one source that pass the quality thresholds, end to end, cut into windows.

    Every epoch visits each window once, in an order of its own and with the cuts at other places.
    """

    def __init__(self, name: str, shard: Shard, quality: Quality, sequence_length: int, seed: int) -> None:
        keep = (shard.chars >= quality.min_chars) & (shard.symbol_ratio <= quality.max_symbol_ratio)
        if not keep.any():
            raise DataError(
                f"data.quality leaves nothing of source '{name}': min_chars = {quality.min_chars}, "
                f"max_symbol_ratio = {quality.max_symbol_ratio:g}"
            )
        self.name, self.seed, self.sequence_length = name, seed, sequence_length
        self._tokens = shard.tokens
        self._first = shard.offsets[:-1][keep]
        self._ends = np.cumsum(shard.lengths[keep])
        self._whole = bool(keep.all())
        self.tokens = int(self._ends[-1])
        self.windows = max(1, self.tokens // sequence_length)
        self._epoch = -1
        self._order: NDArray[np.int64] = np.zeros(0, np.int64)
        self._shift = 0

    def window(self, draw: int) -> NDArray[np.int64]:
        """The tokens of the draw-th window of this source, `sequence_length + 1` of them."""
        epoch, position = divmod(draw, self.windows)
        if epoch != self._epoch:
            rng = np.random.default_rng(stream_seed(self.seed, self.name, epoch))
            self._epoch, self._shift = epoch, int(rng.integers(self.sequence_length))
            self._order = rng.permutation(self.windows)
        start = int(self._order[position]) * self.sequence_length + self._shift
        return self._read(start % self.tokens, self.sequence_length + 1)

    def _read(self, start: int, count: int) -> NDArray[np.int64]:
        pieces = []
        while count > 0:
            if self._whole:
                piece = self._tokens[start : min(start + count, self.tokens)]
            else:
                document = int(np.searchsorted(self._ends, start, side="right"))
                take = min(count, int(self._ends[document]) - start)
                # Where `start` lies in the shard: documents that were left out stand between.
                place = int(self._first[document]) + start - (int(self._ends[document - 1]) if document else 0)
                piece = self._tokens[place : place + take]
            pieces.append(piece)
            count -= len(piece)
            start = (start + len(piece)) % self.tokens
        return np.concatenate(pieces).astype(np.int64)


class Loader:
    """The training samples of one recipe.

    The sources are visited by a golden-ratio sequence: after any number of samples each source has had its weight's
    share to within a few samples, instead of to within the square root of their number.
    """

    def __init__(
        self,
        shards: Mapping[str, Shard],
        weights: Mapping[str, float],
        quality: Quality,
        sequence_length: int,
        seed: int,
    ) -> None:
        self.names = sorted(name for name, weight in weights.items() if weight > 0)
        self.sequence_length = sequence_length
        shares = np.array([weights[name] for name in self.names])
        shares /= shares.sum()
        self.shares = dict(zip(self.names, shares.tolist(), strict=True))  # of all tokens, as they are asked for
        self._bounds = np.cumsum(shares)[:-1]
        self._offset = np.random.default_rng(stream_seed(seed, "sources")).random()
        self._streams = [SourceStream(name, shards[name], quality, sequence_length, seed) for name in self.names]
        self._known = np.zeros(0, np.uint16)  # the source of each sample so far: grown on demand, never saved
        self._counts = np.zeros((0, len(self.names)), np.int64)  # of each source, before every BLOCK-th sample

    def batch(self, start: int, count: int) -> NDArray[np.int64]:
        """Samples `start` to `start + count` of the run, shape (count, sequence_length + 1)."""
        sources, draws = self._draws(start, count)
        rows = [self._streams[source].window(int(draw)) for source, draw in zip(sources, draws, strict=True)]
        return np.stack(rows)

    def sources(self, start: int, count: int) -> NDArray[np.int64]:
        """Which of `names` each of the samples `start` to `start + count` comes from."""
        self._grow(start + count)
        return self._known[start : start + count].astype(np.int64)

    def drawn(self, samples: int) -> dict[str, int]:
        """Tokens that the first `samples` samples take from each source."""
        counts = self._before(samples)
        return {name: int(n) * self.sequence_length for name, n in zip(self.names, counts, strict=True)}

    def epochs(self, samples: int) -> dict[str, float]:
        """How often each source has been seen after `samples` samples."""
        drawn = self.drawn(samples)
        return {stream.name: drawn[stream.name] / stream.tokens for stream in self._streams}

    _BLOCK = 4096

    def _grow(self, samples: int) -> None:
        while len(self._known) < samples:
            first = len(self._known)
            index = np.arange(first + 1, first + self._BLOCK + 1, dtype=np.float64)
            choice = np.searchsorted(self._bounds, (self._offset + index * GOLDEN) % 1.0, side="right")
            before = np.zeros(len(self.names), np.int64) if first == 0 else self._counts[-1] + self._tail_counts()
            self._counts = np.vstack([self._counts, before])
            self._known = np.concatenate([self._known, choice.astype(np.uint16)])

    def _tail_counts(self) -> NDArray[np.int64]:
        return np.bincount(self._known[-self._BLOCK :], minlength=len(self.names)).astype(np.int64)

    def _before(self, sample: int) -> NDArray[np.int64]:
        """How many of the samples before this one come from each source."""
        self._grow(sample + 1)
        block = sample // self._BLOCK
        inside = self._known[block * self._BLOCK : sample]
        counted: NDArray[np.int64] = self._counts[block] + np.bincount(inside, minlength=len(self.names))
        return counted

    def _draws(self, start: int, count: int) -> tuple[NDArray[np.uint16], NDArray[np.int64]]:
        """For each sample its source and how often that source has been drawn before."""
        self._grow(start + count)
        before = self._before(start)
        sources = self._known[start : start + count]
        draws = np.empty(count, np.int64)
        for source in range(len(self.names)):
            mine = sources == source
            draws[mine] = before[source] + np.arange(int(mine.sum()))
        return sources, draws
