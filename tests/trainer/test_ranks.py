"""Guards who trains together: what ranks are told, what each of them computes, and what is said when one is missing."""

import socket
import threading

import pytest
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from search_spaces.errors import UsageError
from trainer.engines import ALONE, Ranks, open_ranks
from trainer.engines.ranks import lost_peer
from trainer.engines.shares import passes
from trainer.errors import RankError, RankLost
from trainer.place import Place


@pytest.fixture
def port():
    with socket.socket() as stream:
        stream.bind(("127.0.0.1", 0))
        return stream.getsockname()[1]


def place(rank, world, port):
    return Place(rank=rank, world=world, local_rank=rank, address="127.0.0.1", port=port)


# --- shares -----------------------------------------------------------------------------------------------------------


@given(st.integers(1, 70), st.integers(1, 20), st.integers(1, 9))
def test_every_sample_is_counted_once_and_every_rank_runs_as_many_passes(count, micro, world):
    shares = [passes(count, micro, rank, world) for rank in range(world)]
    counted = [
        one.offset + index for share in shares for one in share if one.weight == 1.0 for index in range(one.samples)
    ]
    assert counted == list(range(count))
    assert len({len(share) for share in shares}) == 1
    assert all(1 <= one.samples <= micro and one.offset + one.samples <= count for share in shares for one in share)
    sizes = [sum(one.samples for one in share if one.weight) for share in shares]
    assert max(sizes) - min(sizes) <= 1


def test_a_rank_without_samples_runs_one_that_counts_nothing():
    assert passes(1, 4, 0, 2) == [(0, 1, 0.0)]
    assert passes(1, 4, 1, 2) == [(0, 1, 1.0)]


# --- places -----------------------------------------------------------------------------------------------------------

TOLD = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "there", "MASTER_PORT": "29500"}


def test_a_place_is_what_torchrun_tells():
    told = Place.of({**TOLD, "TORCHELASTIC_USE_AGENT_STORE": "True"})
    assert told == Place(rank=1, world=2, local_rank=0, address="there", port=29500, agent=True)
    assert Place.of({}) is None


@pytest.mark.parametrize(
    ("change", "words"),
    [({"RANK": "x"}, "go together"), ({"MASTER_PORT": None}, "MASTER_PORT"), ({"RANK": "2"}, "must be at least 0 and")],
)
def test_half_a_place_is_refused(change, words):
    told = {key: value for key, value in {**TOLD, **change}.items() if value is not None}
    with pytest.raises(UsageError, match=words):
        Place.of(told)


def test_a_process_alone_waits_for_nobody(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with open_ranks() as (ranks, device):
        assert (ranks, device) == (ALONE, "cpu")
        assert ranks.any(True, False) == (True, False)
        assert ranks.least(3) == 3
        assert ranks.tell(lambda: 5) == 5


def test_a_group_of_one_is_a_group(port):
    with open_ranks(place=place(0, 1, port)) as (ranks, _):
        assert ranks.together
        assert ranks.tell(lambda: {"a": [1]}) == {"a": [1]}
    assert not dist.is_initialized()


# --- what ranks tell each other ---------------------------------------------------------------------------------------


@pytest.fixture
def pair(port):
    store = dist.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
    return Ranks(0, 2, store), Ranks(1, 2, store)


def test_what_the_first_rank_found_is_everybodys(pair):
    first, second = pair
    assert first.tell(lambda: [1, "a", None]) == [1, "a", None]
    assert second.tell(lambda: pytest.fail("only the first rank looks")) == [1, "a", None]


def test_what_went_wrong_on_the_first_rank_is_everybodys(pair):
    first, second = pair

    def full():
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        first.tell(full)
    with pytest.raises(RankLost, match=r"rank 0 said: \[Errno 28\] No space left on device"):
        second.tell(full)
    assert first.tell(lambda: 1) == second.tell(lambda: 2) == 1


@pytest.mark.parametrize(
    ("words", "lost"),
    [
        ("[../gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:60571", True),
        ("NCCL communicator was aborted on rank 0.", True),
        ("mat1 and mat2 shapes cannot be multiplied", False),
    ],
)
def test_the_error_of_a_lost_rank_is_known(words, lost):
    assert lost_peer(RuntimeError(words)) is lost


# --- pre-flight -------------------------------------------------------------------------------------------------------


def test_ranks_that_do_not_answer_are_named(port):
    with pytest.raises(RankError) as told, open_ranks(place=place(0, 4, port), seconds=0.2):
        pass
    words = str(told.value)
    assert words.startswith(f"ranks 1, 2, 3 of 4 did not answer at 127.0.0.1:{port} within 0.2 s; there are rank 0 on ")
    assert "MASTER_ADDR" in words
    assert "firewall" in words


def test_a_sum_that_does_not_come_back_is_told_of(port, monkeypatch):
    def stuck(*args, **options):
        raise RuntimeError("Timed out waiting 200ms for recv operation to complete\nand more")

    monkeypatch.setattr(dist, "all_reduce", stuck)
    with pytest.raises(RankError) as told, open_ranks(place=place(0, 1, port), seconds=0.2):
        pass
    assert "all 1 ranks are there" in str(told.value)
    assert "did not come back within 0.2 s (Timed out waiting 200ms for recv operation to complete)" in str(told.value)
    assert "GLOO_SOCKET_IFNAME" in str(told.value)
    assert not dist.is_initialized()


def test_a_first_rank_that_is_not_there_is_named(port):
    with pytest.raises(RankError) as told, open_ranks(place=place(1, 2, port), seconds=0.2):
        pass
    assert "rank 1 on " in str(told.value)
    assert f"the ranks were to meet at 127.0.0.1:{port}, and this one did not reach it within 0.2 s" in str(told.value)


def test_those_that_are_there_are_told_with_their_hosts(port):
    """Ranks 0 and 2 of 3 come; both hear that rank 1 does not."""
    heard = {}

    def come(rank):
        with pytest.raises(RankError) as told, open_ranks(place=place(rank, 3, port), seconds=1.0):
            pass
        heard[rank] = str(told.value)

    threads = [threading.Thread(target=come, args=(rank,)) for rank in (0, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert heard[0].startswith("rank 1 of 3 did not answer")
    assert "rank 0 on" in heard[0]
    assert "rank 2 on" in heard[0]
