"""Reading documents: text, JSONL and parquet (plain, .gz or .zst), files, folders and globs, and the running Python.

A reader yields the text of one document after the other and never holds more than one file's line or row group. What is
not text is skipped and counted; a source that yields nothing is an error that says what was skipped and why.
"""

from __future__ import annotations

import ast
import glob
import gzip
import io
import json
import os
import stat
import sys
import sysconfig
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, cast

from search_spaces.errors import nearest
from trainer.errors import DataError
from trainer.recipe import Source

MAX_LINE = 16 * 2**20
"""Bytes of one JSONL record or one line of text; a longer one is skipped and counted."""

MAX_DOCUMENT = 8 * 2**20
"""Bytes of one plain-text document; a longer file continues as a further document."""

PASSAGE = 2_000
"""Characters after which a passage ends at the next blank line."""

FEW_FILES = 100
"""With `document: auto`, a source of fewer plain-text files than this is cut into passages: files would be too few to
hold some of them out."""

TEXT_FIELDS = ("text", "content")


class Stream(Protocol):
    """What the readers need of an open file, compressed or not."""

    def read(self, size: int = -1, /) -> bytes: ...
    def readline(self, size: int = -1, /) -> bytes: ...
    def peek(self, size: int = 0, /) -> bytes: ...
    def __enter__(self) -> Stream: ...
    def __exit__(self, *error: object) -> None: ...


@dataclass
class Skipped:
    """What a reader passed over, by reason, with the first example of each."""

    counts: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)

    def add(self, reason: str, example: str) -> None:
        """Count one thing passed over."""
        self.counts[reason] += 1
        self.examples.setdefault(reason, example)

    def __str__(self) -> str:
        return "; ".join(f"{n} {reason} (first: {self.examples[reason]})" for reason, n in self.counts.items())


Roots = Sequence[Path]
"""Folders from which relative paths are looked up, in this order."""


def fingerprint(source: Source, roots: Roots) -> list[Any]:
    """What a source's content depends on, without reading it: its settings, and name, size and time of each file."""
    settings = source.model_dump(exclude={"path"})
    files: list[Any] = []
    for path in _paths(source):
        if path.startswith("python:"):
            files.append([path, sys.version])
        else:
            for name in list_files(path, roots):
                info = os.stat(name)
                files.append([name, info.st_size, info.st_mtime_ns])
    return [settings, files]


def read_documents(source: Source, roots: Roots, skipped: Skipped) -> Iterator[str]:
    """The documents of one source, in the order of its files. Raises DataError for a path that leads nowhere."""
    listed = [(path, [] if path.startswith("python:") else list_files(path, roots, skipped)) for path in _paths(source)]
    mode = source.document
    if mode == "auto":
        plain = sum(_format(name) == "text" for _, files in listed for name in files)
        mode = "passage" if plain < FEW_FILES else "file"
    for path, files in listed:
        if path.startswith("python:"):
            yield from _python(path)
        for name in files:
            try:
                yield from _read_file(name, mode, skipped)
            except (OSError, EOFError, zlib.error) as error:
                skipped.add("unreadable file", f"{name}: {getattr(error, 'strerror', None) or error}")


def list_files(path: str, roots: Roots = (), skipped: Skipped | None = None) -> list[str]:
    """The regular files that a path means: the file, all files below a folder, or all that a glob matches; sorted.

    Raises DataError when there is no such thing.
    """
    if "://" in path or path.startswith("hf:"):
        raise DataError(f"data source '{path}': this version reads local paths, python:stdlib and python:docs")
    places = list(roots) or [Path()]
    for root in places:
        where = os.path.join(root, os.path.expanduser(path))
        if os.path.isdir(where):
            return _below(where, skipped)
        if os.path.exists(where):
            if not stat.S_ISREG(os.stat(where).st_mode):
                raise DataError(f"data source '{path}' is neither a file nor a folder")
            return [where]
        if glob.has_magic(path) and (found := _matching(path, root, skipped)):
            return found
    raise DataError(
        f"data source '{path}': no such file or folder{_advice(os.path.join(places[0], os.path.expanduser(path)))}"
    )


def _below(folder: str, skipped: Skipped | None) -> list[str]:
    def unreadable(error: OSError) -> None:
        if skipped is not None:
            skipped.add("unreadable folder", f"{error.filename}: {error.strerror}")

    found = [os.path.join(where, name) for where, _, names in os.walk(folder, onerror=unreadable) for name in names]
    return sorted(name for name in found if os.path.isfile(name) and not _hidden(name, folder))


def _matching(pattern: str, root: Path, skipped: Skipped | None) -> list[str]:
    """The files that a pattern matches, and those below the folders that it matches; `**` follows no links."""
    wanted = Path(pattern).expanduser()
    base = Path(wanted.anchor) if wanted.is_absolute() else root
    found: set[str] = set()
    for match in base.glob(str(wanted.relative_to(wanted.anchor))):
        hidden = any(part.startswith(".") and part not in wanted.parts for part in match.relative_to(base).parts)
        if not hidden:
            found.update(_below(str(match), skipped) if match.is_dir() else [str(match)] if match.is_file() else [])
    return sorted(found)


def _advice(where: str) -> str:
    if glob.has_magic(where):
        return " (the pattern matches nothing; ** crosses folders)"
    folder, name = os.path.split(where)
    if not os.path.isdir(folder or "."):
        return f"; the folder {folder} does not exist"
    close = nearest(name, os.listdir(folder or "."))
    return f"; did you mean '{os.path.join(folder, close)}'?" if close else f" in {folder or os.getcwd()}"


def _hidden(name: str, root: str) -> bool:
    return any(part.startswith(".") for part in Path(os.path.relpath(name, root)).parts)


def _paths(source: Source) -> list[str]:
    return [source.path] if isinstance(source.path, str) else list(source.path)


def _format(name: str) -> str:
    plain = name.removesuffix(".gz").removesuffix(".zst")
    if plain.endswith((".jsonl", ".ndjson", ".json")):
        return "jsonl"
    return "parquet" if plain.endswith(".parquet") else "text"


def _read_file(name: str, mode: str, skipped: Skipped) -> Iterator[str]:
    kind = _format(name)
    if kind == "parquet":
        yield from _read_parquet(name, skipped)
        return
    with _open(name) as stream:
        if kind == "jsonl":
            yield from _read_jsonl(name, stream, skipped)
        else:
            yield from _read_text(name, stream, mode, skipped)


def _open(name: str) -> Stream:
    """A stream with `peek`, decompressed."""
    if name.endswith(".gz"):
        return cast(Stream, gzip.open(name, "rb"))
    if name.endswith(".zst"):
        import pyarrow

        return cast(Stream, io.BufferedReader(pyarrow.input_stream(name, compression="zstd")))
    return cast(Stream, open(name, "rb"))


# --- plain text -------------------------------------------------------------------------------------------------------


def _read_text(name: str, stream: Stream, mode: str, skipped: Skipped) -> Iterator[str]:
    if b"\0" in stream.peek(8192)[:8192]:
        skipped.add("binary file", name)
        return
    if mode == "line":
        for _, line in _lines(name, stream, skipped):
            if (text := _decode(line, name, skipped)) is not None:
                yield text.rstrip("\r\n")
        return
    # Cut between lines where there are some, and never inside a character.
    while block := stream.read(MAX_DOCUMENT) + stream.readline(MAX_LINE):
        while (after := stream.peek(1)[:1]) and 0x80 <= after[0] < 0xC0:
            block += stream.read(1)
        text = _decode(block, name, skipped)
        if text is None:
            return
        yield from _passages(text) if mode == "passage" else [text]


def _decode(raw: bytes, name: str, skipped: Skipped) -> str | None:
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        skipped.add("text that is not UTF-8", f"{name}: byte 0x{raw[error.start]:02x} at offset {error.start}")
        return None


def _lines(name: str, stream: Stream, skipped: Skipped) -> Iterator[tuple[int, bytes]]:
    """Numbered lines of bounded length; the rest of a longer one is passed over."""
    number = 0
    while line := stream.readline(MAX_LINE):
        number += 1
        if len(line) == MAX_LINE and not line.endswith(b"\n"):
            skipped.add("line that is too long", f"{name}:{number}")
            while (more := stream.readline(MAX_LINE)) and not more.endswith(b"\n"):
                pass
            continue
        yield number, line


def _passages(text: str) -> Iterator[str]:
    """Cut a text at blank lines into passages of at least `PASSAGE` characters."""
    passage: list[str] = []
    size = 0
    for line in text.splitlines(keepends=True):
        if not line.strip() and size >= PASSAGE:
            yield "".join(passage)
            passage, size = [], 0
            continue
        passage.append(line)
        size += len(line)
    if any(line.strip() for line in passage):
        yield "".join(passage)


# --- records ----------------------------------------------------------------------------------------------------------


def _read_jsonl(name: str, stream: Stream, skipped: Skipped) -> Iterator[str]:
    for number, line in _lines(name, stream, skipped):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            skipped.add("record that is not JSON", f"{name}:{number}: {error}")
            continue
        text = _text_of(record)
        if text is None:
            skipped.add("record without text", f"{name}:{number}: needs `text`, `content`, or `prompt` and `response`")
        else:
            yield text


def _text_of(record: Any) -> str | None:
    if not isinstance(record, dict):
        return None
    for key in TEXT_FIELDS:
        if isinstance(record.get(key), str):
            return cast(str, record[key])
    if isinstance(record.get("prompt"), str) and isinstance(record.get("response"), str):
        return f"{record['prompt']}\n{record['response']}"
    return None


def _read_parquet(name: str, skipped: Skipped) -> Iterator[str]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.ParquetFile(
            name if name.endswith(".parquet") else pyarrow.BufferReader(_open(name).read())
        )
        column = next((key for key in TEXT_FIELDS if key in table.schema_arrow.names), None)
        if column is None:
            skipped.add("parquet file without text", f"{name}: columns {', '.join(table.schema_arrow.names)}")
            return
        for batch in table.iter_batches(batch_size=1024, columns=[column]):
            for text in batch.column(0).to_pylist():
                if isinstance(text, str):
                    yield text
                else:
                    skipped.add("record without text", f"{name}: {column} holds {type(text).__name__}")
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        skipped.add("unreadable file", f"{name}: {error}")


# --- the running Python -----------------------------------------------------------------------------------------------

_NOT_PROSE_OR_CODE = {
    "site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__", "pydoc_data", "encodings", "lib2to3",
}  # fmt: skip


def _python(path: str) -> Iterator[str]:
    readers = {"python:stdlib": _python_code, "python:docs": _python_docs}
    if path not in readers:
        close = nearest(path, readers)
        raise DataError(f"data source '{path}' is unknown; did you mean '{close or 'python:stdlib'}'?")
    return readers[path]()


def _python_files() -> Iterable[Path]:
    root = Path(sysconfig.get_path("stdlib"))
    files = [
        file for file in sorted(root.rglob("*.py")) if not _NOT_PROSE_OR_CODE & set(file.relative_to(root).parts[:-1])
    ]
    if not files:
        raise DataError(f"the running Python has no source files under {root}")
    return files


_DOCUMENTED = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def _parsed(file: Path) -> tuple[str, list[tuple[str, ast.AST, str]]]:
    """A module's source and its docstrings: (qualified name, string node, cleaned text)."""
    try:
        text = file.read_text(encoding="utf-8")
        tree = ast.parse(text)
    except (OSError, SyntaxError, ValueError):
        return "", []
    found: list[tuple[str, ast.AST, str]] = []

    def visit(node: ast.AST, name: str) -> None:
        docstring = ast.get_docstring(node) if isinstance(node, _DOCUMENTED) else None
        if docstring is not None:
            found.append((name, node.body[0], docstring))  # type: ignore[attr-defined]
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.stmt | ast.ExceptHandler | ast.match_case):
                part = getattr(child, "name", "") if isinstance(child, _DOCUMENTED) else ""
                visit(child, f"{name}.{part}" if part else name)

    visit(tree, file.stem)
    return text, found


def _python_code() -> Iterator[str]:
    """Each module's code without its docstrings: they are the other source, and no text may be in two domains."""
    for file in _python_files():
        text, docstrings = _parsed(file)
        lines = text.splitlines(keepends=True)
        for _, node, _ in docstrings:
            first, last = getattr(node, "lineno", 1), getattr(node, "end_lineno", 0)
            before = lines[first - 1][: getattr(node, "col_offset", 0)]
            lines[first - 1 : last] = [before + "...\n" if before.strip() else ""] + [""] * (last - first)
        yield "".join(lines)


def _python_docs() -> Iterator[str]:
    """Each module's docstrings, headed by the names that they describe, and the topics of the language reference."""
    for file in _python_files():
        _, docstrings = _parsed(file)
        yield "\n\n".join(f"{name}\n{text}" for name, _, text in docstrings)
    try:
        from pydoc_data.topics import topics
    except ImportError:  # some distributions leave it out
        return
    yield from (text for _, text in sorted(topics.items()))
