"""metrics.jsonl: a line for every so many tokens, written as training goes and read while it still does."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

MAX_BYTES = 2**22
"""A log is thinned before it grows beyond this."""


class MetricsLog:
    """Appends lines, each on the disk's way before the next; a line that an earlier writer left torn is closed first.

    The file never exceeds `max_bytes`: before it would, every second line of training is left out, of all the log, and
    the file is replaced as a whole. What is left is still the whole curve. Lines without a `loss`, the scores of a
    rung, stay; a line that is longer than all the log may be is not written. What is no regular file is never replaced.
    Without a path nothing is written: of the ranks of a run, the first one alone has a log.
    """

    def __init__(self, path: Path | None, max_bytes: int = MAX_BYTES) -> None:
        self.path, self.max_bytes = path, max_bytes
        if path is not None:
            _thinned(path).unlink(missing_ok=True)  # of a writer that was killed
        self._stream: IO[bytes] = io.BytesIO() if path is None else path.open("ab+")
        self._size = self._stream.tell()
        if self._size > 0:
            self._stream.seek(-1, 2)
            if self._stream.read(1) != b"\n":
                self._append(b"\n")

    def write(self, values: Mapping[str, Any]) -> None:
        """Append one line."""
        if self.path is None:
            return
        line = json.dumps(values).encode() + b"\n"
        if self._size + len(line) > self.max_bytes:
            if len(line) > self.max_bytes:
                return
            if self.path.is_file():
                self._thin(self.path, self.max_bytes - len(line))
        self._append(line)

    def _append(self, line: bytes) -> None:
        self._stream.write(line)
        self._stream.flush()
        self._size += len(line)

    def _thin(self, path: Path, room: int) -> None:
        """Replace the file by one of half the lines, as often as it takes."""
        kept = [(json.dumps(values).encode() + b"\n", "loss" in values) for values in read_metrics(path)]
        while sum(len(line) for line, _ in kept) > room:
            kept = _halved(kept)
        temporary = _thinned(path)
        try:
            temporary.write_bytes(b"".join(line for line, _ in kept))
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
            self._stream.close()
            self._stream = path.open("ab+")
            self._size = self._stream.tell()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._stream.close()


def _thinned(path: Path) -> Path:
    """Where a log is written anew before it takes the place of the old one."""
    return path.with_name(f"{path.name}.tmp")


def _halved(lines: list[tuple[bytes, bool]]) -> list[tuple[bytes, bool]]:
    """The lines without every second one of training; where there is none left to spare, without the oldest."""
    places = [place for place, (_, training) in enumerate(lines) if training]
    out = set(places[1::2]) or {0}
    return [line for place, line in enumerate(lines) if place not in out]


def read_metrics(path: Path) -> Iterator[dict[str, Any]]:
    """The whole lines of a log; a torn one, of a kill or a full disk, is left out. Nothing where there is no log."""
    if not path.is_file():
        return
    for line in path.read_text(errors="replace").splitlines():
        try:
            values = json.loads(line)
        except ValueError:
            continue
        if isinstance(values, dict):
            yield values
