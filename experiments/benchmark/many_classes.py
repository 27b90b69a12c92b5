"""Seconds of each probe against the number of classes, on made-up features.

    python -m experiments.benchmark.many_classes --classes=10,100,1000,5000

Features of 64 columns, four training images and one test image a class. Draws: the images of 1, 5 and
10 shots, five seeds, for three sets of features. Few-shot: the same for one set. SGD and ridge: one draw
of all labels. k-NN: k of 10, 20, 100 and 200. Compilation counts.
"""

import time
from collections.abc import Callable

import numpy as np
from absl import app, flags

from dinotwins_jax.cli import exit_code
from dinotwins_jax.evals.bank import bank_probe
from dinotwins_jax.evals.fewshot import few_shot, shot_indices
from dinotwins_jax.evals.knn import knn_scores
from dinotwins_jax.evals.linear import linear_probe
from dinotwins_jax.evals.table import markdown

_CLASSES = flags.DEFINE_list("classes", ["10", "100", "1000", "5000"], "Numbers of classes")
_TASKS = flags.DEFINE_list("tasks", None, "Draws, few-shot, k-NN, ridge, SGD; all by default")
COLUMNS, TRAIN_IMAGES = 64, 4  # TRAIN_IMAGES: a class
ROWS, SEEDS, SHOTS = 3, range(5), (1, 5, 10)


def made_up(classes: int, images: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """f32[classes * images, COLUMNS] around a mean a class, the same for all seeds, and their labels."""
    means = np.random.RandomState(0).normal(size=(classes, COLUMNS))
    labels = np.repeat(np.arange(classes, dtype=np.int32), images)
    noise = np.random.RandomState(1 + seed).normal(size=(len(labels), COLUMNS))
    return (means[labels] + noise).astype(np.float32), labels


def tasks(classes: int) -> dict[str, Callable]:
    """Name -> the task, a function without arguments."""
    (x, y), (z, t) = made_up(classes, TRAIN_IMAGES, 0), made_up(classes, 1, 1)
    data, options = (x, y, z, t), {"num_classes": classes}

    def draws():
        return [shot_indices(y, n, seed) for _ in range(ROWS) for n in SHOTS for seed in SEEDS]

    return {
        "draws": draws,
        "few-shot": lambda: few_shot(*data, shots=SHOTS, split_seeds=tuple(SEEDS), **options),
        "k-NN": lambda: knn_scores(*data, **options),
        "ridge": lambda: bank_probe({"x": x}, y, {"x": z}, t, **options),
        "SGD": lambda: linear_probe(*data, **options),
    }


def seconds(function: Callable) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def main(argv) -> int:
    """The command; prints a line a task and number of classes, then the table."""
    del argv

    def work():
        found: dict[str, list[str]] = {}
        for classes in map(int, _CLASSES.value):
            for name, function in tasks(classes).items():
                if _TASKS.value and name not in _TASKS.value:
                    continue
                found.setdefault(name, []).append(f"{seconds(function):.1f}")
                print(f"{classes} classes, {name}: {found[name][-1]} s", flush=True)
        print(markdown([["s", *_CLASSES.value], *([name, *row] for name, row in found.items())]))

    return exit_code(work)


if __name__ == "__main__":
    app.run(main)
