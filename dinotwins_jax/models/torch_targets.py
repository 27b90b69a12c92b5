"""Conversion of a ViT's common tensor names (torch_names.py) to those of other codes."""

import re

import numpy as np

from dinotwins_jax.models.positions import rope_periods
from dinotwins_jax.models.torch_names import PERIODS, Weights, blocks_of

_TO_HF = [
    (r"^(cls_token|register_tokens|mask_token)$", r"embeddings.\1"),
    (r"^pos_embed$", "embeddings.position_embeddings"),
    (r"^patch_embed\.proj\.", "embeddings.patch_embeddings.projection."),
    (r"^norm\.", "layernorm."),
    (r"^blocks\.", "encoder.layer."),
    (r"\.attn\.proj\.", ".attention.output.dense."),
    (r"\.attn\.q\.", ".attention.attention.query."),
    (r"\.attn\.k\.", ".attention.attention.key."),
    (r"\.attn\.v\.", ".attention.attention.value."),
    (r"\.ls(\d)\.gamma$", r".layer_scale\1.lambda1"),
    (r"\.mlp\.w12\.", ".mlp.weights_in."),
    (r"\.mlp\.w3\.", ".mlp.weights_out."),
]
_TO_HF_VIT = [
    (r"\.norm1\.", ".layernorm_before."),
    (r"\.norm2\.", ".layernorm_after."),
    (r"\.mlp\.fc1\.", ".intermediate.dense."),
    (r"\.mlp\.fc2\.", ".output.dense."),
]
_TO_HF_DINOV3 = [
    (r"^(cls_token|register_tokens|mask_token)$", r"embeddings.\1"),
    (r"^patch_embed\.proj\.", "embeddings.patch_embeddings."),
    (r"^blocks\.", "layer."),
    (r"\.attn\.proj\.", ".attention.o_proj."),
    (r"\.attn\.(q|k|v)\.", r".attention.\1_proj."),
    (r"\.ls(\d)\.gamma$", r".layer_scale\1.lambda1"),
    (r"\.mlp\.w1\.", ".mlp.gate_proj."),
    (r"\.mlp\.(w2|fc1)\.", ".mlp.up_proj."),
    (r"\.mlp\.(w3|fc2)\.", ".mlp.down_proj."),
]


def to_timm(weights: Weights) -> Weights:
    """Converts to the names of timm's VisionTransformer; the registers' positions are zeros."""
    weights = {name: value for name, value in weights.items() if name != "mask_token"}
    if "register_tokens" in weights:
        registers = weights["reg_token"] = weights.pop("register_tokens")
        cls, patches = np.split(weights["pos_embed"], [1], axis=1)
        weights["pos_embed"] = np.concatenate([cls, np.zeros_like(registers), patches], axis=1)
    return _renamed(weights, [(r"\.mlp\.w12\.", ".mlp.fc1."), (r"\.mlp\.w3\.", ".mlp.fc2.")])


def to_dino(weights: Weights, num_heads: int | None) -> Weights:
    """Converts to DINO's and DINOv2's names (the common ones), or DINOv3's for rotary positions."""
    if PERIODS not in weights:
        return dict(weights)
    periods = rope_periods(weights["cls_token"].shape[-1] // num_heads)
    weights = _split(weights, "mlp.w12", ("mlp.w1", "mlp.w2")) | {PERIODS: np.float32(periods)}
    return _renamed(weights, [(r"^register_tokens$", "storage_tokens")])


def to_hf(weights: Weights, kind: str) -> Weights:
    """Converts to HF transformers' names on disk.

    Args:
      kind: its model_type: "vit", "dinov2", "dinov2_with_registers" or "dinov3_vit". All but "vit" have
        LayerScale and a mask token: ones and zeros if `weights` have none.
    """
    D = weights["cls_token"].shape[-1]
    weights = {name: value for name, value in weights.items() if name != PERIODS}
    if kind == "vit":
        weights.pop("mask_token", None)
        # With pooler_act "linear" the pooled output is the class token, as that of the other kinds.
        weights |= {"pooler.dense.weight": np.eye(D, dtype=np.float32)}
        weights |= {"pooler.dense.bias": np.zeros(D, np.float32)}
    else:
        for block in blocks_of(weights):
            weights = {f"{block}.ls{j}.gamma": np.ones(D, np.float32) for j in (1, 2)} | weights
        weights = {"mask_token": np.zeros((1, D), np.float32)} | weights
    weights = _split(weights, "attn.qkv", ("attn.q", "attn.k", "attn.v"))
    if kind != "dinov3_vit":
        return _renamed(weights, _TO_HF + (_TO_HF_VIT if kind == "vit" else []))
    weights = {"register_tokens": np.zeros((1, 0, D), np.float32)} | weights
    weights["mask_token"] = weights["mask_token"].reshape(1, 1, D)
    return _renamed(_split(weights, "mlp.w12", ("mlp.w1", "mlp.w2")), _TO_HF_DINOV3)


def _renamed(weights: Weights, rules: list[tuple[str, str]]) -> Weights:
    out = {}
    for name, value in weights.items():
        for pattern, replacement in rules:
            name = re.sub(pattern, replacement, name)
        out[name] = value
    return out


def _split(weights: Weights, whole: str, parts: tuple[str, ...]) -> Weights:
    """Splits the tensors `whole` of every block along their outputs into `parts`."""
    out = {}
    for name, value in weights.items():
        if f".{whole}." in name:
            pieces = np.split(value, len(parts))
            out |= {
                name.replace(whole, part): np.ascontiguousarray(piece)
                for part, piece in zip(parts, pieces, strict=True)
            }
        else:
            out[name] = value
    return out
