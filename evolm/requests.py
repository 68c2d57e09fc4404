"""What other processes ask of the controller that is at work in a run folder: to stop, or to try a genome.

The ledger has one writer, so a request is a file of its own in `requests/`, whole or absent, which the controller takes
away once it has done what it says. It works wherever the folder can be seen, from other machines too.
"""

from __future__ import annotations

import json
import os
import time
import uuid
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from evolm.errors import StorageError
from evolm.run_folder import RunFolder
from search_spaces.genome import Values

Kind = Literal["stop", "cancel", "enqueue"]
KINDS: tuple[Kind, ...] = ("stop", "cancel", "enqueue")


@dataclass(frozen=True, kw_only=True)
class Request:
    """One request: `stop` lets running trials save, `cancel` does not, `enqueue` brings a genome."""

    kind: Kind
    genome: Values | None = None
    file: Path | None = None

    def done(self) -> None:
        """Take the request away: what it asked for is written down. Raises StorageError."""
        assert self.file is not None
        try:
            self.file.unlink(missing_ok=True)
        except OSError as error:
            raise StorageError(f"{self.file}: a request that cannot be taken away: {error.strerror}") from None


def send(folder: RunFolder, request: Request) -> Path:
    """Leave a request for the controller; returns its file, which is gone once it was heard. Raises StorageError."""
    body: dict[str, Any] = {"kind": request.kind, "genome": request.genome}
    try:
        folder.requests.mkdir(exist_ok=True)
        # Names sort by when they were sent; between machines as well as their clocks agree, which decides nothing.
        file = folder.requests / f"{time.time_ns():020d}-{uuid.uuid4().hex[:8]}.json"
        temporary = file.with_suffix(".tmp")
        with temporary.open("w") as stream:
            stream.write(json.dumps(body))
            stream.flush()
            os.fsync(stream.fileno())
        temporary.rename(file)
    except OSError as error:
        raise StorageError(f"{folder.requests}: cannot leave a request there: {error.strerror}") from None
    return file


def pending(folder: RunFolder) -> Iterator[Request]:
    """The requests that were left, oldest first. A file that is no request is set aside as `*.refused`."""
    for file in sorted(folder.requests.glob("*.json")):
        try:
            body = json.loads(file.read_text())
            kind, genome = body["kind"], body["genome"]
            if kind not in KINDS or not isinstance(genome, dict | None):
                raise ValueError(kind)
        except FileNotFoundError:
            continue
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            with suppress(OSError):
                file.rename(file.with_suffix(".refused"))
            continue
        yield Request(kind=kind, genome=genome, file=file)
