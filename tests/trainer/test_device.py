"""Guards where tensors live: devices that are not there, and memory that is used again."""

import resource
import sys

import pytest
import torch

from search_spaces.errors import UsageError
from trainer.device import reused_memory, usable_device


def test_a_device_that_is_not_there_is_refused():
    assert usable_device("cpu") == torch.device("cpu")
    with pytest.raises(UsageError, match="device 'nonsense' cannot be used here"):
        usable_device("nonsense")


def faults(times):
    """Pages that the system had to give while a tensor of 8 MiB was made so many times."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(times):
        torch.ones(2**21)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="how memory is given back is the system's own matter")
def test_pages_are_used_again():
    with reused_memory():
        faults(1)
        assert faults(20) < 20 * 2048 / 2  # a tensor has 2,048 pages, and without it each of them is asked for
