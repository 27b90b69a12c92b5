"""Part: from JPEG files, which it makes, to trained images: the host alone, then with the step."""

import contextlib
import time
from collections import deque
from pathlib import Path

import jax
from PIL import Image

from dinotwins_jax.data.pipeline import train_batches
from dinotwins_jax.data.scenes import Scenes
from dinotwins_jax.data.workers import num_cores
from experiments.benchmark.input_pipeline import Repeated
from experiments.gpu.child import Job, serve
from experiments.gpu.plan import Item
from experiments.gpu.program import built, config_for, fresh_state
from experiments.gpu.report import measured
from experiments.gpu.step import PICTURE

_WARM = 6  # batches, until the prefetch buffer is as full as at the end


def measure(item: Item, ready: None, job: Job) -> dict:
    """Images/s."""
    count, width = (8, 64) if job.toy else (40, PICTURE[1])
    folder = make_pictures(Path(job.out) / f"pictures_{width}", count, width)
    config = config_for(item.values, source="folder", dir=str(folder))
    run = built(config)
    batches = train_batches(
        Repeated(run.source),
        batch_size=config.batch_size,
        canvas_size=run.canvas_size,
        seed=config.seed,
    )
    seconds = 0.5 if job.toy else 4.0
    facts = {"batch_size": config.batch_size, "cores": num_cores()}
    with contextlib.closing(batches):
        if item.name == "host":
            return facts | host(batches, config.batch_size, seconds)
        found = facts | end_to_end(run, batches, config.batch_size, seconds)
    step = steps_like(job.found, config)
    return found | ({"share_of_step": found["images_per_s"] / step} if step else {})


def host(batches, batch_size: int, seconds: float) -> dict:
    """Decoding alone, with all cores."""
    for _ in range(_WARM):
        next(batches)
    count, start = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - start) < seconds or not count:
        next(batches)
        count += 1
    return {"images_per_s": count * batch_size / elapsed}


def end_to_end(run, batches, batch_size: int, seconds: float) -> dict:
    """A training: files, decoding, copies to the device, augmentation, step."""
    state, running, waited = fresh_state(run), deque(maxlen=2), 0.0
    step = run.placement.compile(run.train_step, state)
    start, count = time.perf_counter(), -_WARM
    while (elapsed := time.perf_counter() - start) < seconds or count <= 0:
        before = time.perf_counter()
        batch = next(batches)
        batch = run.placement.put_batch({k: batch[k] for k in ("image", "size", "place")})
        waited += time.perf_counter() - before
        state, metrics = step(state, batch)
        running.append(metrics)
        jax.block_until_ready(running[0])  # as in training: one step runs, one is queued
        count += 1
        if count == 0:
            compiled_s = time.perf_counter() - start
            jax.block_until_ready(state)
            start, waited = time.perf_counter(), 0.0
    jax.block_until_ready(state)
    elapsed = time.perf_counter() - start
    return {
        "images_per_s": count * batch_size / elapsed,
        "share_waiting": waited / elapsed,
        "compile_s": compiled_s,
    }


def steps_like(report: dict, config) -> float | None:
    """Images/s of the step of the part "step" that is the same but for its resident batch."""
    wanted = {"model": config.model.name, "batch_size": config.batch_size, "augments": True}
    wanted["attention"] = config.model.attention
    found = [
        item["images_per_s"]
        for item in measured(report, "step").values()
        if all(item[key] == value for key, value in wanted.items())
    ]
    return found[0] if found else None


def make_pictures(folder: Path, count: int, width: int) -> Path:
    """JPEGs of generated scenes, `width` pixels wide, as high as PICTURE is; made once."""
    if folder.is_dir():
        return folder
    temporary = folder.with_name(f"{folder.name}.tmp")
    temporary.mkdir(exist_ok=True)
    scenes = Scenes("train", num_train=count, size=width)
    height = width * PICTURE[0] // PICTURE[1]
    for i in range(count):
        Image.fromarray(scenes[i][:height]).save(temporary / f"{i:05}.jpg", quality=92)
    return temporary.rename(folder)


if __name__ == "__main__":
    serve(measure)
