"""What a device can compute at most, by its name: the denominator of model FLOPs utilisation (MFU).

Figures are dense TFLOP/s of the vendors' datasheets (those with sparsity are twice as high), products of 16 bits
accumulated in fp32. A device that is not listed has no peak here: nothing is guessed. Slices of a device (MIG), laptop
chips and cut-down versions carry other names, and are not listed.
"""

from __future__ import annotations

import re
from typing import Literal, NamedTuple

Precision = Literal["fp32", "tf32", "bf16", "fp16"]


class Peak(NamedTuple):
    """Dense TFLOP/s of matrix products by precision; None where the device has no units for it."""

    fp32: float
    tf32: float | None
    bf16: float | None
    fp16: float | None


_MEMORY = r"(?:[ -]\d+GB)?(?: HBM\w+)?"

PEAKS: tuple[tuple[str, Peak], ...] = (
    (r"NVIDIA GB200", Peak(80, 1250, 2500, 2500)),
    (r"NVIDIA B200", Peak(75, 1125, 2250, 2250)),
    (r"NVIDIA (H200|GH200)", Peak(67, 494.7, 989.4, 989.4)),
    (r"NVIDIA H100", Peak(67, 494.7, 989.4, 989.4)),  # SXM, which names its memory alone
    (r"NVIDIA H(100|200) NVL", Peak(60, 417.5, 835.5, 835.5)),
    (r"NVIDIA H100 PCIe", Peak(51.2, 378, 756, 756)),
    (r"NVIDIA A(100|800)(-SXM4|-PCIE|-PG509-\d+|(?: 80GB)? PCIe)?", Peak(19.5, 156, 312, 312)),
    (r"NVIDIA A40", Peak(37.4, 74.8, 149.7, 149.7)),
    (r"NVIDIA A30", Peak(10.3, 82, 165, 165)),
    (r"NVIDIA A10", Peak(31.2, 62.5, 125, 125)),
    (r"NVIDIA RTX A6000", Peak(38.7, 77.4, 154.8, 154.8)),
    (r"NVIDIA L40S", Peak(91.6, 183, 362, 362)),
    (r"NVIDIA L40", Peak(90.5, 90.5, 181, 181)),
    (r"NVIDIA L4", Peak(30.3, 60, 121, 121)),
    (r"NVIDIA GeForce RTX 5090", Peak(104.8, 104.8, 209.5, 209.5)),
    (r"NVIDIA GeForce RTX 4090", Peak(82.6, 82.6, 165.2, 165.2)),
    (r"NVIDIA GeForce RTX 3090", Peak(35.6, 35.6, 71, 71)),
    (r"(NVIDIA |Tesla )+V100-SXM[23]", Peak(15.7, None, None, 125)),
    (r"(NVIDIA |Tesla )+V100-PCIE", Peak(14, None, None, 112)),
    (r"(NVIDIA |Tesla )+T4", Peak(8.1, None, None, 65)),
    (r"AMD Instinct MI300X", Peak(163.4, 653.7, 1307.4, 1307.4)),
)


def peak_flops(device: str, precision: Precision) -> float | None:
    """FLOP/s of dense matrix products on the device of that name (torch.cuda.get_device_name), or None: unknown."""
    for pattern, peak in PEAKS:
        if re.fullmatch(pattern + _MEMORY, device):
            tera: float | None = getattr(peak, precision)
            return None if tera is None else tera * 1e12
    return None
