"""What can be tried: genes, spaces, genomes, and the YAML files.

The ground floor of the house. It knows nothing of models, data or clusters: what a recipe may hold and what a genome
costs is handed in as plain functions.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from search_spaces.errors import EvolmError, Problem, SpaceError, UsageError
    from search_spaces.genome import Genome
    from search_spaces.space import Space

__all__ = ["EvolmError", "Genome", "Problem", "Space", "SpaceError", "UsageError"]

_HOMES = {"Genome": "search_spaces.genome", "Space": "search_spaces.space"}


def __getattr__(name: str) -> Any:
    """Import what is asked for, when it is asked for: the command line needs the errors before it needs numpy."""
    if name not in __all__:
        raise AttributeError(f"module 'search_spaces' has no attribute '{name}'")
    return getattr(import_module(_HOMES.get(name, "search_spaces.errors")), name)
