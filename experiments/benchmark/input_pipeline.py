"""Throughput of the input pipeline: host, device and both, against Pillow's multi-crop in the same run.

    python -m experiments.benchmark.input_pipeline --dir=/data/coco/train2017 --json=input.json

Raw images are those of 640 x 480 pixels; shards are made of the first ones of any shape.

Host figures, also Pillow's, are for one core, to which the process is pinned. Rounds of all contestants
alternate; the table shows medians. Without --dir the images are generated, and decode faster than
photographs.
"""

import json
import os
import platform
import random
import statistics
import tempfile
import time
from importlib.metadata import version
from itertools import islice
from pathlib import Path

import numpy as np
from absl import app, flags
from PIL import Image

from dinotwins_jax.data import make_source, shards
from dinotwins_jax.data.pipeline import train_batches
from dinotwins_jax.data.scenes import Scenes
from dinotwins_jax.data.store import Settings, union
from experiments.benchmark import pil_views

_DIR = flags.DEFINE_string("dir", None, "Tree of JPEGs; those of 640 x 480 pixels are used")
_IMAGES = flags.DEFINE_integer("images", 80, "Images, read repeatedly", lower_bound=1)
_SIDE = flags.DEFINE_integer("short_side", 256, "Short side of the prepared shards, pixels")
_ROUNDS = flags.DEFINE_integer("rounds", 5, "Rounds of all contestants in turn", lower_bound=1)
_SECONDS = flags.DEFINE_float("seconds", 2.0, "Seconds of each contestant in a round")
_BATCH = flags.DEFINE_integer("batch_size", 32, "Pictures", lower_bound=1)
_MEMORY = flags.DEFINE_integer(
    "memory_batches", 0, "Batches over which memory is measured; 0: skip"
)
_JSON = flags.DEFINE_string("json", None, "File for all figures")

RAW = (640, 480)  # width, height


def main(argv) -> None:
    del argv
    if _MEMORY.value and not Path("/proc/self/statm").exists():
        raise app.UsageError("--memory_batches needs /proc, which this system lacks")
    with tempfile.TemporaryDirectory() as folder:
        sources, files = make_sources(Path(folder))
        figures = {"environment": environment(), "settings": settings(sources)}
        figures["host"] = measure_host(sources, files)
        figures["device"] = measure_device(sources, files)
        if _MEMORY.value:
            figures["memory"] = measure_memory(sources["prepared"])
    print(table(figures))
    if _JSON.value:
        Path(_JSON.value).write_text(json.dumps(figures, indent=1) + "\n")


def make_sources(folder: Path) -> tuple[dict, list[Path]]:
    """{"raw": JPEGs of 640 x 480, "prepared": shards}, and the JPEGs of 640 x 480."""
    found = jpegs(folder / "drawn")
    files = list(islice(filter(_is_raw, found), _IMAGES.value))
    if not files:
        raise app.UsageError(f"--dir={_DIR.value}: no .jpg of 640 x 480 pixels in it")
    raw = folder_of(files, folder / "raw")
    shards.write(
        union({"pretrain": folder_of(found[: _IMAGES.value], folder / "any")}),
        folder / "prepared",
        Settings(short_side=_SIDE.value),
        description={"name": "folder"},
        command="",
    )
    prepared = make_source("array_record", "pretrain", dir=str(folder / "prepared"))
    return {"raw": Repeated(raw), "prepared": Repeated(prepared)}, files


def folder_of(files: list[Path], folder: Path):
    """Makes a source of these files."""
    folder.mkdir()
    for number, file in enumerate(files):
        (folder / f"{number:05}.jpg").symlink_to(file)
    return make_source("folder", "pretrain", dir=str(folder))


def jpegs(drawn: Path) -> list[Path]:
    """All JPEGs below --dir, or generated ones of 640 x 480 pixels."""
    if _DIR.value is None:
        drawn.mkdir()
        scenes = Scenes("train", num_train=_IMAGES.value, size=RAW[0])
        for i in range(_IMAGES.value):
            picture = Image.fromarray(scenes[i][: RAW[1]])
            picture.save(drawn / f"{i:05}.jpg", quality=92)
        return sorted(drawn.iterdir())
    return [path.resolve() for path in sorted(Path(_DIR.value).rglob("*.jpg"))]


def _is_raw(path: Path) -> bool:
    try:
        with Image.open(path) as image:
            return image.size == RAW and image.mode == "RGB"
    except OSError:
        return False


class Repeated:
    """A source repeated to the length of a data set: shuffling few records costs more than many."""

    labels, class_names = None, ()

    def __init__(self, source, length: int = 100_000):
        self._source, self._length = source, length

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, i: int) -> np.ndarray:
        return self._source[i % len(self._source)]

    def encoded(self, i: int) -> bytes:
        return self._source.encoded(i % len(self._source))

    def name(self, i: int) -> str:
        return self._source.name(i % len(self._source))

    def default_canvas(self, global_size: int) -> int:
        return self._source.default_canvas(global_size)


def batches_of(source, seed: int = 0, **options):
    canvas = source.default_canvas(224)
    return train_batches(source, batch_size=_BATCH.value, canvas_size=canvas, seed=seed, **options)


def measure_host(sources, files) -> dict:
    """Images/s on one core: Pillow's whole pipeline, and the host part of ours."""
    contestants = {
        "pillow": lambda: pillow_rate(files, decode=True, crops=True),
        "pillow_decode": lambda: pillow_rate(files, decode=True, crops=False),
        "pillow_crops": lambda: pillow_rate(files, decode=False, crops=True),
    }
    for name, source in sources.items():
        contestants[name] = lambda source=source: host_rate(source)
        contestants[f"{name}_worker_process"] = lambda source=source: host_rate(
            source, num_workers=1
        )
    cores = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None
    if cores:
        os.sched_setaffinity(0, {min(cores)})
    try:
        rounds = [{name: run() for name, run in contestants.items()} for _ in range(_ROUNDS.value)]
    finally:
        if cores:
            os.sched_setaffinity(0, cores)
    return summary(rounds, base="pillow")


def pillow_rate(files, *, decode: bool, crops: bool) -> float:
    """Images/s from files (or decoded pictures) to batches of views (or decoded pictures)."""
    rng, pictures = random.Random(0), None if decode else [pil_views.read(f) for f in files]
    count, views, start = 0, [], time.perf_counter()
    while (elapsed := time.perf_counter() - start) < _SECONDS.value or count < _BATCH.value:
        i = count % len(files)
        picture = pil_views.read(files[i]) if decode else pictures[i]
        if crops:
            views.append(pil_views.multi_crop(picture, rng))
        if len(views) == _BATCH.value:
            pil_views.collate(views)
            views = []
        count += 1
    return count / elapsed


def host_rate(source, num_workers: int = 0) -> float:
    """Images/s of training batches, decoded by one thread of this process or one other process."""
    batches = batches_of(source, num_workers=num_workers, num_threads=1)
    for _ in range(6):  # until the prefetch buffer is as full as at the end
        next(batches)
    count, start = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - start) < _SECONDS.value:
        next(batches)
        count += 1
    batches.close()
    return count * _BATCH.value / elapsed


def measure_device(sources, files) -> dict:
    """Images/s on the whole machine: crops only, and from files to crops."""
    import jax

    from dinotwins_jax.augment.multi_crop import image_keys, make_multi_crop

    multi_crop, key = jax.jit(make_multi_crop()), jax.random.key(0)

    def crops(batch):
        return multi_crop(batch["image"], batch["size"], image_keys(key, batch["place"]))

    def alone(batch):
        jax.block_until_ready(crops(batch))
        count, start, cpu = 0, time.perf_counter(), time.process_time()
        while (elapsed := time.perf_counter() - start) < _SECONDS.value or not count:
            jax.block_until_ready(crops(batch))
            count += 1
        images = count * _BATCH.value
        return images / elapsed, images / (time.process_time() - cpu)

    def end_to_end(source):
        batches, before, count = batches_of(source), None, -3
        start = time.perf_counter()
        while (elapsed := time.perf_counter() - start) < _SECONDS.value or count <= 0:
            views = crops(jax.device_put(next(batches)))
            jax.block_until_ready(before)  # as in training: one batch runs, one is queued
            before, count = views, count + 1
            if count == 0:
                start = time.perf_counter()
        batches.close()
        return count * _BATCH.value / elapsed

    resident = {}
    for name, source in sources.items():
        batches = batches_of(source)
        resident[name] = jax.device_put(next(batches))
        batches.close()
    rounds = []
    for _ in range(_ROUNDS.value):
        figures = {"pillow_crops_one_core": pillow_rate(files, decode=False, crops=True)}
        figures["pillow_one_core"] = pillow_rate(files, decode=True, crops=True)
        for name, source in sources.items():
            figures[f"crops_{name}"], figures[f"crops_{name}_per_cpu_second"] = alone(
                resident[name]
            )
            figures[f"end_to_end_{name}"] = end_to_end(source)
        rounds.append(figures)
    device = jax.devices()[0]
    return {"kind": device.device_kind, "platform": device.platform} | summary(
        rounds, base="pillow_one_core"
    )


def measure_memory(source) -> dict:
    """Resident bytes of this process over _MEMORY batches of 8 images."""
    batches = train_batches(source, batch_size=8, canvas_size=source.default_canvas(224), seed=0)
    marks, every = {}, max(_MEMORY.value // 10, 1)
    for number in range(_MEMORY.value + 1):
        next(batches)
        if number % every == 0:
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            marks[number] = pages * os.sysconf("SC_PAGE_SIZE")
    batches.close()
    return {"resident_bytes_after_batches": marks}


def summary(rounds: list[dict], base: str) -> dict:
    """{"images_per_s": medians, "times_<base>": medians of the ratios of each round, "rounds": all}."""
    names = rounds[0]
    return {
        "images_per_s": {n: statistics.median(r[n] for r in rounds) for n in names},
        f"times_{base}": {n: statistics.median(r[n] / r[base] for r in rounds) for n in names},
        "rounds": rounds,
    }


def environment() -> dict:
    packages = ("jax", "grain", "numpy", "pillow", "simplejpeg", "array_record")
    return {
        "date": time.strftime("%Y-%m-%d"),
        "machine": platform.machine(),
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "python": platform.python_version(),
        "packages": {name: version(name) for name in packages},
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(": ")[1] for line in lines if line.startswith("model name")), "unknown")


def settings(sources) -> dict:
    return {
        "pictures": "photographs" if _DIR.value else "drawn",
        "short_side": _SIDE.value,
        "batch_size": _BATCH.value,
        "crops": "2 x 224 + 8 x 96, official DINO recipe",
        "canvas": {name: source.default_canvas(224) for name, source in sources.items()},
    }


def table(figures: dict) -> str:
    """Formats the figures as text."""
    host, device = figures["host"], figures["device"]
    cores = figures["environment"]["cores"]
    rate, times = host["images_per_s"], host["times_pillow"]
    lines = [
        f"one core of {cores}, {figures['settings']['pictures']}    images/s   x Pillow multi-crop",
        f"  Pillow: decode + crops                {rate['pillow']:9.1f}   {1:6.1f}",
    ]
    for name, what in (("raw", "640 x 480 JPEGs"), ("prepared", f"shards, side {_SIDE.value}")):
        for suffix, how in (("", "a thread"), ("_worker_process", "a process")):
            line = f"host, {how}: {what}"
            lines.append(f"  {line:38}{rate[name + suffix]:9.1f}   {times[name + suffix]:6.1f}")
    rate = device["images_per_s"]
    pillow, pillow_crops = rate["pillow_one_core"], rate["pillow_crops_one_core"]
    lines += [
        f"all of {cores} cores + {device['kind']}    images/s   x Pillow on all cores (ideal)",
        f"  Pillow: crops alone, x {cores} cores         {pillow_crops * cores:9.1f}   {1:6.1f}",
    ]
    for name in ("raw", "prepared"):
        value = rate[f"crops_{name}"]
        lines.append(
            f"  device: crops alone, {name:17}{value:9.1f}   {value / pillow_crops / cores:6.1f}"
        )
    lines.append(f"  Pillow: decode + crops, x {cores} cores      {pillow * cores:9.1f}   {1:6.1f}")
    for name in ("raw", "prepared"):
        value = rate[f"end_to_end_{name}"]
        lines.append(f"  end to end, {name:26}{value:9.1f}   {value / pillow / cores:6.1f}")
    if device["platform"] == "cpu":
        ratio = statistics.median(
            r["crops_raw_per_cpu_second"] / r["pillow_crops_one_core"] for r in device["rounds"]
        )
        lines.append(f"crops on this CPU: {ratio:.2f} x Pillow's images a second of one core")
    for number, size in figures.get("memory", {}).get("resident_bytes_after_batches", {}).items():
        lines.append(f"memory after {number:>6} batches: {size / 1e6:7.1f} MB")
    return "\n".join(lines)


if __name__ == "__main__":
    app.run(main)
