"""Contestant: this package's training step, from crops to the updated state."""

import time

import jax
import jax.numpy as jnp

from dinotwins_jax.build import build
from experiments.benchmark.settings import Settings, config_of
from experiments.benchmark.worker import forget_peak, random_crops, resident_peak, serve


def prepare(settings: dict) -> tuple[dict, dict]:
    """Compiles the step and runs it once; see worker.serve."""
    given = Settings(**settings)
    run = build(config_of(given), make_crops=lambda batch: batch)
    state = run.placement.init(run.fresh_state)
    batch = run.placement.put_batch(random_crops(settings))
    lowered = run.placement.compile(run.train_step, state).lower(state, batch)
    start = time.perf_counter()
    step = lowered.compile()
    facts = {"compile_s": time.perf_counter() - start} | _analyses(step)
    forget_peak()
    kept = [state]

    def steps(count: int) -> dict:
        start = time.perf_counter()
        for _ in range(count):
            kept[0], metrics = step(kept[0], batch)
        jax.block_until_ready((kept[0], metrics))
        return {"seconds": time.perf_counter() - start}

    facts["first_step_s"] = steps(1)["seconds"]
    device = jax.devices()[0]
    facts |= {"device": device.device_kind, "devices": run.placement.num_devices}
    facts["version"] = f"jax {jax.__version__}"
    requests = {
        "steps": steps,
        "peak": lambda: {"peak_bytes": peak_bytes()},
        "ceiling": lambda: {"flop_per_s": matmul_ceiling(given.dtype)},
    }
    return facts, requests


def peak_bytes() -> int:
    """Peak bytes of the device if it counts them, else resident bytes of the process."""
    stats = jax.local_devices()[0].memory_stats() or {}
    return stats.get("peak_bytes_in_use") or resident_peak()


def _analyses(compiled) -> dict:
    memory, cost = compiled.memory_analysis(), compiled.cost_analysis() or {}
    return {"xla_flops": cost.get("flops"), "temporary_bytes": memory.temp_size_in_bytes}


def matmul_ceiling(dtype: str, tries: int = 5) -> float:
    """FLOP/s of a large square matrix product in this dtype, the best of several tries."""
    side = 2048 if jax.default_backend() == "cpu" else 8192
    a, b = (jax.random.normal(jax.random.key(i), (side, side), jnp.dtype(dtype)) for i in range(2))
    product = jax.jit(jnp.matmul)
    product(a, b).block_until_ready()
    repeats = 1 if jax.default_backend() == "cpu" else 20
    seconds = []
    for _ in range(tries):
        start = time.perf_counter()
        for _ in range(repeats):
            out = product(a, b)
        out.block_until_ready()
        seconds.append((time.perf_counter() - start) / repeats)
    return 2 * side**3 / min(seconds)


if __name__ == "__main__":
    serve(prepare)
