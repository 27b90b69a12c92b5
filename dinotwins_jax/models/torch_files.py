"""Reads PyTorch weight files (.safetensors, .npz, .pth) without PyTorch."""

import json
import math
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file

from dinotwins_jax.models.block import ratio_of
from dinotwins_jax.models.positions import ROPE_BASE
from dinotwins_jax.models.torch_folder import weights_file
from dinotwins_jax.models.torch_names import PERIODS, blocks_of, common, interpolation_of
from dinotwins_jax.models.torch_pickle import Refused, read_torch
from dinotwins_jax.models.torch_weights import vit_from_torch
from dinotwins_jax.models.vit import VisionTransformer, as_pair

# Nested keys of checkpoints: the teacher is the model that DINO evaluates.
_NESTS = ("teacher", "state_dict", "model")
_HEADS = re.compile(r"^(module\.|backbone\.)*(head|dino_head|ibot_head|projector)\.")


def load_vit(
    path: str | Path, like: VisionTransformer | None = None
) -> tuple[VisionTransformer, dict]:
    """Loads a ViT and its parameters from weights of DINO, DINOv2, DINOv3, timm or HF transformers.

    The number of heads, the norms' epsilon and the interpolation of positions are in no tensor: they are
    taken from a config.json beside the file (HF's, timm's, or of our export), if it is for a model of the
    same width; else the interpolation is that of the code whose names the tensors have.

    Args:
      path: a file, or a folder with one: see `weights_file`.
      like: without such a config.json, the number of heads is that of `like`, if of the same width;
        otherwise heads are 64 wide, as in all ViTs of DINO, DeiT and timm, or as wide as DINOv3's periods
        imply.
    Raises:
      ValueError, OSError: no such file, not a file of weights, or not of this architecture.
    """
    path = weights_file(path)
    weights = read_state_dict(path)
    try:
        fields, params = vit_fields(weights), vit_from_torch(weights)
        width = fields["embed_dim"]
        stated = stated_beside(path, width)
        if like is not None and like.embed_dim == width and "positions" not in fields:
            fields["num_heads"] = like.num_heads
        fields |= stated
        if not fields["image_size"]:
            shape = params["pos_embed"].shape
            raise ValueError(f"pos_embed {shape}: not a class token and a square grid")
        if not fields["num_heads"]:
            raise ValueError(f"width {width} is not a multiple of 64, the width of a head")
        vit = VisionTransformer(**fields)
        _check_shapes(vit, params)
        return vit, params
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _check_shapes(vit: VisionTransformer, params: dict) -> None:
    """Raises ValueError for the first parameter that is missing in the model or has another shape."""

    def shapes(tree):
        leaves = jax.tree_util.tree_leaves_with_path(tree)
        return {jax.tree_util.keystr(path): np.shape(leaf) for path, leaf in leaves}

    shape = (1, *as_pair(vit.image_size), vit.in_channels)
    images = jax.ShapeDtypeStruct(shape, jnp.float32)
    wanted = shapes(jax.eval_shape(vit.init, jax.random.key(0), images)["params"])
    found = shapes(params)
    for name in sorted(wanted.keys() | found.keys()):
        if wanted.get(name) != found.get(name):
            raise ValueError(
                f"params{name}: shape {found.get(name)}, expected {wanted.get(name)} for this ViT"
            )


def read_state_dict(path: str | Path) -> dict[str, np.ndarray]:
    """Reads the named tensors of a backbone.

    From a training checkpoint the "teacher" is read, or the entry "state_dict" or "model"; projection
    heads and everything that is not a tensor are left out.

    Args:
      path: .safetensors, .npz, or .pth / .pt / .bin of PyTorch 1.6 and newer, or a folder with one: see
        `weights_file`. From a pickle only tensors are created; any other object is refused, not run.
    Raises:
      FileNotFoundError: no such file.
      ValueError: another kind of file, a broken one, or a pickle with other objects.
    """
    path = weights_file(path)
    read = {".safetensors": load_file, ".npz": _read_npz}.get(path.suffix, read_torch)
    try:
        found = read(path)
    except Refused as error:
        raise ValueError(f"{path}: {error}") from None
    except Exception as error:  # broken files raise nearly every built-in exception
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{path} is broken or no such file: {reason}") from error
    for _ in range(3):  # {"model": {"teacher": …}}; bounded, as a pickle may contain itself
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
    """The fields of a VisionTransformer, inferred from the shapes of its weights.

    num_heads is for heads 64 wide (0: impossible), or from DINOv3's periods; norm_eps and
    position_interpolation are those of the official models; image_size is 0 if the grid of positions is
    not square. Raises ValueError for another architecture.
    """
    rule = interpolation_of(weights)
    weights = common(weights)
    ffn = "swiglu" if "blocks.0.mlp.w3.weight" in weights else "mlp"
    first = f"blocks.0.mlp.{'w12' if ffn == 'swiglu' else 'fc1'}.weight"
    rope = PERIODS in weights
    for name in ("patch_embed.proj.weight", first, *(() if rope else ("pos_embed",))):
        if name not in weights:
            raise ValueError(
                f"no tensor '{name}': not a ViT of DINO's kind; it has {_some(weights)}"
            )
    kernel = weights["patch_embed.proj.weight"].shape
    if len(kernel) != 4:
        raise ValueError(f"patch_embed.proj.weight {kernel}: not a convolution [D, C, p, p]")
    D, patch_size, hidden = kernel[0], kernel[2], weights[first].shape[0]
    if ffn == "swiglu":
        if hidden % 16:
            raise ValueError(f"{first} {weights[first].shape}: SwiGLU's width is a multiple of 8")
        hidden = hidden // 2 * 3 // 2  # of the MLP in its place
    registers = weights.get("register_tokens", np.zeros((1, 0)))
    fields = {
        "embed_dim": D,
        "depth": len(blocks_of(weights)),
        "num_heads": 0 if D % 64 else D // 64,
        "patch_size": patch_size,
        "in_channels": kernel[1],
        "image_size": 14 * patch_size,  # arbitrary for rotary positions
        "mlp_ratio": ratio_of(hidden, D),
        "num_register_tokens": registers.shape[1],
    }
    if ffn != "mlp":
        fields["ffn"] = ffn
    if rope:
        fields |= {"positions": "rope", "norm_eps": 1e-5}
        if len(weights[PERIODS]):
            fields["num_heads"] = D // (4 * len(weights[PERIODS]))
    else:
        fields["position_interpolation"] = rule
        grid = math.isqrt(weights["pos_embed"].shape[1] - 1)
        square = grid * grid + 1 == weights["pos_embed"].shape[1]
        fields["image_size"] = grid * patch_size if square else 0
    if "blocks.0.ls1.gamma" in weights:
        fields["layer_scale_init"] = 1.0  # creates the parameter; the weights replace it
    return fields


def stated_beside(path: Path, embed_dim: int) -> dict[str, Any]:
    """num_heads, norm_eps and position_interpolation from the config.json beside a file, and of our exports
    image_size; {} without one of this width."""
    file = path.with_name("config.json")
    try:
        config = json.loads(file.read_text()) if file.is_file() else {}
        if not isinstance(config, dict):
            raise ValueError(f"it holds a {type(config).__name__}")
    except (OSError, ValueError) as error:
        raise ValueError(f"{file.name} beside it is broken: {error}") from None
    ours = config.get("dinotwins_jax")
    if isinstance(ours, dict) and ours.get("embed_dim") == embed_dim:
        found = {name: ours[name] for name in ("num_heads", "norm_eps") if name in ours}
        found["position_interpolation"] = ours.get("position_interpolation", "dino")
        if side := ours.get("image_size", 0):
            found["image_size"] = side if isinstance(side, int) else tuple(side)
        return found
    if "pretrained_cfg" in config and config.get("num_features", embed_dim) == embed_dim:
        return {"position_interpolation": "antialias"}  # timm's
    if config.get("hidden_size") != embed_dim:
        return {}
    if config.get("rope_theta", ROPE_BASE) != ROPE_BASE:
        raise ValueError(f"its rope_theta is {config['rope_theta']}, here it is {ROPE_BASE}")
    names = {"num_heads": "num_attention_heads", "norm_eps": "layer_norm_eps"}
    return {ours: config[theirs] for ours, theirs in names.items() if theirs in config}


def _some(names) -> str:
    return ", ".join(sorted(names)[:6]) + " …"


def _read_npz(path: Path) -> dict:
    with np.load(path, allow_pickle=False) as file:
        return {name: file[name] for name in file.files}
