"""What can be tried: genes, spaces, genomes, and the YAML files.

The ground floor of the house. It knows nothing of models, data or clusters: what a recipe may hold and what a genome
costs is handed in as plain functions.
"""

from search_spaces.errors import EvolmError, Problem, SpaceError, UsageError
from search_spaces.genome import Genome
from search_spaces.space import Space

__all__ = ["EvolmError", "Genome", "Problem", "Space", "SpaceError", "UsageError"]
