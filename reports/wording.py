"""Values in words: what the page and the figures write about numbers, times and names."""

from __future__ import annotations

import math
from datetime import UTC, datetime

from fitness.trial import Trial

WIDEST = 60
"""Characters of a name in a figure; what is longer is cut."""

_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
_ENTITIES = str.maketrans({"&": "&amp;", "<": "&lt;", ">": "&gt;"})


def plain(text: str, widest: int = WIDEST) -> str:
    """A name as plotly may show it: plotly reads tags and entities in every label, so none may be left in it."""
    clean = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return (clean if len(clean) <= widest else clean[: widest - 1] + "…").translate(_ENTITIES)


def scientific(value: float) -> str:
    """A large number as people read it: 6430000000000 as `6.43 × 10¹²`, 512 as `512`."""
    if abs(value) < 1e5:
        return f"{value:.4g}"
    exponent = math.floor(math.log10(abs(value)))
    mantissa = f"{value / 10**exponent:.2f}".rstrip("0").rstrip(".")
    return f"{mantissa} × {ten_to(exponent)}"


def ten_to(exponent: int) -> str:
    """A power of ten: 12 as `10¹²`."""
    return f"10{str(exponent).translate(_SUPERSCRIPTS)}"


def duration(seconds: float) -> str:
    """A span of time in its two largest units: 5580 as `1 h 33 min`."""
    if seconds < 60:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    units = [(days, "d"), (hours, "h"), (minutes, "min"), (rest, "s")]
    first = next(i for i, (count, _) in enumerate(units) if count)
    return " ".join(f"{count} {unit}" for count, unit in units[first : first + 2] if count)


def moment(epoch: float) -> str:
    """A time as date and minute in UTC, so that the same run reads the same everywhere."""
    return datetime.fromtimestamp(epoch, UTC).strftime("%Y-%m-%d %H:%M UTC")


def counted(count: int, one: str, many: str | None = None) -> str:
    """`1 trial`, `2 trials`."""
    return f"{count:,} {one if count == 1 else many or one + 's'}"


def origin(trial: Trial) -> str:
    """How a trial came to be proposed: `crossover of 3, 7`."""
    parents = f" of {', '.join(str(parent) for parent in trial.parents)}" if trial.parents else ""
    return f"{trial.operator or 'given'}{parents}"
