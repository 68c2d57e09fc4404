"""Guards the split into training and held-out text: by content alone, the same whatever the files are called."""

import json
import math

import pytest

from trainer.data.documents import SPLITS, Documents, side_of, symbol_ratio
from trainer.errors import DataError
from trainer.recipe import HeldOut, Source

HELD_OUT = HeldOut(validation=0.1, test=0.2)


@pytest.fixture
def opened(tmp_path):
    """Write files of records, and open them as one source with a cache of their own."""

    def build(files, held_out=HELD_OUT, name="web"):
        folder = tmp_path / f"files-{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        for file, texts in files.items():
            (folder / file).write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        return Documents.open(name, Source(path=str(folder)), held_out, tmp_path / "cache")

    return build


def texts(count, start=0):
    return [f"This is document number {number}." for number in range(start, start + count)]


def contents(documents, split):
    found = documents.split(split)
    return [found.document(index) for index in range(len(found))]


def sides(documents):
    return {text: split for split in SPLITS for text in contents(documents, split)}


def stored(documents):
    """The content of every stored file, but for the manifest, which names the paths."""
    return {file.name: file.read_bytes() for file in documents.folder.iterdir() if file.name != "manifest.json"}


# --- which side -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("position", "side"),
    [(0.0, "test"), (0.19, "test"), (0.21, "validation"), (0.29, "validation"), (0.31, "train"), (0.999, "train")],
)
def test_the_hash_is_a_position_between_0_and_1(position, side):
    key = int(position * 2**64).to_bytes(8, "big") + b"whatever"
    assert side_of(key, HELD_OUT) == side


def test_every_document_is_on_one_side(opened):
    written = texts(200)
    found = [text for split in SPLITS for text in contents(opened({"a.jsonl": written}), split)]
    assert sorted(found) == sorted(written)


def test_the_side_does_not_depend_on_order_files_or_other_documents(opened):
    written = texts(200)
    one = sides(opened({"a.jsonl": written}))
    shuffled = sides(opened({"x.jsonl": written[150:], "y.jsonl": written[:150][::-1]}))
    fewer = sides(opened({"a.jsonl": written[:120]}))
    assert shuffled == one
    assert fewer.items() <= one.items()


def test_equal_documents_of_two_sources_are_on_the_same_side(opened):
    shared = texts(150)
    web = sides(opened({"a.jsonl": shared + texts(50, start=1000)}, name="web"))
    books = sides(opened({"b.jsonl": texts(50, start=2000) + shared}, name="books"))
    assert all(web[text] == books[text] for text in shared)


def test_raising_a_share_moves_documents_only_out_of_training(opened):
    written = texts(300)
    before = sides(opened({"a.jsonl": written}, HeldOut(validation=0.1, test=0.2)))
    after = sides(opened({"a.jsonl": written}, HeldOut(validation=0.2, test=0.2)))
    assert {(before[text], after[text]) for text in written if before[text] != after[text]} == {("train", "validation")}


def test_the_shares_are_near_what_was_asked_for(opened):
    counts = opened({"a.jsonl": texts(3000)}).manifest["documents"]
    for split, share in {"train": 0.7, "validation": 0.1, "test": 0.2}.items():
        assert abs(counts[split] - 3000 * share) < 4 * math.sqrt(3000 * share * (1 - share))


# --- duplicates -------------------------------------------------------------------------------------------------------


def test_exact_duplicates_are_stored_once_in_whichever_file_they_stand(opened):
    written = texts(100)
    documents = opened({"a.jsonl": written + written[:10], "b.jsonl": written[50:]})
    assert documents.manifest["skipped"] == {"exact duplicate": 60}
    assert sorted(sides(documents)) == sorted(written)
    assert documents.digest == opened({"a.jsonl": written}).digest


def test_blank_documents_are_none(opened):
    documents = opened({"a.jsonl": ["", " \n\t ", *texts(100)]})
    assert documents.manifest["skipped"] == {"blank document": 2}
    assert sum(documents.manifest["documents"].values()) == 100


# --- what is stored ---------------------------------------------------------------------------------------------------


def test_the_same_content_is_stored_as_the_same_bytes_whatever_the_order(opened):
    written = texts(200)
    one, other = opened({"a.jsonl": written}), opened({"b.jsonl": written[90:], "c.jsonl": written[:90]})
    assert one.folder != other.folder
    assert stored(one) == stored(other)
    assert one.digest == other.digest


def test_the_digest_depends_on_the_documents_and_on_the_shares(opened):
    written = texts(200)
    digest = opened({"a.jsonl": written}).digest
    assert opened({"a.jsonl": [*written, "One more."]}).digest != digest
    assert opened({"a.jsonl": written}, HeldOut(validation=0.2, test=0.1)).digest != digest


def test_the_name_of_the_source_is_not_part_of_the_digest(opened):
    assert opened({"a.jsonl": texts(200)}, name="web").digest == opened({"a.jsonl": texts(200)}, name="books").digest


def test_text_of_every_kind_is_given_back(opened):
    odd = [
        "Grüße aus Köln",
        "日本語のテキスト",
        "🦜🦜🦜",
        "line\nline\r\nline",
        "nul \0 inside",
        "\u2028 odd blanks \x0c",
    ]
    assert set(sides(opened({"a.jsonl": odd + texts(100)}))) >= set(odd)


def test_a_lone_surrogate_which_json_can_hold_becomes_a_question_mark(opened):
    assert "half a \ud83e character".replace("\ud83e", "?") in sides(
        opened({"a.jsonl": ["half a \ud83e character", *texts(100)]})
    )


def test_each_document_has_its_signals(opened):
    found = opened({"a.jsonl": ["größe!", *texts(100)]})
    split = next(found.split(name) for name in SPLITS if "größe!" in contents(found, name))
    index = [split.document(i) for i in range(len(split))].index("größe!")
    assert split.chars[index] == 6
    assert split.symbol_ratio[index] == pytest.approx(1 / 6)


@pytest.mark.parametrize(
    ("text", "ratio"), [("abc 123\n", 0), ("a+b", 1 / 3), ("!?!?", 1), ("éß語", 0), ("🦜a", 1 / 2), ("", 0)]
)
def test_symbols_are_what_is_neither_alphanumeric_nor_blank(text, ratio):
    assert symbol_ratio(text) == pytest.approx(ratio)


def test_the_manifest_counts_documents_and_bytes(opened):
    manifest = opened({"a.jsonl": ["größe", *texts(100)]}).manifest
    assert sum(manifest["documents"].values()) == 101
    assert sum(manifest["bytes"].values()) == len("größe".encode()) + sum(map(len, texts(100)))


# --- the cache --------------------------------------------------------------------------------------------------------


@pytest.fixture
def file(tmp_path):
    file = tmp_path / "a.txt"
    file.write_text("\n".join(texts(200)))
    return file


def open_lines(file, tmp_path):
    return Documents.open("web", Source(path=str(file), document="line"), HELD_OUT, tmp_path / "cache")


def test_a_source_is_read_once(file, tmp_path):
    first = open_lines(file, tmp_path).folder
    made = first.stat().st_mtime_ns, first.stat().st_ino
    second = open_lines(file, tmp_path).folder
    assert (second, (second.stat().st_mtime_ns, second.stat().st_ino)) == (first, made)


def test_a_file_that_has_changed_is_read_again(file, tmp_path):
    before = open_lines(file, tmp_path)
    file.write_text("\n".join(texts(201)))
    after = open_lines(file, tmp_path)
    assert after.digest != before.digest
    assert len(sides(after)) == 201


# --- too little text --------------------------------------------------------------------------------------------------


def test_a_source_without_text_says_what_was_passed_over(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"body": "a"}\n{"body": "b"}\nno json\n')
    (tmp_path / "b.bin").write_bytes(b"\0\0")
    with pytest.raises(DataError) as error:
        Documents.open("web", Source(path=str(tmp_path)), HELD_OUT, tmp_path / "cache")
    words = str(error.value)
    assert words.startswith(f"data.sources.web: no text in {tmp_path}. Passed over: 2 record without text (first: ")
    assert "1 record that is not JSON" in words
    assert "1 binary file" in words


def test_several_paths_without_text_are_all_named(tmp_path):
    for name in "ab":
        (tmp_path / name).write_text("")
    with pytest.raises(DataError, match=f"no text in {tmp_path}/a, {tmp_path}/b."):
        Documents.open("web", Source(path=[f"{tmp_path}/a", f"{tmp_path}/b"]), HELD_OUT, tmp_path / "cache")


def test_too_few_documents_for_every_side_is_an_error_with_advice(opened):
    with pytest.raises(DataError) as error:
        opened({"a.jsonl": texts(1)})
    words = str(error.value)
    assert words.startswith("data.sources.web: 1 documents in ")
    assert "leave none for " in words
    assert "Add text, raise data.held_out, or set `document: passage` or `document: line`." in words


def test_a_source_that_is_refused_leaves_nothing_in_the_cache(opened, tmp_path):
    with pytest.raises(DataError):
        opened({"a.jsonl": texts(1)})
    assert list((tmp_path / "cache" / "documents").iterdir()) == []
