"""The root of the exception tree (drawn whole in evolm/errors.py) and the problems that a file can have."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

MAX_TOLD = 50
"""Problems that one error tells; the rest are counted."""

MAX_SUGGESTIONS = 20

MAX_SHOWN = 120
"""Characters of a source line that a message shows."""

Path = tuple[str | int, ...]
"""The way from the root of a nested mapping to one of its values; integers are positions in lists."""


class EvolmError(Exception):
    """Root of all errors that evolm raises on purpose. `exit_code` is what the command line ends with."""

    exit_code = 1


class UsageError(EvolmError):
    """The user asked for something that cannot be done as written: a flag, a name, a file."""

    exit_code = 2


def short(text: str, longest: int = 60) -> str:
    """A name from outside as messages show it: in quotes, on one line, and cut where it is long."""
    text = text if len(text) <= longest else text[: longest - 3] + "..."
    return f"'{text}'"


def dotted(path: Path) -> str:
    """`("model", "n_heads", 0)` as `model.n_heads[0]`, the way paths are written in messages and expressions."""
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name that a misspelt one most likely meant, or None."""
    matches = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return matches[0] if matches else None


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One thing that is wrong with a file or a mapping.

    `line` and `column` count from 1; they are None where no file stands behind the mapping.
    """

    path: Path
    rule: str
    value: Any = None
    help: str | None = None
    file: str | None = None
    line: int | None = None
    column: int | None = None
    source: str | None = None
    on_key: bool = False  # the caret belongs under the key, not under its value

    def __str__(self) -> str:
        where = ":".join(str(part) for part in (self.file, self.line, self.column) if part is not None)
        key = dotted(self.path)
        text = ": ".join(part for part in (where, key, self.rule) if part)
        if self.source is not None and self.line is not None and self.column is not None:
            start = max(0, self.column - MAX_SHOWN // 2) if len(self.source) > MAX_SHOWN else 0
            gutter = f"{self.line:5d} | "
            text += f"\n{gutter}{self.source[start : start + MAX_SHOWN]}"
            text += f"\n{'| '.rjust(len(gutter))}{' ' * (self.column - 1 - start)}^"
        if self.help:
            text += f"\n      = {self.help}"
        return text

    def as_dict(self) -> dict[str, Any]:
        """The problem as one JSON object (what `--json` prints)."""
        return {
            "file": self.file,
            "line": self.line,
            "column": self.column,
            "path": dotted(self.path),
            "rule": self.rule,
            "value": self.value,
            "help": self.help,
        }


class SpaceError(UsageError):
    """A space, recipe or genome that breaks the rules; carries every problem that was found, not only the first."""

    def __init__(self, problems: Problem | Sequence[Problem]) -> None:
        self.problems = [problems] if isinstance(problems, Problem) else list(problems)
        told = [str(problem) for problem in self.problems[:MAX_TOLD]]
        if len(self.problems) > MAX_TOLD:
            told.append(f"and {len(self.problems) - MAX_TOLD} more problems")
        super().__init__("\n".join(told))


class Problems:
    """Collects problems while a file is read, so that all of them are told at once."""

    def __init__(self) -> None:
        self.found: list[Problem] = []

    def add(self, path: Path, rule: str, *, value: Any = None, help: str | None = None) -> None:
        """Note one problem at `path`."""
        self.found.append(Problem(path=path, rule=rule, value=value, help=help))

    def unknown(self, path: Path, name: str, known: Iterable[str], what: str = "key") -> None:
        """Note a name that does not exist, with the nearest one that does."""
        known = sorted(known)
        # Looking for the nearest name takes time with each name that there is: a file of nothing but slips gets it for
        # the first ones.
        close = nearest(name[:100], known) if len(self.found) < MAX_SUGGESTIONS else None
        listing = ", ".join(known) if len(known) <= 16 else ", ".join(known[:15]) + ", ..."
        advice = f"did you mean '{close}'?" if close else f"known here: {listing}"
        rule = f"unknown {what} {short(name)}"
        on_key = bool(path) and path[-1] == name  # otherwise the name is a value, or stands inside one
        self.found.append(Problem(path=path, rule=rule, value=name, help=advice, on_key=on_key))

    def raise_if_any(self) -> None:
        """Raise one SpaceError that carries everything found so far."""
        if self.found:
            raise SpaceError(self.found)


def located(
    problems: Iterable[Problem], *, file: str, lines: Sequence[str], mark: Callable[[Path, bool], tuple[int, int]]
) -> list[Problem]:
    """The same problems with their place in the file, in file order. `mark(path, on_key)` gives (line, column) from
    1."""
    placed = []
    for problem in problems:
        if problem.line is None:
            line, column = mark(problem.path, problem.on_key)
            source = lines[line - 1] if 0 < line <= len(lines) else None
            problem = replace(problem, file=file, line=line, column=column, source=source)
        placed.append(problem)
    return sorted(placed, key=lambda problem: (problem.line or 0, problem.column or 0))
