"""A ledger to write to, and the bytes of one that is large enough to be damaged in many places."""

import random
from contextlib import closing

import pytest
from histories import one_more, propose

from fitness.ledger import Ledger


@pytest.fixture
def path(tmp_path):
    return tmp_path / "ledger.db"


@pytest.fixture
def ledger(path):
    with closing(Ledger.create(path, {"seed": 7, "rungs": [1e6, 4e6]})) as created:
        yield created


@pytest.fixture(scope="session")
def large(tmp_path_factory):
    """The bytes of a ledger of some tens of pages, closed."""
    path = tmp_path_factory.mktemp("large") / "ledger.db"
    with closing(Ledger.create(path, {"seed": 7, "rungs": [1e6, 4e6]})) as ledger:
        ledger._connection.execute("PRAGMA synchronous=OFF")
        rng = random.Random(0)
        ledger.open_session({"pid": 1})
        for number in range(50):
            propose(ledger, text="y" * 300 if number % 20 else "z" * 9000)  # some do not fit on a page
            for _ in range(3):
                one_more(ledger, rng)
    return path.read_bytes()
