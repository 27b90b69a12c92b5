"""Sums that a module accumulates in less than float32."""

from typing import NamedTuple

from experiments.benchmark.hlo.parts import Parts, short
from experiments.benchmark.hlo.text import Instruction, Module

_NARROW = ("bf16", "f16")
_SUMS = ("reduce", "all-reduce", "all-reduce-start", "reduce-scatter", "reduce-window")


class Reduction(NamedTuple):
    """result: dtype and shape; terms: elements summed for one element of it."""

    result: str
    terms: int
    part: str
    op_name: str


def low_precision(module: Module, parts: Parts) -> list[Reduction]:
    """All of them, those inside fusions too. Matrix products accumulate in float32 whatever their result's
    dtype is, and do not count; nor do maxima, nor sums of one term."""
    found = (
        _reduction(parts, name, computation, instruction)
        for name, computation in module.computations.items()
        for instruction in computation.values()
        if instruction.opcode in _SUMS
        and any(array.dtype in _NARROW for array in instruction.arrays)
        and _adds(module, instruction)
    )
    return [reduction for reduction in found if reduction.terms > 1]


def _adds(module: Module, instruction: Instruction) -> bool:
    """Whether the reducer is a sum."""
    roots = [
        one
        for name in instruction.called
        for one in module.computations.get(name, {}).values()
        if one.is_root
    ]
    return any(root.opcode == "add" for root in roots)


def _reduction(parts: Parts, name: str, computation, instruction: Instruction) -> Reduction:
    array = next(array for array in instruction.arrays if array.dtype in _NARROW)
    whole = computation[instruction.operands[0]].arrays[0] if instruction.operands else array
    return Reduction(
        result=str(array),
        terms=max(whole.bytes // max(array.bytes, 1), 1),
        part=parts.of_instruction(name, instruction),
        op_name=short(instruction.op_name),
    )
