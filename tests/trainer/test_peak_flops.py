"""Guards the peaks of devices: figures of datasheets, by the names that drivers give, and never a guess."""

from __future__ import annotations

import pytest

from trainer.peak_flops import PEAKS, peak_flops


@pytest.mark.parametrize(
    ("device", "precision", "tera"),
    [
        ("NVIDIA A100-SXM4-80GB", "bf16", 312),
        ("NVIDIA A100 80GB PCIe", "bf16", 312),
        ("NVIDIA A100-PCIE-40GB", "fp32", 19.5),
        ("NVIDIA A100-SXM4-40GB", "tf32", 156),
        ("NVIDIA H100 80GB HBM3", "bf16", 989.4),
        ("NVIDIA H100 PCIe", "bf16", 756),
        ("NVIDIA H100 NVL", "fp16", 835.5),
        ("NVIDIA H200", "bf16", 989.4),
        ("NVIDIA GH200 480GB", "bf16", 989.4),
        ("NVIDIA B200", "bf16", 2250),
        ("NVIDIA A10", "fp16", 125),
        ("NVIDIA L4", "bf16", 121),
        ("NVIDIA L40S", "bf16", 362),
        ("Tesla V100-SXM2-16GB", "fp16", 125),
        ("Tesla V100-PCIE-32GB", "fp16", 112),
        ("Tesla T4", "fp16", 65),
        ("NVIDIA GeForce RTX 4090", "bf16", 165.2),
    ],
)
def test_datasheet_figures(device: str, precision, tera: float) -> None:
    assert peak_flops(device, precision) == pytest.approx(tera * 1e12)


@pytest.mark.parametrize(
    "device",
    [
        "",
        "cpu",
        "NVIDIA A10G",
        "NVIDIA H100 80GB HBM3 MIG 1g.10gb",
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA GeForce RTX 4090 D",
        "NVIDIA L400",
        "NVIDIA H20",
        "Some accelerator of the future",
    ],
)
def test_no_figure_is_guessed(device: str) -> None:
    assert peak_flops(device, "bf16") is None


def test_a_device_without_units_for_a_precision_has_no_peak_in_it() -> None:
    assert peak_flops("Tesla V100-SXM2-16GB", "bf16") is None
    assert peak_flops("Tesla T4", "tf32") is None


def test_every_row_is_in_order() -> None:
    """Half the width is at least as fast, and figures with sparsity, twice as high, have not slipped in."""
    for _, peak in PEAKS:
        ladder = [one for one in (peak.fp32, peak.tf32, peak.fp16) if one is not None]
        assert ladder == sorted(ladder) and peak.bf16 in (None, peak.fp16)
        assert peak.tf32 is None or peak.fp16 == pytest.approx(2 * peak.tf32, rel=0.02)
