"""The Ray cluster that a search joins, or starts for itself: addresses, tokens, and whether its head still answers."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from evolm.errors import ExecutorError

CONNECT_SECONDS = 5.0
"""How long an address may take to answer at all."""

HEAD_SECONDS = 20.0
"""How long the head of the cluster may be silent before the run ends. Ray itself ends the process, without a word to
it, after 60 s."""

HEAD_EVERY = 2.0
"""Seconds between looks at whether the head is there."""

ASK_SECONDS = 30.0
"""How long a cluster may take to say that it is there."""

_QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # the default of a coming Ray: CPU actors keep the devices they see
    "TOKENIZERS_PARALLELISM": "false",
}


def connect(address: str | None) -> None:
    """Start a Ray of our own, or join the one at `address`."""
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    if address is not None:
        _someone_listens(address)
        _ask(address)
    import logging

    import ray

    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if address is None:
        options |= {"address": "local", "include_dashboard": False, "object_store_memory": 128 * 2**20}
    else:
        options["address"] = address
    start: Callable[..., Any] = ray.init
    try:
        start(**options)
    except (ConnectionError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        where = "a local Ray" if address is None else f"the Ray cluster at {address}"
        token = "" if address is None or _token_there() else "; if it wants a token, set RAY_AUTH_TOKEN_PATH"
        raise ExecutorError(f"cannot reach {where}: {str(error).splitlines()[0]}{token}") from None


def _someone_listens(address: str) -> None:
    """Ray itself tries for minutes before it tells that nobody is at an address."""
    host, colon, port = address.rpartition("://")[2].rpartition(":")
    if not colon or not port.isdecimal():
        return  # 'auto', or what Ray makes of it
    try:
        _reach(f"{host}:{port}", CONNECT_SECONDS)
    except (OSError, OverflowError) as error:
        raise ExecutorError(
            f"cannot reach the Ray cluster at {address}: {error}; does `ray status --address {address}` find it?"
        ) from None


def _reach(address: str, seconds: float) -> None:
    """Whether somebody listens at `host:port`. Raises OSError."""
    host, _, port = address.rpartition(":")
    socket.create_connection((host.strip("[]"), int(port)), timeout=seconds).close()


def _token_there() -> bool:
    file = os.environ.get("RAY_AUTH_TOKEN_PATH") or str(Path.home() / ".ray" / "auth_token")
    return bool(os.environ.get("RAY_AUTH_TOKEN")) or Path(file).is_file()


def _ask(address: str) -> None:
    """Ask a cluster whether it is one, and whether it wants a token.

    A cluster that wants a token refuses clients that have one but were not told to use it, and a cluster without lets
    clients in that use one, and then their actors die. Ray reads the mode once in a process, and waits without end for
    somebody who listens and says nothing: so another process asks. Raises ExecutorError.
    """
    if address.startswith("ray://"):
        return
    where = [] if address == "auto" else ["--address", address]
    mode = {} if "RAY_AUTH_MODE" in os.environ else {"RAY_AUTH_MODE": "disabled"}
    try:
        asked = subprocess.run(
            [sys.executable, "-m", "ray.scripts.scripts", "health-check", *where],
            env={**os.environ, **mode},
            capture_output=True,
            text=True,
            timeout=ASK_SECONDS,
        )
    except subprocess.TimeoutExpired:
        raise ExecutorError(f"cannot reach the Ray cluster at {address}: no answer in {ASK_SECONDS:g} s") from None
    if mode and _token_there() and "AuthenticationError" in asked.stderr + asked.stdout:
        os.environ["RAY_AUTH_MODE"] = "token"


class Head:
    """Looks whether the head of the cluster still answers."""

    def __init__(self, address: str) -> None:
        self._address = address
        self._heard = self._looked = time.monotonic()

    def check(self) -> bool:
        """Whether the head was looked for now, and answered. Raises ExecutorError when it has not for
        `HEAD_SECONDS`."""
        now = time.monotonic()
        if now - self._looked < HEAD_EVERY:
            return False
        missed = now - self._looked > HEAD_SECONDS  # this process itself was away
        self._looked = now
        try:
            _reach(self._address, 1.0)
            self._heard = now
        except OSError as error:
            if missed:
                self._heard = now
            if now - self._heard > HEAD_SECONDS:
                raise ExecutorError(f"the head of the Ray cluster at {self._address} is gone: {error}") from None
            return False
        return True
