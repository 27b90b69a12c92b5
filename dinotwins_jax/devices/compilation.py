"""Compiler options and the persistent compilation cache."""

import hashlib
import platform
from pathlib import Path

import jax

from dinotwins_jax.devices.platforms import platform_of

_SHORTEST = 0.5  # seconds; programs that compile faster are not cached


def compiler_options(devices: list[jax.Device]) -> dict[str, str]:
    """Compiler options of a training step for these devices.

    By default XLA's CPU backend removes optimisation barriers, which disables remat and
    `models.barriers.in_memory`.
    """
    if platform_of(devices) == "cpu":
        return {"xla_disable_hlo_passes": "cse_barrier_expander"}
    return {}


def remember_compilations(folder: Path) -> Path | None:
    """Enables the compilation cache in a subfolder of `folder` for machines like this one.

    Returns:
      the subfolder; None if a cache is configured already, such as by JAX_COMPILATION_CACHE_DIR.
    """
    if jax.config.jax_compilation_cache_dir is not None:
        return None
    path = folder / machine_id()
    jax.config.update("jax_compilation_cache_dir", str(path))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", _SHORTEST)
    return path


def machine_id() -> str:
    """Name of this machine's CPU type: a program may use instructions that another CPU lacks."""
    cpu = Path("/proc/cpuinfo")
    lines = cpu.read_text().splitlines() if cpu.exists() else [platform.processor()]
    told = next((x for x in lines if x.startswith(("flags", "Features"))), lines[0])
    return f"{platform.machine()}-{hashlib.sha256(told.encode()).hexdigest()[:8]}"
