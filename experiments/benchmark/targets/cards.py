"""Public figures of the accelerators that steps are compiled for without having one."""

from collections.abc import Callable
from typing import NamedTuple

from experiments.gpu.peaks import peak_of


class Card(NamedTuple):
    """device: the model, whose peaks are in experiments/gpu/peaks.py; platform: "gpu" or "tpu"; memory:
    bytes of it; link_rate: bytes/s of all its links in one direction; float32: passes (precision,
    "default" | "high" | "highest") -> how much longer a float32 product takes than one of bfloat16;
    clock: Hz of the compiler's cycle estimates, None: it gives none; source: of the figures.
    """

    device: str
    platform: str
    memory: int
    link_rate: float
    float32: Callable[[str], float]
    clock: float | None
    source: str

    @property
    def flops(self) -> float:
        """FLOP/s of dense bfloat16 products."""
        return peak_of(self.device).flops

    @property
    def memory_rate(self) -> float:
        """Bytes/s of the memory."""
        return peak_of(self.device).memory

    def product_seconds(self, flops: float, dtypes: tuple[str, str], precision: str) -> float:
        """Seconds of a matrix product of factors of these dtypes at the card's peak."""
        wide = "f32" in dtypes or "f64" in dtypes
        return flops * (self.float32(precision) if wide else 1.0) / self.flops


def _tensor_cores(precision: str) -> float:
    """TF32 (494.7 TFLOP/s), as JAX documents for "default" and "high", or float32 cores (66.9 TFLOP/s)."""
    return 989.4 / (66.9 if precision == "highest" else 494.7)


def _matrix_unit(precision: str) -> float:
    """One, three or six products of bfloat16 parts."""
    return {"default": 1.0, "high": 3.0}.get(precision, 6.0)


CARDS = {
    "h100": Card(
        device="NVIDIA H100 80GB HBM3 (SXM5)",
        platform="gpu",
        memory=80 * 10**9,
        link_rate=450e9,
        float32=_tensor_cores,
        clock=None,
        source="NVIDIA H100 Tensor Core GPU datasheet and architecture white paper: without sparsity; "
        "NVLink 900 GB/s in both directions together",
    ),
    "v5e": Card(
        device="TPU v5 lite",
        platform="tpu",
        memory=16 * 2**30,
        link_rate=200e9,
        float32=_matrix_unit,
        clock=197e12 / (4 * 128 * 128 * 2),  # four matrix units of 128 x 128
        source="Google Cloud TPU documentation, v5e: interconnect 1,600 Gbit/s a chip",
    ),
    "v6e": Card(
        device="TPU v6 lite",
        platform="tpu",
        memory=32 * 2**30,
        link_rate=400e9,
        float32=_matrix_unit,
        clock=None,
        source="Google Cloud TPU documentation, v6e: interconnect 3,200 Gbit/s a chip",
    ),
}
