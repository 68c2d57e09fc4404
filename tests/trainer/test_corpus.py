"""Guards the corpus as a whole: held-out text is scored token by token exactly once, the mix is what was asked for."""

import json

import numpy as np
import pytest

from trainer.data.corpus import Corpus
from trainer.data.tokenizer import BOS, PAD
from trainer.errors import DataError

DOMAINS = ["ledgers", "tales"]
UNLIMITED = 2**30


def texts(corpus, source, split):
    found = corpus.documents[source].split(split)
    return {found.document(index) for index in range(len(found))}


# --- held-out text ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", ["validation", "test"])
@pytest.mark.parametrize("source", DOMAINS)
def test_held_out_windows_predict_every_token_exactly_once(corpus, source, split):
    stream = np.asarray(corpus.shard(source, split).tokens)
    windows = corpus.held_out(split, UNLIMITED)[source].tokens
    predicted = windows[:, 1:].flatten()
    assert predicted[: len(stream) - 1].tolist() == stream[1:].tolist()
    assert set(predicted[len(stream) - 1 :].tolist()) <= {PAD}
    assert len(predicted) - (len(stream) - 1) < corpus.data.sequence_length


def test_a_window_begins_with_the_last_token_of_the_one_before(corpus):
    windows = corpus.held_out("validation", UNLIMITED)["tales"].tokens
    assert windows.shape[1] == corpus.data.sequence_length + 1
    assert windows[0, 0] == BOS
    assert windows[1:, 0].tolist() == windows[:-1, -1].tolist()


@pytest.mark.parametrize("split", ["validation", "test"])
@pytest.mark.parametrize("source", DOMAINS)
def test_the_bytes_of_the_predicted_tokens_are_the_bytes_of_the_text(corpus, source, split):
    text = corpus.held_out(split, UNLIMITED)[source]
    assert text.bytes_of.shape == (len(text.tokens), corpus.data.sequence_length)
    assert text.bytes_of.sum() == corpus.documents[source].manifest["bytes"][split]


def test_special_tokens_and_padding_have_no_bytes(corpus):
    text = corpus.held_out("validation", UNLIMITED)["tales"]
    assert ((text.bytes_of == 0) == (text.tokens[:, 1:] < 3)).all()


def test_held_out_text_is_cut_near_the_limit(corpus):
    recipe_limit = corpus.data.held_out.max_bytes
    for limit, held_out in {recipe_limit: corpus.held_out("test"), 1500: corpus.held_out("test", 1500)}.items():
        for source in DOMAINS:
            assert limit - 16 < held_out[source].bytes_of.sum() < limit + 16


def test_less_text_is_the_beginning_of_more(corpus):
    """So that scores at two limits are of the same documents, as far as they go."""
    less, more = (corpus.held_out("test", limit)["tales"].tokens for limit in (1000, 2000))
    assert np.array_equal(less[:-1], more[: len(less) - 1])


def test_held_out_text_is_never_trained_on(corpus):
    for source in DOMAINS:
        training, validation, test = (texts(corpus, source, split) for split in ("train", "validation", "test"))
        assert not training & validation
        assert not training & test
        assert not validation & test


def test_held_out_text_is_not_filtered(recipe_of, cache, corpus):
    strict = Corpus.open(recipe_of(data={"quality": {"max_symbol_ratio": 0.1, "min_chars": 60}}).data, cache)
    for source in DOMAINS:
        assert np.array_equal(strict.held_out("test")[source].tokens, corpus.held_out("test")[source].tokens)


# --- training samples -------------------------------------------------------------------------------------------------


def test_every_sample_is_a_piece_of_the_training_tokens_of_one_source(corpus):
    streams = []
    for source in DOMAINS:
        stream = np.asarray(corpus.shard(source, "train").tokens, dtype=np.int64)
        streams.append(np.concatenate([stream, stream[: corpus.data.sequence_length]]).tobytes())
    samples = corpus.loader(seed=0).batch(0, 500)
    assert all(any(sample.tobytes() in stream for stream in streams) for sample in samples)


def test_a_sample_reads_as_text(corpus, domains):
    text = corpus.tokenizer.decode(corpus.loader(seed=0).batch(0, 1)[0].tolist())
    words = {word for document in domains["tales"] + domains["ledgers"] for word in document.split()}
    assert len(set(text.split()) & words) > 3


def test_quality_is_what_the_loader_draws(recipe_of, cache, corpus):
    strict = Corpus.open(recipe_of(data={"quality": {"min_chars": 100}}).data, cache)
    sizes = corpus.shard("tales", "train").chars
    assert 0 < (sizes < 100).sum() < len(sizes)
    assert strict.loader(0).epochs(1000)["tales"] > corpus.loader(0).epochs(1000)["tales"]


# --- the mix ----------------------------------------------------------------------------------------------------------


def test_without_a_mix_sources_weigh_what_they_hold(corpus):
    sizes = {name: corpus.documents[name].manifest["bytes"]["train"] for name in DOMAINS}
    assert corpus.weights == pytest.approx({name: size / sum(sizes.values()) for name, size in sizes.items()})


def test_a_mix_is_normalised(recipe_of, cache):
    weights = Corpus.open(recipe_of(data={"mix": {"tales": 3.0, "ledgers": 1.0}}).data, cache).weights
    assert weights == {"tales": 0.75, "ledgers": 0.25}


def test_a_source_without_weight_is_scored_but_never_drawn(recipe_of, cache):
    corpus = Corpus.open(recipe_of(data={"mix": {"tales": 1.0, "ledgers": 0.0}}).data, cache)
    assert set(corpus.loader(0).drawn(100)) == {"tales"}
    assert set(corpus.held_out("validation")) == {"tales", "ledgers"}


# --- identity and the cache -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "same"),
    [
        ({"mix": {"tales": 0.5, "ledgers": 0.5}}, True),
        ({"quality": {"min_chars": 5}}, True),
        ({"sequence_length": 64}, True),
        ({"tokenizer": {"vocab_size": 321}}, False),
        ({"held_out": {"validation": 0.2, "test": 0.1}}, False),
    ],
)
def test_the_digest_identifies_documents_split_and_tokenizer(recipe_of, cache, corpus, change, same):
    assert (Corpus.open(recipe_of(data=change).data, cache).digest == corpus.digest) is same


def test_opening_a_second_time_builds_nothing(recipe, corpus, cache):
    def folders():
        return {path: path.stat().st_mtime_ns for path in cache.glob("*/*") if path.is_dir()}

    before = folders()
    assert Corpus.open(recipe.data, cache).digest == corpus.digest
    assert folders() == before


def test_every_step_is_cached_by_content(corpus, tmp_path, recipe):
    Corpus.open(recipe.data, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"documents", "tokenizers", "tokens", "locks"}
    assert not list(tmp_path.rglob("*.tmp-*"))


def test_relative_sources_are_found_from_the_roots(recipe_of, corpus_folder, cache, corpus):
    sources = {"tales": {"path": "tales.jsonl"}, "ledgers": {"path": "ledgers.txt", "document": "line"}}
    assert Corpus.open(recipe_of(data={"sources": sources}).data, cache, [corpus_folder]).digest == corpus.digest


def test_an_unknown_file_is_refused(recipe_of, corpus_folder, cache):
    sources = {"tales": {"path": str(corpus_folder / "tale.jsonl")}}
    with pytest.raises(DataError, match=r"did you mean '.*tales.jsonl'"):
        Corpus.open(recipe_of(data={"sources": sources}).data, cache)


def test_the_manifest_says_where_the_corpus_comes_from(corpus):
    manifest = json.loads(json.dumps(corpus.manifest()))
    assert manifest["digest"] == corpus.digest
    assert manifest["tokenizer"] == {"sha256": corpus.tokenizer.digest, "vocab_size": 320}
    assert manifest["weights"] == corpus.weights
    tales = manifest["sources"]["tales"]
    assert tales["source"]["path"].endswith("tales.jsonl")
    assert sum(tales["documents"].values()) == 300
    assert tales["digest"] == corpus.documents["tales"].digest
