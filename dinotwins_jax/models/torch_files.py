"""Weights of PyTorch's world from their files, without PyTorch: .safetensors, .npz, .pth."""

import json
import math
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dinotwins_jax.models.torch_pickle import Refused, read_torch
from dinotwins_jax.models.torch_weights import vit_from_torch
from dinotwins_jax.models.vit import VisionTransformer

# Where a checkpoint nests: the teacher is the model that DINO evaluates.
_NESTS = ("teacher", "state_dict", "model")
_HEADS = re.compile(r"^(module\.|backbone\.)*(head|dino_head|ibot_head|projector)\.")
_SAFETENSORS = {
    "F64": "f8",
    "F32": "f4",
    "F16": "f2",
    "BF16": jnp.bfloat16,
    "I64": "i8",
    "I32": "i4",
}


def load_vit(
    path: str | Path, like: VisionTransformer | None = None
) -> tuple[VisionTransformer, dict]:
    """A ViT and its parameters from a file of DINO's, DINOv2's or timm's names.

    Args:
      like: says how many heads a model of its width has, which no weight tells; otherwise heads are
        64 wide, as in all ViTs of DINO, DeiT and timm.
    Raises:
      ValueError, OSError: no such file, not a file of weights, or not of this architecture.
    """
    weights = read_state_dict(path)
    try:
        fields, params = vit_fields(weights), vit_from_torch(weights)
        if like is not None and like.embed_dim == fields["embed_dim"]:
            fields["num_heads"] = like.num_heads
        elif fields["embed_dim"] % 64:
            width = fields["embed_dim"]
            raise ValueError(f"width {width} is not a multiple of 64, the width of a head")
        vit = VisionTransformer(**fields)
        _check_shapes(vit, params)
        return vit, params
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _check_shapes(vit: VisionTransformer, params: dict) -> None:
    """Raises ValueError at the first parameter that the model lacks or has in another shape."""

    def shapes(tree):
        leaves = jax.tree_util.tree_leaves_with_path(tree)
        return {jax.tree_util.keystr(path): np.shape(leaf) for path, leaf in leaves}

    images = jax.ShapeDtypeStruct((1, vit.image_size, vit.image_size, 3), jnp.float32)
    wanted = shapes(jax.eval_shape(vit.init, jax.random.key(0), images)["params"])
    found = shapes(params)
    for name in sorted(wanted.keys() | found.keys()):
        if wanted.get(name) != found.get(name):
            raise ValueError(
                f"params{name}: shape {found.get(name)}, where this ViT has {wanted.get(name)}"
            )


def read_state_dict(path: str | Path) -> dict[str, np.ndarray]:
    """Names and tensors of a backbone.

    Of a training checkpoint the "teacher" is taken, or what lies under "state_dict" or "model";
    projection heads and everything that is no tensor are left out.

    Args:
      path: .safetensors, .npz, or .pth / .pt / .bin of PyTorch 1.6 and newer. Of a pickle only
        tensors are made; whatever else it asks for is refused, not run.
    Raises:
      FileNotFoundError: no such file.
      ValueError: another kind of file, a broken one, or a pickle that asks for something else.
    """
    path = Path(path)
    readers = {".safetensors": _read_safetensors, ".npz": _read_npz}
    readers |= dict.fromkeys((".pth", ".pt", ".bin"), read_torch)
    if path.suffix not in readers:
        raise ValueError(f"{path}: weights are one of {', '.join(readers)}, not '{path.suffix}'")
    if not path.is_file():
        raise FileNotFoundError(f"no file of weights: {path}")
    try:
        found = readers[path.suffix](path)
    except Refused as error:
        raise ValueError(f"{path}: {error}") from None
    except Exception as error:  # broken files raise nearly every built-in exception
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{path} is broken or no such file: {reason}") from error
    for _ in range(3):  # {"model": {"teacher": …}}; a bound, as a pickle may hold itself
        nest = next((n for n in _NESTS if isinstance(found.get(n), dict)), None)
        found = found if nest is None else found[nest]
    tensors = {
        name: value
        for name, value in found.items()
        if isinstance(name, str) and isinstance(value, np.ndarray) and not _HEADS.search(name)
    }
    if not tensors:
        raise ValueError(
            f"{path} holds no tensors of a backbone; it has {', '.join(map(str, found))}"
        )
    return tensors


def vit_fields(weights: dict[str, np.ndarray]) -> dict[str, Any]:
    """The fields of a VisionTransformer that the shapes of its weights say.

    num_heads is that of heads 64 wide. Raises ValueError for another architecture.
    """
    weights = {re.sub(r"^(module\.|backbone\.)+", "", name): w for name, w in weights.items()}
    for name in ("patch_embed.proj.weight", "pos_embed", "blocks.0.mlp.fc1.weight"):
        if name not in weights:
            raise ValueError(f"no tensor '{name}': not a ViT with an MLP; it has {_some(weights)}")
    kernel = weights["patch_embed.proj.weight"].shape
    if len(kernel) != 4:
        raise ValueError(f"patch_embed.proj.weight {kernel}: not a convolution [D, 3, p, p]")
    D, patch_size, hidden = kernel[0], kernel[2], weights["blocks.0.mlp.fc1.weight"].shape[0]
    mlp_ratio = hidden / D
    if int(D * mlp_ratio) < hidden:  # rounding: the model takes the whole part
        mlp_ratio = math.nextafter(mlp_ratio, math.inf)
    grid = math.isqrt(weights["pos_embed"].shape[1] - 1)
    if grid * grid + 1 != weights["pos_embed"].shape[1]:
        raise ValueError(
            f"pos_embed {weights['pos_embed'].shape}: not a class token and a square grid"
        )
    registers = [weights[n].shape[1] for n in ("register_tokens", "reg_token") if n in weights]
    fields = {
        "embed_dim": D,
        "depth": len({n.split(".")[1] for n in weights if n.startswith("blocks.")}),
        "num_heads": D // 64,
        "patch_size": patch_size,
        "image_size": grid * patch_size,
        "mlp_ratio": mlp_ratio,
        "num_register_tokens": registers[0] if registers else 0,
    }
    if "blocks.0.ls1.gamma" in weights:
        fields["layer_scale_init"] = 1.0  # there to make room: the weights replace it
    return fields


def _some(names) -> str:
    return ", ".join(sorted(names)[:6]) + " …"


def _read_npz(path: Path) -> dict:
    with np.load(path, allow_pickle=False) as file:
        return {name: file[name] for name in file.files}


def _read_safetensors(path: Path) -> dict:
    """An u64 length, so many bytes of JSON, then the tensors."""
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    tensors = {}
    for name, entry in json.loads(data[8:start]).items():
        if name == "__metadata__":
            continue
        if entry["dtype"] not in _SAFETENSORS:
            raise Refused(f"tensor '{name}' is of type {entry['dtype']}")
        first, last = (start + offset for offset in entry["data_offsets"])
        flat = np.frombuffer(data[first:last], np.dtype(_SAFETENSORS[entry["dtype"]]))
        tensors[name] = flat.reshape(entry["shape"])
    return tensors
