"""What a run does to a picture before the backbone, from its config, and the same for other codes."""

import math
from typing import Any, NamedTuple

from dinotwins_jax.inputs import moments_of
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
    mean, std = moments_of(config)
    window = config.data.get("window")
    return Preprocessing(
        max(config.evals.resize, *crop),
        crop,
        mean,
        std,
        window.to_dict() if window is not None and window.get("mode") else None,
    )


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
