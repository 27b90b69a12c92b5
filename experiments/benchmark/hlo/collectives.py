"""Collectives of a module: what is sent between chips, how much, and how long it takes at least."""

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

from experiments.benchmark.hlo.parts import UNNAMED, part_of, short
from experiments.benchmark.hlo.text import Instruction, Module

COMBINED = "combined"

# Bytes that cross a chip's links in one direction, over the bytes of the array, among n chips in a ring.
_SHARES = {
    "all-reduce": lambda n: 2 * (n - 1) / n,
    "all-gather": lambda n: (n - 1) / n,
    "reduce-scatter": lambda n: (n - 1) / n,
    "all-to-all": lambda n: (n - 1) / n,
    "ragged-all-to-all": lambda n: (n - 1) / n,
    "collective-permute": lambda n: 1.0,
    "collective-broadcast": lambda n: 1.0,
}


class Collective(NamedTuple):
    """bytes: of the whole arrays, before a scatter or after a gather; sent: over a chip's links in one
    direction; arrays: the largest one, dtype and shape, and how many there are; chips: that take part;
    part: COMBINED if the compiler joined collectives of several parts."""

    kind: str
    bytes: int
    sent: float
    arrays: str
    chips: int
    part: str
    op_name: str


def collectives(module: Module, chips: int) -> list[Collective]:
    """All collectives of a module for `chips` chips, the largest first.

    A TPU's compiler repeats one in every kernel that runs beside it: its channel tells that it is one. And
    it writes a reduce-scatter as a kernel of an all-reduce and a slice, "all-reduce-scatter".
    """
    found = {}
    for name, computation in module.computations.items():
        for kind, instruction in _in(computation.values()):
            kind = "reduce-scatter" if name.startswith("all-reduce-scatter") else kind
            channel = instruction.attribute(r"channel_id=(\d+)") or (name, instruction.name)
            if channel not in found:
                found[channel] = _collective(kind, computation, instruction, chips)
    return sorted(found.values(), key=lambda one: -one.bytes)


def _in(instructions) -> Iterator[tuple[str, Instruction]]:
    for instruction in instructions:
        kind = instruction.opcode.removesuffix("-start")
        if kind in _SHARES:
            yield kind, instruction


def _collective(kind: str, computation, instruction: Instruction, chips: int) -> Collective:
    given = [array for x in instruction.operands for array in computation[x].arrays]
    made = list(instruction.arrays)
    if instruction.opcode.endswith("-start") and kind != "all-reduce":
        made = made[len(given) : 2 * len(given)]  # (operands, results, contexts)
    arrays = max(given, made, key=_bytes)
    largest = max(arrays, key=lambda array: array.bytes)
    group, part = _group(instruction, chips), part_of(instruction.op_name, instruction.frames)
    return Collective(
        kind=kind,
        bytes=_bytes(arrays),
        sent=_bytes(arrays) * _SHARES[kind](group),
        arrays=f"{largest} and {len(arrays) - 1} more" if len(arrays) > 1 else f"{largest}",
        chips=group,
        part=COMBINED if part == UNNAMED else part,
        op_name=short(instruction.op_name),
    )


def _bytes(arrays) -> int:
    return sum(array.bytes for array in arrays)


def _group(instruction: Instruction, chips: int) -> int:
    """Number of chips of each group: "{{0,1},{2,3}}", "[groups,chips]<=[…]", or axes of a mesh,
    "mesh['a'=2,'b'=4] {'b'}", with the devices' order between if it is not theirs; all by default."""
    listed = re.search(r"replica_groups=\{\{([\d,]+)\}", instruction.text)
    if listed:
        return len(listed[1].split(","))
    mesh = re.search(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}", instruction.text)
    if mesh:
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", mesh[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", mesh[2]))
    counted = re.search(r"replica_groups=\[\d+,(\d+)\]", instruction.text)
    return int(counted[1]) if counted else chips
