"""metrics.jsonl: a line for every so many tokens, written as training goes and read while it still does."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self


class MetricsLog:
    """Appends lines, each on the disk's way before the next; a line that an earlier writer left torn is closed
    first."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._stream = path.open("ab+")
        if self._stream.tell() > 0:
            self._stream.seek(-1, 2)
            if self._stream.read(1) != b"\n":
                self._stream.write(b"\n")

    def write(self, values: Mapping[str, Any]) -> None:
        """Append one line."""
        self._stream.write(json.dumps(values).encode() + b"\n")
        self._stream.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._stream.close()


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
