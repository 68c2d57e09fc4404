"""metrics.jsonl: what was torn by a kill or a full disk hurts no other line, and no log outgrows its bound."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.metrics_log import MetricsLog, read_metrics


def test_what_is_written_is_read(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    for number in range(3):
        with MetricsLog(path) as log:
            log.write({"tokens": number})
            assert list(read_metrics(path))[-1] == {"tokens": number}
    assert [line["tokens"] for line in read_metrics(path)] == [0, 1, 2]


def test_a_torn_line_is_left_out_and_nothing_is_glued_to_it(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"tokens": 1}\n{"tokens": 2, "lo')
    with MetricsLog(path) as log:
        log.write({"tokens": 3})
    assert list(read_metrics(path)) == [{"tokens": 1}, {"tokens": 3}]
    path.write_bytes(b'{"tokens": 1}\n{"tok{"tokens": 2}\n5\n\xff\n')
    assert list(read_metrics(path)) == [{"tokens": 1}]


def test_where_there_is_no_log_there_are_no_lines(tmp_path: Path) -> None:
    assert list(read_metrics(tmp_path / "none")) == []


# --- the bound --------------------------------------------------------------------------------------------------------


def line(number: int) -> dict[str, float]:
    return {"tokens": 1_000_000 + number, "loss": 3.25}


SIZE = len(json.dumps(line(0))) + 1


def test_a_log_that_fills_up_loses_every_second_line_and_no_end_of_the_curve(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with MetricsLog(path, 10 * SIZE) as log:
        for number in range(10):
            log.write(line(number))
        assert len(list(read_metrics(path))) == 10
        log.write(line(10))
        assert [one["tokens"] - 1_000_000 for one in read_metrics(path)] == [0, 2, 4, 6, 8, 10]
        for number in range(11, 16):
            log.write(line(number))
    assert [one["tokens"] - 1_000_000 for one in read_metrics(path)] == [0, 4, 8, 11, 13, 15]
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_the_scores_of_a_rung_stay_when_lines_of_training_go(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with MetricsLog(path, 8 * SIZE) as log:
        log.write(line(0))
        log.write({"rung": 0, "bits_per_byte": 1.5})
        for number in range(1, 60):
            log.write(line(number))
    found = list(read_metrics(path))
    assert found[0] == line(0) and found[1] == {"rung": 0, "bits_per_byte": 1.5} and found[-1] == line(59)


def test_scores_alone_keep_the_bound_as_well_the_newest_staying(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with MetricsLog(path, 120) as log:
        for rung in range(9):
            log.write({"rung": rung, "bits_per_byte": 1.5})
    assert path.stat().st_size <= 120
    assert [one["rung"] for one in read_metrics(path)] == [6, 7, 8]


def test_a_log_of_a_larger_bound_is_thinned_when_it_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b"".join(json.dumps(line(number)).encode() + b"\n" for number in range(64)) + b'{"torn')
    with MetricsLog(path, 8 * SIZE) as log:
        log.write(line(64))
    found = [one["tokens"] - 1_000_000 for one in read_metrics(path)]
    assert found == [0, 16, 32, 48, 64] and path.stat().st_size <= 8 * SIZE


def test_a_reader_who_has_the_file_open_sees_whole_lines_only(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with MetricsLog(path, 4 * SIZE) as log:
        for number in range(4):
            log.write(line(number))
        with path.open() as reader:
            log.write(line(4))  # replaces the file
            assert [json.loads(one)["tokens"] - 1_000_000 for one in reader] == [0, 1, 2, 3]


def test_a_line_longer_than_all_the_log_may_be_is_not_written(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with MetricsLog(path, 100) as log:
        log.write(line(0))
        log.write({"tokens": 1, "loss": 1.0, "note": "x" * 200})
    assert list(read_metrics(path)) == [line(0)]


def test_a_disk_that_is_full_while_the_log_is_thinned_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: Path, data: bytes) -> int:
        raise OSError(28, "No space left on device")

    path = tmp_path / "metrics.jsonl"
    with MetricsLog(path, 4 * SIZE) as log:
        for number in range(4):
            log.write(line(number))
        with monkeypatch.context() as patch, pytest.raises(OSError, match="No space"):
            patch.setattr(Path, "write_bytes", full)
            log.write(line(4))
        assert len(list(read_metrics(path))) == 4
        log.write(line(5))
    assert [one["tokens"] - 1_000_000 for one in read_metrics(path)] == [0, 2, 5]
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_what_a_kill_left_of_a_log_that_was_being_thinned_is_removed(tmp_path: Path) -> None:
    class Killed(BaseException):
        pass

    def kill(self: Path, target: Path) -> Path:
        raise Killed

    path, left = tmp_path / "metrics.jsonl", tmp_path / "metrics.jsonl.tmp"
    with MetricsLog(path, 4 * SIZE) as log, pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "unlink", lambda self, missing_ok=False: None)
        patch.setattr(Path, "replace", kill)
        for number in range(4):
            log.write(line(number))
        with pytest.raises(Killed):
            log.write(line(4))
    assert left.is_file()
    with MetricsLog(path, 4 * SIZE) as log:
        log.write(line(5))
    assert not left.exists() and len(list(read_metrics(path))) == 3


def test_without_a_path_nothing_is_written_and_no_bound_is_reached() -> None:
    with MetricsLog(None, 2 * SIZE) as log:
        for number in range(9):
            log.write(line(number))


def test_what_is_no_regular_file_is_never_replaced(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.symlink_to(os.devnull)
    with MetricsLog(path, 2 * SIZE) as log:
        for number in range(9):
            log.write(line(number))
    assert path.is_symlink() and [file.name for file in tmp_path.iterdir()] == ["metrics.jsonl"]


@settings(max_examples=30, deadline=None)
@given(
    kinds=st.lists(st.tuples(st.booleans(), st.integers(0, 60)), min_size=1, max_size=60), bound=st.integers(60, 600)
)
def test_no_log_ever_exceeds_its_bound_and_what_is_left_is_in_order(
    tmp_path_factory: pytest.TempPathFactory, kinds: list[tuple[bool, int]], bound: int
) -> None:
    path = tmp_path_factory.mktemp("log") / "metrics.jsonl"
    written = [
        {"tokens": number, ("loss" if training else "rung"): "x" * size}
        for number, (training, size) in enumerate(kinds)
    ]
    with MetricsLog(path, bound) as log:
        for one in written:
            log.write(one)
            assert path.stat().st_size <= bound
    found = list(read_metrics(path))
    assert all(one in written for one in found)
    assert [one["tokens"] for one in found] == sorted({one["tokens"] for one in found})
    fitting = [one for one in written if len(json.dumps(one)) < bound]
    assert found[-1:] == fitting[-1:]
