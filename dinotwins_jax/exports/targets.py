"""The files of an export, by target: weights or a program, and the settings that belong to them."""

import importlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from dinotwins_jax.models.onnx_graph import OPSET, onnx_model
from dinotwins_jax.models.stablehlo import PLATFORMS, stablehlo_program
from dinotwins_jax.models.torch_export import described, exported
from dinotwins_jax.models.vit import VisionTransformer
from dinotwins_jax.preprocessing import Preprocessing, hf_processor, timm_transform

TARGETS = ("timm", "dino", "hf", "onnx", "stablehlo")
_PROGRAMS = {"onnx": onnx_model, "stablehlo": stablehlo_program}
_NEEDS = {"onnx": "onnx", "stablehlo": "flatbuffers"}  # the packages that write them
_LARGEST = (
    2**31 - 2**24
)  # bytes of weights in a file of protobuf or flatbuffers, which end at 2 GiB


class Export(NamedTuple):
    """The files of an export, and what its model card says of them."""

    write: dict[str, Callable[[Path], object]]  # name -> writes this file
    config: dict  # of config.json
    programs: dict[str, Preprocessing]  # the .onnx or .stablehlo files, each with the size it takes
    parameters: int


def files_of(
    target: str,
    vit: VisionTransformer,
    params,
    pre: Preprocessing,
    sizes: Sequence[tuple[int, int]] = (),
) -> Export:
    """What an export consists of, but for config.json and the model card.

    Args:
      target: of TARGETS.
      vit: of dtype float32.
      sizes: (height, width) in pixels, a file each for onnx and stablehlo; (): that of `pre`.
    Raises:
      ValueError: the target cannot hold this model or these sizes, or needs a package.
    """
    params = jax.tree.map(np.asarray, params)
    if target in _PROGRAMS:
        return _programs(target, vit, params, pre, sizes)
    if sizes:
        raise ValueError(f"--image_size is for {' and '.join(_PROGRAMS)}, not for --to={target}")
    return _weights(target, vit, params, pre)


def _weights(target: str, vit, params, pre: Preprocessing) -> Export:
    from safetensors.numpy import save_file

    tensors, config = exported(vit, params, target)

    def save(path: Path) -> None:
        save_file(tensors, path, metadata={"format": "pt"})

    write = {"model.safetensors": save}
    if target == "timm":
        config["pretrained_cfg"] |= timm_transform(pre)
    if target == "hf":
        text = json.dumps(hf_processor(pre), indent=2) + "\n"
        write["preprocessor_config.json"] = lambda path: path.write_text(text)
    return Export(write, config, {}, sum(tensor.size for tensor in tensors.values()))


def _programs(target: str, vit, params, pre: Preprocessing, sizes) -> Export:
    try:
        importlib.import_module(_NEEDS[target])
    except ImportError:
        package = _NEEDS[target]
        raise ValueError(f"--to={target} needs a package: pip install {package}") from None
    params = {name: part for name, part in params.items() if name != "mask_token"}
    count = sum(x.size for x in jax.tree.leaves(params))
    if 4 * count > _LARGEST:
        raise ValueError(f"{target} holds 2 GiB in a file, this model has {4 * count / 2**30:.1f}")
    views = [pre.at(size) for size in sizes or (pre.crop,)]
    several = len(views) > 1
    programs = {}
    for view in views:
        place = "_{}x{}".format(*view.crop) if several else ""
        programs[f"model{place}.{target}"] = view

    def saving(view: Preprocessing) -> Callable[[Path], object]:
        program = _PROGRAMS[target]
        return lambda path: path.write_bytes(program(vit, params, view.crop, view.mean, view.std))

    files = {
        name: {
            "images": ["b", *view.crop, view.channels],
            "cls": ["b", vit.embed_dim],
            "patches": ["b", rows * columns, vit.embed_dim],
            "resize": view.resize,
        }
        for name, view in programs.items()
        for rows, columns in (_grid(vit, view.crop),)
    }
    about = {"opset": OPSET} if target == "onnx" else {"platforms": PLATFORMS}
    config = {"format": target, **about, "files": files, "dinotwins_jax": described(vit)}
    write = {name: saving(view) for name, view in programs.items()}
    return Export(write, config, programs, count)


def _grid(vit: VisionTransformer, size: tuple[int, int]) -> tuple[int, int]:
    try:
        return vit.grid(size)
    except ValueError as error:
        raise ValueError(f"--image_size: {error}") from None
