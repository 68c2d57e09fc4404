"""The folder of one trial, held by one launch at a time, and what its storage may do to all of them."""

from __future__ import annotations

import errno
import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

FENCE_SECONDS = 60.0
"""How long a launch waits for the one before it to let go of the trial's folder."""


class Held(Exception):
    """The trial's folder is another launch's."""


@contextmanager
def fenced(folder: Path) -> Iterator[None]:
    """Hold a trial's folder: a launch whose lease has expired may still be at work in it, and is waited for.

    The kernel lets go when the process ends, however it ends. The folder of all trials has to be there: it is not made
    anew when somebody removed it. Raises Held, OSError.
    """
    folder.mkdir(exist_ok=True)
    with (folder / "lock").open("w") as stream:
        until = time.monotonic() + FENCE_SECONDS
        while True:
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > until:
                    raise Held(f"{folder}: an earlier launch of this trial is still at work there") from None
                time.sleep(0.05)
        yield


def storage_words(folder: Path, error: Exception) -> str | None:
    """What to tell when an error comes from the storage of all trials, and not from this trial."""
    if not isinstance(error, OSError):
        return None
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"{folder}: {error.strerror}; free some space, then run `evolm resume`"
    if error.errno == errno.EROFS or (error.errno == errno.EACCES and not os.access(folder.parent, os.W_OK)):
        return f"{folder}: {error.strerror}; make the run folder writable, then run `evolm resume`"
    if not folder.parent.is_dir():
        node = os.uname().nodename
        return (
            f"{folder.parent} is not there on {node}: bring it back, or put the run on storage that all nodes of the "
            "cluster see; then run `evolm resume`"
        )
    return None
