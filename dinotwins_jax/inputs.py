"""How a run reads and normalises its pictures, from its config: window, moments, crops."""

import copy
from collections.abc import Callable

from dinotwins_jax.augment.multi_crop import channel_moments, seeded_multi_crop
from dinotwins_jax.data.base import Source, reading_of
from dinotwins_jax.data.window import window_keys
from dinotwins_jax.devices.placement import Placement


def with_window(config, source: Source):
    """The config with the numbers of the window with which the source is read, if there is one."""
    if (window := reading_of(source).window) is None:
        return config
    config = copy.deepcopy(config)
    with config.unlocked():
        config.data.window = window_keys(window)
    return config


def moments_of(config) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """(mean, std) of each channel, with which views are normalised.

    Raises ValueError if config.data.mean or config.data.std has another number of values.
    """
    data, channels = config.data, config.model.get("in_channels", 3)
    return channel_moments(channels, data.get("mean", ()), data.get("std", ()))


def make_crops_of(config, placement: Placement) -> Callable:
    """The multi-crop of config.views, batch -> crops."""
    # A loop over images sharded over devices would gather all of them on every device.
    split = placement.axis_name is None and placement.num_devices > 1
    one_by_one = placement.platform == "cpu" and not split
    mean, std = moments_of(config)
    options = config.views.to_dict() | {"mean": mean, "std": std}
    return seeded_multi_crop(config.seed, **options, one_by_one=one_by_one)
