"""evolm is five packages with common names; this makes sure that the other four are its own."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from evolm import __file__ as here

NEIGHBOURS = ("search_spaces", "trainer", "fitness", "reports")


def foreign_packages(home: Path | None = None) -> list[str]:
    """Sentences about packages that are missing or belong to somebody else; empty when all is well."""
    root = home or Path(here).resolve().parent.parent
    found = []
    for name in NEIGHBOURS:
        spec = find_spec(name)
        origin = spec.origin if spec is not None else None
        if origin is None:
            found.append(f"package '{name}' is missing beside evolm in {root}; install evolm again")
        elif Path(origin).resolve().parent.parent != root:
            found.append(
                f"package '{name}' is taken from {Path(origin).parent}, not from evolm's own {root / name}: another "
                f"distribution of that name hides it; uninstall that one, or give evolm an environment of its own"
            )
    return found
