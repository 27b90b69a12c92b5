"""The platform for which a program is compiled: that of its devices, which may be absent here."""

import jax


def platform_of(devices: list[jax.Device]) -> str:
    """Returns "cpu", "gpu" or "tpu"; the devices may be those of a topology that is absent here."""
    platform = devices[0].platform
    return "gpu" if platform in ("cuda", "rocm") else platform
