"""Guards the readers of text, JSONL and parquet: what they find, what they pass over, and what they say about it."""

import gzip
import json
import os
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from trainer.data import sources
from trainer.data.sources import Skipped, fingerprint, list_files, read_documents
from trainer.errors import DataError
from trainer.recipe import Source

AS_ROOT = hasattr(os, "geteuid") and os.geteuid() == 0


def read(path, document="auto", roots=()):
    """The documents of a source, and what was passed over."""
    paths = [str(one) for one in path] if isinstance(path, list) else str(path)
    skipped = Skipped()
    return list(read_documents(Source(path=paths, document=document), roots, skipped)), skipped


def documents(path, document="auto", roots=()):
    """The documents of a source that has nothing to pass over."""
    found, skipped = read(path, document, roots)
    assert not skipped.counts, str(skipped)
    return found


def refusal(path, roots=()):
    with pytest.raises(DataError) as error:
        read(path, roots=roots)
    return str(error.value)


def records(*values):
    return "".join(json.dumps(value) + "\n" for value in values).encode()


def plain(raw):
    return raw


def zstandard(raw):
    return pyarrow.compress(raw, codec="zstd", asbytes=True)


# --- formats ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("ending", "pack"), [("", plain), (".gz", gzip.compress), (".zst", zstandard)])
@pytest.mark.parametrize(
    ("name", "raw"),
    [
        ("a.txt", b"Gr\xc3\xbc\xc3\x9fe"),
        ("a.md", b"Gr\xc3\xbc\xc3\x9fe"),
        ("a", b"Gr\xc3\xbc\xc3\x9fe"),
        ("a.jsonl", records({"text": "Grüße"})),
        ("a.ndjson", records({"text": "Grüße"})),
        ("a.json", records({"text": "Grüße"})),
    ],
)
def test_every_text_format_and_compression(tmp_path, name, raw, ending, pack):
    file = tmp_path / (name + ending)
    file.write_bytes(pack(raw))
    assert documents(file) == ["Grüße"]


@pytest.mark.parametrize("column", ["text", "content"])
def test_parquet(tmp_path, column):
    table = pyarrow.table({"id": [1, 2], column: ["Grüße", "and more"]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    assert documents(tmp_path / "a.parquet") == ["Grüße", "and more"]


def test_large_and_dictionary_strings_of_parquet(tmp_path):
    for name, column in {
        "large": pyarrow.array(["a", "b"], pyarrow.large_string()),
        "dictionary": pyarrow.array(["a", "b"]).dictionary_encode(),
    }.items():
        pyarrow.parquet.write_table(pyarrow.table({"text": column}), tmp_path / f"{name}.parquet")
        assert documents(tmp_path / f"{name}.parquet") == ["a", "b"]


def test_missing_values_of_parquet_are_no_documents(tmp_path):
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a", None, "b"]}), tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet")[0] == ["a", "b"]


def test_parquet_without_text_is_passed_over_with_its_columns(tmp_path):
    pyarrow.parquet.write_table(pyarrow.table({"body": ["a"], "url": ["b"]}), tmp_path / "a.parquet")
    found, skipped = read(tmp_path / "a.parquet")
    assert found == []
    assert str(skipped).startswith("1 parquet file without text")
    assert "columns body, url" in str(skipped)


@pytest.mark.parametrize("name", ["a.parquet", "a.txt.gz", "a.txt.zst", "a.jsonl.gz"])
def test_a_file_that_is_not_what_its_name_says_is_passed_over(tmp_path, name):
    (tmp_path / name).write_bytes(b"no such format")
    (tmp_path / "good.txt").write_text("good")
    found, skipped = read(tmp_path)
    assert found == ["good"]
    assert skipped.counts == {"unreadable file": 1}
    assert name in str(skipped)


@pytest.mark.parametrize(("ending", "pack"), [(".gz", gzip.compress), (".zst", zstandard)])
def test_a_torn_compressed_file_is_passed_over(tmp_path, ending, pack):
    raw = pack(os.urandom(4096).hex().encode())
    (tmp_path / f"a.txt{ending}").write_bytes(raw[: len(raw) // 2])
    found, skipped = read(tmp_path / f"a.txt{ending}")
    assert found == []
    assert skipped.counts == {"unreadable file": 1}


# --- records ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("record", "text"),
    [
        ({"text": "a"}, "a"),
        ({"content": "a"}, "a"),
        ({"content": "other", "text": "a"}, "a"),
        ({"text": None, "content": "a"}, "a"),
        ({"prompt": "question", "response": "answer"}, "question\nanswer"),
        ({"text": "line\nline\tend"}, "line\nline\tend"),
    ],
)
def test_where_a_record_keeps_its_text(tmp_path, record, text):
    (tmp_path / "a.jsonl").write_bytes(records(record))
    assert documents(tmp_path / "a.jsonl") == [text]


@pytest.mark.parametrize("record", [{"body": "a"}, {"prompt": "alone"}, {"text": 3}, ["text"], "text", None])
def test_a_record_without_text_is_counted_with_its_line(tmp_path, record):
    (tmp_path / "a.jsonl").write_bytes(records({"text": "good"}, record, {"text": "also good"}))
    found, skipped = read(tmp_path / "a.jsonl")
    assert found == ["good", "also good"]
    assert skipped.counts == {"record without text": 1}
    assert "a.jsonl:2: needs `text`, `content`, or `prompt` and `response`" in str(skipped)


@pytest.mark.parametrize("line", [b"{'text': 1}", b"{", b'{"text": "\xff"}', b"[" * 100_000, b"9" * 5000])
def test_a_line_that_is_not_json_is_counted_with_its_number(tmp_path, line):
    (tmp_path / "a.jsonl").write_bytes(records({"text": "good"}) + line + b"\n" + records({"text": "also good"}))
    found, skipped = read(tmp_path / "a.jsonl")
    assert found == ["good", "also good"]
    assert skipped.counts == {"record that is not JSON": 1}
    assert "a.jsonl:2:" in str(skipped)


def test_blank_lines_between_records_mean_nothing(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b"\n" + records({"text": "a"}) + b"  \r\n" + records({"text": "b"}) + b"\n")
    assert documents(tmp_path / "a.jsonl") == ["a", "b"]


def test_the_last_record_needs_no_line_end(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "a"}')
    assert documents(tmp_path / "a.jsonl") == ["a"]


# --- plain text -------------------------------------------------------------------------------------------------------


def test_a_line_can_be_a_document(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"one\r\n\r\ntwo\nthree")
    assert documents(tmp_path / "a.txt", "line") == ["one", "", "two", "three"]


def test_a_file_can_be_a_document(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"one\r\n\r\ntwo\n")
    assert documents(tmp_path / "a.txt", "file") == ["one\r\n\r\ntwo\n"]


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_a_passage_ends_at_the_first_blank_line_after_enough_text(tmp_path, monkeypatch, end):
    monkeypatch.setattr(sources, "PASSAGE", 20)
    paragraphs = ["first paragraph", "second paragraph", "third paragraph"]
    (tmp_path / "a.txt").write_bytes((end * 2).join(paragraphs).encode())
    first, second = documents(tmp_path / "a.txt", "passage")
    assert first.split() == ["first", "paragraph", "second", "paragraph"]
    assert second == "third paragraph"


def test_a_few_files_are_cut_into_passages_and_many_are_not(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "PASSAGE", 4)
    monkeypatch.setattr(sources, "FEW_FILES", 3)
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text(f"{name} one\n\n{name} two")
    assert len(documents(tmp_path)) == 4
    (tmp_path / "c.txt").write_text("c one\n\nc two")
    assert len(documents(tmp_path)) == 3


def test_records_do_not_count_as_files_to_be_cut(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "PASSAGE", 4)
    (tmp_path / "a.txt").write_text("long enough\n\nlong enough")
    (tmp_path / "b.jsonl").write_bytes(records({"text": "long enough\n\nlong enough"}))
    assert len(documents(tmp_path)) == 2 + 1


def test_a_byte_order_mark_is_no_text(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\ntwo")
    (tmp_path / "b.jsonl").write_bytes(b"\xef\xbb\xbf" + records({"text": "three"}))
    assert documents(tmp_path, "line") == ["one", "two", "three"]


def test_text_that_is_not_utf8_is_passed_over_with_the_byte_and_its_place(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"abc\xe9def")
    found, skipped = read(tmp_path / "a.txt")
    assert found == []
    assert str(skipped).startswith("1 text that is not UTF-8")
    assert "a.txt: byte 0xe9 at offset 3" in str(skipped)


def test_only_the_line_that_is_not_utf8_is_lost_where_lines_are_documents(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"one\n\xff\ntwo\n")
    found, skipped = read(tmp_path / "a.txt", "line")
    assert found == ["one", "two"]
    assert skipped.counts == {"text that is not UTF-8": 1}


@pytest.mark.parametrize("document", ["auto", "file", "line", "passage"])
def test_a_binary_file_is_passed_over(tmp_path, document):
    (tmp_path / "a.bin").write_bytes(b"\x7fELF\x00\x01")
    found, skipped = read(tmp_path / "a.bin", document)
    assert found == []
    assert skipped.counts == {"binary file": 1}


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.txt.gz"])
@pytest.mark.parametrize("document", ["auto", "file", "line", "passage"])
def test_an_empty_file_holds_nothing(tmp_path, name, document):
    (tmp_path / name).write_bytes(gzip.compress(b"") if name.endswith(".gz") else b"")
    assert documents(tmp_path / name, document) == []


# --- bounded memory ---------------------------------------------------------------------------------------------------


def test_a_line_that_is_too_long_is_passed_over_and_the_next_one_read(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "MAX_LINE", 40)
    (tmp_path / "a.txt").write_text("one\n" + "x" * 200 + "\ntwo\n")
    (tmp_path / "b.jsonl").write_bytes(records({"text": "three"}, {"text": "x" * 200}, {"text": "four"}))
    found, skipped = read(tmp_path, "line")
    assert found == ["one", "two", "three", "four"]
    assert skipped.counts == {"line that is too long": 2}
    assert "a.txt:2" in str(skipped)


def test_a_line_of_just_the_limit_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "MAX_LINE", 40)
    (tmp_path / "a.txt").write_text("x" * 39 + "\n" + "y" * 39 + "\n")
    assert documents(tmp_path / "a.txt", "line") == ["x" * 39, "y" * 39]


def test_the_last_line_may_be_too_long_too(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "MAX_LINE", 40)
    (tmp_path / "a.txt").write_text("one\n" + "x" * 200)
    found, skipped = read(tmp_path / "a.txt", "line")
    assert found == ["one"]
    assert skipped.counts == {"line that is too long": 1}


def test_a_long_file_is_cut_between_lines_into_documents_without_losing_text(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "MAX_DOCUMENT", 50)
    text = "".join(f"Zeile {number} mit Umläuten äöü\n" for number in range(20))
    (tmp_path / "a.txt").write_text(text)
    found = documents(tmp_path / "a.txt", "file")
    assert len(found) > 5
    assert all(document.endswith("\n") for document in found)
    assert "".join(found) == text


# --- files, folders, globs --------------------------------------------------------------------------------------------


@pytest.fixture
def tree(tmp_path):
    """A folder with files, hidden files and folders below."""
    for name in ("b.txt", "a.txt", "sub/c.txt", "sub/deep/d.md", ".hidden", "sub/.hidden.txt", ".git/config"):
        file = tmp_path / "tree" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(name)
    return tmp_path / "tree"


def names(path, roots=()):
    return [Path(file).name for file in list_files(str(path), roots)]


def test_a_folder_means_all_files_below_it_but_hidden_ones(tree):
    assert names(tree) == ["a.txt", "b.txt", "c.txt", "d.md"]


def test_a_hidden_folder_can_be_named(tree):
    assert names(tree / ".git") == ["config"]


@pytest.mark.parametrize(
    ("pattern", "found"), [("*.txt", ["a.txt", "b.txt"]), ("**/*.md", ["d.md"]), ("[b-z].txt", ["b.txt"])]
)
def test_a_pattern_means_what_it_matches(tree, pattern, found):
    assert names(tree / pattern) == found


def test_a_file_whose_name_looks_like_a_pattern_is_that_file(tree):
    (tree / "[a].txt").write_text("odd name")
    assert names(tree / "[a].txt") == ["[a].txt"]


def test_several_paths_are_read_in_their_order(tree):
    assert documents([tree / "b.txt", tree / "sub" / "c.txt", tree / "a.txt"]) == ["b.txt", "sub/c.txt", "a.txt"]


def test_relative_paths_are_looked_up_in_the_roots_in_their_order(tree):
    other = tree.parent / "other"
    other.mkdir()
    (other / "a.txt").write_text("another a")
    (other / "only.txt").write_text("only here")
    assert documents("a.txt", roots=[other, tree]) == ["another a"]
    assert documents("a.txt", roots=[tree, other]) == ["a.txt"]
    assert documents("only.txt", roots=[tree, other]) == ["only here"]


def test_an_absolute_path_needs_no_root(tree):
    assert documents(tree / "a.txt", roots=[tree.parent / "elsewhere"]) == ["a.txt"]


def test_a_tilde_is_the_home_folder(tree, monkeypatch):
    monkeypatch.setenv("HOME", str(tree))
    assert documents("~/a.txt") == documents("~/a.txt", roots=[tree.parent]) == ["a.txt"]


def test_a_link_to_a_file_is_that_file(tree):
    (tree / "link.txt").symlink_to(tree / "a.txt")
    assert documents(tree / "link.txt") == ["a.txt"]


def test_links_that_lead_nowhere_and_pipes_are_passed_over_in_folders(tree):
    (tree / "loop").symlink_to(tree / "loop")
    (tree / "dangling").symlink_to(tree / "gone")
    (tree / "up").symlink_to(tree)
    os.mkfifo(tree / "pipe")
    assert names(tree) == ["a.txt", "b.txt", "c.txt", "d.md"]


def test_a_pipe_is_refused(tree):
    os.mkfifo(tree / "pipe")
    assert "is neither a file nor a folder" in refusal(tree / "pipe")


@pytest.mark.skipif(AS_ROOT, reason="root reads everything")
def test_a_file_that_may_not_be_read_is_passed_over(tree):
    (tree / "a.txt").chmod(0)
    found, skipped = read(tree)
    assert "a.txt" not in found
    assert skipped.counts == {"unreadable file": 1}


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["hf:owner/name", "s3://bucket/key", "https://example.org/a.txt"])
def test_what_this_version_cannot_read_is_refused_in_words(path):
    assert refusal(path) == f"data source '{path}': this version reads local paths, python:stdlib and python:docs"


def test_a_misspelt_file_gets_the_nearest_name(tree):
    (tree / "chapter-one.txt").write_text("text")
    words = refusal(tree / "chapter-noe.txt")
    assert "no such file or folder" in words
    assert words.endswith(f"did you mean '{tree / 'chapter-one.txt'}'?")


def test_the_nearest_name_is_looked_for_in_the_first_root(tree):
    (tree / "chapter-one.txt").write_text("text")
    assert refusal("chapter-noe.txt", roots=[tree]).endswith(f"did you mean '{tree / 'chapter-one.txt'}'?")


def test_a_name_like_no_other_gets_the_folder_that_was_looked_in(tree):
    assert refusal(tree / "zebra").endswith(f"no such file or folder in {tree}")


def test_a_missing_folder_is_named(tree):
    assert refusal(tree / "gone" / "a.txt").endswith(f"the folder {tree / 'gone'} does not exist")


def test_a_pattern_without_matches_is_told_how_patterns_work(tree):
    assert "the pattern matches nothing; ** crosses folders" in refusal(tree / "*.pdf")


# --- fingerprints -----------------------------------------------------------------------------------------------------


def test_a_fingerprint_changes_with_the_files_and_the_settings(tree):
    def of(document="auto"):
        return fingerprint(Source(path=str(tree), document=document), ())

    before = of()
    assert of() == before
    assert of("line") != before
    (tree / "a.txt").write_text("longer than before")
    changed = of()
    assert changed != before
    (tree / "new.txt").write_text("new")
    assert of() != changed


def test_a_fingerprint_does_not_depend_on_how_the_path_is_written(tree):
    assert fingerprint(Source(path="."), [tree.resolve()])[0] == fingerprint(Source(path=str(tree)), ())[0]
