"""Part: the device, versions, and the rates that it reaches."""

import os
import platform
import shutil
import subprocess
import time
from importlib import metadata
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import dinotwins_jax
from experiments.benchmark.jax_step import matmul_ceiling
from experiments.benchmark.train_step import environment
from experiments.gpu.child import Job, serve
from experiments.gpu.peaks import peak_of
from experiments.gpu.plan import Item

PACKAGES = (
    *("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "torch", "libtpu"),
    *("jax-cuda12-plugin", "jax-cuda13-plugin", "nvidia-cudnn-cu12", "nvidia-cudnn-cu13"),
)
_MIB = 2**20


def measure(item: Item, ready: None, job: Job) -> dict:
    """Figures of "versions" or "rates"."""
    return versions() if item.name == "versions" else rates(jax.default_backend() == "cpu")


def versions() -> dict:
    """What is here: device, drivers, packages, host."""
    device = jax.devices()[0]
    peak, memory = peak_of(device.device_kind), device.memory_stats() or {}
    return environment() | {
        "platform": device.platform,
        "kind": device.device_kind,
        "devices": jax.device_count(),
        "compute_capability": str(getattr(device, "compute_capability", "")),
        "memory_bytes": memory.get("bytes_limit"),
        "peak_flop_per_s": peak and peak.flops,
        "peak_bytes_per_s": peak and peak.memory,
        "nvidia_smi": nvidia_smi(),
        "packages": {name: v for name in PACKAGES if (v := _version(name))},
        "dinotwins_jax": dinotwins_jax.__version__,
        "cores": os.cpu_count(),
        "host_memory_bytes": _host_memory(),
        "system": platform.platform(),
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
    }


def nvidia_smi() -> list[str]:
    """Name, driver, memory and power limit of each NVIDIA card that the system has, used by JAX or not."""
    if shutil.which("nvidia-smi") is None:
        return []
    query = "--query-gpu=name,driver_version,memory.total,power.limit"
    done = subprocess.run(
        ["nvidia-smi", query, "--format=csv,noheader"], capture_output=True, text=True, timeout=20
    )
    return done.stdout.splitlines() if done.returncode == 0 else []


def rates(small: bool) -> dict:
    """FLOP/s of large matrix products, bytes/s of memory and from the host."""
    flops = {
        f"{dtype}_flop_per_s": matmul_ceiling(dtype, tries=2) for dtype in ("bfloat16", "float32")
    }
    side = 16 * _MIB if small else 512 * _MIB
    x = jnp.zeros(side, jnp.float32)
    add = jax.jit(lambda x: x + 1.0)
    host = np.ones((16 if small else 256) * _MIB, np.uint8)
    return flops | {
        "memory_bytes_per_s": 2 * x.nbytes / _seconds(lambda: add(x)),
        "host_to_device_bytes_per_s": host.nbytes / _seconds(lambda: jax.device_put(host)),
    }


def _seconds(function, tries: int = 5) -> float:
    """Least seconds of a call after a first one."""
    taken = []
    for _ in range(1 + tries):
        start = time.perf_counter()
        jax.block_until_ready(function())
        taken.append(time.perf_counter() - start)
    return min(taken[1:])


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _host_memory() -> int | None:
    info = Path("/proc/meminfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((int(x.split()[1]) * 1024 for x in lines if x.startswith("MemTotal")), None)


if __name__ == "__main__":
    serve(measure)
