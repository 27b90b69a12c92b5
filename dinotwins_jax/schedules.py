"""Schedules: pure functions step -> scalar that reproduce the official arrays element by element."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

Schedule = Callable[[jax.Array | int], jax.Array]


def _lookup(values: np.ndarray) -> Schedule:
    # A table computed in float64 and rounded once: a float32 cosine on the device would lose digits
    # where the value is small. Steps past the end keep the last value.
    table = np.asarray(values, np.float32)

    def schedule(step):
        return jnp.asarray(table)[jnp.clip(step, 0, len(table) - 1)]

    return schedule


def cosine_schedule(base, final, total_steps, warmup_steps=0, warmup_start=0.0) -> Schedule:
    """Linear warm-up to `base`, then half a cosine towards `final`.

    Args:
      base, final, warmup_start: values, in the unit of the scheduled quantity.
      total_steps, warmup_steps: in steps; the warm-up is part of the total.
    Returns:
      fn(step i32[]) -> f32[]. The warm-up includes both ends, so steps warmup_steps - 1 and
      warmup_steps both have `base`; the last step is close to `final`, not at it.
    Raises:
      ValueError: warmup_steps outside of [0, total_steps], or total_steps < 1.
    Source: dino utils.py, cosine_scheduler; dinov2 utils/utils.py, CosineScheduler.
    Differs: Barlow Twins and DINOv3 (linear_warmup_cosine_decay) reach `base` one step later, in step
    warmup_steps; DINOv3's cosine includes its last point.
    """
    if total_steps < 1 or not 0 <= warmup_steps <= total_steps:
        raise ValueError(
            f"warmup_steps {warmup_steps} must lie in [0, total_steps {total_steps}], total_steps >= 1"
        )
    warmup = np.linspace(warmup_start, base, warmup_steps)
    rest = total_steps - warmup_steps
    cosine = final + 0.5 * (base - final) * (1 + np.cos(np.pi * np.arange(rest) / max(rest, 1)))
    return _lookup(np.concatenate([warmup, cosine]))


def teacher_temp_schedule(warmup_temp, temp, warmup_steps, steps_per_update=1) -> Schedule:
    """Linear warm-up from `warmup_temp` to `temp` (both ends included), then constant.

    Args:
      warmup_temp, temp: softmax temperatures.
      warmup_steps: length of the ramp, in steps.
      steps_per_update: steps between two changes of the value: 1, or the steps of an epoch as in the
        official code.
    Source: dino main_dino.py, DINOLoss.__init__ (per epoch); dinov2 (per step).
    """
    if min(warmup_temp, temp) <= 0:
        raise ValueError(
            f"teacher temperatures {warmup_temp} -> {temp} must be positive (0.04 in the paper)"
        )
    ramp = np.linspace(warmup_temp, temp, max(round(warmup_steps / steps_per_update), 0))
    return _lookup(np.concatenate([np.repeat(ramp, steps_per_update), [temp]]))
