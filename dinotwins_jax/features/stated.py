"""The preprocessing and the reading that a folder of weights states in its JSON files."""

import json
from pathlib import Path

from dinotwins_jax.augment.multi_crop import channel_moments
from dinotwins_jax.data.reading import Reading
from dinotwins_jax.data.window import reading_with
from dinotwins_jax.preprocessing import Preprocessing


def stated_preprocessing(folder: Path, channels: int) -> tuple[Preprocessing, int] | None:
    """(preprocessing, canvas side in pixels or 0) of a folder; None if it states none.

    Read are config.json of our exports and of timm, and preprocessor_config.json of transformers.

    Raises:
      ValueError: a file that cannot be read, or whose entries are of another kind.
    """
    config, processor = _json(folder / "config.json"), _json(folder / "preprocessor_config.json")
    ours, timm = config.get("dinotwins_jax", {}), config.get("pretrained_cfg", {})
    try:
        if "resize" in ours:
            found = _ours(ours, channels)
        elif "input_size" in timm:
            found = _timm(timm, channels)
        elif "size" in processor:
            found = _transformers(processor, channels)
        else:
            return None
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{folder}: its preprocessing cannot be read ({error!r})") from None
    return found, int(ours.get("canvas") or 0)


def stated_reading(folder: Path) -> Reading:
    """The channels and the window that an export states; RGB in a folder without them."""
    ours = _json(folder / "config.json").get("dinotwins_jax", {})
    channels = ours.get("in_channels", 3)
    return reading_with(channels, ours.get("window"))


def _ours(stated: dict, channels: int) -> Preprocessing:
    moments = channel_moments(channels, stated["mean"], stated["std"])
    crop = tuple(map(int, stated["crop"]))
    return Preprocessing(int(stated["resize"]), crop, *moments, stated.get("window"))


def _timm(stated: dict, channels: int) -> Preprocessing:
    _, *crop = stated.get("test_input_size") or stated["input_size"]
    share = stated.get("test_crop_pct") or stated.get("crop_pct") or 0.875
    moments = channel_moments(channels, stated.get("mean") or (), stated.get("std") or ())
    return Preprocessing(int(min(crop) / share), tuple(crop), *moments)  # rounded down, as timm


def _transformers(stated: dict, channels: int) -> Preprocessing:
    size = _sides(stated["size"])
    cut = stated.get("crop_size") if stated.get("do_center_crop") else None
    crop = _sides(cut) if cut else size
    moments = channel_moments(
        channels, stated.get("image_mean") or (), stated.get("image_std") or ()
    )
    return Preprocessing(max(min(size), *crop), crop, *moments)


def _sides(size) -> tuple[int, int]:
    """(height, width) of a processor's size: a number, or an object."""
    if isinstance(size, int):
        return size, size
    if "shortest_edge" in size:
        return size["shortest_edge"], size["shortest_edge"]
    return size["height"], size["width"]


def _json(path: Path) -> dict:
    try:
        found = json.loads(path.read_text()) if path.is_file() else {}
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from None
    return found if isinstance(found, dict) else {}
