"""What can go wrong in this room. The whole tree is drawn in evolm/errors.py."""

from __future__ import annotations

from search_spaces.errors import EvolmError, UsageError


class DataError(UsageError):
    """The sources give nothing to train or to score on, or not what the recipe asks of them."""


class CheckpointError(EvolmError):
    """A checkpoint that is missing, torn, or not of this recipe."""

    exit_code = 5


class Refused(EvolmError):
    """Training that was ended because going on would be wasted or its result a lie. `reason` is a trial's reason."""

    reason = "crashed"


class Diverged(Refused):
    """The loss or the gradient is no longer finite, or the loss has left the range of any useful model."""

    reason = "diverged"


class Leak(Refused):
    """The model sees the token it has to predict: its loss would mean nothing."""

    reason = "leak"


class RankError(EvolmError):
    """Processes that train together and did not all answer, or one of which has gone."""


class RankLost(RankError):
    """What the other ranks see of one that has gone: why it did is its own to say."""


class ParityError(EvolmError):
    """An exported model that does not compute what the trained one does."""

    exit_code = 6
