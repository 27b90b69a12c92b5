"""Deprecated alias of augment.presets, kept for one release."""

from dinotwins_jax.augment.presets import *  # noqa: F403
