"""The part of the model that an instruction belongs to, by its name stack and its source lines."""

import re
from collections import defaultdict
from itertools import chain
from pathlib import PurePath

from experiments.benchmark.hlo.kernels import Kernel
from experiments.benchmark.hlo.text import Computation, Instruction, Module

UNNAMED = "unnamed"
REST = "rest of the step"  # schedules, metrics, random numbers

# Paths of modules in the name stack of the backbone, first match first.
_BACKBONE = (
    (r"/attn/qkv\b", "qkv"),
    (r"/attn/proj\b", "attention projection"),
    (r"/attn/|/attn$", "attention core"),
    (r"/mlp/", "MLP"),
    (r"patch_embed", "patch embedding"),
    (r"\._embed\b", "tokens and positions"),
    (r"blocks_\d+", "residuals"),
    (r"VisionTransformer", "norms"),  # the last one
)
_NORMS = ("LayerNorm", "normalise", "_normalise")


def part_of(op_name: str, frames: tuple[tuple[str, str], ...]) -> str:
    """The part: one of the backbone, "head …" or "loss …" with its name, "optimiser", "EMA",
    "augmentation", "heads to losses" (the arrays between them), REST; UNNAMED for what the compiler made.

    Args:
      op_name: JAX's name stack; frames: (file, function), innermost first; as in hlo.text.Instruction.
    """
    ours = [
        (file.rpartition("dinotwins_jax/")[2], function)
        for file, function in frames
        if "dinotwins_jax/" in file
    ]
    folders = {file.split("/")[0] for file, _ in ours}
    if "augment" in folders:
        return "augmentation"
    losses = [PurePath(file).stem for file, _ in ours if file.startswith("losses/")]
    if losses:
        return f"loss {losses[0]}"
    head = re.search(r"\b(\w+(?:Head|Projector|Predictor))\b(.*)", op_name)
    if head:
        return f"head {head[1]}" + (", prototypes" if "/last_layer" in head[2] else "")
    if any(function.startswith(_NORMS) for _, function in ours[:2]):
        return "norms"
    for pattern, part in _BACKBONE:
        if re.search(pattern, op_name):
            return part
    return _of_step(ours, frames)


def _of_step(ours, frames) -> str:
    """The part of an instruction outside all modules."""
    if any(file == "training/optim.py" or function == "apply_gradients" for file, function in ours):
        return "optimiser"
    # _keep: of the teacher's parameters, into which their average is fused
    if any(function == "ema_update" for _, function in ours) or (ours and ours[0][1] == "_keep"):
        return "EMA"
    if ours and ours[0][0] == "training/objective.py":
        return "heads to losses"
    if any("/optax/" in file for file, _ in frames):
        return "optimiser"
    return REST if ours else UNNAMED


class Parts:
    """Parts of the kernels of a module."""

    def __init__(self, module: Module):
        self._module = module
        self._users = {
            name: _users(computation) for name, computation in module.computations.items()
        }

    def of(self, kernel: Kernel) -> str:
        """The part of a kernel, see of_instruction."""
        return self.of_instruction(kernel.computation, kernel.instruction)

    def of_instruction(self, computation: str, instruction: Instruction) -> str:
        """The part of an instruction of a computation. One without a name belongs to the last named one
        inside it, else to what made its operands, else to what reads its results."""
        return self._of(computation, instruction, before=3, behind=3)

    def _of(self, name: str, instruction: Instruction, before: int, behind: int) -> str:
        computation = self._module.computations[name]
        named = [instruction]
        if instruction.opcode == "fusion":
            bodies = (self._module.computations.get(x, {}) for x in instruction.called)
            named += [x for body in bodies for x in reversed(body.values())]
        found = (part_of(x.op_name, x.frames) for x in named if x.opcode != "parameter")
        near = [computation[x] for x in instruction.operands if x in computation] if before else []
        makers = (
            self._of(name, x, before - 1, 0) for x in near if x.opcode not in ("parameter", "tuple")
        )
        readers = self._users[name].get(instruction.name, []) if behind else []
        users = (self._of(name, x, 0, behind - 1) for x in readers if x.opcode != "tuple")
        return next((x for x in chain(found, makers, users) if x != UNNAMED), UNNAMED)


def _users(computation: Computation) -> dict[str, list[Instruction]]:
    found = defaultdict(list)
    for instruction in computation.values():
        for operand in instruction.operands:
            found[operand].append(instruction)
    return found


def short(op_name: str) -> str:
    """A name stack without the jitted function, and with one name for all blocks."""
    name = re.sub(r"^jit\(train_step\)/", "", op_name)
    return re.sub(r"blocks_\d+", "blocks_i", name)
