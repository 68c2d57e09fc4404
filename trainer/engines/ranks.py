"""The processes that train one model together: who they are, whether they all answer, and what they agree on.

Whoever starts them (torchrun, `evolm train --processes`, Ray) tells each its place in the environment: RANK,
WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT. What ranks tell each other is tensors and JSON, never pickled objects.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, Store, TCPStore

from trainer.device import usable_device
from trainer.errors import RankError, RankLost
from trainer.place import Place

PREFLIGHT_SECONDS = 60.0
"""How long ranks wait for each other before the first step."""

COLLECTIVE_SECONDS = 1800.0
"""How long a rank waits in one exchange for the others: the slowest of them may be writing a checkpoint."""

FAR_TOO_LONG = timedelta(days=30)

_ASK_SECONDS = 0.2


class Ranks:
    """The ranks of one training. All of them call every method, in the same order; alone, each returns at once."""

    def __init__(self, rank: int = 0, world: int = 1, store: Store | None = None) -> None:
        self.rank, self.world, self._store = rank, world, store
        self._asked = 0

    @property
    def first(self) -> bool:
        """Whether this is the rank that writes and speaks."""
        return self.rank == 0

    @property
    def together(self) -> bool:
        """Whether there is a process group, of one rank or more."""
        return self._store is not None

    def any(self, *flags: bool) -> tuple[bool, ...]:
        """For each flag, whether some rank raised it. Never waits for a GPU."""
        if self.world == 1:
            return flags
        raised = torch.tensor(flags, dtype=torch.int32)
        dist.all_reduce(raised, dist.ReduceOp.MAX)
        return tuple(bool(one) for one in raised.tolist())

    def least(self, number: int) -> int:
        """The smallest of the ranks' numbers."""
        if self.world == 1:
            return number
        numbers = torch.tensor(number)
        dist.all_reduce(numbers, dist.ReduceOp.MIN)
        return int(numbers.item())

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum of a tensor over ranks, in place."""
        if self.world > 1:
            dist.all_reduce(tensor)
        return tensor

    def tell(self, make: Callable[[], Any]) -> Any:
        """What `make` gives on the first rank, as JSON, on all of them. However long that takes, the others wait; what
        it raises there, the others learn as RankLost."""
        if self._store is None:
            return make()
        self._asked += 1
        key = f"told/{self._asked}"
        if self.first:
            try:
                value = make()
            except BaseException as error:
                self._store.set(key, json.dumps({"error": str(error) or type(error).__name__}))
                raise
            self._store.set(key, json.dumps({"value": value}))
            return value
        try:
            self._store.wait([key], FAR_TOO_LONG)
            said = json.loads(self._store.get(key))
        except RuntimeError as error:
            raise RankLost(f"rank 0 has gone ({_line(error)})") from None
        if "error" in said:
            raise RankLost(f"rank 0 said: {said['error']}")
        return said["value"]


ALONE = Ranks()


@contextmanager
def open_ranks(
    device: str = "cpu", *, place: Place | None = None, seconds: float = PREFLIGHT_SECONDS
) -> Iterator[tuple[Ranks, str]]:
    """Meet the other ranks of this process's environment: the ranks, and the device of this one (`cuda` becomes
    `cuda:LOCAL_RANK`). A process without such an environment is alone.

    Raises RankError when not all answer within `seconds`, naming who did not, and RankLost when another rank goes while
    this is open.
    """
    place = place or Place.of(os.environ)
    if place is None:
        yield ALONE, device
        return
    mine = f"cuda:{place.local_rank}" if device == "cuda" else device
    usable_device(mine)
    store = _meet(place, seconds)
    try:
        _join(place, store, mine, seconds)
        yield Ranks(place.rank, place.world, store), mine
    except RuntimeError as error:
        if place.world > 1 and lost_peer(error):
            raise RankLost(f"rank {place.rank}: another rank has gone ({_line(error)})") from None
        raise
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def lost_peer(error: RuntimeError) -> bool:
    """Whether an error is that of an exchange whose other side has gone."""
    if isinstance(error, dist.DistBackendError | dist.DistNetworkError | dist.DistStoreError):
        return True
    words = str(error)
    return any(one in words for one in ("/gloo/", "Connection closed by peer", "Connection reset by peer", "NCCL"))


# --- before the first step --------------------------------------------------------------------------------------------


def _meet(place: Place, seconds: float) -> Store:
    """Say that this rank is there and wait for all others. Raises RankError."""
    where = f"{place.address}:{place.port}"
    begun = time.monotonic()
    try:
        base = TCPStore(
            place.address,
            place.port,
            place.world,
            is_master=place.rank == 0 and not place.agent,
            timeout=timedelta(seconds=seconds),
            wait_for_workers=False,
            multi_tenant=True,
        )
    except (RuntimeError, ValueError) as error:
        who = "cannot listen there" if place.rank == 0 and not place.agent else "did not reach it"
        raise RankError(
            f"rank {place.rank} on {os.uname().nodename}: the ranks were to meet at {where}, and this one {who} within "
            f"{seconds:g} s ({_line(error)}). Check that rank 0 was started, that MASTER_ADDR and MASTER_PORT are the "
            "same everywhere, and that no firewall stands between the hosts"
        ) from None
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    store = PrefixStore(f"evolm/{attempt}", base)
    store.set(f"here/{place.rank}", os.uname().nodename)
    while missing := [rank for rank in range(place.world) if not store.check([f"here/{rank}"])]:
        if time.monotonic() - begun > seconds:
            raise RankError(_missing(place, missing, store, seconds))
        time.sleep(_ASK_SECONDS if time.monotonic() - begun > 2 else 0.01)
    return store


def _join(place: Place, store: Store, device: str, seconds: float) -> None:
    """Make the process group, and sum a number over all ranks on the device they train on. Raises RankError."""
    if device.startswith("cuda"):
        torch.cuda.set_device(torch.device(device))
    backend = "cpu:gloo,cuda:nccl" if device.startswith("cuda") else "gloo"
    limit = timedelta(seconds=seconds)
    try:
        dist.init_process_group(
            backend,
            store=PrefixStore("group", store),
            rank=place.rank,
            world_size=place.world,
            timeout=timedelta(seconds=COLLECTIVE_SECONDS),
        )
        for where in {"cpu", device}:
            number = torch.tensor([place.rank + 1.0], device=where)
            dist.all_reduce(number, async_op=True).wait(limit)
            expected = place.world * (place.world + 1) / 2
            if number.item() != expected:
                raise RankError(f"the pre-flight sum over ranks is {number.item():g}, not {expected:g}")
    except RuntimeError as error:
        hosts = ", ".join(sorted({store.get(f"here/{rank}").decode() for rank in range(place.world)}))
        raise RankError(
            f"rank {place.rank} on {os.uname().nodename}: all {place.world} ranks are there ({hosts}), but a sum over "
            f"them did not come back within {seconds:g} s ({_line(error)}). Check the network between these hosts; "
            "GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME name the interface to use, NCCL_DEBUG=INFO shows what NCCL does"
        ) from None


def _missing(place: Place, missing: list[int], store: Store, seconds: float) -> str:
    there = [rank for rank in range(place.world) if rank not in missing]
    known = ", ".join(f"rank {rank} on {store.get(f'here/{rank}').decode()}" for rank in there)
    names = f"rank{'s' if len(missing) > 1 else ''} {', '.join(map(str, missing))}"
    return (
        f"{names} of {place.world} did not answer at {place.address}:{place.port} within {seconds:g} s; there are "
        f"{known}. Check that every rank was started with the same MASTER_ADDR, MASTER_PORT and WORLD_SIZE, that none "
        "has ended (its own words say why), and that no firewall stands between the hosts"
    )


def _line(error: Exception) -> str:
    """The first line of what a library says."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
