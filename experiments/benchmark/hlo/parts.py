"""The part of the model that an instruction belongs to, by its name stack and its source lines."""

import re
from pathlib import PurePath

from experiments.benchmark.hlo.kernels import Kernel
from experiments.benchmark.hlo.text import Instruction, Module

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
    "augmentation", REST; UNNAMED for what the compiler made.

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
    if any(function == "ema_update" for _, function in ours):
        return "EMA"
    if (
        ours and ours[0][1] == "_keep"
    ):  # of the teacher's parameters; they are fused with their average
        return "EMA"
    if any("/optax/" in file for file, _ in frames):
        return "optimiser"
    return REST if ours else UNNAMED


def part(module: Module, kernel: Kernel) -> str:
    """The part of a kernel; one without a name belongs to the last named instruction inside it, else to
    that which made its first operand with a name."""
    instruction, computation = kernel.instruction, module.computations[kernel.computation]
    inside = [
        x
        for name in (instruction.called if instruction.opcode == "fusion" else [])
        for x in reversed(module.computations.get(name, {}).values())
        if x.opcode != "parameter"
    ]
    makers = [computation[x] for x in instruction.operands if x in computation]
    makers += [computation[x] for maker in makers for x in maker.operands if x in computation]
    for one in [instruction, *inside, *(x for x in makers if x.opcode != "parameter")]:
        if (found := _part_of_instruction(one)) != UNNAMED:
            return found
    return UNNAMED


def _part_of_instruction(instruction: Instruction) -> str:
    return part_of(instruction.op_name, instruction.frames)


def short(op_name: str) -> str:
    """A name stack without the jitted function, and with one name for all blocks."""
    name = re.sub(r"^jit\(train_step\)/", "", op_name)
    return re.sub(r"blocks_\d+", "blocks_i", name)
