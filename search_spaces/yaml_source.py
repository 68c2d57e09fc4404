"""Bounded YAML with line and column: the only way in which evolm reads YAML.

YAML 1.2 scalars (`1e-4` is a number, `no` is a string) and the suffixes of `quantities`. What a stranger's file could
use to hurt or to mislead is refused by name: tags, merge keys, duplicate keys, expanding aliases, deep nesting, huge or
non-finite numbers, control and bidirectional characters. Nothing is ever constructed but dict, list, str, int, float,
bool and None.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path as FilePath
from typing import Any, NoReturn

import yaml

from search_spaces.errors import Path, Problem, SpaceError, UsageError, located, short
from search_spaces.quantities import parse_quantity

MAX_BYTES = 2**20
MAX_DEPTH = 64
MAX_NODES = 100_000
MAX_INTEGER = 2**63 - 1
MAX_PROBLEMS = 50

# Without libyaml the pure Python parser does the same, about ten times slower.
_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)

_INTEGER = re.compile(r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+")
_FLOAT = re.compile(r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?")
_NOT_FINITE = re.compile(r"[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)")
_WORDS: dict[str, Any] = {
    **dict.fromkeys(("", "~", "null", "Null", "NULL")),
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
}
# Controls but tab and line ends; line separators that only some programs take for line ends; and U+202A-202E,
# U+2066-2069, U+200E/F and U+061C, which reorder what a reader sees.
_BAD = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\u200e\u200f\u061c]")
_LINE_END = re.compile(r"\r\n|\r|\n")
_INVISIBLE = re.compile("[\u00ad\u200b-\u200d\u2060\ufeff]")  # two keys that look the same must be the same

Mark = tuple[int, int]


@dataclass(frozen=True)
class Document:
    """A YAML file that was read: the plain value and where each part of it stands."""

    file: str
    lines: list[str]
    value: Any
    value_marks: dict[Path, Mark] = field(repr=False)
    key_marks: dict[Path, Mark] = field(repr=False)

    def mark(self, path: Path, on_key: bool = False) -> Mark:
        """(line, column), from 1, of the value or key at `path`, or of its nearest ancestor that the file holds."""
        marks = self.key_marks if on_key else self.value_marks
        if path in marks:
            return marks[path]
        while path:
            if path in self.key_marks:
                return self.key_marks[path]
            if path in self.value_marks:
                return self.value_marks[path]
            path = path[:-1]
        return (1, 1)

    @property
    def text(self) -> str:
        """The file's text."""
        return "\n".join(self.lines)

    @property
    def folders(self) -> list[FilePath]:
        """Where the file lies: paths in it may be relative to here."""
        return [FilePath(self.file).resolve().parent]

    def locate(self, problems: Iterable[Problem]) -> list[Problem]:
        """The problems with this file's name, lines and columns, in file order."""
        return located(problems, file=self.file, lines=self.lines, mark=self.mark)


def read_yaml(path: FilePath) -> Document:
    """Read one YAML file whose root is a mapping.

    Raises UsageError when there is no such readable file and SpaceError, with line and column, when its content is
    not acceptable.
    """
    try:
        if not path.is_file():
            raise UsageError(f"{path}: {'is no file' if path.exists() else 'no such file'}")
        with path.open("rb") as stream:
            raw = stream.read(MAX_BYTES + 1)
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror}") from None
    return parse_yaml(raw, file=str(path))


def parse_yaml(raw: bytes | str, *, file: str) -> Document:
    """Like `read_yaml`, for text in hand; `file` is the name used in messages."""
    text = raw if isinstance(raw, str) else _decode(raw, file)
    lines = _LINE_END.split(text)
    _refuse_bad_characters(text, lines, file)
    composer = _Composer(file, lines)
    try:
        value = composer.compose(yaml.parse(text, Loader=_LOADER))
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        rule = f"not valid YAML: {error.problem or error.context}"
        _refuse(file, lines, (mark.line + 1, mark.column + 1) if mark else (1, 1), rule)
    except yaml.YAMLError as error:
        _refuse(file, lines, (1, 1), f"not valid YAML: {str(error).splitlines()[0]}")
    if composer.problems:
        raise SpaceError(composer.problems)
    if not isinstance(value, dict):
        _refuse(file, lines, (1, 1), "the file must hold a mapping of keys to values", value=value)
    return Document(file, lines, value, composer.value_marks, composer.key_marks)


def _refuse(file: str, lines: list[str], mark: Mark, rule: str, value: Any = None) -> NoReturn:
    line, column = mark
    source = lines[line - 1] if 0 < line <= len(lines) else None
    raise SpaceError(Problem(path=(), rule=rule, value=value, file=file, line=line, column=column, source=source))


def _decode(raw: bytes, file: str) -> str:
    if len(raw) > MAX_BYTES:
        raise SpaceError(Problem(path=(), rule=f"larger than {MAX_BYTES // 2**20} MiB", file=file))
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        rule = f"not UTF-8: byte 0x{raw[error.start]:02x} at offset {error.start}"
        raise SpaceError(
            Problem(path=(), rule=rule, file=file, line=line, column=1, help="save the file as UTF-8")
        ) from None


def _refuse_bad_characters(text: str, lines: list[str], file: str) -> None:
    bad = _BAD.search(text)
    if bad is None:
        return
    before = _LINE_END.split(text[: bad.start()])
    line, column = len(before), len(before[-1]) + 1
    rule = f"character U+{ord(bad.group()):04X} is not allowed: it is a control, or changes what a reader sees"
    raise SpaceError(
        Problem(path=(), rule=rule, file=file, line=line, column=column, source=_BAD.sub("?", lines[line - 1]))
    )


class _Unreadable(ValueError):
    """A plain scalar that looks like a number and cannot be one."""

    def __init__(self, rule: str, help: str | None = None) -> None:
        self.rule, self.help = rule, help
        super().__init__(rule)


def plain_scalar(text: str) -> Any:
    """What a scalar without quotes means: null, a truth value, a number, a quantity, or the text itself.

    Raises ValueError for numbers that are too large or not finite.
    """
    if text in _WORDS:
        return _WORDS[text]
    if _INTEGER.fullmatch(text):
        if len(text) > 32 or abs(number := int(text, 0) if text[:2] in ("0o", "0x") else int(text)) > MAX_INTEGER:
            raise _Unreadable("number is too large", "whole numbers end at 2^63 - 1")
        return number
    if _FLOAT.fullmatch(text):
        if len(text) > 64:
            raise _Unreadable("number has too many digits", "floats have about 16")
        if not math.isfinite(real := float(text)):
            raise _Unreadable("number is too large", "numbers end at about 1.8e308")
        return real
    if _NOT_FINITE.fullmatch(text):
        raise _Unreadable("number must be finite")
    if len(text) <= 32 and (quantity := parse_quantity(text)) is not None:
        if abs(quantity) > MAX_INTEGER:
            raise _Unreadable("number is too large", "whole numbers end at 2^63 - 1")
        return quantity
    return text


class _Composer:
    """Turns parser events into plain values and remembers where each stood."""

    def __init__(self, file: str, lines: list[str]) -> None:
        self.file, self.lines = file, lines
        self.problems: list[Problem] = []
        self.value_marks: dict[Path, Mark] = {}
        self.key_marks: dict[Path, Mark] = {}
        self._anchors: dict[str, tuple[Any, int]] = {}  # the value, and how deep it is
        self._nodes = 0

    def compose(self, events: Iterator[Any]) -> Any:
        value: Any = None
        documents = 0
        for event in events:
            if isinstance(event, yaml.DocumentStartEvent):
                documents += 1
                if documents > 1:
                    _refuse(self.file, self.lines, _start(event), "a second document; one file holds one")
            elif isinstance(event, (yaml.ScalarEvent, yaml.CollectionStartEvent, yaml.AliasEvent)):
                value = self._node(event, events, ())
        return value

    def _node(self, event: Any, events: Iterator[Any], path: Path) -> Any:
        self.value_marks.setdefault(path, _start(event))
        self._count(1, event)
        if len(path) > MAX_DEPTH:
            _refuse(self.file, self.lines, _start(event), f"nested deeper than {MAX_DEPTH} levels")
        if isinstance(event, yaml.AliasEvent):
            return self._alias(event, len(path))
        self._refuse_tag(path, event)
        value: Any
        if isinstance(event, yaml.ScalarEvent):
            value = event.value if event.style else self._scalar(event, path)
            self._refuse_escaped(path, event)
        elif isinstance(event, yaml.SequenceStartEvent):
            value = []
            while not isinstance(item := next(events), yaml.SequenceEndEvent):
                value.append(self._node(item, events, (*path, len(value))))
        else:
            value = self._mapping(events, path)
        if event.anchor is not None:
            # Registered when complete: an alias inside its own anchor, an endless structure, is therefore undefined.
            self._anchors[event.anchor] = (value, _depth(value))
        return value

    def _mapping(self, events: Iterator[Any], path: Path) -> dict[str, Any]:
        value: dict[str, Any] = {}
        normal: dict[str, str] = {}
        while not isinstance(event := next(events), yaml.MappingEndEvent):
            if not isinstance(event, yaml.ScalarEvent):
                _refuse(self.file, self.lines, _start(event), "a key must be plain text")
            key = event.value
            here = (*path, key)
            self._refuse_tag(here, event)
            self._refuse_escaped(here, event)
            if _INVISIBLE.search(key):
                self._problem(here, event, f"key {short(key)} holds a character that cannot be seen")
            if key == "<<" and not event.style:
                self._problem(here, event, "merge keys are not allowed", "use `extends` or write the keys out")
            folded = unicodedata.normalize("NFKC", key)
            if folded in normal:
                twin = normal[folded]
                line = self.key_marks.get((*path, twin), (0, 0))[0]
                same = "" if twin == key else f" (it reads the same as {short(twin)})"
                self._problem(here, event, f"key {short(key)} is given twice{same}; the first is on line {line}")
            normal[folded] = key
            self.key_marks.setdefault(here, _start(event))
            value[key] = self._node(next(events), events, here)
        return value

    def _refuse_tag(self, path: Path, event: Any) -> None:
        if event.tag is not None:
            self._problem(path, event, f"tag {short(event.tag)} is not allowed", "plain values need no tag")

    def _refuse_escaped(self, path: Path, event: Any) -> None:
        """What `_refuse_bad_characters` refuses may also be written as an escape in a quoted scalar."""
        bad = _BAD.search(event.value) if event.style else None
        if bad is not None:
            self._problem(path, event, f"escape for character U+{ord(bad.group()):04X} is not allowed")

    def _alias(self, event: Any, depth: int) -> Any:
        if event.anchor not in self._anchors:
            name = short(f"*{event.anchor}")
            _refuse(self.file, self.lines, _start(event), f"alias {name} has no complete anchor before it")
        value, height = self._anchors[event.anchor]
        if depth + height > MAX_DEPTH:
            _refuse(self.file, self.lines, _start(event), f"nested deeper than {MAX_DEPTH} levels")
        return self._copy(value, event)

    def _copy(self, value: Any, event: Any) -> Any:
        """A copy of an anchored value; every node of it counts, so that aliases of aliases cannot explode."""
        self._count(1, event)
        if isinstance(value, dict):
            return {key: self._copy(item, event) for key, item in value.items()}
        if isinstance(value, list):
            return [self._copy(item, event) for item in value]
        return value

    def _count(self, nodes: int, event: Any) -> None:
        self._nodes += nodes
        if self._nodes > MAX_NODES:
            _refuse(self.file, self.lines, _start(event), f"more than {MAX_NODES} values, aliases expanded")

    def _scalar(self, event: Any, path: Path) -> Any:
        try:
            return plain_scalar(event.value)
        except _Unreadable as error:
            return self._problem(path, event, error.rule, error.help)

    def _problem(self, path: Path, event: Any, rule: str, help: str | None = None) -> None:
        line, column = _start(event)
        source = self.lines[line - 1] if line <= len(self.lines) else None
        self.problems.append(
            Problem(path=path, rule=rule, help=help, file=self.file, line=line, column=column, source=source)
        )
        if len(self.problems) >= MAX_PROBLEMS:
            raise SpaceError(self.problems)


def _depth(value: Any) -> int:
    """How many levels of lists and mappings a value has."""
    if isinstance(value, dict):
        return 1 + max((_depth(item) for item in value.values()), default=0)
    if isinstance(value, list):
        return 1 + max((_depth(item) for item in value), default=0)
    return 0


def _start(event: Any) -> Mark:
    return (event.start_mark.line + 1, event.start_mark.column + 1)
