"""Models from runs, exported folders and weight files: the `load` of the public API."""

import json
import os
from functools import partial
from pathlib import Path
from typing import Any

import jax

from dinotwins_jax.build import make_backbone
from dinotwins_jax.cli import config_of, quiet_orbax
from dinotwins_jax.data.base import canvas_for_photos
from dinotwins_jax.devices.placement import make_placement
from dinotwins_jax.devices.processes import warn
from dinotwins_jax.evals.features import View
from dinotwins_jax.features.model import Model
from dinotwins_jax.models.torch_files import load_vit
from dinotwins_jax.models.vit import as_pair
from dinotwins_jax.weights import check_parameters, teacher_of, with_mask_token

_BATCH = 64  # images at once for weights that no run of ours made
_SUFFIXES = (".safetensors", ".npz", ".pth", ".pt", ".bin")


def load(source: str | os.PathLike, checkpoint: str | int = "last") -> Model:
    """Loads a trained backbone with the preprocessing that belongs to it.

    Args:
      source: a run's workdir, whose teacher is taken; a folder that `export` wrote, or one of timm or
        transformers; or a file of weights with the names of DINO, DINOv2, DINOv3, timm or transformers
        (.safetensors, .npz, .pth). No code that they name is run.
      checkpoint: of a run: "last", "best" by its config.checkpoint.best_metric, or a step.
    Returns:
      Model. Preprocessing is that of the run's evaluation, or what the folder states; for a bare file it
      is the official one of ImageNet evaluation, said in a warning.
    Raises:
      ValueError, OSError: no such run, folder or file, or another architecture; the message is one line.
    """
    quiet_orbax()
    path = Path(source).expanduser()
    if (path / "checkpoints").is_dir() or (path / "metrics.jsonl").exists():
        return _from_run(path, "latest" if checkpoint == "last" else str(checkpoint))
    if checkpoint != "last":
        raise ValueError(f"{path} is not a run: checkpoint={checkpoint!r} cannot be chosen there")
    if path.is_dir():
        return _from_folder(path)
    if not path.exists():
        raise FileNotFoundError(f"no run, folder or file of weights: {path}")
    return _from_file(path, {})


def _from_run(workdir: Path, checkpoint: str) -> Model:
    config = config_of(workdir)
    teacher, step = teacher_of(workdir, config, checkpoint)
    model = config.model
    if model.get("attention") == "cudnn" and jax.default_backend() != "gpu":
        model.attention = "xla"  # the same function on other devices
    try:
        backbone = with_mask_token(make_backbone(config), teacher)
        crop = config.views.global_size
        crop = crop if isinstance(crop, int) else tuple(crop)
        resize, batch = max(config.evals.resize, *as_pair(crop)), config.evals.batch_size
        canvas = config.data.canvas_size
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"{workdir / 'config.json'} is of another version ({error!r})") from None
    view = partial(View, resize, crop, canvas or canvas_for_photos(max(as_pair(crop))), batch)
    check_parameters(backbone, teacher, step)
    return _placed(backbone, teacher, view, config=config, source=str(workdir))


def _from_folder(folder: Path) -> Model:
    files = sorted(p for p in folder.iterdir() if p.suffix in _SUFFIXES)
    if not files:
        raise FileNotFoundError(
            f"{folder} is not a run (it has no checkpoints) and holds no weights "
            f"({', '.join(f'*{s}' for s in _SUFFIXES)})"
        )
    if len(files) > 1:
        names = ", ".join(p.name for p in files[:4])
        raise ValueError(f"{folder} holds several files of weights ({names}): name one of them")
    return _from_file(files[0], _stated(folder))


def _from_file(path: Path, stated: dict[str, Any]) -> Model:
    backbone, params = load_vit(path)
    crop = stated.get("crop") or backbone.image_size
    resize = stated.get("resize") or round(max(as_pair(crop)) * 256 / 224)
    if not stated:
        warn(
            f"{path} does not state its preprocessing: short side to {resize} pixels, centre crop of "
            f"{crop}, ImageNet's mean and standard deviation"
        )
    canvas = stated.get("canvas") or canvas_for_photos(max(as_pair(crop)))
    view = partial(View, resize, crop, canvas, _BATCH)
    return _placed(backbone, params, view, source=str(path))


def _stated(folder: Path) -> dict[str, Any]:
    """Resize and crop (pixels), mean and std that a folder's JSON files state; {} if none does."""
    config, processor = _json(folder / "config.json"), _json(folder / "preprocessor_config.json")
    ours, timm = config.get("dinotwins_jax", {}), config.get("pretrained_cfg", {})
    if "resize" in ours:
        crop = ours["crop"]
        return ours | {"crop": crop if isinstance(crop, int) else tuple(crop)}
    if timm:
        _, *crop = timm.get("test_input_size") or timm["input_size"]
        percent = timm.get("test_crop_pct") or timm.get("crop_pct") or 0.875
        resize = int(min(crop) / percent)  # rounded down, as timm
        return {"crop": _one_side(crop), "resize": resize} | {
            k: timm.get(k) for k in ("mean", "std")
        }
    if processor:
        size = _sides(processor.get("size"))
        cut = processor.get("do_center_crop") and processor.get("crop_size")
        crop = _sides(cut) if cut else size
        moments = {"mean": processor.get("image_mean"), "std": processor.get("image_std")}
        return {"crop": _one_side(crop), "resize": min(size)} | moments
    return {}


def _json(path: Path) -> dict:
    try:
        found = json.loads(path.read_text()) if path.is_file() else {}
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from None
    return found if isinstance(found, dict) else {}


def _sides(size) -> tuple[int, int]:
    """(height, width) of a processor's size: a number, or an object."""
    if isinstance(size, int):
        return size, size
    if "shortest_edge" in size:
        return size["shortest_edge"], size["shortest_edge"]
    return size["height"], size["width"]


def _one_side(size) -> int | tuple[int, int]:
    height, width = size
    return height if height == width else (height, width)


def _placed(backbone, params, view, **about) -> Model:
    """A Model over this process' devices."""
    placement = make_placement("jit", jax.local_device_count(), jax.local_devices())
    return Model(backbone, placement.whole(params), view(placement.put_images), **about)
