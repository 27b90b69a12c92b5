"""How programs are compiled, and where they are remembered."""

import hashlib
import platform
from pathlib import Path

import jax

_SHORTEST = 0.5  # seconds of compilation that are worth a file


def compiler_options(devices: list[jax.Device]) -> dict[str, str]:
    """Of a training step for these devices.

    XLA's CPU backend drops optimisation barriers: then remat computes everything once after all, and
    what `models.barriers.in_memory` says is not heard.
    """
    on_cpu = devices[0].platform == "cpu"
    return {"xla_disable_hlo_passes": "cse_barrier_expander"} if on_cpu else {}


def remember_compilations(folder: Path) -> Path | None:
    """Programs compiled from here on are kept in a part of `folder` for machines like this one.

    Returns:
      where; None where JAX was told already, such as by JAX_COMPILATION_CACHE_DIR.
    """
    if jax.config.jax_compilation_cache_dir is not None:
        return None
    path = folder / machine_id()
    jax.config.update("jax_compilation_cache_dir", str(path))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", _SHORTEST)
    return path


def machine_id() -> str:
    """The kind of CPU: a program compiled for one fails on another that lacks its instructions."""
    cpu = Path("/proc/cpuinfo")
    lines = cpu.read_text().splitlines() if cpu.exists() else [platform.processor()]
    told = next((x for x in lines if x.startswith(("flags", "Features"))), lines[0])
    return f"{platform.machine()}-{hashlib.sha256(told.encode()).hexdigest()[:8]}"
