"""The cache of corpora: folders named by the digest of what is in them, written once, shared by all processes.

A folder is built under a temporary name and appears under its own name by one rename, so whoever sees it sees it whole.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from search_spaces.genome import canonical_json

CONTENTS = "contents.json"
"""Names every file of a folder with its bytes."""

FORMAT = 1
"""Goes into every key: a change of what is stored makes a new cache entry instead of misreading an old one."""


def digest_of(*parts: Any) -> str:
    """128-bit digest of JSON values, in hexadecimal."""
    return hashlib.blake2b(canonical_json([FORMAT, *parts]).encode(), digest_size=16).hexdigest()


def default_cache() -> Path:
    """The user's cache folder for evolm."""
    import platformdirs

    return Path(platformdirs.user_cache_dir("evolm", appauthor=False))


def cached_folder(
    cache: Path, kind: str, key: str, build: Callable[[Path], None], tick: Callable[[], None] = lambda: None
) -> Path:
    """The folder `cache/kind/key`, built by `build(temporary folder)` when it is not there yet, or not whole any more.

    Processes that want the same folder wait for the one that builds it, and `tick` now and then meanwhile. A build that
    fails leaves nothing behind.
    """
    folder = cache / kind / key
    if _whole(folder):
        return folder
    with _locked(cache / "locks" / f"{kind}-{key}", tick):
        if _whole(folder):
            return folder
        folder.parent.mkdir(parents=True, exist_ok=True)
        for left in folder.parent.glob(f"{key}.tmp-*"):  # by builders that were killed: we hold their lock
            shutil.rmtree(left, ignore_errors=True)
        temporary = folder.with_name(f"{key}.tmp-{uuid.uuid4().hex[:8]}")
        temporary.mkdir()
        try:
            build(temporary)
            sizes = {file.name: file.stat().st_size for file in temporary.iterdir()}
            (temporary / CONTENTS).write_text(json.dumps(sizes))
            shutil.rmtree(folder, ignore_errors=True)  # what was not whole
            os.rename(temporary, folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return folder


def _whole(folder: Path) -> bool:
    """Whether a folder holds every file that was built, none of them cut short. (Older folders do not tell.)"""
    if not folder.is_dir():
        return False
    contents = folder / CONTENTS
    if not contents.is_file():
        return True
    try:
        sizes: dict[str, int] = json.loads(contents.read_text())
        return all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (FileNotFoundError, ValueError):  # of another failure, a disk may be the cause that comes back
        return False


@contextmanager
def _locked(path: Path, tick: Callable[[], None]) -> Iterator[None]:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as stream:
        while True:
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the kernel lets go of it also at a crash
                break
            except BlockingIOError:
                tick()
                time.sleep(0.05)
        yield
