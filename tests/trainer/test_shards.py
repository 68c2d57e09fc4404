"""Guards token shards: they say which tokenizer wrote them, and are refused when torn or another's."""

import hashlib

import numpy as np
import pytest
import tokenizers
from tokenizers import models, pre_tokenizers

from trainer.data.documents import Split
from trainer.data.shards import MAGIC, open_shard, write_shard
from trainer.data.tokenizer import BOS, EOS, Tokenizer
from trainer.errors import DataError

HEADER = 64


@pytest.fixture(scope="module")
def tokenizer(corpus):
    return corpus.tokenizer


@pytest.fixture
def split(corpus):
    return corpus.documents["tales"].split("validation")


@pytest.fixture
def shard_file(split, tokenizer, tmp_path):
    write_shard(tmp_path, "validation", split, tokenizer)
    return tmp_path / "validation.tokens"


def open_file(file, tokenizer):
    return open_shard(file.parent, "validation", tokenizer)


def refusal(file, tokenizer):
    with pytest.raises(DataError) as error:
        open_file(file, tokenizer)
    assert str(error.value).startswith(str(file))
    return str(error.value)


def split_of(texts):
    raw = [text.encode() for text in texts]
    return Split(
        text=np.frombuffer(b"".join(raw), dtype=np.uint8),
        offsets=np.concatenate([[0], np.cumsum([len(one) for one in raw])]).astype(np.int64),
        chars=np.array([len(text) for text in texts], dtype=np.int64),
        symbol_ratio=np.zeros(len(texts), dtype=np.float32),
    )


# --- what is in it ----------------------------------------------------------------------------------------------------


def test_each_document_stands_between_the_tokens_that_begin_and_end_it(shard_file, split, tokenizer):
    shard = open_file(shard_file, tokenizer)
    assert shard.offsets[-1] == len(shard.tokens)
    assert len(shard.offsets) == len(split) + 1
    for index in range(len(split)):
        first, *text, last = shard.tokens[shard.offsets[index] : shard.offsets[index + 1]].tolist()
        assert (first, last) == (BOS, EOS)
        assert tokenizer.decode(text) == split.document(index)


def test_lengths_count_the_tokens_of_each_document(shard_file, tokenizer):
    shard = open_file(shard_file, tokenizer)
    assert shard.lengths.sum() == len(shard.tokens)
    assert shard.lengths.min() > 2


def test_the_signals_come_along(shard_file, split, tokenizer):
    shard = open_file(shard_file, tokenizer)
    assert shard.chars.tolist() == split.chars.tolist()
    assert shard.symbol_ratio.tolist() == split.symbol_ratio.tolist()


def test_tokens_are_memory_mapped(shard_file, tokenizer):
    assert isinstance(open_file(shard_file, tokenizer).tokens, np.memmap)


def test_batches_of_any_size_give_the_same_shard(shard_file, split, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr("trainer.data.shards.BATCH_BYTES", 300)
    (tmp_path / "other").mkdir()
    write_shard(tmp_path / "other", "validation", split, tokenizer)
    assert (tmp_path / "other" / "validation.tokens").read_bytes() == shard_file.read_bytes()


def test_ids_beyond_16_bits_take_four_bytes(tmp_path):
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate(["<pad>", "<s>", "</s>", *alphabet])}
    vocabulary |= {f"filler{index}": index for index in range(len(vocabulary), 2**16 + 10)}
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.save(str(tmp_path / "tokenizer.json"))
    large = Tokenizer(tmp_path / "tokenizer.json")
    write_shard(tmp_path, "validation", split_of(["abc"]), large)
    shard = open_shard(tmp_path, "validation", large)
    assert shard.tokens.dtype == np.uint32
    assert shard.tokens.tolist() == [BOS, *(vocabulary[character] for character in "abc"), EOS]


# --- the header -------------------------------------------------------------------------------------------------------


def test_the_header_carries_the_hash_of_the_tokenizer(shard_file, tokenizer):
    header = shard_file.read_bytes()[:HEADER]
    assert header.startswith(MAGIC)
    assert hashlib.sha256(tokenizer.file.read_bytes()).digest() in header


def test_another_tokenizer_of_the_same_size_is_refused(shard_file, tokenizer, tmp_path):
    other = tmp_path / "other.json"
    other.write_text(tokenizer.file.read_text() + "\n")
    words = refusal(shard_file, Tokenizer(other))
    assert f"written with tokenizer {tokenizer.digest[:12]}" in words
    assert f"the model's is {Tokenizer(other).digest[:12]}" in words


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda raw: raw[:-1], id="a byte short"),
        pytest.param(lambda raw: raw[: len(raw) // 2], id="half"),
        pytest.param(lambda raw: raw + b"\0\0", id="a token too many"),
        pytest.param(lambda raw: raw[:HEADER], id="only the header"),
    ],
)
def test_a_torn_shard_is_refused(shard_file, tokenizer, change):
    shard_file.write_bytes(change(shard_file.read_bytes()))
    words = refusal(shard_file, tokenizer)
    assert "torn, holds " in words
    assert "delete that folder of the cache and run again" in words


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda raw: b"", id="empty"),
        pytest.param(lambda raw: raw[: HEADER - 1], id="less than a header"),
        pytest.param(lambda raw: b"EVOLMTOX" + raw[8:], id="other magic"),
        pytest.param(lambda raw: raw[:8] + b"\x02" + raw[9:], id="other version"),
        pytest.param(lambda raw: b"\0" * len(raw), id="zeros, as of a build that never ended"),
    ],
)
def test_what_is_no_shard_is_refused(shard_file, tokenizer, change):
    shard_file.write_bytes(change(shard_file.read_bytes()))
    assert "not a token shard" in refusal(shard_file, tokenizer)


def test_a_missing_shard_is_refused(shard_file, tokenizer):
    shard_file.unlink()
    assert "not a token shard" in refusal(shard_file, tokenizer)
