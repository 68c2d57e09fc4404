"""The exception tree of evolm. Each class stands in the lowest room that raises it; all of them can be had from here.

EvolmError                      1   root; the number is the exit code of the command line
├── UsageError                  2   a flag, name or file that cannot be used as given
│   ├── SpaceError              2   a space, recipe or genome that breaks the rules; carries all problems
│   ├── ExpressionError         2   an expression without a value
│   └── DataError               2   sources that give nothing to train or score on
├── NothingFeasible             3   a search that ended without one completed trial
├── RunBusy                     4   another controller works in the run folder
├── StorageError                5   the run folder: full, read-only, vanished
│   └── LedgerDamaged           5   a ledger that is not what was written
├── CheckpointError             5   a checkpoint: missing, torn, or of another run
├── GateError                   6   a gate said no: worse than the baseline
├── ParityError                 6   an exported model that is not the trained one
├── Interrupted           130, 143   a signal ended the work; everything is saved
├── BadMetrics                  1   a trial told something that is no finite number
├── SpaceExhausted              1   every genome of the space has been proposed
├── ExecutorError               1   workers that cannot be had
├── RankError                   1   processes that train together: one did not answer
│   └── RankLost                1   or has gone
└── Refused                     1   inside a trial: training that was ended, with a typed reason
    ├── Diverged                    no longer finite, or worse than guessing
    └── Leak                        the model sees what it predicts
"""

from typing import Any

from fitness.errors import BadMetrics, LedgerDamaged, RunBusy, StorageError
from search_spaces.errors import EvolmError, Problem, SpaceError, UsageError
from search_spaces.evaluation import ExpressionError
from trainer.errors import CheckpointError, DataError, Diverged, Leak, ParityError, RankError, RankLost, Refused


class NothingFeasible(EvolmError):
    """The search ended and no trial completed."""

    exit_code = 3


class GateError(EvolmError):
    """A result that must not be passed on. `result` is what was judged, where there is more to show than words."""

    exit_code = 6
    result: Any = None


class Interrupted(EvolmError):
    """Work that a signal ended in order. The exit code is the signal's."""

    def __init__(self, number: int) -> None:
        self.exit_code = 128 + number
        super().__init__("interrupted, everything is saved; the same command goes on")


class SpaceExhausted(EvolmError):
    """Every genome of the space has been proposed."""


class ExecutorError(EvolmError):
    """Workers that cannot be had, or were lost for good."""


__all__ = [
    "BadMetrics",
    "CheckpointError",
    "DataError",
    "Diverged",
    "EvolmError",
    "ExecutorError",
    "ExpressionError",
    "GateError",
    "Interrupted",
    "Leak",
    "LedgerDamaged",
    "NothingFeasible",
    "ParityError",
    "Problem",
    "RankError",
    "RankLost",
    "Refused",
    "RunBusy",
    "SpaceError",
    "SpaceExhausted",
    "StorageError",
    "UsageError",
]
