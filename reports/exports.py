"""Trials for other programs."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

from reports.frame import RunData, trial_rows, trials_frame

_FORMULA = ("=", "+", "-", "@", "\t", "\r")


def _cell(value: Any) -> Any:
    """Spreadsheets run text that begins like a formula; a quote in front makes it text (CWE-1236)."""
    return f"'{value}" if isinstance(value, str) and value.startswith(_FORMULA) else value


def write_csv(data: RunData) -> str:
    """All trials as CSV, one row each, with the columns of any trial."""
    rows = trial_rows(data)
    columns = list(dict.fromkeys(column for row in rows for column in row))
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow([_cell(column) for column in columns])
    for row in rows:
        writer.writerow([_cell(row.get(column, "")) for column in columns])
    return out.getvalue()


def write_parquet(data: RunData, path: Path) -> None:
    """All trials as a parquet file."""
    trials_frame(data).to_parquet(path)
