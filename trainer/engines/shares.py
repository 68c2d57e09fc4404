"""Which samples of a step each rank computes, in which forward passes."""

from __future__ import annotations

from typing import NamedTuple


class Pass(NamedTuple):
    """One forward and backward pass over `samples` samples from the `offset`-th of the step on. A pass with weight 0
    computes a sample that another rank counts: ranks exchange in every pass, so that all must run as many."""

    offset: int
    samples: int
    weight: float


def passes(count: int, micro: int, rank: int = 0, world: int = 1) -> list[Pass]:
    """The passes of one rank over a step of `count` samples, at most `micro` at a time: a contiguous share of them, the
    shares differing by one sample at most. Every rank gets the same number of passes."""
    begin, end = (count * one // world for one in (rank, rank + 1))
    largest = -(-count // world)
    found = [Pass(start, min(micro, end - start), 1.0) for start in range(begin, end, micro)]
    idle = -(-largest // micro) - len(found)
    return found + [Pass(0, 1, 0.0)] * idle
