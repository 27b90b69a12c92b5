"""What a run does to a picture before the backbone, from its config, and the same for other codes."""

import math
from typing import Any, NamedTuple

from dinotwins_jax.augment.multi_crop import IMAGENET_MEAN, IMAGENET_STD
from dinotwins_jax.models.vit import as_pair


class Preprocessing(NamedTuple):
    """The view of evaluation: resize (bicubic, antialiased), centre crop, normalisation."""

    resize: int  # pixels of the short side
    crop: tuple[int, int]  # (height, width) in pixels, at most `resize`
    mean: tuple[float, ...]  # of each channel, for values in [0, 1]
    std: tuple[float, ...]
    window: dict | None = None  # config.data.window: how wider samples became 8 bits

    @property
    def channels(self) -> int:
        return len(self.mean)

    def at(self, size: tuple[int, int]) -> "Preprocessing":
        """The same share of the picture at another size, (height, width) in pixels."""
        if size == self.crop:
            return self
        scale = max(wanted / own for wanted, own in zip(size, self.crop, strict=True))
        return self._replace(resize=max(round(self.resize * scale), *size), crop=size)


def preprocessing_of(config) -> Preprocessing:
    """The preprocessing of the evaluations of a run."""
    crop = as_pair(config.views.global_size)
    channels = config.model.get("in_channels") or 3
    mean, std, window = (config.data.get(name) for name in ("mean", "std", "window"))
    return Preprocessing(
        max(config.evals.resize, *crop),
        crop,
        tuple(mean or _for_channels(IMAGENET_MEAN, channels)),
        tuple(std or _for_channels(IMAGENET_STD, channels)),
        window.to_dict() if window is not None and window.get("mode") else None,
    )


def _for_channels(moments: tuple[float, ...], channels: int) -> tuple[float, ...]:
    """ImageNet's for RGB, their mean for each of another number of channels."""
    return moments if channels == 3 else (sum(moments) / 3,) * channels


def timm_transform(pre: Preprocessing) -> dict[str, Any]:
    """Entries of timm's pretrained_cfg, from which timm.data makes its transform.

    Differs: of a crop that is not square timm resizes both sides to at least their share of crop_pct; it
    has no name for a short side that is larger than both.
    """
    # timm takes floor(crop / crop_pct): the quotient must not round to below `resize`.
    share = min(pre.crop) / pre.resize
    if math.floor(min(pre.crop) / share) < pre.resize:
        share = math.nextafter(share, 0)
    return {
        "input_size": [pre.channels, *pre.crop],
        "interpolation": "bicubic",
        "crop_pct": share,
        "crop_mode": "center",
        "mean": pre.mean,
        "std": pre.std,
    }


def hf_processor(pre: Preprocessing) -> dict[str, Any]:
    """preprocessor_config.json of transformers' image processor that crops the centre."""
    height, width = pre.crop
    return {
        "image_processor_type": "BitImageProcessor",
        "do_convert_rgb": pre.channels == 3,
        "do_resize": True,
        "size": {"shortest_edge": pre.resize},
        "resample": 3,  # bicubic
        "do_center_crop": True,
        "crop_size": {"height": height, "width": width},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": pre.mean,
        "image_std": pre.std,
    }
