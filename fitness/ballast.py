"""The ballast: a file that keeps room for the last words of a search on a disk that is full."""

from __future__ import annotations

import errno
import os
from dataclasses import dataclass
from pathlib import Path

from fitness.errors import StorageError

SIZE = 4 << 20
"""Bytes: some 300 events, each of which takes about three pages of the write-ahead log, and the log's next round."""


@dataclass(frozen=True)
class Ballast:
    """The file that is given up when there is no room for an event."""

    path: Path

    @classmethod
    def beside(cls, ledger: Path) -> Ballast:
        """The ballast of a ledger."""
        return cls(ledger.with_name("ballast"))

    def take(self) -> None:
        """Make the file where it is not. Raises StorageError when there is no room for it."""
        try:
            if self.path.exists() and self.path.stat().st_size >= SIZE:
                return
            with self.path.open("wb") as stream:
                stream.write(os.urandom(SIZE))  # random, so that no filesystem can keep it in less room
                stream.flush()
                os.fsync(stream.fileno())  # a network filesystem says only now that there is no room
        except OSError as error:
            self.drop()
            words = "make the run folder writable"
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                words = f"a search keeps {SIZE >> 20} MiB there to end in order when the disk is full; free some space"
            raise StorageError(f"{self.path}: {error.strerror}; {words}, then run `evolm resume`") from error

    def drop(self) -> bool:
        """Give the room back; False when there was none."""
        try:
            self.path.unlink()
        except OSError:
            return False
        return True
