"""Conversion from and to PyTorch state dicts (ViTs of official DINO, timm and HF transformers).

A state dict is any mapping name -> array-like (numpy arrays or torch CPU tensors).
"""

import re

import numpy as np

from dinotwins_jax.models.positions import rope_periods
from dinotwins_jax.models.torch_names import PERIODS, blocks_of, common
from dinotwins_jax.models.torch_targets import to_dino

# common name in torch, our path inside a block, kind of tensor
_BLOCK = [
    ("norm1", ("norm1",), "norm"),
    ("attn.qkv", ("attn", "qkv"), "linear"),
    ("attn.proj", ("attn", "proj"), "linear"),
    ("norm2", ("norm2",), "norm"),
]
_FFN = {
    "mlp": [("mlp.fc1", ("mlp", "fc1"), "linear"), ("mlp.fc2", ("mlp", "fc2"), "linear")],
    "swiglu": [("mlp.w12", ("mlp", "w12"), "linear"), ("mlp.w3", ("mlp", "w3"), "linear")],
}
_KERNEL = {"norm": "scale", "linear": "kernel"}


def _clean(state_dict) -> dict[str, np.ndarray]:
    """Converts to numpy float32 and strips wrapper prefixes (DataParallel, MultiCropWrapper)."""
    strip = re.compile(r"^(module\.|backbone\.)+")
    return {strip.sub("", k): np.asarray(v).astype(np.float32) for k, v in state_dict.items()}


def _take(weights: dict, name: str, shape: tuple | None = None) -> np.ndarray:
    if name not in weights:
        raise ValueError(
            f"state dict has no tensor '{name}'; it has {', '.join(sorted(weights)[:8])} …"
        )
    if shape is not None and weights[name].shape != shape:
        raise ValueError(f"tensor '{name}' has shape {weights[name].shape}, expected {shape}")
    return weights.pop(name)


def _layer(weights: dict, name: str, kind: str) -> dict[str, np.ndarray]:
    kernel = _take(weights, f"{name}.weight")
    if kind == "linear":
        kernel = kernel.T
    layer = {_KERNEL[kind]: np.ascontiguousarray(kernel)}
    if f"{name}.bias" in weights:
        layer["bias"] = _take(weights, f"{name}.bias", (kernel.shape[-1],))
    return layer


def vit_from_torch(state_dict) -> dict:
    """Parameters of a `VisionTransformer` from a state dict of DINO, DINOv2, DINOv3, timm or HF.

    Args:
      state_dict: name -> array, see torch_names.py; wrapper prefixes are dropped, classifier heads and
        the mask token are left out. DINOv3's mask of the key bias is applied to the bias.
    Returns:
      params, ready for VisionTransformer.apply({"params": params}, …).
    Raises:
      ValueError: a tensor is missing, has the wrong shape, or belongs to another architecture.
    """
    weights = common(state_dict)
    conv = _take(weights, "patch_embed.proj.weight")  # [D, C, p, p]
    D = conv.shape[0]
    params = {
        "cls_token": _take(weights, "cls_token", (1, 1, D)),
        "patch_embed": {
            "kernel": np.ascontiguousarray(conv.transpose(2, 3, 1, 0)),
            "bias": _take(weights, "patch_embed.proj.bias", (D,)),
        },
        "norm": _layer(weights, "norm", "norm"),
    }
    if PERIODS in weights:
        _check_periods(weights.pop(PERIODS))
    else:
        params["pos_embed"] = _take(weights, "pos_embed")
    if "register_tokens" in weights:
        params["register_tokens"] = _take(weights, "register_tokens")
    for i in range(len(blocks_of(weights))):
        block = params.setdefault(f"blocks_{i}", {})
        ffn = "swiglu" if f"blocks.{i}.mlp.w12.weight" in weights else "mlp"
        for name, path, kind in _BLOCK + _FFN[ffn]:
            parent = block.setdefault(path[0], {}) if len(path) == 2 else block
            parent[path[-1]] = _layer(weights, f"blocks.{i}.{name}", kind)
        for j in (1, 2):
            if f"blocks.{i}.ls{j}.gamma" in weights:
                block[f"gamma{j}"] = _take(weights, f"blocks.{i}.ls{j}.gamma", (D,))
    if weights:
        raise ValueError(f"not a tensor of this ViT: {', '.join(sorted(weights)[:8])}")
    return params


def _check_periods(periods: np.ndarray) -> None:
    expected = rope_periods(4 * len(periods))
    if not np.allclose(periods, expected, rtol=1e-2):  # they may have been bfloat16
        raise ValueError(f"tensor '{PERIODS}' is {periods}: those of base 100 are {expected}")


def vit_to_torch(params, num_heads: int | None = None) -> dict[str, np.ndarray]:
    """Inverse of `vit_from_torch`: DINO's names, and DINOv2's for what DINO lacks; DINOv3's for rotary
    positions, which need num_heads, since their periods are a tensor."""
    if "pos_embed" not in params and num_heads is None:
        raise ValueError("num_heads is needed to name the periods of rotary positions")
    return to_dino(vit_to_common(params), num_heads)


def vit_to_common(params) -> dict[str, np.ndarray]:
    """Tensors by their common names (torch_names.py); rotary positions have an empty `PERIODS`."""
    if "conv_0" in params["patch_embed"]:
        raise ValueError("a convolutional stem has no names in DINO's and timm's ViTs")
    tokens = ("cls_token", "pos_embed", "register_tokens", "mask_token")
    out = {name: np.asarray(params[name]) for name in tokens if name in params}
    if "pos_embed" not in params:
        out[PERIODS] = np.zeros(0, np.float32)
    out["patch_embed.proj.weight"] = np.asarray(params["patch_embed"]["kernel"]).transpose(
        3, 2, 0, 1
    )
    out["patch_embed.proj.bias"] = np.asarray(params["patch_embed"]["bias"])

    def put(name, layer, kind):
        kernel = np.asarray(layer[_KERNEL[kind]])
        out[f"{name}.weight"] = np.ascontiguousarray(kernel.T) if kind == "linear" else kernel
        if "bias" in layer:
            out[f"{name}.bias"] = np.asarray(layer["bias"])

    for i in range(sum(name.startswith("blocks_") for name in params)):
        block = params[f"blocks_{i}"]
        ffn = _FFN["swiglu" if "w12" in block["mlp"] else "mlp"]
        for name, path, kind in _BLOCK + ffn:
            put(
                f"blocks.{i}.{name}",
                block[path[0]][path[1]] if len(path) == 2 else block[path[0]],
                kind,
            )
        for j in (1, 2):
            if f"gamma{j}" in block:
                out[f"blocks.{i}.ls{j}.gamma"] = np.asarray(block[f"gamma{j}"])
    put("norm", params["norm"], "norm")
    return {name: np.ascontiguousarray(value) for name, value in out.items()}


def dino_head_from_torch(state_dict) -> dict:
    """Parameters of a `DINOHead` from the official head's state dict (prefix `head.` allowed).

    `weight_g` is kept; a head with norm_last_layer=True has no such parameter and ignores it. Batch norm
    of a head with use_bn=True has no running statistics: no forward pass in training uses them.
    """
    weights = {re.sub(r"^head\.", "", k): v for k, v in _clean(state_dict).items()}
    names = sorted(
        (k[: -len(".weight")] for k in weights if re.fullmatch(r"mlp\.\d+\.weight", k)), key=_index
    )
    linear = [name for name in names if weights[f"{name}.weight"].ndim == 2]
    params = {f"mlp_{i}": _layer(weights, name, "linear") for i, name in enumerate(linear)}
    norms = [name for name in names if name not in linear]
    params |= {f"bn_{i}": _layer(weights, name, "norm") for i, name in enumerate(norms)}
    weight_v = _take(weights, "last_layer.weight_v")
    weight_g = _take(weights, "last_layer.weight_g", (weight_v.shape[0], 1))
    return params | {"last_layer": {"weight_v": weight_v, "weight_g": weight_g}}


def barlow_projector_from_torch(state_dict) -> tuple[dict, dict]:
    """(params, batch_stats) of a `BarlowProjector` from the official nn.Sequential's state dict."""
    weights = {re.sub(r"^projector\.", "", k): v for k, v in _clean(state_dict).items()}
    params, batch_stats = {}, {}
    numbers = sorted({k.split(".")[0] for k in weights}, key=int)
    for number in numbers:
        if f"{number}.running_mean" in weights:
            name = f"bn_{len(batch_stats)}"
            params[name] = _layer(weights, number, "norm")
            batch_stats[name] = {
                "mean": _take(weights, f"{number}.running_mean"),
                "var": _take(weights, f"{number}.running_var"),
            }
        else:
            params[f"dense_{len(params) - len(batch_stats)}"] = _layer(weights, number, "linear")
    return params, batch_stats


def _index(name: str) -> int:
    return int(name.split(".")[1])
