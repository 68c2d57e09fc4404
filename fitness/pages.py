"""Reads rows straight from the pages of a SQLite file and of its write-ahead log, whatever SQLite thinks of them.

A page that is gone takes no other with it.
Only what a ledger needs of the format (https://sqlite.org/fileformat2.html, sections 1.5, 1.6, 2.1 and 4): the cells of
every page that says it is a leaf, or an inner page of an index; no blobs. No number in there is trusted.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PAGE = 4096
"""Bytes of a page where the file does not say."""

Row = tuple[Any, ...]


def read_rows(path: Path) -> Iterator[Row]:
    """Every row and every entry of an index that can be read, later versions after earlier ones; rows that were taken
    back may be among them. The key of a table's row stands in its first column."""
    pages, stale, current = _read(path)
    latest = {**pages, **dict(current)}
    for number, page in (*stale, *pages.items(), *current):
        yield from _cells(page, 100 if number == 1 else 0, latest)


def read_log(path: Path) -> Iterator[Row]:
    """The same of what lies in the write-ahead log alone."""
    pages, stale, current = _read(path)
    latest = {**pages, **dict(stale), **dict(current)}
    for number, page in (*stale, *current):
        yield from _cells(page, 100 if number == 1 else 0, latest)


def _read(path: Path) -> tuple[dict[int, bytes], list[tuple[int, bytes]], list[tuple[int, bytes]]]:
    """The pages of the file, and those of its log as `_frames` gives them."""
    log = path.with_name(f"{path.name}-wal")
    file, frames = path.read_bytes(), log.read_bytes() if log.is_file() else b""
    size = _page_size(file[16:18]) or _page_size(frames[10:12]) or PAGE
    return dict(enumerate(_pieces(file, size), 1)), *_frames(frames, size)


def _page_size(told: bytes) -> int | None:
    """A size as a header tells it, when it is one (1 stands for 65,536)."""
    size = int.from_bytes(told, "big")
    size = 65536 if size == 1 else size
    return size if size >= 512 and size & (size - 1) == 0 else None


def _pieces(data: bytes, size: int) -> Iterator[bytes]:
    for start in range(0, len(data), size):
        yield data[start : start + size].ljust(size, b"\0")


def _frames(log: bytes, size: int) -> tuple[list[tuple[int, bytes]], list[tuple[int, bytes]]]:
    """The pages of a write-ahead log, with their numbers: those that an earlier round left there, and those since."""
    stale: list[tuple[int, bytes]] = []
    current: list[tuple[int, bytes]] = []
    for frame in _pieces(log[32:], 24 + size):
        (number,) = struct.unpack(">I", frame[:4])
        (current if frame[8:16] == log[16:24] else stale).append((number, frame[24:]))
    return stale, current


def _cells(page: bytes, header: int, pages: dict[int, bytes]) -> Iterator[Row]:
    """The rows of a page that holds some, as far as they can be read. `header` is where its own header begins."""
    kind = page[header]
    if kind not in (0x0D, 0x0A, 0x02):  # a leaf of a table, a leaf and an inner page of an index
        return
    table, inner = kind == 0x0D, kind == 0x02
    (count,) = struct.unpack_from(">H", page, header + 3)
    for cell in range(count):
        try:
            (at,) = struct.unpack_from(">H", page, header + (12 if inner else 8) + 2 * cell)
            at += 4 if inner else 0
            size, at = _varint(page, at)
            number, at = _varint(page, at) if table else (None, at)
            row = _record(_payload(page, at, size, table, pages))
            yield row if number is None else (number, *row[1:])
        except (ValueError, IndexError, KeyError, struct.error):
            continue


def _payload(page: bytes, at: int, size: int, table: bool, pages: dict[int, bytes]) -> bytes:
    """The bytes of a row, with those that did not fit and lie on a chain of other pages."""
    usable = len(page)
    longest = usable - 35 if table else (usable - 12) * 64 // 255 - 23
    shortest = (usable - 12) * 32 // 255 - 23
    here = size
    if size > longest:
        here = shortest + (size - shortest) % (usable - 4)
        here = here if here <= longest else shortest
    if size > usable * (len(pages) + 1):
        raise ValueError("longer than the file")
    parts = [page[at : at + here]]
    left, link = size - here, page[at + here : at + here + 4]
    while left > 0:
        more = pages[int.from_bytes(link, "big")]
        parts.append(more[4 : 4 + left])
        left, link = left - (usable - 4), more[:4]
    return b"".join(parts)


def _record(payload: bytes) -> Row:
    """The values of a row. Raises ValueError or IndexError where they cannot be read."""
    end, at = _varint(payload, 0)
    values: list[Any] = []
    place = end
    while at < end:
        kind, at = _varint(payload, at)
        length = _LENGTHS[kind] if kind < 12 else (kind - 12) // 2
        data = payload[place : place + length]
        if len(data) < length:
            raise ValueError("cut off")
        values.append(_value(kind, data))
        place += length
    return tuple(values)


_LENGTHS = (0, 1, 2, 3, 4, 6, 8, 8, 0, 0)


def _value(kind: int, data: bytes) -> Any:
    if kind == 0:
        return None
    if kind == 7:
        return struct.unpack(">d", data)[0]
    if kind < 7:
        return int.from_bytes(data, "big", signed=True)
    if kind < 10:
        return kind - 8
    if kind % 2 == 0:
        raise ValueError("a ledger has no blobs")
    return data.decode()


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """A number of 1 to 9 bytes, and where it ends."""
    value = 0
    for place in range(8):
        byte = data[at + place]
        value = value << 7 | byte & 0x7F
        if byte < 0x80:
            return value, at + place + 1
    return value << 8 | data[at + 8], at + 9
