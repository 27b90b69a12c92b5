"""The kernels that a module launches, with the bytes that each moves to and from the device's memory."""

import math
from collections.abc import Iterator
from typing import NamedTuple

from experiments.benchmark.hlo.text import Array, Computation, Instruction, Module

# Instructions that move nothing: names of arrays, or ends of what a "-start" began.
_FREE = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "opt-barrier", "after-all"),
    *("partition-id", "replica-id", "domain", "async-update", "get-dimension-size"),
}
_FREE_CALLS = {"ConcatBitcast"}  # TPU: neighbouring arrays seen as one
TRANSFERS = {"copy-start", "slice-start", "dynamic-slice-start"}  # beside the kernels
_VIEWS = {"bitcast", "get-tuple-element", "copy-done", "async-done"}
_CALLS = {"call", "async-start", "while", "conditional"}
_PARTIAL = {"slice", "dynamic-slice", "gather"}  # they read as much as they return
_STARTED = {"slice-start", "dynamic-slice-start"}  # these too: (operands, slice, context)


class Kernel(NamedTuple):
    """instruction: in the computation; runs: in a step; read, written: bytes in one run."""

    instruction: Instruction
    computation: str
    runs: int
    read: int
    written: int

    @property
    def bytes(self) -> int:
        """Bytes read and written in all runs."""
        return self.runs * (self.read + self.written)

    @property
    def is_transfer(self) -> bool:
        """Whether it only moves an array, while kernels run."""
        return self.instruction.opcode in TRANSFERS


def kernels(module: Module) -> list[Kernel]:
    """All kernels of a module. Bodies of loops count as often as they run, see _trips; all branches of a
    conditional count."""
    return [
        Kernel(instruction, name, runs, *_traffic(module, name, instruction))
        for name, instruction, runs in _launched(module, module.entry, 1)
    ]


def _launched(module: Module, name: str, runs: int) -> Iterator[tuple[str, Instruction, int]]:
    for instruction in module.computations[name].values():
        opcode = instruction.opcode
        if opcode in _CALLS:
            times = runs * _trips(module, instruction) if opcode == "while" else runs
            for called in instruction.called:
                yield from _launched(module, called, times)
        elif not (opcode.endswith("-done") or _is_free(module.computations[name], instruction)):
            yield name, instruction, runs


def _trips(module: Module, loop: Instruction) -> int:
    """Runs of a loop: as the compiler states them, else the constant below which a counter has to be, as in
    the loops of jax.lax.scan; 1 if neither says."""
    known = loop.attribute(r'known_trip_count[^\d]*"?(\d+)')
    if known:
        return int(known)
    condition = module.computations.get(loop.attribute(r"condition=%?([\w.\-]+)") or "", {})
    for root in (one for one in condition.values() if one.is_root and one.opcode == "compare"):
        limit = condition[root.operands[1]]
        if root.attribute(r"direction=(\w+)") == "LT" and limit.opcode == "constant":
            return int(limit.operand_text)
    return 1


def _is_free(computation: Computation, instruction: Instruction) -> bool:
    if instruction.opcode in ("fusion", "custom-call") or instruction.called:
        return instruction.attribute(r'custom_call_target="([^"]*)"') in _FREE_CALLS
    given = [computation[x] for x in instruction.operands if x in computation]
    sizes = [math.prod(array.shape) for x in [instruction, *given] for array in x.arrays]
    of_scalars = max(sizes, default=0) <= 1
    return instruction.opcode in _FREE or of_scalars  # on a TPU, the scalar unit's


def _traffic(module: Module, name: str, instruction: Instruction) -> tuple[int, int]:
    """(bytes read, bytes written) of one run: every operand is read once, every result written once."""
    computation = module.computations[name]
    inside = module.computations.get((instruction.called or [""])[0], {})
    if instruction.opcode != "fusion":
        inside = {}
    parameters = {x.operand_text: x for x in inside.values() if x.opcode == "parameter"}
    read, seen = 0, set()
    for place, operand in enumerate(instruction.operands):
        if operand in seen or operand not in computation:
            continue
        seen.add(operand)
        whole = _in_memory(computation[operand].arrays)
        part = _read_by(instruction, place)
        if inside:
            part = _read_of(inside, parameters.get(str(place)))
        read += whole if part is None else min(part, whole)
    return read, _written(inside, computation, instruction)


def _in_memory(arrays: tuple[Array, ...]) -> int:
    return sum(array.bytes for array in arrays if not array.on_chip)


def _read_of(inside: Computation, parameter: Instruction | None) -> int | None:
    """Bytes that a fusion reads of a parameter; None: all."""
    if parameter is None:
        return None
    total = 0
    for user in inside.values():
        for place, operand in enumerate(user.operands):
            if operand != parameter.name:
                continue
            part = _read_of(inside, user) if user.opcode in _VIEWS else _read_by(user, place)
            if part is None:
                return None
            total += part
    return total


def _read_by(user: Instruction, place: int) -> int | None:
    """Bytes that an instruction reads of its operand number `place`; None: all."""
    if place == 0 and user.opcode in _PARTIAL:
        return sum(array.bytes for array in user.arrays)
    if place == 0 and user.opcode in _STARTED:
        return user.arrays[1].bytes
    if place == 0 and user.opcode == "dynamic-update-slice":  # in place
        return 0
    return None


def _written(inside: Computation, computation: Computation, instruction: Instruction) -> int:
    if instruction.opcode == "copy-start":  # (to, from, context)
        return _in_memory(instruction.arrays[:1])
    if instruction.opcode in _STARTED:
        return _in_memory(instruction.arrays[1:2])
    if instruction.opcode.endswith("-start"):  # some return their operands too
        own = sum(_in_memory(computation[x].arrays) for x in instruction.operands)
        whole = _in_memory(instruction.arrays)
        return whole - own if whole > own else whole
    root = next((x for x in inside.values() if x.is_root), instruction)
    where = inside or computation
    results = [where[x] for x in root.operands] if root.opcode == "tuple" else [root]
    if len(results) != len(instruction.arrays):
        return _in_memory(instruction.arrays)
    return sum(
        0 if array.on_chip else min(array.bytes, _stored(where, result, array))
        for result, array in zip(results, instruction.arrays, strict=True)
    )


def _stored(where: Computation, result: Instruction, array: Array) -> int:
    """Bytes that computing `result` stores: of an update in place, only the update."""
    while result.opcode in _VIEWS and result.operands and result.operands[0] in where:
        result = where[result.operands[0]]
    if result.opcode == "dynamic-update-slice" and result.operands[1] in where:
        return sum(x.bytes for x in where[result.operands[1]].arrays)
    return array.bytes
