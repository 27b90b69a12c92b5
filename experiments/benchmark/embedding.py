"""Speed and memory of embed, beside the bare forward pass of the same model in the same process.

    python -m experiments.benchmark.embedding --images=/data/coco/val2017 [--model=vit_small] [--size=224]

One round is: embed into an .npz, then the same number of images through the model alone (views already on
the device), then reading and views alone. Prints the median of the rounds and the peak memory of a
process that embeds 200, and one that embeds 2,000 images.
"""

import resource
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from itertools import islice
from pathlib import Path

import jax
import numpy as np
from absl import app, flags

from dinotwins_jax.data.base import ImageFiles, canvas_for_photos
from dinotwins_jax.data.pictures import pictures_in
from dinotwins_jax.devices.placement import make_placement
from dinotwins_jax.evals.features import View
from dinotwins_jax.features.embedding import write_features
from dinotwins_jax.features.model import Model, tokens
from dinotwins_jax.models import create_vit
from dinotwins_jax.training.state import init_backbone

_IMAGES = flags.DEFINE_string("images", None, "folder, pattern or prepared data")
_MODEL = flags.DEFINE_string("model", "vit_small", "name of the model; random weights")
_PATCH = flags.DEFINE_integer("patch_size", 16, "pixels")
_SIZE = flags.DEFINE_integer("size", 224, "pixels of the crop; the short side becomes size * 8 / 7")
_BATCH = flags.DEFINE_integer("batch_size", 64, "images at once")
_COUNT = flags.DEFINE_integer("count", 512, "images a round")
_ROUNDS = flags.DEFINE_integer("rounds", 3, "of the three contestants in turn")
_ONCE = flags.DEFINE_boolean("once", False, "embed once and print the peak memory (MiB)")


def make_model() -> Model:
    """A model with random weights."""
    size = _SIZE.value
    backbone = create_vit(_MODEL.value, patch_size=_PATCH.value, image_size=size)
    placement = make_placement("jit", jax.local_device_count())
    params = placement.whole(init_backbone(backbone, jax.random.key(0)))
    view = View(size * 8 // 7, size, canvas_for_photos(size), _BATCH.value, placement.put_images)
    return Model(backbone, params, view)


def embed(model: Model, pictures) -> float:
    """Seconds of embed into a file."""
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        write_features(model, pictures, Path(folder) / "features.npz")
        return time.perf_counter() - start


def forward(model: Model, views, batches: int) -> float:
    """Seconds of the model alone on batches that are on the device."""
    start = time.perf_counter()
    for _ in range(batches):
        jax.block_until_ready(tokens(model.module, model.params, views))
    return time.perf_counter() - start


def reading(model: Model, pictures) -> float:
    """Seconds of reading, decoding and views alone."""
    start = time.perf_counter()
    for views, _, _ in model.view.batches(pictures, bad_limit=1.0):
        jax.block_until_ready(views)
    return time.perf_counter() - start


def peak(count: int) -> int:
    """Peak memory (MiB) of a process that embeds `count` images."""
    command = [sys.executable, "-m", "experiments.benchmark.embedding", *sys.argv[1:]]
    command += ["--once", f"--count={count}"]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def main(argv) -> None:
    del argv
    pictures, model = pictures_in(_IMAGES.value), make_model()
    if isinstance(pictures, ImageFiles):
        pictures = ImageFiles(pictures.paths[: _COUNT.value])
    if _ONCE.value:
        embed(model, pictures)
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
        return
    ((views, _, _),) = islice(model.view.batches(pictures), 1)
    batches = -(-len(pictures) // _BATCH.value)
    contestants = {
        "embed": partial(embed, model, pictures),
        "the model alone": partial(forward, model, views, batches),
        "reading alone": partial(reading, model, pictures),
    }
    for run in contestants.values():  # compiles
        run()
    seconds = {name: [] for name in contestants}
    for _ in range(_ROUNDS.value):
        for name, run in contestants.items():
            seconds[name].append(run())
    for name, found in seconds.items():
        speed = len(pictures) / statistics.median(found)
        share = statistics.median(np.divide(seconds["the model alone"], found))
        print(f"{name:<16} {speed:8.1f} images/s   {share:5.2f} of the model alone")
    print("peak memory: " + ", ".join(f"{n:,} images {peak(n):,} MiB" for n in (200, 2000)))


if __name__ == "__main__":
    flags.mark_flag_as_required("images")
    app.run(main)
