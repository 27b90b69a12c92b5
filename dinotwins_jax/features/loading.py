"""Models from runs, exported folders and weight files: the `load` of the public API."""

import os
from pathlib import Path

import jax

from dinotwins_jax.augment.multi_crop import channel_moments
from dinotwins_jax.backbone import make_backbone
from dinotwins_jax.data.base import canvas_for_photos
from dinotwins_jax.data.window import reading_with
from dinotwins_jax.devices.attention import attention_anywhere
from dinotwins_jax.devices.placement import make_placement
from dinotwins_jax.devices.processes import warn
from dinotwins_jax.evals.view import View
from dinotwins_jax.features.model import Model
from dinotwins_jax.features.stated import stated_preprocessing
from dinotwins_jax.models.torch_files import load_vit
from dinotwins_jax.models.torch_folder import weights_file
from dinotwins_jax.models.vit import as_pair
from dinotwins_jax.preprocessing import Preprocessing, preprocessing_of
from dinotwins_jax.quiet import quiet_orbax
from dinotwins_jax.run_config import get_config
from dinotwins_jax.weights import check_parameters, teacher_of, with_mask_token

_BATCH = 64  # images at once for weights that no run of ours made


def load(
    source: str | os.PathLike,
    checkpoint: str | int = "last",
    position_interpolation: str | None = None,
) -> Model:
    """Loads a trained backbone with the preprocessing that belongs to it.

    Args:
      source: a run's workdir, whose teacher is taken; a folder that `export` wrote, or one of timm or
        transformers; or a file of weights with the names of DINO, DINOv2, DINOv3, timm or transformers
        (.safetensors, .npz, .pth). No code that they name is run.
      checkpoint: of a run: "last", "best" by its config.checkpoint.best_metric, or a step.
      position_interpolation: of learned positions at other image sizes, of
        `models.positions.INTERPOLATIONS`; None: as the run, the folder or the names of the tensors say.
    Returns:
      Model. Preprocessing is that of the run's evaluation, or what the folder states; for a bare file it
      is the official one of ImageNet evaluation, said in a warning.
    Raises:
      ValueError, OSError: no such run, folder or file, or another architecture; the message is one line.
    """
    quiet_orbax()
    path = Path(source).expanduser()
    if (path / "checkpoints").is_dir() or (path / "metrics.jsonl").exists():
        which = "latest" if checkpoint == "last" else str(checkpoint)
        return _from_run(path, which, position_interpolation)
    if checkpoint != "last":
        raise ValueError(f"{path} is not a run: checkpoint={checkpoint!r} cannot be chosen there")
    return _from_weights(path, position_interpolation)


def _from_run(workdir: Path, checkpoint: str, rule: str | None) -> Model:
    config = get_config(str(workdir))
    if rule:
        config.model.position_interpolation = rule
    teacher, step = teacher_of(workdir, config, checkpoint)
    try:
        config.model.attention = attention_anywhere(config.model.attention)
        backbone = with_mask_token(make_backbone(config, jax.local_devices()), teacher)
        pre = preprocessing_of(config)
        batch, canvas = config.evals.batch_size, config.data.canvas_size
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"{workdir / 'config.json'} is of another version ({error!r})") from None
    check_parameters(backbone, teacher, step)
    return _placed(backbone, teacher, pre, canvas, batch, config=config, source=str(workdir))


def _from_weights(path: Path, rule: str | None) -> Model:
    if not path.exists():
        raise FileNotFoundError(f"no run, folder or file of weights: {path}")
    try:
        file = weights_file(path)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"no run with checkpoints, and {error}") from None
    backbone, params = load_vit(file)
    backbone = backbone.clone(position_interpolation=rule) if rule else backbone
    stated = stated_preprocessing(file.parent, backbone.in_channels) if path.is_dir() else None
    canvas = 0
    if stated is None:
        crop = as_pair(backbone.image_size)
        moments = channel_moments(backbone.in_channels, (), ())
        pre = Preprocessing(round(max(crop) * 256 / 224), crop, *moments)
        warn(
            f"{path} does not state its preprocessing: short side to {pre.resize} pixels, centre crop of "
            f"{' x '.join(map(str, crop))}, ImageNet's mean and standard deviation"
        )
    else:
        pre, canvas = stated
    if backbone.positions == "rope":  # no tensor holds the image size
        backbone = backbone.clone(image_size=pre.crop)
    return _placed(backbone, params, pre, canvas, _BATCH, source=str(path))


def _placed(backbone, params, pre: Preprocessing, canvas: int, batch: int, **about) -> Model:
    """A Model over this process' devices."""
    placement = make_placement("jit", jax.local_device_count(), jax.local_devices())
    crop = pre.crop[0] if pre.crop[0] == pre.crop[1] else pre.crop
    canvas = canvas or canvas_for_photos(max(pre.crop))
    view = View(
        pre.resize, crop, canvas, batch, placement.put_images, tuple(pre.mean), tuple(pre.std)
    )
    reading = reading_with(backbone.in_channels, pre.window)
    return Model(backbone, placement.whole(params), view, reading=reading, **about)
