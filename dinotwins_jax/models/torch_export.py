"""Export of a ViT for other code: named tensors and the matching config.json."""

import numpy as np

from dinotwins_jax.models.block import ratio_of, swiglu_width
from dinotwins_jax.models.torch_targets import to_dino, to_hf, to_timm
from dinotwins_jax.models.torch_weights import vit_to_common
from dinotwins_jax.models.vit import VisionTransformer, as_pair

_PROGRAMS = "--to=onnx and --to=stablehlo"  # targets for any model
_SIZES = {192: "tiny", 384: "small", 768: "base", 1024: "large"}  # by embed_dim


def exported(vit: VisionTransformer, params, target: str) -> tuple[dict[str, np.ndarray], dict]:
    """Tensors and config.json of a backbone for another code.

    Args:
      target: "timm": its VisionTransformer, for timm.create_model("local-dir:…"). "dino": the official
        class, the first of DINO, DINOv2 and DINOv3 that supports all options. "hf": transformers'
        ViTModel, Dinov2Model, Dinov2WithRegistersModel or DINOv3ViTModel, likewise.
    Raises:
      ValueError: the target lacks an option of this model, or the target is unknown.
    """
    if target not in _TARGETS:
        raise ValueError(f"--to is '{target}': choose {' or '.join(_TARGETS)}")
    _need(vit.stem == "linear", f"--to={target}", f"stem={vit.stem}; {_PROGRAMS} have")
    tensors, config = _TARGETS[target](vit, vit_to_common(params))
    config["dinotwins_jax"] = described(vit)
    return {name: np.ascontiguousarray(value) for name, value in tensors.items()}, config


def interpolation_in(target: str, vit: VisionTransformer, config: dict) -> str:
    """The rule of `positions.INTERPOLATIONS` by which the code of a target resamples the positions of this
    export for other image sizes; "" for rotary positions."""
    if vit.positions == "rope":
        return ""
    hf = {"vit": "size", "dinov2": "size", "dinov2_with_registers": "antialias"}
    return {"timm": "antialias", "hf": hf.get(config.get("model_type"))}.get(
        target, vit.position_interpolation
    )


def described(vit: VisionTransformer) -> dict:
    """What an export's config.json says of the model under "dinotwins_jax"."""
    fields = ("embed_dim", "depth", "num_heads", "patch_size", "image_size", "mlp_ratio")
    fields += ("in_channels", "num_register_tokens", "layer_scale_init", "ffn", "positions")
    fields += ("position_interpolation", "stem")
    return {name: getattr(vit, name) for name in (*fields, "norm_eps")}


def _hidden(vit) -> int:
    """Hidden width of the MLP or SwiGLU."""
    hidden = int(vit.embed_dim * vit.mlp_ratio)
    return swiglu_width(hidden) if vit.ffn == "swiglu" else hidden


def _side(vit) -> int | list[int]:
    height, width = as_pair(vit.image_size)
    return height if height == width else [height, width]


def _need(holds: bool, target: str, what: str) -> None:
    if not holds:
        raise ValueError(f"{target} has no {what}")


def _timm(vit, weights) -> tuple[dict, dict]:
    _need(
        vit.positions == "learned",
        "timm's plain ViT",
        "rotary positions; --to=hf and --to=dino have",
    )
    _need(vit.norm_eps == 1e-6, "timm's plain ViT", f"norm_eps but 1e-6, here it is {vit.norm_eps}")
    size = _SIZES.get(vit.embed_dim, "small")
    swiglu = (
        vit.ffn == "swiglu"
    )  # JSON cannot hold its class: the name of the one model that has it is used
    hidden = 2 * _hidden(vit) if swiglu else _hidden(vit)
    config = {
        "architecture": "vit_giant_patch14_dinov2" if swiglu else f"vit_{size}_patch16_224",
        "num_classes": 0,
        "num_features": vit.embed_dim,
        "global_pool": "token",
        "model_args": {
            "img_size": _side(vit),
            "patch_size": vit.patch_size,
            "embed_dim": vit.embed_dim,
            "depth": vit.depth,
            "num_heads": vit.num_heads,
            "mlp_ratio": ratio_of(hidden, vit.embed_dim),
            "init_values": vit.layer_scale_init,
            "reg_tokens": vit.num_register_tokens,
            "in_chans": vit.in_channels,
            "dynamic_img_size": True,
        },
        "pretrained_cfg": {
            "input_size": [vit.in_channels, *as_pair(vit.image_size)],
            "fixed_input_size": False,
            "interpolation": "bicubic",
            "num_classes": 0,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        },
    }
    return to_timm(weights), config


def _dino(vit, weights) -> tuple[dict, dict]:
    rope = vit.positions == "rope"
    eps = (1e-6, 1e-5) if rope else (1e-6,)
    options = vit.num_register_tokens or vit.layer_scale_init is not None or vit.ffn != "mlp"
    options = options or vit.position_interpolation != "dino"
    code = "dinov3" if rope else "dinov2" if options else "dino"
    _need(vit.norm_eps in eps, code, f"norm_eps but {eps}, here it is {vit.norm_eps}")
    side = _side(vit)
    _need(
        rope or isinstance(side, int),
        code,
        f"positions of a grid that is not square: {side} pixels",
    )
    arguments = {
        "img_size": side,
        "patch_size": vit.patch_size,
        "in_chans": vit.in_channels,
        "embed_dim": vit.embed_dim,
        "depth": vit.depth,
        "num_heads": vit.num_heads,
        "qkv_bias": True,
    }
    if code == "dino":
        arguments |= {"img_size": [side], "mlp_ratio": vit.mlp_ratio, "num_classes": 0}
    elif code == "dinov2":
        arguments |= {"mlp_ratio": vit.mlp_ratio, "init_values": vit.layer_scale_init}
        arguments |= {"ffn_layer": vit.ffn, "block_chunks": 0}
        arguments |= {"num_register_tokens": vit.num_register_tokens}
        rule = vit.position_interpolation
        arguments |= {"interpolate_offset": 0.1 if rule == "dino" else 0.0}
        arguments |= {"interpolate_antialias": rule == "antialias"}
    else:
        arguments |= {"ffn_ratio": vit.mlp_ratio, "layerscale_init": vit.layer_scale_init}
        arguments |= {"ffn_layer": vit.ffn, "n_storage_tokens": vit.num_register_tokens}
        arguments |= {"pos_embed_rope_dtype": "fp32"}
        arguments |= {"norm_layer": "layernorm" if vit.norm_eps == 1e-6 else "layernormbf16"}
    where = "vision_transformer" if code == "dino" else f"{code}.models.vision_transformer"
    name = "VisionTransformer" if code == "dino" else "DinoVisionTransformer"
    config = {"class": f"{where}.{name}", "arguments": arguments}
    if code == "dino":
        config["norm_layer"] = "torch.nn.LayerNorm, eps=1e-6"  # an argument that JSON cannot hold
        weights = {name: value for name, value in weights.items() if name != "mask_token"}
    else:
        weights = {"mask_token": np.zeros((1, vit.embed_dim), np.float32)} | weights
    return to_dino(weights, vit.num_heads), config


def _hf(vit, weights) -> tuple[dict, dict]:
    config = {
        "hidden_size": vit.embed_dim,
        "num_hidden_layers": vit.depth,
        "num_attention_heads": vit.num_heads,
        "image_size": _side(vit),
        "patch_size": vit.patch_size,
        "num_channels": vit.in_channels,
        "hidden_act": "gelu",
        "layer_norm_eps": vit.norm_eps,
        "dtype": "float32",
    }
    swiglu, scale = vit.ffn == "swiglu", vit.layer_scale_init
    if vit.positions == "rope":
        kind, name = "dinov3_vit", "DINOv3ViTModel"
        config |= {"intermediate_size": _hidden(vit), "use_gated_mlp": swiglu, "key_bias": True}
        config |= {"num_register_tokens": vit.num_register_tokens, "rope_theta": 100.0}
        config |= {"hidden_act": "silu" if swiglu else "gelu"}
        config |= {"pos_embed_rescale": vit.rope_rescale, "pos_embed_shift": vit.rope_shift}
        config |= {"pos_embed_jitter": vit.rope_jitter}
    elif vit.num_register_tokens or scale is not None or swiglu:
        kind, name = "dinov2", "Dinov2Model"
        ratio = vit.mlp_ratio
        _need(ratio == int(ratio), "transformers' Dinov2", f"mlp_ratio {ratio}, but whole numbers")
        config |= {"mlp_ratio": int(ratio), "use_swiglu_ffn": swiglu, "qkv_bias": True}
        if vit.num_register_tokens:
            kind, name = "dinov2_with_registers", "Dinov2WithRegistersModel"
            config["num_register_tokens"] = vit.num_register_tokens
    else:
        kind, name = "vit", "ViTModel"
        config |= {"intermediate_size": _hidden(vit), "qkv_bias": True}
        config |= {"pooler_act": "linear", "pooler_output_size": vit.embed_dim}
    if kind != "vit":
        config["layerscale_value"] = 1.0 if scale is None else scale
    config |= {"architectures": [name], "model_type": kind}
    return to_hf(weights, kind), config


_TARGETS = {"timm": _timm, "dino": _dino, "hf": _hf}
