"""Guards the reading of YAML: the scalars of YAML 1.2, the place of every key and value, and that a stranger's file is
refused in words, soon, in little memory, and without anything in it being run.
"""

import json
import subprocess
import sys
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from search_spaces.errors import Problem, SpaceError, UsageError
from search_spaces.yaml_source import MAX_BYTES, MAX_DEPTH, MAX_NODES, parse_yaml, read_yaml

properties = settings(deadline=None, derandomize=True, max_examples=100)


def read(text):
    return parse_yaml(text, file="space.yaml").value


def refusals(text):
    """Every problem of a file as `line:column path: rule`."""
    with pytest.raises(SpaceError) as caught:
        read(text)
    return [str(problem).splitlines()[0].removeprefix("space.yaml:") for problem in caught.value.problems]


# --- scalars ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("12", 12),
        ("-12", -12),
        ("+12", 12),
        ("017", 17),
        ("0o17", 15),
        ("0x1F", 31),
        ("9223372036854775807", 2**63 - 1),
        ("1.5", 1.5),
        ("1.", 1.0),
        (".5", 0.5),
        ("-.5", -0.5),
        ("1e-4", 1e-4),
        ("1E5", 1e5),
        ("1e+5", 1e5),
        ("1.7e308", 1.7e308),
        ("30M", 30_000_000),
        ("1.5B", 1_500_000_000),
        ("16GiB", 16 * 2**30),
        ("-5K", -5_000),
        ("true", True),
        ("True", True),
        ("FALSE", False),
        ("null", None),
        ("~", None),
        ("", None),
    ],
)
def test_a_scalar_of_yaml_1_2_or_with_a_suffix(text, value):
    read_value = read(f"key: {text}")["key"]
    assert read_value == value
    assert type(read_value) is type(value)


@pytest.mark.parametrize(
    "text",
    [
        *("no", "No", "yes", "on", "off", "y", "n", "tRUE", "nan", "inf", ".", "..", "=", "<<"),
        *("1_000", "0b11", "0O17", "0x", "1e", "1e3K", "30 M", "30m", "30MB", "--1", "1.2.3", "１２"),
        *("12:30:45", "1:30", "2024-01-01", "10.0.0.1"),
    ],
)
def test_everything_else_is_a_string(text):
    assert read(f"key: {text}") == {"key": text}


@pytest.mark.parametrize("text", ["'12'", '"12"', "|-\n  12", ">-\n  12"])
def test_what_is_quoted_is_a_string(text):
    assert read(f"key: {text}") == {"key": "12"}


def test_keys_are_always_strings():
    assert read("1: a\ntrue: b\nno: c\n1e3: d") == {"1": "a", "true": "b", "no": "c", "1e3": "d"}


def test_a_quoted_merge_key_is_a_key():
    assert read('"<<": 1') == {"<<": 1}


def test_a_mark_of_byte_order_at_the_start_is_no_content():
    assert read(b"\xef\xbb\xbfkey: 1") == {"key": 1}


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_lines_may_end_as_on_any_system(end):
    document = parse_yaml(f"a:{end}  b: 1{end}  c: 2{end}".encode(), file="space.yaml")
    assert document.value == {"a": {"b": 1, "c": 2}}
    assert document.mark(("a", "c")) == (3, 6)


def test_an_alias_repeats_what_was_anchored():
    assert read("a: &x {b: [1]}\nc: *x\nd: [*x]") == {"a": {"b": [1]}, "c": {"b": [1]}, "d": [{"b": [1]}]}


def test_what_an_alias_repeats_is_a_copy():
    value = read("a: &x [1]\nb: *x")
    value["a"].append(2)
    assert value["b"] == [1]


json_values = st.recursive(
    st.integers(-(2**63) + 1, 2**63 - 1) | st.booleans() | st.none() | st.text("abc <*&!%@#:-?{}[]'\"\\", max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("abcdef", max_size=3), inner, max_size=3),
    max_leaves=10,
)


@properties
@given(st.dictionaries(st.text("abc", min_size=1), json_values, max_size=4))
def test_json_is_yaml(mapping):
    assert read(json.dumps(mapping)) == mapping


# --- places -----------------------------------------------------------------------------------------------------------

BLOCK = """\
model:
  d_model: 256
  n_heads:
    - 2
    - {low: 4}
# a comment
train: {lr: 1e-3, sizes: [8, 16]}
copy: &anchor
  inner: 1
again: *anchor
"""


@pytest.mark.parametrize(
    ("path", "value", "key"),
    [
        (("model",), (2, 3), (1, 1)),
        (("model", "d_model"), (2, 12), (2, 3)),
        (("model", "n_heads"), (4, 5), (3, 3)),
        (("model", "n_heads", 0), (4, 7), (4, 7)),
        (("model", "n_heads", 1, "low"), (5, 13), (5, 8)),
        (("train", "lr"), (7, 13), (7, 9)),
        (("train", "sizes"), (7, 26), (7, 19)),
        (("train", "sizes", 1), (7, 30), (7, 30)),
        (("again",), (10, 8), (10, 1)),
    ],
)
def test_every_value_and_key_has_its_place(path, value, key):
    document = parse_yaml(BLOCK, file="space.yaml")
    assert document.mark(path) == value
    assert document.mark(path, on_key=True) == key


@pytest.mark.parametrize(
    ("path", "mark"),
    [
        (("model", "width"), (1, 1)),
        (("model", "d_model", "x", 3), (2, 3)),
        (("again", "inner"), (10, 1)),
        (("missing",), (1, 1)),
        ((), (1, 1)),
    ],
)
def test_what_the_file_does_not_hold_has_the_place_of_its_nearest_ancestor(path, mark):
    assert parse_yaml(BLOCK, file="space.yaml").mark(path) == mark


def test_problems_get_their_place_and_come_in_the_order_of_the_file():
    document = parse_yaml(BLOCK, file="space.yaml")
    train, model = Problem(path=("train", "lr"), rule="too large"), Problem(path=("model",), rule="odd", on_key=True)
    first, second = document.locate([train, model])
    assert str(first) == "space.yaml:1:1: model: odd\n    1 | model:\n      | ^"
    assert str(second).startswith("space.yaml:7:13: train.lr: too large\n    7 | train: {lr: 1e-3, sizes")


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: !!int 5", "1:4: a: tag 'tag:yaml.org,2002:int' is not allowed"),
        ("a: !mine {b: 1}", "1:4: a: tag '!mine' is not allowed"),
        ("!!str a: 1", "1:1: a: tag 'tag:yaml.org,2002:str' is not allowed"),
        (
            "a: !!python/object/apply:os.system [ls]",
            "1:4: a: tag 'tag:yaml.org,2002:python/object/apply:os.system' is not allowed",
        ),
        ("a: 1\na: 2", "2:1: a: key 'a' is given twice; the first is on line 1"),
        ('m: {a: 1, "a": 2}', "1:11: m.a: key 'a' is given twice; the first is on line 1"),
        ("ﬁ: 1\nfi: 2", "2:1: fi: key 'fi' is given twice (it reads the same as 'ﬁ'); the first is on line 1"),
        ("ｌr: 1\nlr: 2", "2:1: lr: key 'lr' is given twice (it reads the same as 'ｌr'); the first is on line 1"),
        ("a: &x {b: 1}\nc:\n  <<: *x", "3:3: c.<<: merge keys are not allowed"),
        ("a: 1\n---\nb: 2", "2:1: a second document; one file holds one"),
        ("a: *x", "1:4: alias '*x' has no complete anchor before it"),
        ("a: &x [*x]", "1:8: alias '*x' has no complete anchor before it"),
        ("a: &x {b: {c: *x}}", "1:15: alias '*x' has no complete anchor before it"),
        ("? [1]\n: 2", "1:3: a key must be plain text"),
        ("{a: 1}: 2", "1:1: a key must be plain text"),
        ("a: &k k\n*k : 1", "2:1: a key must be plain text"),
        ("a: .inf", "1:4: a: number must be finite"),
        ("a: [1, -.INF]", "1:8: a[1]: number must be finite"),
        ("a: .NaN", "1:4: a: number must be finite"),
        ("a: 1e309", "1:4: a: number is too large"),
        ("a: 9223372036854775808", "1:4: a: number is too large"),
        ("a: -9223372036854775808", "1:4: a: number is too large"),
        ("a: 9999999T", "1:4: a: number is too large"),
        ("a: " + "9" * 5000, "1:4: a: number is too large"),
        ("a: \x00", "1:4: character U+0000 is not allowed: it is a control, or changes what a reader sees"),
        ("a: \x1b[31m", "1:4: character U+001B is not allowed: it is a control, or changes what a reader sees"),
        ("a: 1\nb: \x85", "2:4: character U+0085 is not allowed: it is a control, or changes what a reader sees"),
        ("a: \u202etxt", "1:4: character U+202E is not allowed: it is a control, or changes what a reader sees"),
        ("a: x # \u2066", "1:8: character U+2066 is not allowed: it is a control, or changes what a reader sees"),
        ("a: \u2028", "1:4: character U+2028 is not allowed: it is a control, or changes what a reader sees"),
        (b"a: caf\xe9", "1:1: not UTF-8: byte 0xe9 at offset 6"),
        (b"a: 1\nb: \xff", "2:1: not UTF-8: byte 0xff at offset 8"),
        ("a: 1".encode("utf-16"), "1:1: not UTF-8: byte 0xff at offset 0"),
        (b"#" * (MAX_BYTES + 1), " larger than 1 MiB"),
        ("- 1", "1:1: the file must hold a mapping of keys to values"),
        ("just text", "1:1: the file must hold a mapping of keys to values"),
        ("", "1:1: the file must hold a mapping of keys to values"),
        ("# only a comment", "1:1: the file must hold a mapping of keys to values"),
        ("a: b: c", "1:5: not valid YAML: mapping values are not allowed in this context"),
        ("a:\n\t- 1", "2:1: not valid YAML: found character that cannot start any token"),
        ("%YAML 9.9\n---\na: 1", "1:1: not valid YAML: found incompatible YAML document"),
    ],
)
def test_a_refusal_has_these_words_and_this_place(text, words):
    assert refusals(text) == [words]


@pytest.mark.parametrize(
    ("text", "help"),
    [
        ("a: !x 1", "plain values need no tag"),
        ("<<: {}", "use `extends` or write the keys out"),
        ("a: 1e999", "numbers end at about 1.8e308"),
        ("a: 0xffffffffffffffff", "whole numbers end at 2^63 - 1"),
        (b"\xff", "save the file as UTF-8"),
    ],
)
def test_a_refusal_says_the_way_out(text, help):
    with pytest.raises(SpaceError) as caught:
        read(text)
    assert caught.value.problems[0].help == help


def test_all_problems_are_told_at_once():
    assert len(refusals("a: .nan\nb: !x 1\na: 2\n<<: {c: 1e999}")) == 5


def test_a_forbidden_character_is_not_shown():
    with pytest.raises(SpaceError) as caught:
        read("key: a\u202eb")
    assert "    1 | key: a?b\n      |       ^" in str(caught.value)


def test_nesting_ends_at_a_limit():
    assert read("a: " + "[" * (MAX_DEPTH - 1) + "]" * (MAX_DEPTH - 1))
    (words,) = refusals("a: " + "[" * (MAX_DEPTH + 1) + "]" * (MAX_DEPTH + 1))
    assert words.endswith(f"nested deeper than {MAX_DEPTH} levels")


def test_aliases_cannot_multiply_without_end():
    rows = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    rows += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 30)]
    (words,) = refusals("\n".join(rows))
    assert words.endswith(f"more than {MAX_NODES} values, aliases expanded")


# --- files ------------------------------------------------------------------------------------------------------------


def test_a_file_is_read(tmp_path):
    file = tmp_path / "space.yaml"
    file.write_text("a: 1\nb: [2]\n")
    document = read_yaml(file)
    assert (document.value, document.file, document.lines) == ({"a": 1, "b": [2]}, str(file), ["a: 1", "b: [2]", ""])


@pytest.mark.parametrize("name", ["missing.yaml", ".", "a\x00b", "x" * 300])
def test_what_is_no_file_is_bad_usage(tmp_path, name):
    with pytest.raises(UsageError, match=r"no such file|is no file|cannot be read"):
        read_yaml(tmp_path / name)


def test_a_file_of_one_mebibyte_is_read_and_not_a_byte_more(tmp_path):
    file = tmp_path / "space.yaml"
    file.write_bytes(b"a: 1".ljust(MAX_BYTES))
    assert read_yaml(file).value == {"a": 1}
    file.write_bytes(b"a: 1".ljust(MAX_BYTES + 1))
    with pytest.raises(SpaceError, match="larger than 1 MiB"):
        read_yaml(file)


# --- hostile files ----------------------------------------------------------------------------------------------------


def _bomb(item, width, levels):
    """Anchors that each hold the one before many times."""
    rows = [f"a0: &a0 {item}"]
    rows += [f"a{i}: &a{i} [{','.join([f'*a{i - 1}'] * width)}]" for i in range(1, levels)]
    return "\n".join(rows).encode()


HOSTILE = {
    "os.system": b"a: !!python/object/apply:os.system ['touch executed']",
    "subprocess": b"!!python/object/apply:subprocess.Popen [[touch, executed]]",
    "touch": b"a: !!python/object/apply:pathlib.Path.touch [!!python/object/apply:pathlib.Path [executed]]",
    "eval": b"a: !!python/object/apply:eval [\"open('executed', 'w')\"]",
    "module": b"a: !!python/module:antigravity",
    "name": b"a: !<tag:yaml.org,2002:python/name:os.system> x",
    "object new": b"a: !!python/object/new:type {args: [x, [], {extend: !!python/name:exec}]}",
    "tag directive": b"%TAG ! tag:yaml.org,2002:python/\n---\na: !name:os.system x",
    "tag on a key": b"!!python/name:os.system a: 1",
    "binary": b"a: !!binary aGVsbG8=",
    "set": b"a: !!set {x, y}",
    "timestamp": b"a: !!timestamp 2024-01-01",
    "merge": b"a: &x {b: 1}\nc: {<<: *x}",
    "merge list": b"a: &x {b: 1}\nc: {<<: [*x, *x]}",
    "laughs": _bomb("[x,x,x,x,x,x,x,x,x,x]", 10, 10),
    "laughing maps": _bomb("{a: 1, b: 2, c: 3}", 50, 50),
    "laughing text": _bomb(f"[{'x' * 50_000}]", 100, 4),
    "aliases": b"a: &a 1\nb: [" + b"*a," * 150_000 + b"]",
    "endless list": b"a: &a [*a]",
    "endless mapping": b"a: &a {b: {c: *a}}",
    "alias from nowhere": b"a: *b",
    "alias as key": b"a: &a x\n*a : 1",
    "open brackets": b"[" * 500_000,
    "open braces": b"{" * 500_000,
    "deep mappings": b"{a: " * 100_000,
    "deep blocks": b"a:\n" + b"".join(b" " * i + b"a:\n" for i in range(1, 1000)),
    "deep dashes": b"- " * 100_000,
    "deep questions": b"? " * 100_000,
    "many values": b"a: [" + b"1," * 300_000 + b"]",
    "many keys": b"".join(b"%x:\n" % i for i in range(110_000)),
    "many twins": b"a: 1\n" * 3_000,
    "many infinities": b"a: [" + b".inf," * 3_000 + b"]",
    "long number": b"a: " + b"9" * 900_000,
    "long fraction": b"a: ." + b"9" * 900_000,
    "long exponent": b"a: 1e" + b"9" * 900_000,
    "long hexadecimal": b"a: 0x" + b"f" * 900_000,
    "long tag": b"a: !" + b"x" * 900_000 + b" 1",
    "long key": b"a" * 900_000 + b": 1",
    "huge quantity": b"a: 99999999999999999999999T",
    "directives": b"%FOO bar\n" * 50_000 + b"---\na: 1",
    "second document": b"a: 1\n---\na: 2",
    "nul": b"a: b\x00c",
    "terminal escape": b"a: \x1b]0;owned\x07",
    "delete": b"a: \x7f",
    "right to left": "a: \u202e'nwonk'".encode(),
    "isolates": "a: 1 # \u2067hidden\u2069".encode(),
    "line separator": "a: 1\u2028b: 2".encode(),
    "next line": "a: 1\u0085b: 2".encode(),
    "lone surrogate": b"a: \xed\xa0\x80",
    "overlong": b"a: \xc0\xaf",
    "utf-16": "a: 1".encode("utf-16"),
    "utf-32": "a: 1".encode("utf-32"),
    "ligature": "ﬁ: 1\nfi: 2".encode(),
    "unclosed string": b'a: "' + b"x" * 900_000,
    "unknown escape": b'a: "\\q"',
    "surrogate escape": b'a: "\\ud800"',
    "a gibibyte of nothing": b"\n" * (MAX_BYTES + 1),
    "an image": b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR",
    "a pickle": b"\x80\x04\x95\x17\x00\x00\x00\x00\x00\x00\x00\x8c\x02os\x94\x8c\x06system\x94\x93\x94.",
    "an archive": b"PK\x03\x04\x14\x00\x00\x00\x08\x00",
}


@pytest.mark.parametrize("raw", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_file_is_refused_soon(raw):
    start = time.process_time()
    with pytest.raises(UsageError) as caught:
        parse_yaml(raw, file="hostile.yaml")
    assert str(caught.value).startswith("hostile.yaml:")
    assert time.process_time() - start < 2, "seconds of processor time"


READ_ALL = """
import sys
from pathlib import Path
from search_spaces.errors import UsageError
from search_spaces.yaml_source import read_yaml
for name in sys.argv[1:]:
    try:
        read_yaml(Path(name))
        print("accepted", name)
    except UsageError:
        pass
# getrusage would tell the peak of whoever forked this process.
peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
print(int(peak.split()[1]) // 1024)
"""


def test_hostile_files_take_little_memory_and_run_nothing(tmp_path):
    for i, raw in enumerate(HOSTILE.values()):
        (tmp_path / f"{i}.yaml").write_bytes(raw)
    names = sorted(path.name for path in tmp_path.iterdir())
    command = [sys.executable, "-c", READ_ALL, *names]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=True)
    assert int(done.stdout) < 300, "megabytes"
    assert sorted(path.name for path in tmp_path.iterdir()) == names


@properties
@given(st.binary(max_size=60) | st.text("a1:-?&*!|>'\"%@`{}[],# \n\t~<.", max_size=40).map(str.encode))
def test_any_bytes_are_read_or_refused_in_words(raw):
    try:
        assert isinstance(read(raw), dict)
    except UsageError as error:
        assert str(error).startswith("space.yaml:")
