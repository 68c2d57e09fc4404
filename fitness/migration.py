"""Brings a ledger of an older schema up to date, in one transaction: it is the old one or the new one, never between.

Version 1 had neither leases nor a clock of its own. A lease is the number of the event that started a launch, so the
old events tell it; the seconds since a session began are those of the wall clock, as far as it went forward.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from fitness.database import (
    EVENTS,
    SCHEMA_VERSION,
    SPARES,
    Damaged,
    check_pages,
    checksum,
    fetch,
    meta_rows,
    put,
    run,
    transaction,
    verified,
)
from fitness.events import ENDS


def version_of(connection: sqlite3.Connection) -> int:
    """The schema version of a ledger. Raises Damaged when it does not say."""
    columns = [column for column, *_ in connection.execute("SELECT * FROM meta LIMIT 0").description]
    if columns == ["key", "value", "sum"]:
        version = meta_rows(connection).get("schema_version")
    else:  # what a later schema sums up is not known; none that is known has other columns
        told = connection.execute("SELECT value FROM meta WHERE key = 'schema_version'").fetchone()
        version = json.loads(told[0]) if told else None
    if not isinstance(version, int) or (version <= SCHEMA_VERSION and len(columns) != 3):
        raise Damaged(f"schema_version is {version}")
    return version


def migrate(connection: sqlite3.Connection) -> None:
    """Take a ledger of version 1 to the present one. Raises Damaged, and changes nothing, when a row of it is not what
    was written."""
    with transaction(connection):
        check_pages(connection)
        meta_rows(connection)
        for _ in verified("trials", fetch(connection, "trials")):
            pass
        events = list(upgraded(verified("events", fetch(connection, "events"))))
        connection.execute("DROP TABLE events")
        run(connection, EVENTS + SPARES)
        for row in events:
            put(connection, "events", row)
        version = ("schema_version", str(SCHEMA_VERSION))
        connection.execute(
            "UPDATE meta SET value = ?, sum = ? WHERE key = ?", (version[1], checksum(version), version[0])
        )
        connection.execute("INSERT INTO spare_meta SELECT * FROM meta")
        connection.execute("INSERT INTO spare_trials SELECT * FROM trials")


def upgraded(events: Iterable[Sequence[Any]]) -> Iterator[tuple[Any, ...]]:
    """Events of version 1 as version 2 would have written them."""
    leases: dict[int, int] = {}
    began: float | None = None
    elapsed = 0.0
    for seq, trial, kind, rung, body, time in events:
        if kind == "start":
            leases[trial] = seq
        if kind == "open":
            began, elapsed = time, 0.0
        elif began is not None:
            elapsed = max(elapsed, time - began)
        lease = leases.pop(trial, None) if kind in ENDS else None
        yield seq, trial, kind, rung, body, time, elapsed, lease
