"""Hearing the signals that ask a process to end, so that it can save first."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@contextmanager
def on_signals(handle: Callable[[int], None]) -> Iterator[None]:
    """While this is open, a signal that asks to end calls `handle` with its number instead of ending the process. One
    that this process was started to ignore (nohup) stays ignored. Outside the main thread, where Python hears none,
    this does nothing."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def hear(number: int, frame: FrameType | None) -> None:
        handle(number)

    heard = [number for number in ENDING if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, hear) for number in heard}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
