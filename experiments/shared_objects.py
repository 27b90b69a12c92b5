"""Object overlap of a config's crops, and of the same with local_overlap.

    python -m experiments.shared_objects --config=configs/hybrid.py:demo
    python -m experiments.shared_objects --config=configs/hybrid.py:coco --config.data.dir=/path/to/coco

Uses the images with masks in the split "train". Published crops: configs/hybrid.py:coco+barlow_twins
"""

import sys
import time

import numpy as np
from absl import flags

from dinotwins_jax.augment.views import make_view_specs
from dinotwins_jax.cli import command, exit_code
from dinotwins_jax.data import data_section, open_source
from dinotwins_jax.evals.shared_objects import (
    MIN_FILL,
    MIN_VISIBLE,
    rate_table,
    shared_object_rates,
)

OVERLAPS = (0.25, 0.5, 0.75, 1.0)


def _define(values: flags.FlagValues) -> None:
    options = {"flag_values": values}
    flags.DEFINE_integer("images", 200, "images, drawn by config.seed", 1, **options)
    flags.DEFINE_integer("draws", 20, "draws of the views of each image", 1, **options)
    flags.DEFINE_float(
        "min_visible",
        MIN_VISIBLE,
        "an object counts as in a view with this share of its area inside, …",
        **options,
    )
    flags.DEFINE_float("min_fill", MIN_FILL, "… or if it fills this share of the view", **options)


def measure(values: flags.FlagValues) -> None:
    """Prints the table; raises ValueError for a source without masks."""
    started, config = time.perf_counter(), values.config
    views, source = config.views.to_dict(), open_source(data_section(config), "train")
    if not hasattr(source, "masks"):
        raise ValueError(
            f"config.data.source '{config.data.source}' has no masks for split 'train': use scenes, "
            "coco, or data prepared with --masks=train,test"
        )
    recipes = {"as configured": make_view_specs(**views)}
    if views["num_local"]:
        for overlap in OVERLAPS:
            name = f"local_overlap={overlap:g}"
            recipes[name] = make_view_specs(**views | {"local_overlap": overlap})
    rng = np.random.default_rng(config.seed)
    indices = rng.choice(len(source), min(values.images, len(source)), replace=False)
    rates = shared_object_rates(
        source.masks,
        indices.tolist(),
        recipes,
        draws=values.draws,
        seed=config.seed,
        min_visible=values.min_visible,
        min_fill=values.min_fill,
    )
    images = len(rates["as configured"].get("globals", ()))
    if not images:
        raise ValueError(f"none of {len(indices)} images has an object: raise --images")
    print(rate_table(rates))
    print(
        f"\nPercent, mean and standard error of {images} images with objects out of {len(indices)}, "
        f"each drawn {values.draws} times; {time.perf_counter() - started:.0f} s."
    )


def run(argv=None) -> int:
    """The command; returns the exit code, errors are one line on stderr."""
    program = "python -m experiments.shared_objects"
    return command(
        program, __doc__, _define, lambda values: exit_code(lambda: measure(values)), argv
    )


if __name__ == "__main__":
    sys.exit(run())
