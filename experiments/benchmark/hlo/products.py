"""Matrix products of a module: FLOPs (2 per multiply-add), dtypes and precision."""

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

from experiments.benchmark.hlo.kernels import Kernel
from experiments.benchmark.hlo.text import Array, Computation, Instruction, Module


class Product(NamedTuple):
    """One product of a kernel. factors, result: arrays; flops: of one run; precision: "default" | "high" |
    "highest"."""

    factors: tuple[Array, Array]
    result: Array
    flops: float
    precision: str
    op_name: str

    @property
    def dtypes(self) -> tuple[str, str]:
        """Of the factors."""
        return self.factors[0].dtype, self.factors[1].dtype


def products(module: Module, kernel: Kernel) -> list[Product]:
    """The products that a kernel computes."""
    computation = module.computations[kernel.computation]
    return list(_inside(module, computation, kernel.instruction))


def _inside(
    module: Module, computation: Computation, instruction: Instruction
) -> Iterator[Product]:
    if (flops := _flops(computation, instruction)) is not None:
        operands = [computation[x].arrays[0] for x in instruction.operands[:2]]
        yield Product(
            factors=(operands[0], operands[1]),
            result=instruction.arrays[0],
            flops=flops,
            precision=_precision(instruction),
            op_name=instruction.op_name,
        )
    elif instruction.opcode == "fusion":
        for name in instruction.called:
            inner = module.computations.get(name, {})
            for one in inner.values():
                yield from _inside(module, inner, one)


def _flops(computation: Computation, instruction: Instruction) -> float | None:
    """None: no product."""
    if instruction.opcode not in ("dot", "convolution", "custom-call"):
        return None
    shapes = [computation[x].arrays[0].shape for x in instruction.operands if x in computation]
    result = instruction.arrays[0].shape
    if instruction.opcode == "convolution":
        return convolution_flops(instruction.text, result, *shapes[:2])
    if instruction.opcode == "dot":
        axes = instruction.attribute(r"lhs_contracting_dims=\{([\d,]*)\}")
        return 2.0 * math.prod(result) * _along(shapes[0], axes)
    target = instruction.attribute(r'custom_call_target="([^"]*)"') or ""
    if target.startswith("__cublas"):
        axes = instruction.attribute(r'"lhs_contracting_dimensions":\[([^\]]*)\]')
        return 2.0 * math.prod(result) * _along(shapes[0], axes)
    if target.startswith("__cudnn$fmha"):  # [B, T, H, D] each; two products forward, five backward
        count = 5 if "Backward" in target else 2
        return 2.0 * count * math.prod(shapes[0]) * shapes[1][1]
    return None


def _along(shape: tuple[int, ...], axes: str | None) -> int:
    return math.prod(shape[int(axis)] for axis in re.findall(r"\d+", axes or ""))


def _precision(instruction: Instruction) -> str:
    found = instruction.attribute(r"operand_precision=\{(\w+)")
    found = found or instruction.attribute(r'"operand_precision":\["(\w+)"')
    return (found or "default").lower()


def convolution_flops(text: str, result, image, kernel) -> float:
    """FLOPs of a convolution, TPUs' form of a product; only taps that lie in the image count.

    Args:
      text: the attributes; result, image, kernel: shapes.
    """
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", text)
    window = re.search(r"window=\{([^}]*)\}", text)
    window = dict(re.findall(r"(\w+)=(\S+)", window[1])) if window else {}
    spatial = sorted(letter for letter in labels[1] if letter.isdigit())

    def setting(name: str, usual: str) -> list[str]:
        return window[name].split("x") if name in window else [usual] * len(spatial)

    taps = 1
    columns = (
        ("size", "1"),
        ("stride", "1"),
        ("lhs_dilate", "1"),
        ("rhs_dilate", "1"),
        ("pad", "0_0"),
    )
    for axis, size, stride, spread, dilation, pad in zip(
        spatial, *(setting(*column) for column in columns), strict=True
    ):
        outputs, inputs = result[labels[3].index(axis)], image[labels[1].index(axis)]
        first, spread = int(pad.split("_")[0]), int(spread)
        taps *= sum(
            place % spread == 0 and 0 <= place // spread < inputs
            for output in range(outputs)
            for place in (
                output * int(stride) + k * int(dilation) - first for k in range(int(size))
            )
        )
    outer = result[labels[3].index("b")] * result[labels[3].index("f")]
    return 2.0 * taps * outer * kernel[labels[2].index("i")]
