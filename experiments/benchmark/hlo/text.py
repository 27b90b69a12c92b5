"""The text of a compiled HLO module as instructions: `parse`, and what an instruction's line says."""

import math
import re
from typing import NamedTuple

_BITS = {"pred": 8, "s4": 4, "u4": 4, "bf16": 16, "token": 0, "opaque": 0}
_ARRAY = re.compile(r"([a-z]\w*)\[([\d,]*)\](?:\{([^{}]*)\})?")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*)$")
_CALLED = re.compile(
    r"(?:calls|to_apply|body|true_computation|false_computation|branch_computations|called_computations)"
    r"=(?:\{([^}]*)\}|%?([\w.\-]+))"
)
_FRAME = re.compile(r"stack_frame_id=(\d+)")


class Array(NamedTuple):
    """One array of a type; layout: the text in braces, such as "1,0:T(8,128)(2,1)S(1)"."""

    dtype: str
    shape: tuple[int, ...]
    layout: str = ""

    def __str__(self) -> str:
        return f"{self.dtype}{list(self.shape)}"

    @property
    def bytes(self) -> int:
        """Bytes that the array takes, with the padding of its layout's tiles."""
        order, _, tiling = self.layout.partition(":")
        shape = [self.shape[int(axis)] for axis in order.split(",") if axis]  # minor first
        shape = shape if len(shape) == len(self.shape) else [*reversed(self.shape)]
        tile = re.match(r"T\(([\d,]+)\)", tiling)
        if tile and shape:
            sides = [int(side) for side in reversed(tile[1].split(","))]
            padded = [-(-n // side) * side for n, side in zip(shape, sides, strict=False)]
            shape = padded + shape[len(padded) :]
        return math.prod(shape) * bits(self.dtype) // 8

    @property
    def on_chip(self) -> bool:
        """Whether it lies in another memory than the device's main one."""
        return re.search(r"S\([1-9]", self.layout) is not None


def bits(dtype: str) -> int:
    """Bits of an element; 8 for an unknown dtype."""
    found = re.match(r"[a-z]+(\d+)", dtype)
    return _BITS[dtype] if dtype in _BITS else int(found[1]) if found else 8


class Instruction(NamedTuple):
    """One line. arrays: of its result, in order; operands: names; text: what follows the operands; frames:
    (file, function) of the source and its callers, innermost first."""

    name: str
    arrays: tuple[Array, ...]
    opcode: str
    operands: tuple[str, ...]
    operand_text: str
    text: str
    is_root: bool
    frames: tuple[tuple[str, str], ...] = ()

    def attribute(self, pattern: str) -> str | None:
        """The first group of a pattern in the attributes, None without a match."""
        found = re.search(pattern, self.text)
        return found and found[1]

    @property
    def op_name(self) -> str:
        """The path of JAX's name stack; "" if the compiler made the instruction."""
        return self.attribute(r'op_name="([^"]*)"') or ""

    @property
    def called(self) -> list[str]:
        """Names of the computations that it calls."""
        found = (several or one for several, one in _CALLED.findall(self.text))
        return [name.strip().lstrip("%") for names in found for name in names.split(",") if name]


Computation = dict[str, Instruction]


class Module(NamedTuple):
    """computations: name -> {name of an instruction: the instruction}, in order; entry: the main one's."""

    computations: dict[str, Computation]
    entry: str


def parse(text: str) -> Module:
    """Reads the text of a compiled module, as `jax.stages.Compiled.as_text()` returns it."""
    frames = _Frames(text)
    computations, current, entry = {}, None, ""
    for line in text.splitlines():
        if not line.startswith(" "):
            if (head := _COMPUTATION.match(line)) is not None:
                current = computations.setdefault(head[2], {})
                entry = head[2] if head[1] else entry
        elif current is not None and (found := _INSTRUCTION.match(line)) is not None:
            instruction = _instruction(found[2], found[3], bool(found[1]), frames)
            if instruction is not None:
                current[instruction.name] = instruction
    return Module(computations, entry)


def _instruction(name: str, line: str, is_root: bool, frames: "_Frames") -> Instruction | None:
    end = _closing(line) if line.startswith("(") else line.find(" ")
    result, rest = line[:end], line[end:].lstrip()
    opcode, bracket, _ = rest.partition("(")
    if not bracket or not re.fullmatch(r"[\w\-]+", opcode):
        return None
    rest = rest[len(opcode) :]
    end = _closing(rest)
    operands, text = rest[1 : end - 1], rest[end:]
    frame = _FRAME.search(text)
    return Instruction(
        name=name,
        arrays=tuple(arrays(result)),
        opcode=opcode,
        operands=tuple(re.findall(r"%([\w.\-]+)", operands)),
        operand_text=operands,
        text=text,
        is_root=is_root,
        frames=frames.of(int(frame[1])) if frame else (),
    )


def arrays(text: str) -> list[Array]:
    """All arrays that a type names, those of tuples in order."""
    return [
        Array(dtype, tuple(int(n) for n in shape.split(",") if n), layout)
        for dtype, shape, layout in _ARRAY.findall(text)
    ]


def _closing(text: str) -> int:
    """The index behind the bracket that closes the one at index 0."""
    depth = 0
    for place, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if depth == 0:
            return place + 1
    return len(text)


class _Frames:
    """The tables of source positions at the top of a module."""

    def __init__(self, text: str):
        self._files = dict(_rows(text, "FileNames", r'^(\d+) "(.*)"$'))
        self._functions = dict(_rows(text, "FunctionNames", r'^(\d+) "(.*)"$'))
        places = r"^(\d+) \{file_name_id=(\d+) function_name_id=(\d+)"
        self._places = {place: of for place, *of in _rows(text, "FileLocations", places)}
        stack = r"^(\d+) \{file_location_id=(\d+) parent_frame_id=(\d+)"
        self._stack = {frame: of for frame, *of in _rows(text, "StackFrames", stack)}

    def of(self, frame: int) -> tuple[tuple[str, str], ...]:
        """(file, function) of a frame and of those that called it, innermost first."""
        found = []
        while (row := self._stack.get(str(frame))) is not None:
            file, function = self._places[row[0]]
            found.append((self._files[file], self._functions[function]))
            frame = int(row[1]) - 1  # printed plus 1; 0: none
        return tuple(found)


def _rows(text: str, title: str, pattern: str) -> list[tuple[str, ...]]:
    found = re.search(rf"^{title}\n((?:.+\n)+)", text, re.MULTILINE)
    return re.findall(pattern, found[1], re.MULTILINE) if found else []
