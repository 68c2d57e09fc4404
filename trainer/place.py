"""Where a process stands among those that train together: what its environment says. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

from search_spaces.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class Place:
    """One rank's place among those that train together, and where they meet."""

    rank: int
    world: int
    local_rank: int
    address: str
    port: int
    agent: bool = False  # whether the meeting place is kept by who started the ranks, as torchrun does

    @classmethod
    def of(cls, environment: Mapping[str, str]) -> Self | None:
        """The place that an environment names; None for a process that trains alone. Raises UsageError."""
        if environment.get("WORLD_SIZE", "1") == "1" and "MASTER_ADDR" not in environment:
            return None
        try:
            place = cls(
                rank=int(environment["RANK"]),
                world=int(environment["WORLD_SIZE"]),
                local_rank=int(environment.get("LOCAL_RANK", environment["RANK"])),
                address=environment["MASTER_ADDR"],
                port=int(environment["MASTER_PORT"]),
                agent=environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
            )
        except (KeyError, ValueError) as error:
            words = "RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT go together; torchrun sets them all"
            raise UsageError(f"the environment is not that of a rank ({error}): {words}") from None
        if not 0 <= place.rank < place.world:
            raise UsageError(f"RANK = {place.rank} must be at least 0 and below WORLD_SIZE = {place.world}")
        return place
