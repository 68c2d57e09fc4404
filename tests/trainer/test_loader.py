"""Guards the loader: a pure function of seed, position and weights, without padding, that counts what it gives."""

import numpy as np
import pytest

from trainer.data.loader import Loader, SourceStream
from trainer.data.shards import Shard
from trainer.errors import DataError
from trainer.recipe import Quality

LENGTH = 8
EVERYTHING = Quality()


def shard(tokens, documents=1, chars=None, symbol_ratio=None, first=0):
    """A shard whose token at place i is first + i, in documents of equal length."""
    offsets = np.linspace(0, tokens, documents + 1).astype(np.int64)
    return Shard(
        tokens=np.arange(first, first + tokens, dtype=np.uint16),
        offsets=offsets,
        chars=np.full(documents, 100) if chars is None else np.array(chars),
        symbol_ratio=np.zeros(documents, np.float32) if symbol_ratio is None else np.array(symbol_ratio, np.float32),
    )


def stream(one, seed=0, quality=EVERYTHING, length=LENGTH):
    return SourceStream("web", one, quality, length, seed)


def loader(weights, seed=0, sizes=None):
    """A loader whose tokens tell their source: those of the k-th name begin at 1000 k."""
    shards = {name: shard((sizes or {}).get(name, 1000), first=1000 * k) for k, name in enumerate(sorted(weights))}
    return Loader(shards, weights, EVERYTHING, LENGTH, seed)


def origins(weights, samples, seed=0):
    """For each sample the number of its source, by name."""
    return loader(weights, seed).batch(0, samples)[:, 0] // 1000


def epoch(source, number=0):
    """All windows of one epoch."""
    return [source.window(number * source.windows + position) for position in range(source.windows)]


# --- a pure function --------------------------------------------------------------------------------------------------


MIX = {"web": 0.5, "code": 0.3, "books": 0.2}


@pytest.mark.parametrize("sizes", [[40], [1] * 40, [7, 1, 20, 12], [39, 1]])
def test_batches_of_any_size_are_the_same_samples(sizes):
    whole, parts = loader(MIX).batch(0, 40), loader(MIX)
    starts = np.cumsum([0, *sizes])[:-1]
    assert np.array_equal(np.concatenate([parts.batch(int(a), n) for a, n in zip(starts, sizes, strict=True)]), whole)


def test_samples_do_not_depend_on_what_was_asked_before():
    one, other = loader(MIX), loader(MIX)
    forwards = [one.batch(start, 4) for start in range(0, 600, 4)]
    backwards = [other.batch(start, 4) for start in range(596, -1, -4)]
    assert np.array_equal(forwards, backwards[::-1])


def test_a_loader_that_begins_in_the_middle_goes_on_as_another_would():
    assert np.array_equal(loader(MIX).batch(9_000, 16), loader(MIX).batch(8_990, 26)[10:])


def test_another_seed_gives_other_windows_and_visits_the_sources_in_another_order():
    assert not np.array_equal(loader(MIX, seed=0).batch(0, 16), loader(MIX, seed=1).batch(0, 16))
    assert not np.array_equal(origins(MIX, 16, seed=0), origins(MIX, 16, seed=1))


def test_two_sources_of_the_same_text_are_read_in_orders_of_their_own():
    firsts = [
        [int(window[0]) for window in epoch(SourceStream(name, shard(800), EVERYTHING, LENGTH, 0))] for name in "ab"
    ]
    assert firsts[0] != firsts[1]


def test_the_order_in_which_sources_are_named_does_not_matter():
    reordered = dict(reversed(MIX.items()))
    assert np.array_equal(loader(MIX).batch(0, 40), loader(reordered).batch(0, 40))


def test_weights_need_not_sum_to_one():
    scaled = {name: 7 * weight for name, weight in MIX.items()}
    assert np.array_equal(loader(MIX).batch(0, 40), loader(scaled).batch(0, 40))


# --- windows ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [1000, 1001, 1007, 9, 8])
def test_a_window_is_consecutive_tokens_of_the_stream_without_padding(tokens):
    source = stream(shard(tokens, documents=3))
    for draw in range(3 * source.windows):
        window = source.window(draw)
        assert window.shape == (LENGTH + 1,)
        assert np.array_equal(np.diff(window) % tokens, np.full(LENGTH, 1 % tokens))


@pytest.mark.parametrize("tokens", [800, 803, 807, 9])
def test_an_epoch_predicts_no_token_twice_and_leaves_out_less_than_a_window(tokens):
    source = stream(shard(tokens))
    for number in range(3):
        predicted = np.concatenate([window[1:] for window in epoch(source, number)])
        assert len(set(predicted)) == len(predicted) == tokens - tokens % LENGTH


def test_every_epoch_has_its_own_order_and_its_own_cuts():
    source = stream(shard(800))
    firsts = [[int(window[0]) for window in epoch(source, number)] for number in range(6)]
    assert len({tuple(np.argsort(first)) for first in firsts}) == 6
    cuts = [first[0] % LENGTH for first in firsts]
    assert len(set(cuts)) > 2


def test_every_token_is_met_in_the_end():
    source = stream(shard(807))
    met = {int(token) for number in range(10) for window in epoch(source, number) for token in window[1:]}
    assert met == set(range(807))


@pytest.mark.parametrize("tokens", [2, 5, 8])
def test_a_source_of_less_than_a_window_is_repeated(tokens):
    source = stream(shard(tokens))
    assert source.windows == 1
    for draw in range(5):
        window = source.window(draw)
        assert np.array_equal(window, (window[0] + np.arange(LENGTH + 1)) % tokens)


# --- quality ----------------------------------------------------------------------------------------------------------


def test_documents_below_the_thresholds_are_never_drawn():
    one = shard(100, documents=10, chars=[9, 10, 99, 5, 10, 10, 1, 10, 10, 0])
    left_out = {int(t) for d in (0, 3, 6, 9) for t in range(10 * d, 10 * d + 10)}
    source = stream(one, quality=Quality(min_chars=10))
    drawn = {int(token) for number in range(8) for window in epoch(source, number) for token in window}
    assert drawn == set(range(100)) - left_out
    assert source.tokens == 60


def test_what_is_left_stands_end_to_end():
    source = stream(shard(100, documents=10, chars=[0, 1] * 5), quality=Quality(min_chars=1))
    kept = [token for document in range(1, 10, 2) for token in range(10 * document, 10 * document + 10)]
    place = {token: index for index, token in enumerate(kept)}
    for draw in range(3 * source.windows):
        places = [place[int(token)] for token in source.window(draw)]
        assert np.array_equal(np.diff(places) % len(kept), np.ones(LENGTH))


def test_too_many_symbols_leave_a_document_out_and_just_as_many_do_not():
    one = shard(100, documents=4, symbol_ratio=[0.1, 0.25, 0.26, 1.0])
    assert stream(one, quality=Quality(max_symbol_ratio=0.25)).tokens == 50


def test_thresholds_that_leave_nothing_are_an_error():
    one = shard(100, documents=4, chars=[1, 2, 3, 4])
    with pytest.raises(DataError, match=r"data\.quality leaves nothing of source 'web': min_chars = 5, max_symbol"):
        stream(one, quality=Quality(min_chars=5))


# --- counts -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("samples", [1, 100, 4095, 4096, 4097, 8200])
def test_the_tokens_of_each_source_are_counted_as_they_are_drawn(samples):
    counted = np.bincount(origins(MIX, samples), minlength=3)
    assert loader(MIX).drawn(samples) == dict(zip(sorted(MIX), (counted * LENGTH).tolist(), strict=True))


def test_counting_and_drawing_do_not_disturb_each_other():
    one = loader(MIX)
    one.drawn(9_000)
    one.batch(5_000, 3)
    assert one.drawn(100) == loader(MIX).drawn(100)
    assert np.array_equal(one.batch(0, 10), loader(MIX).batch(0, 10))


def test_nothing_is_drawn_by_no_samples():
    assert loader(MIX).drawn(0) == dict.fromkeys(MIX, 0)


def test_epochs_are_tokens_over_the_size_of_the_source():
    one = loader({"web": 0.5, "code": 0.5}, sizes={"code": 40})
    drawn, epochs = one.drawn(500), one.epochs(500)
    assert epochs == {"web": drawn["web"] / 1000, "code": drawn["code"] / 40}


# --- weights ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    "weights",
    [{"a": 1.0}, {"a": 0.5, "b": 0.5}, {"a": 0.9, "b": 0.07, "c": 0.03}, {f"s{i}": 1.0 + i for i in range(12)}],
)
def test_each_source_has_its_share_to_within_a_few_samples_at_any_time(weights, seed):
    one = loader(weights, seed)
    total = sum(weights.values())
    for samples in (10, 100, 1000, 5000, 12_345):
        for name, tokens in one.drawn(samples).items():
            assert abs(tokens / LENGTH - samples * weights[name] / total) < 4


def test_a_source_without_weight_is_never_drawn():
    one = loader({"web": 0.7, "code": 0.0, "books": 0.3})
    assert one.names == ["books", "web"]
    assert set(one.drawn(1000)) == {"books", "web"}


def test_a_source_without_weight_may_fail_the_thresholds():
    shards = {"web": shard(1000), "code": shard(1000, chars=[1])}
    assert Loader(shards, {"web": 1.0, "code": 0.0}, Quality(min_chars=50), LENGTH, 0).batch(0, 4).shape == (4, 9)


def test_sources_alternate_instead_of_coming_in_runs():
    assert {int(chunk.sum()) for chunk in origins({"web": 0.5, "code": 0.5}, 400).reshape(-1, 8)} <= {3, 4, 5}


# --- common random numbers --------------------------------------------------------------------------------------------


def test_two_mixes_draw_the_same_windows_of_a_source_in_the_same_order():
    windows = []
    for weights in (MIX, {"books": 0.4, "code": 0.1, "web": 0.5}):
        batch = loader(weights).batch(0, 200)
        windows.append(batch[batch[:, 0] >= 2000])  # web's
    common = min(map(len, windows))
    assert common > 90
    assert np.array_equal(windows[0][:common], windows[1][:common])


def test_two_mixes_choose_the_same_source_but_where_their_weights_differ():
    same = origins({"a": 0.5, "b": 0.5}, 1000) == origins({"a": 0.6, "b": 0.4}, 1000)
    assert same.mean() == pytest.approx(0.9, abs=0.005)
