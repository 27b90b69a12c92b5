"""Seconds of the tasks of an evaluation against images, classes, columns and k, and of `prepare`.

    python -m experiments.benchmark.evaluation --json=evaluation.json
    python -m experiments.benchmark.evaluation --sweeps=classes --values=5000 --tasks=few-shot,k-NN

One setting is varied at a time around 8,000 training and 2,000 test images of 10 classes, with made-up
features of 384 columns, and k = 20. Draws: the images of 1, 5 and 10 shots, five seeds, for three sets of
features. Few-shot: the same for one set. SGD and ridge: one draw of all labels. k-NN: one k. Clusters: of
the test images, as many as classes. Compilation counts. `prepare`: made-up JPEGs to a short side of 160
pixels, with all cores.
"""

import contextlib
import io
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from absl import app, flags
from PIL import Image

from dinotwins_jax import prepare
from dinotwins_jax.cli import exit_code
from dinotwins_jax.evals.bank import bank_probe
from dinotwins_jax.evals.clusters import k_means
from dinotwins_jax.evals.fewshot import few_shot, shot_indices
from dinotwins_jax.evals.knn import knn_scores
from dinotwins_jax.evals.linear import linear_probe
from dinotwins_jax.evals.table import markdown
from dinotwins_jax.files import replace_text


class Sizes(NamedTuple):
    """Sizes of an evaluation; a quarter as many test images as training images."""

    images: int = 8000
    classes: int = 10
    columns: int = 384
    k: int = 20


class Files(NamedTuple):
    """JPEGs that `prepare` reads."""

    files: int = 200
    side: int = 480


SWEEPS = {
    "images": (2000, 8000, 32000),
    "classes": (10, 100, 1000),
    "columns": (192, 384, 768),
    "k": (5, 20, 200),
    "files": (100, 400, 1600),
    "side": (240, 480, 960),
}
ROWS, SEEDS, SHOTS = 3, range(5), (1, 5, 10)


def made_up(sizes: Sizes, images: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """f32[images, columns] around a mean a class, the same for all seeds, and their labels."""
    means = np.random.RandomState(0).normal(size=(sizes.classes, sizes.columns))
    labels = np.arange(images, dtype=np.int32) % sizes.classes
    noise = np.random.RandomState(1 + seed).normal(0, 4, size=(images, sizes.columns))
    return (means[labels] + noise).astype(np.float32), labels


def tasks(sizes: Sizes) -> dict[str, Callable]:
    """Name -> the task, a function without arguments."""
    (x, y), (z, t) = made_up(sizes, sizes.images, 0), made_up(sizes, sizes.images // 4, 1)
    data, options = (x, y, z, t), {"num_classes": sizes.classes}

    def draws():
        return [shot_indices(y, n, seed) for _ in range(ROWS) for n in SHOTS for seed in SEEDS]

    return {
        "draws": draws,
        "few-shot": lambda: few_shot(*data, shots=SHOTS, split_seeds=tuple(SEEDS), **options),
        "k-NN": lambda: knn_scores(*data, ks=(sizes.k,), **options),
        "ridge": lambda: bank_probe({"x": x}, y, {"x": z}, t, **options),
        "SGD": lambda: linear_probe(*data, **options),
        "clusters": lambda: k_means(z, sizes.classes),
    }


def prepared(files: Files) -> Callable:
    """`prepare` of that many JPEGs, made here first; a function without arguments."""
    folder = tempfile.TemporaryDirectory()
    root, rng = Path(folder.name), np.random.RandomState(0)
    (root / "in" / "train" / "a").mkdir(parents=True)
    blocks = rng.randint(0, 200, (8, 8, 3), np.uint8)
    for i in range(files.files):
        picture = np.asarray(Image.fromarray(np.roll(blocks, i)).resize((files.side,) * 2))
        noisy = picture + rng.randint(0, 40, picture.shape).astype(np.uint8)
        Image.fromarray(noisy).save(root / "in" / "train" / "a" / f"{i:05}.jpg", quality=90)
    command = ["--config=hybrid:demo", "--config.data.source=folder", "--short_side=160"]
    command += [f"--config.data.dir={root / 'in'}", f"--out={root / 'out'}"]

    def run():
        with contextlib.redirect_stdout(io.StringIO()), folder:
            if code := prepare.run(command):
                raise RuntimeError(f"prepare ended with exit code {code}")

    return run


def seconds(function: Callable) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def measure(base: Sizes, sweep: str, value: int, chosen: list[str] | None) -> dict[str, float]:
    """{task: seconds} with one setting of SWEEPS changed."""
    if sweep in Files._fields:
        return {"prepare": seconds(prepared(Files()._replace(**{sweep: value})))}
    found = tasks(base._replace(**{sweep: value}))
    return {name: seconds(task) for name, task in found.items() if not chosen or name in chosen}


def table(found: dict) -> str:
    """A line a setting, a column a task."""
    names = list(
        dict.fromkeys(n for points in found.values() for of in points.values() for n in of)
    )
    rows = [["seconds", "", *names]]
    for sweep, points in found.items():
        for value, of in points.items():
            cells = [f"{of[name]:.1f}" if name in of else "" for name in names]
            rows.append([sweep, f"{value:,}", *cells])
            sweep = ""  # printed once
    return markdown(rows)


def define_flags() -> None:
    """Defines the command's flags; other commands have flags of the same names."""
    flags.DEFINE_list("sweeps", list(SWEEPS), "What is varied")
    flags.DEFINE_list("values", None, "Values of a single sweep, by default its own")
    for name, value in Sizes()._asdict().items():
        flags.DEFINE_integer(name, value, "Where it is not varied", lower_bound=1)
    flags.DEFINE_list("tasks", None, "draws, few-shot, k-NN, ridge, SGD, clusters; all by default")
    flags.DEFINE_string("json", None, "File for all figures, written after each of them")


def main(argv) -> int:
    """The command; prints a line a setting, then the table."""
    del argv
    given = flags.FLAGS

    def work():
        if unknown := set(given.sweeps) - set(SWEEPS):
            raise ValueError(f"--sweeps has {', '.join(unknown)}: choose from {', '.join(SWEEPS)}")
        if given.values and len(given.sweeps) > 1:
            raise ValueError("--values are of one sweep: give it, such as --sweeps=classes")
        base, found = Sizes(*(given[name].value for name in Sizes._fields)), {}
        for sweep in given.sweeps:
            for value in map(int, given.values or SWEEPS[sweep]):
                of = found.setdefault(sweep, {})[value] = measure(base, sweep, value, given.tasks)
                print(f"{sweep} {value}: {of}", flush=True)
                if given.json:
                    replace_text(Path(given.json), json.dumps(found, indent=1) + "\n")
        print(table(found))

    return exit_code(work)


if __name__ == "__main__":
    define_flags()
    app.run(main)
