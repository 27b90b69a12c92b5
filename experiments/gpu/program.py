"""The config, the built run and the random state of a measured step, on one device."""

import threading
from collections.abc import Callable
from typing import Any

import jax
from ml_collections import ConfigDict

from dinotwins_jax.build import Run, build
from experiments.benchmark.settings import Settings, config_of

STEPS = 1000  # of every schedule, so that equal steps are equal programs


def settings_of(values: dict) -> Settings:
    """Settings of an item's values."""
    return Settings(**values["settings"])


def config_for(values: dict, **data) -> ConfigDict:
    """The config of an item's settings and keys; data: keys of config.data."""
    config = config_of(settings_of(values))
    config.total_steps = STEPS
    config.update_from_flattened_dict(values["keys"])
    config.data.update(data)
    return config


def built(config: ConfigDict, make_crops: Callable | None = None) -> Run:
    """The run on the first device."""
    return build(config, jax.devices()[:1], make_crops=make_crops)


def fresh_state(run: Run):
    """The initial state, made by one program."""
    return run.placement.init(jax.jit(run.fresh_state))


class Once:
    """Calls a function once, in whichever thread comes first, and keeps its result."""

    def __init__(self):
        self._lock, self._found = threading.Lock(), []

    def __call__(self, make: Callable[[], Any]) -> Any:
        with self._lock:
            if not self._found:
                self._found.append(make())
            return self._found[0]
