"""The algorithms that propose genomes, by name.

An algorithm is a function of what is known: it keeps no state and runs nothing. Others plug in through the entry point
group `evolm.algorithms`: a name, and a callable without arguments that gives an object with `propose(history, rng)`.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import entry_points

from evolm.algorithms.base import Algorithm
from search_spaces.errors import UsageError, nearest


def _random() -> Algorithm:
    from evolm.algorithms.random_search import RandomSearch

    return RandomSearch()


def _nsga2() -> Algorithm:
    from evolm.algorithms.evolution import Nsga2

    return Nsga2()


BUILT_IN: dict[str, Callable[[], Algorithm]] = {"auto": _nsga2, "nsga2": _nsga2, "random": _random}
"""`auto` means what serves a search of recipes best among the algorithms that are here: at present `nsga2`."""


def names() -> list[str]:
    """All algorithms that can be asked for."""
    return sorted({*BUILT_IN, *(point.name for point in entry_points(group="evolm.algorithms"))})


def load_algorithm(name: str) -> Algorithm:
    """The algorithm of that name. Raises UsageError with the nearest one for a name that does not exist."""
    if name in BUILT_IN:
        return BUILT_IN[name]()
    for point in entry_points(group="evolm.algorithms"):
        if point.name == name:
            algorithm: Algorithm = point.load()()
            return algorithm
    close = nearest(name, names())
    advice = f"did you mean '{close}'?" if close else f"there are {', '.join(names())}"
    raise UsageError(f"unknown algorithm '{name}'; {advice}")
