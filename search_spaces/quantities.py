"""Counts and bytes as people write them: `32M` tokens, `16GiB` of memory."""

from __future__ import annotations

import re
from fractions import Fraction

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
    value = Fraction(number) * SUFFIXES[suffix]  # exact: 8.2 times a million is no whole number in floats
    return value.numerator if value.denominator == 1 else float(value)


def format_count(value: float) -> str:
    """A count with at most three significant digits: 1234567 as `1.23M`."""
    return _format(value, ("", "K", "M", "B", "T"), 1000.0)


def format_bytes(value: float) -> str:
    """A number of bytes with at most three significant digits: 1536 as `1.5KiB`."""
    return _format(value, ("B", "KiB", "MiB", "GiB", "TiB"), 1024.0)


def _format(value: float, suffixes: tuple[str, ...], step: float) -> str:
    """The value with the largest suffix of which it holds at least one."""
    size = 0
    while abs(value) >= 0.9995 * step and size < len(suffixes) - 1:
        value, size = value / step, size + 1
    text = f"{value:.3g}" if abs(value) < 999.5 else f"{value:.0f}"
    return text + suffixes[size]
