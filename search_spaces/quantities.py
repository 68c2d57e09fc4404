"""Counts and bytes as people write them: `32M` tokens, `16GiB` of memory."""

from __future__ import annotations

import re

SUFFIXES: dict[str, int] = {
    "K": 10**3,
    "M": 10**6,
    "B": 10**9,
    "T": 10**12,
    "KiB": 2**10,
    "MiB": 2**20,
    "GiB": 2**30,
    "TiB": 2**40,
}

PATTERN = r"[0-9]+(?:\.[0-9]+)?(?:KiB|MiB|GiB|TiB|K|M|B|T)"
_QUANTITY = re.compile(rf"[-+]?{PATTERN}")


def parse_quantity(text: str) -> int | float | None:
    """`"32M"` as 32000000; None when the text is not a number with one of the suffixes.

    A whole result is an int, `1.5M` included.
    """
    if not _QUANTITY.fullmatch(text):
        return None
    number, suffix = re.split(r"(?=[KMBTG])", text, maxsplit=1)
    value = float(number) * SUFFIXES[suffix]
    return int(value) if value.is_integer() else value


def format_count(value: float) -> str:
    """A count with at most three significant digits: 1234567 as `1.23M`."""
    size = abs(value)
    for suffix in ("T", "B", "M", "K"):
        if size >= SUFFIXES[suffix] * 0.9995:
            return f"{value / SUFFIXES[suffix]:.3g}{suffix}"
    return f"{value:.4g}"


def format_bytes(value: float) -> str:
    """A number of bytes with at most three significant digits: 1536 as `1.5KiB`."""
    size = abs(value)
    for suffix in ("TiB", "GiB", "MiB", "KiB"):
        if size >= SUFFIXES[suffix]:
            return f"{value / SUFFIXES[suffix]:.3g}{suffix}"
    return f"{value:.0f}B"
