"""Who decides: algorithms, executors, the search loop, promotion, the command line.

The Python interface, the same engine without a cluster:

    space = evolm.Space.load("space.yaml")
    search = evolm.Search(space, objectives={"loss": "min"})
    trial = search.ask()
    search.tell(trial, {"loss": train(trial.genome)})
    search.front()
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from evolm.config import Space
    from evolm.errors import EvolmError, SpaceExhausted
    from evolm.run import Run, load
    from evolm.search import Search

__version__ = "0.1.0"

__all__ = ["EvolmError", "Run", "Search", "Space", "SpaceExhausted", "__version__", "load"]

_HOMES = {
    "EvolmError": "evolm.errors",
    "Run": "evolm.run",
    "Search": "evolm.search",
    "Space": "evolm.config",
    "SpaceExhausted": "evolm.errors",
    "load": "evolm.run",
}


def __getattr__(name: str) -> Any:
    """Import what is asked for, when it is asked for: `import evolm` itself costs nothing."""
    if name not in _HOMES:
        raise AttributeError(f"module 'evolm' has no attribute '{name}'")
    return getattr(import_module(_HOMES[name]), name)
