"""Peaks of cards by JAX's name of the device.

bfloat16 FLOP/s of dense matrix products (accumulated in float32) and bytes/s of memory, from NVIDIA's data
sheets and architecture papers and Google's pages of each TPU, for one jax.Device: a chip, on TPU v2 and v3
a core.
"""

import re
from typing import NamedTuple


class Peak(NamedTuple):
    """flops: bfloat16 FLOP/s; memory: bytes/s."""

    flops: float
    memory: float


# Name in the device's kind -> peak; the first that matches.
_PEAKS = {
    "B200": Peak(2250e12, 8.0e12),
    "GH200": Peak(989.4e12, 4.0e12),
    "H200 NVL": Peak(835e12, 4.8e12),
    "H200": Peak(989.4e12, 4.8e12),
    "H100 NVL": Peak(835e12, 3.9e12),
    "H100 PCIe": Peak(756e12, 2.0e12),
    "H100": Peak(989.4e12, 3.35e12),
    "A100-SXM4-80GB": Peak(312e12, 2.039e12),
    "A100 80GB PCIe": Peak(312e12, 1.935e12),
    "A100": Peak(312e12, 1.555e12),
    "A10G": Peak(70e12, 0.6e12),
    "A10": Peak(125e12, 0.6e12),
    "L40S": Peak(362e12, 0.864e12),
    "L4": Peak(121e12, 0.3e12),
    "RTX A6000": Peak(154.8e12, 0.768e12),
    "RTX 4090": Peak(165.2e12, 1.008e12),
    "RTX 3090": Peak(71e12, 0.936e12),
    "TPU v2": Peak(23e12, 0.35e12),
    "TPU v3": Peak(61.5e12, 0.45e12),
    "TPU v4": Peak(275e12, 1.2e12),
    "TPU v5 lite": Peak(197e12, 0.819e12),
    "TPU v5e": Peak(197e12, 0.819e12),
    "TPU v5p?": Peak(459e12, 2.765e12),
    "TPU v6 lite": Peak(918e12, 1.64e12),
    "TPU v6e": Peak(918e12, 1.64e12),
}


def peak_of(kind: str) -> Peak | None:
    """Peak of jax.Device.device_kind; None: unknown, such as a part of a card (MIG)."""
    if re.search(r"\bMIG\b", kind):
        return None
    return next(
        (peak for name, peak in _PEAKS.items() if re.search(rf"\b{name}(?!\w)", kind, re.I)), None
    )
