"""Attention weights that a module writes to memory: what flash attention would not."""

from experiments.benchmark.hlo.kernels import Kernel
from experiments.benchmark.hlo.parts import Parts
from experiments.benchmark.hlo.text import Array


def materialised_weights(
    parts: Parts, launched: list[Kernel], tokens: list[int]
) -> list[tuple[Kernel, Array]]:
    """Arrays [..., T, T] (axes in any order) that kernels of the attention write.

    tokens: the lengths T of the sequences; padded ones, to multiples of 2, 8 or 128, count too.
    """
    lengths = {-(-count // step) * step for count in tokens for step in (1, 2, 8, 128)}
    return [
        (kernel, array)
        for kernel in launched
        if parts.of(kernel) == "attention core"
        for array in kernel.instruction.arrays
        if len(array.shape) > 2 and any(array.shape.count(length) > 1 for length in lengths)
    ]
