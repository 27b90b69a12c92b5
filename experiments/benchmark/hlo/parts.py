"""The part of the model that an instruction belongs to, by its name stack and its source lines."""

import re
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
    what made its operands."""
    return _part(module, module.computations[kernel.computation], kernel.instruction, hops=2)


def _part(module: Module, computation: Computation, instruction: Instruction, hops: int) -> str:
    named = [instruction]
    if instruction.opcode == "fusion":
        inside = (module.computations.get(name, {}) for name in instruction.called)
        named += [x for body in inside for x in reversed(body.values()) if x.opcode != "parameter"]
    found = (part_of(one.op_name, one.frames) for one in named)
    if (own := next((name for name in found if name != UNNAMED), None)) is not None:
        return own
    makers = [computation[x] for x in instruction.operands if x in computation] if hops else []
    makers = [maker for maker in makers if maker.opcode != "parameter"]
    found = (_part(module, computation, maker, hops - 1) for maker in makers)
    return next((name for name in found if name != UNNAMED), UNNAMED)


def short(op_name: str) -> str:
    """A name stack without the jitted function, and with one name for all blocks."""
    name = re.sub(r"^jit\(train_step\)/", "", op_name)
    return re.sub(r"blocks_\d+", "blocks_i", name)
