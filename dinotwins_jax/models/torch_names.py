"""Tensor names of a ViT in PyTorch codes, converted to common names: those of DINO and DINOv2.

    common                     timm                  HF transformers (on disk)        DINOv3
    register_tokens            reg_token             embeddings.register_tokens       storage_tokens
    blocks.0.attn.qkv          the same              three of attention's own         bias by a mask
    blocks.0.ls1.gamma         the same              layer_scale1.lambda1             the same
    blocks.0.mlp.w12           mlp.fc1, twice fc2    weights_in | gate_ and up_proj   w1, w2

Letters: D embed, N patches, R registers.
"""

import math
import re

import numpy as np

Weights = dict[str, np.ndarray]
PERIODS = "rope_embed.periods"
_WRAPPERS = re.compile(
    r"^(module\.|backbone\.|(vit|dinov2|dinov2_with_registers|dinov3_vit)\.(?=embeddings|encoder|layer))+"
)
# Not needed for features: classifiers, poolers, mask tokens, DINOv3's norm of the class tokens of local
# crops.
_SKIPPED = re.compile(
    r"^(head|fc_norm|head_drop|pooler|classifier|local_cls_norm)\.|^(embeddings\.)?mask_token$"
)
# HF's names on disk -> common names, applied in order.
_FROM_HF = [
    (r"^embeddings\.patch_embeddings\.(projection\.)?", "patch_embed.proj."),
    (r"^embeddings\.position_embeddings$", "pos_embed"),
    (r"^embeddings\.", ""),
    (r"^(encoder\.|model\.)?layer\.", "blocks."),
    (r"^layernorm\.", "norm."),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"\.attention\.attention\.(query|key|value)\.", r".attn.\1."),
    (r"\.attention\.(q|k|v|o)_proj\.", r".attn.\1."),
    (r"\.attention\.output\.dense\.", ".attn.proj."),
    (r"\.attn\.o\.", ".attn.proj."),
    (r"\.attn\.(query|key|value)\.", lambda m: f".attn.{m[1][0]}."),
    (r"\.layer_scale(\d)\.lambda1$", r".ls\1.gamma"),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"(blocks\.\d+)\.output\.dense\.", r"\1.mlp.fc2."),
    (r"\.mlp\.weights_in\.", ".mlp.w12."),
    (r"\.mlp\.weights_out\.", ".mlp.w3."),
]
_APART = [
    ("attn.qkv", ("attn.q", "attn.k", "attn.v")),  # HF
    ("mlp.w12", ("mlp.w1", "mlp.w2")),  # DINOv3, HF
    ("mlp.w12", ("mlp.fc1_g", "mlp.fc1_x")),  # timm's DINOv3
]
_GATED_FROM_HF = {"gate": "w1", "up": "w2", "down": "w3"}
_MLP_FROM_HF = {"up": "fc1", "down": "fc2"}


def common(state_dict) -> Weights:
    """Renames the backbone's tensors to their common names, as float32.

    Args:
      state_dict: name -> array, by any of the names above, in blocks or in chunks of blocks
        ("blocks.0.3." of DINOv2's big models), wrapped ("module.", "backbone.", "dinov2.") or not.
    Returns:
      weights; rotary ones without "pos_embed", and with `PERIODS` of shape (0,) if they are not stored.
    Raises:
      ValueError: tensors that belong together do not match; the message names one.
    """
    weights = {
        _WRAPPERS.sub("", name): np.asarray(value).astype(np.float32)
        for name, value in state_dict.items()
    }
    weights = {name: value for name, value in weights.items() if not _SKIPPED.search(name)}
    hint = {"embeddings.patch_embeddings.weight", "blocks.0.attn.q_bias", "blocks.0.gamma_1"}
    rotary = not hint.isdisjoint(weights)  # DINOv3 of HF, of timm with and without biases
    if any(name.startswith("embeddings.") for name in weights):
        gated = any(".gate_proj." in name for name in weights)
        weights = {_from_hf(name, gated): value for name, value in weights.items()}
    weights = {
        re.sub(r"^blocks\.\d+\.(\d+)\.", r"blocks.\1.", name): w for name, w in weights.items()
    }
    if "storage_tokens" in weights:
        weights["register_tokens"] = weights.pop("storage_tokens")
    if np.size(weights.get("register_tokens", 1)) == 0:  # HF's DINOv3 without registers
        del weights["register_tokens"]
    if rotary and "pos_embed" not in weights:
        weights.setdefault(PERIODS, np.zeros(0, np.float32))
    for block in blocks_of(weights):
        _join_block(weights, f"{block}.")
    if "reg_token" in weights:
        _from_timms_positions(weights)
    return weights


def interpolation_of(names) -> str:
    """The rule of `positions.INTERPOLATIONS` by which the code with these tensor names resamples learned
    positions.

    DINO, DINOv2 and timm name the tensors of a ViT without registers alike: "dino" for these, though timm's
    is "antialias".
    """
    registers = any(name.endswith(("register_tokens", "reg_token")) for name in names)
    if registers:
        return "antialias"
    hf = any("embeddings.patch_embeddings." in name for name in names)
    return "size" if hf else "dino"


def blocks_of(weights) -> list[str]:
    """The blocks that have tensors: "blocks.0", "blocks.1", …"""
    numbers = {int(m[1]) for name in weights if (m := re.match(r"blocks\.(\d+)\.", name))}
    return [f"blocks.{number}" for number in sorted(numbers)]


def _from_hf(name: str, gated: bool) -> str:
    for pattern, replacement in _FROM_HF:
        name = re.sub(pattern, replacement, name)
    names = _GATED_FROM_HF if gated else _MLP_FROM_HF
    return re.sub(r"\.mlp\.(gate|up|down)_proj\.", lambda m: f".mlp.{names[m[1]]}.", name)


def _join_block(weights: Weights, block: str) -> None:
    """Renames a block's tensors to common names, fuses separate ones and completes the biases."""
    for whole, parts in _APART:
        _join(weights, f"{block}{whole}", [f"{block}{part}" for part in parts])
    _whole_qkv_bias(weights, f"{block}attn.")
    fc1, fc2 = (weights.get(f"{block}mlp.{n}.weight") for n in ("fc1", "fc2"))
    packed = fc1 is not None and fc2 is not None and fc1.shape[0] == 2 * fc2.shape[1]
    renames = {"gamma_1": "ls1.gamma", "gamma_2": "ls2.gamma"}
    if (
        packed or f"{block}mlp.w12.weight" in weights
    ):  # timm names SwiGLU's matrices as those of an MLP
        renames |= {f"mlp.fc1.{leaf}": f"mlp.w12.{leaf}" for leaf in ("weight", "bias")}
        renames |= {f"mlp.fc2.{leaf}": f"mlp.w3.{leaf}" for leaf in ("weight", "bias")}
    for theirs, ours in renames.items():
        if f"{block}{theirs}" in weights:
            weights[f"{block}{ours}"] = weights.pop(f"{block}{theirs}")


def _join(weights: Weights, whole: str, parts: list[str]) -> None:
    """Concatenates parts along the outputs; only a bias of queries, keys or values may be missing."""
    for leaf in ("weight", "bias"):
        given = {part: weights.pop(f"{part}.{leaf}", None) for part in parts}
        there = [w for w in given.values() if w is not None]
        if not there:
            continue
        for part, w in given.items():
            if w is None and (leaf == "weight" or not whole.endswith("qkv")):
                raise ValueError(f"state dict has no tensor '{part}.{leaf}'")
            if w is not None and w.shape != (shape := there[0].shape):
                raise ValueError(f"tensor '{part}.{leaf}' has shape {w.shape}, expected {shape}")
        pieces = [np.zeros_like(there[0]) if w is None else w for w in given.values()]
        weights[f"{whole}.{leaf}"] = np.concatenate(pieces)


def _whole_qkv_bias(weights: Weights, attn: str) -> None:
    """One bias of queries, keys and values; zeros where there is none, as for DINOv3's keys."""
    kernel = weights.get(f"{attn}qkv.weight")
    if kernel is None or kernel.ndim != 2:
        return  # reported by the caller that needs it
    D = kernel.shape[0] // 3
    parts = [weights.pop(f"{attn}{part}_bias", None) for part in "qv"]
    if f"{attn}qkv.bias" not in weights:
        q, v = (np.zeros(D, np.float32) if part is None else part for part in parts)
        weights[f"{attn}qkv.bias"] = np.concatenate([q, np.zeros(D, np.float32), v])
    mask = weights.pop(f"{attn}qkv.bias_mask", None)
    if mask is not None:
        if mask.shape != weights[f"{attn}qkv.bias"].shape or not np.isin(mask, (0, 1)).all():
            raise ValueError(f"tensor '{attn}qkv.bias_mask' is not a mask of ones and zeros")
        # Not a product: masked values may be anything, even NaN.
        weights[f"{attn}qkv.bias"] = np.where(mask == 1, weights[f"{attn}qkv.bias"], 0)


def _from_timms_positions(weights: Weights) -> None:
    """Converts timm's positions, with registers or without prefix tokens, to class token and patches."""
    weights["register_tokens"] = registers = weights.pop("reg_token")
    positions = weights.get("pos_embed")
    if positions is None:
        return
    tokens, R = positions.shape[1], registers.shape[1]
    without, with_all = (math.isqrt(max(n, 0)) ** 2 == n for n in (tokens, tokens - 1 - R))
    if without == with_all:
        raise ValueError(
            f"pos_embed {positions.shape} with {R} registers: ambiguous whether these have positions"
        )
    if without:
        weights["pos_embed"] = np.concatenate([np.zeros_like(positions[:, :1]), positions], axis=1)
    else:
        weights["register_tokens"] = registers + positions[:, 1 : 1 + R]
        weights["pos_embed"] = np.delete(positions, range(1, 1 + R), axis=1)
