"""metrics.jsonl: what was torn by a kill or a full disk hurts no other line."""

from __future__ import annotations

from pathlib import Path

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
