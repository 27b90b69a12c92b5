"""The implementation of attention of a run, chosen by its devices and its model."""

import re

import jax
import jax.numpy as jnp
import numpy as np


def attention_for(
    devices: list[jax.Device],
    wanted: str,
    *,
    dtype: np.dtype,
    head_dim: int,
    plain_gradients: bool = False,
) -> str:
    """The implementation that config.model.attention stands for on these devices.

    Args:
      devices: of the run; they need not be present.
      wanted: "auto": cuDNN where it runs, else XLA; any other name stands for itself.
      dtype: of compute.
      head_dim: width of a head.
      plain_gradients: whether JAX's own gradients are asked for, which no kernel has.
    Returns:
      A name of `models.attention.ATTENTION`.
    Raises:
      ValueError: cudnn is wanted and does not run; one line with what it needs.
    """
    if wanted not in ("auto", "cudnn"):
        return wanted
    missing = _missing_for_cudnn(devices, dtype, head_dim, plain_gradients)
    if missing and wanted == "cudnn":
        raise ValueError(f"config.model.attention is 'cudnn': {missing}: choose auto or xla")
    return "xla" if missing else "cudnn"


def attention_anywhere(wanted: str) -> str:
    """The config.model.attention with which weights trained with `wanted` are used on any devices: the
    same function, whatever computes it."""
    return wanted if wanted == "xla" else "auto"


def _missing_for_cudnn(devices, dtype, head_dim: int, plain_gradients: bool) -> str:
    """What cuDNN's attention needs and what is there instead, or ""."""
    oldest = min(devices, key=_capability)
    major, minor = _capability(oldest)
    if major < 8:
        here = f"{oldest.device_kind} ({major}.{minor})" if major else oldest.device_kind
        return f"it needs NVIDIA GPUs of compute capability 8.0 (Ampere) or newer, here is {here}"
    if dtype not in (jnp.bfloat16, jnp.float16):
        return f"it needs config.model.dtype bfloat16, which is {jnp.dtype(dtype)}"
    widest = 256 if major == 9 else 128
    if head_dim % 8 or head_dim > widest:
        return (
            f"it needs heads whose width is a multiple of 8 up to {widest}, embed_dim / num_heads is "
            f"{head_dim}"
        )
    if plain_gradients:
        return "it has a gradient of its own, and config.model.plain_gradients is True"
    return ""


def _capability(device: jax.Device) -> tuple[int, int]:
    """Compute capability of an NVIDIA GPU; (0, 0) for any other device."""
    stated = re.fullmatch(r"(\d+)\.(\d+)", str(getattr(device, "compute_capability", "")))
    return (int(stated[1]), int(stated[2])) if device.platform == "gpu" and stated else (0, 0)
