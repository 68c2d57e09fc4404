"""What can go wrong in this room. The whole tree is drawn in evolm/errors.py."""

from __future__ import annotations

from search_spaces.errors import EvolmError


class StorageError(EvolmError):
    """The run folder cannot be read or written: full, read-only, vanished, torn."""

    exit_code = 5


class LedgerDamaged(StorageError):
    """What is in the ledger is not what was written. `fitness.repair.repair` saves what is readable."""


class RunBusy(EvolmError):
    """Another controller works in this run folder."""

    exit_code = 4


class BadMetrics(EvolmError, ValueError):
    """A trial told something that is no finite number, or not what the objectives need."""
