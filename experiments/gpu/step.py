"""Part: time, utilisation and memory of training steps, with or without augmentation on the device."""

import statistics
import time
from typing import Any, NamedTuple

import jax
import numpy as np

from dinotwins_jax.build import Run
from dinotwins_jax.memory import abstract_batch
from experiments.benchmark.flops import step_flops
from experiments.benchmark.settings import Settings
from experiments.benchmark.worker import random_crops
from experiments.gpu.child import Job, serve
from experiments.gpu.peaks import peak_of
from experiments.gpu.plan import Item
from experiments.gpu.program import built, config_for, fresh_state, settings_of

PICTURE = (480, 640)  # pixels, height and width
_ROUNDS, _SECONDS, _MOST = 3, 0.7, 100  # seconds and steps of a round


class Compiled(NamedTuple):
    run: Run
    step: Any  # of jax.stages.Compiled
    compile_s: float


_states: dict[str, Any] = {}  # of models; a step takes one and leaves the next


def prepare(item: Item, job: Job) -> Compiled:
    """Compiles the step of an item."""
    augments, values = item.values["augments"], item.values
    canvas = 64 if job.toy else max(PICTURE)
    config = config_for(values, canvas_size=canvas)
    run = built(config, make_crops=None if augments else lambda batch: batch)
    if augments:
        batch = abstract_batch(run, config.batch_size)
    else:
        batch = run.placement.abstract_batch(crop_shapes(settings_of(values)))
    state = run.placement.abstract(jax.eval_shape(run.fresh_state))
    start = time.perf_counter()
    step = run.placement.compile(run.train_step, state).lower(state, batch).compile()
    return Compiled(run, step, time.perf_counter() - start)


def measure(item: Item, ready: Compiled, job: Job) -> dict:
    """Milliseconds of a step, utilisation, memory."""
    settings, run = settings_of(item.values), ready.run
    model = settings.model
    if item.values["augments"]:
        batch = random_pictures(settings.batch_size, run.canvas_size)
    else:
        batch = random_crops(settings._asdict())
    batch = run.placement.put_batch(batch)
    if model not in _states:
        _states.clear()  # one model's state is on the device
        _states[model] = fresh_state(run)

    def seconds_of(steps: int) -> float:
        start, state = time.perf_counter(), _states.pop(model)  # lost if the step fails
        for _ in range(steps):
            state, metrics = ready.step(state, batch)
        jax.block_until_ready((state, metrics))
        _states[model] = state
        return time.perf_counter() - start

    before = device_peak()
    first = seconds_of(1)
    count = max(2, min(_MOST, round(_SECONDS / seconds_of(1))))
    ms = [1000 * seconds_of(count) / count for _ in range(_ROUNDS)]
    after = device_peak()
    found = {
        "model": model,
        "batch_size": settings.batch_size,
        "attention": settings.attention,
        "augments": item.values["augments"],
        "ms": statistics.median(ms),
        "ms_min": min(ms),
        "ms_max": max(ms),
        "images_per_s": 1000 * settings.batch_size / statistics.median(ms),
        "compile_s": ready.compile_s,
        "first_step_s": first,
        "peak_bytes": program_bytes(ready.step),
        "device_peak_bytes": after if after and after != before else None,
    }
    altered = any(key.startswith("model.") for key in item.values["keys"])
    return found | utilisation(None if altered else step_flops(settings), found["ms"])


def utilisation(flops: float | None, ms: float) -> dict:
    """FLOPs of a step by formula and their rate as a share of the device's peak; None: unknown."""
    peak = peak_of(jax.devices()[0].device_kind)
    share = flops / ms * 1000 / peak.flops if flops and peak else None
    return {"flops": flops, "utilisation": share}


def crop_shapes(settings: Settings) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes of `random_crops`, which takes seconds for a large batch."""
    one = random_crops(settings._asdict() | {"batch_size": 1})
    return {
        name: jax.ShapeDtypeStruct((settings.batch_size, *crops.shape[1:]), crops.dtype)
        for name, crops in one.items()
    }


def program_bytes(step) -> int | None:
    """Memory of a compiled step on the device by XLA: arguments, results and temporaries; None: the
    backend does not tell."""
    memory = step.memory_analysis()
    if memory is None:
        return None
    kept = memory.argument_size_in_bytes + memory.output_size_in_bytes
    return kept - memory.alias_size_in_bytes + memory.temp_size_in_bytes


def device_peak() -> int | None:
    """Most bytes that this process had on the device, of all its items; None: not counted."""
    return (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")


def random_pictures(count: int, canvas: int) -> dict[str, np.ndarray]:
    """A batch as the pipeline makes it, of noise: the augmentation's time does not depend on it."""
    rng, (height, width) = np.random.default_rng(0), PICTURE
    size = (min(height, canvas), min(width, canvas))
    return {
        "image": rng.integers(0, 255, (count, canvas, canvas, 3), np.uint8),
        "size": np.tile(np.int32(size), (count, 1)),
        "place": np.stack([np.zeros(count), np.arange(count)], axis=1).astype(np.int32),
    }


if __name__ == "__main__":
    serve(measure, prepare)
