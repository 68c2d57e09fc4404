"""Guards byte-level BPE: every text comes back, a vocabulary is known by its hash, and no byte is counted twice."""

import hashlib
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.data import tokenizer as tokenizer_module
from trainer.data.tokenizer import BOS, EOS, PAD, open_tokenizer, train_bpe
from trainer.errors import DataError
from trainer.recipe import SMALLEST_VOCABULARY
from trainer.recipe import Tokenizer as TokenizerRecipe

TEXTS = st.text()
EVERY_PLANE = "".join(chr(plane * 0x10000 + 0xA2) for plane in range(17)) + "\U0010ffff\uffff\ue000\0\x7f\x80"


@pytest.fixture(scope="module")
def tokenizer(corpus):
    return corpus.tokenizer


def round_trip(tokenizer, text):
    return tokenizer.decode(tokenizer.encode([text])[0])


# --- text -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["", " ", "two  blanks ", "\n\r\n\t", "Grüße, 日本語 🦜", "e\u0301", EVERY_PLANE])
def test_text_comes_back(tokenizer, text):
    assert round_trip(tokenizer, text) == text


@settings(derandomize=True, deadline=None, max_examples=100)
@given(text=TEXTS)
def test_any_text_comes_back(tokenizer, text):
    assert round_trip(tokenizer, text) == text


def test_every_byte_comes_back(tokenizer):
    noise = random.Random(0).randbytes(4096).decode("latin-1")
    assert round_trip(tokenizer, noise) == noise


def test_text_that_was_trained_on_takes_fewer_tokens_than_bytes(tokenizer, domains):
    text = " ".join(domains["tales"][:20])
    assert len(tokenizer.encode([text])[0]) < 0.7 * len(text)


def test_documents_are_encoded_one_by_one(tokenizer):
    assert tokenizer.encode(["one", "two"]) == tokenizer.encode(["one"]) + tokenizer.encode(["two"])


# --- special tokens ---------------------------------------------------------------------------------------------------


def test_the_special_tokens_are_the_first_three_ids(tokenizer):
    assert (PAD, BOS, EOS) == (0, 1, 2)
    assert [tokenizer.backend.token_to_id(token) for token in ("<pad>", "<s>", "</s>")] == [0, 1, 2]


def test_encoding_adds_no_special_tokens_and_decoding_leaves_them_out(tokenizer):
    ids = tokenizer.encode(["tale"])[0]
    assert not {PAD, BOS, EOS} & set(ids)
    assert tokenizer.decode([BOS, *ids, EOS, PAD]) == "tale"


# --- bytes ------------------------------------------------------------------------------------------------------------


@settings(derandomize=True, deadline=None, max_examples=100)
@given(text=TEXTS)
def test_the_bytes_of_the_tokens_are_the_bytes_of_the_text(tokenizer, text):
    assert tokenizer.bytes_per_token[tokenizer.encode([text])[0]].sum() == len(text.encode())


def test_special_tokens_stand_for_no_bytes_and_all_others_for_some(tokenizer):
    sizes = tokenizer.bytes_per_token
    assert sizes[[PAD, BOS, EOS]].tolist() == [0, 0, 0]
    assert sizes[3:].min() == 1
    assert (sizes == 1).sum() == 256


# --- identity ---------------------------------------------------------------------------------------------------------


def test_a_tokenizer_is_known_by_the_hash_of_its_file(tokenizer):
    assert tokenizer.digest == hashlib.sha256(tokenizer.file.read_bytes()).hexdigest()


def test_training_again_gives_the_same_tokenizer(corpus, tokenizer, tmp_path):
    again = open_tokenizer(corpus.data.tokenizer, corpus.documents, tmp_path)
    assert again.file != tokenizer.file
    assert again.digest == tokenizer.digest


def test_the_order_in_which_sources_are_named_does_not_matter(corpus, tokenizer, tmp_path):
    reordered = dict(reversed(corpus.documents.items()))
    assert open_tokenizer(corpus.data.tokenizer, reordered, tmp_path).digest == tokenizer.digest


def test_there_is_one_per_vocabulary_size(corpus, tokenizer, cache):
    assert tokenizer.vocab_size == 320
    assert open_tokenizer(TokenizerRecipe(vocab_size=320), corpus.documents, cache).file == tokenizer.file
    larger = open_tokenizer(TokenizerRecipe(vocab_size=350), corpus.documents, cache)
    assert larger.vocab_size == 350
    assert larger.digest != tokenizer.digest


def test_only_training_text_is_learned_from(corpus, tokenizer):
    """Training on the training text alone, by hand, gives the same vocabulary."""
    splits = [documents.split("train") for _, documents in sorted(corpus.documents.items())]
    texts = [split.document(index) for split in splits for index in range(len(split))]
    assert train_bpe(iter(texts), 320).get_vocab() == tokenizer.backend.get_vocab()


def test_every_source_gives_no_more_than_its_share(corpus, monkeypatch, tmp_path):
    """A huge source does not decide the vocabulary alone, nor does one long document."""
    monkeypatch.setattr(tokenizer_module, "TRAINING_BYTES", 2000)
    found = open_tokenizer(TokenizerRecipe(vocab_size=300), corpus.documents, tmp_path)
    texts = []
    for _, documents in sorted(corpus.documents.items()):
        split, left = documents.split("train"), 2000
        for index in range(len(split)):
            texts.append(split.document(index)[:left])
            left -= len(texts[-1])
    assert train_bpe((text for text in texts if text), 300).get_vocab() == found.backend.get_vocab()


# --- too large a vocabulary -------------------------------------------------------------------------------------------


def test_a_vocabulary_that_the_text_does_not_support_is_refused_with_the_number_that_it_does(corpus, tmp_path):
    with pytest.raises(DataError, match=r"data\.tokenizer\.vocab_size: the training text supports ") as error:
        open_tokenizer(TokenizerRecipe(vocab_size=5000), corpus.documents, tmp_path)
    assert "5000 were asked for" in str(error.value)
    supported = int(str(error.value).rstrip(".").split()[-1])
    assert open_tokenizer(TokenizerRecipe(vocab_size=supported), corpus.documents, tmp_path).vocab_size == supported


def test_text_without_repetition_supports_the_bytes_alone():
    with pytest.raises(DataError, match=f"supports {SMALLEST_VOCABULARY} entries"):
        train_bpe(iter(["abcdefg"]), SMALLEST_VOCABULARY + 1)
