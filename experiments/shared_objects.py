"""How often views of one image show a common object, for a config's crops and with local_overlap.

    python -m experiments.shared_objects --config=configs/hybrid.py:demo
    python -m experiments.shared_objects --config=configs/hybrid.py:coco --config.data.dir=/path/to/coco

Looks at the images with masks of the split "train". Crops of a paper: configs/hybrid.py:coco+barlow_twins
"""

import time

import numpy as np
from absl import app, flags, logging

from dinotwins_jax.augment_recipe import make_recipes
from dinotwins_jax.cli import fail, parse_flags
from dinotwins_jax.data import open_source
from dinotwins_jax.evals.shared_objects import (
    MIN_FILL,
    MIN_VISIBLE,
    rate_table,
    shared_object_rates,
)

OVERLAPS = (0.25, 0.5, 0.75, 1.0)

_IMAGES = flags.DEFINE_integer("images", 200, "Images to look at, chosen by config.seed", 1)
_DRAWS = flags.DEFINE_integer("draws", 20, "Times that the views of each image are drawn", 1)
_MIN_VISIBLE = flags.DEFINE_float(
    "min_visible", MIN_VISIBLE, "An object is in a view with this part of its area, …"
)
_MIN_FILL = flags.DEFINE_float("min_fill", MIN_FILL, "… or when it fills this part of the view")


def main(argv) -> int:
    """Prints the table; returns the exit code, errors are one line on stderr."""
    if len(argv) > 1:
        return fail(f"unknown argument '{argv[1]}': options start with --")
    logging.set_verbosity(logging.WARNING)
    try:
        measure(flags.FLAGS.config)
    except (ValueError, OSError) as error:
        return fail(str(error))
    return 0


def measure(config) -> None:
    """Raises ValueError for a source without masks, and what the source and the recipe raise."""
    started = time.perf_counter()
    views, source = config.views.to_dict(), open_source(config.data.to_dict(), "train")
    if not hasattr(source, "masks"):
        raise ValueError(
            f"config.data.source '{config.data.source}' has no masks of split 'train': scenes and "
            "coco do, and data prepared with --masks=train,test"
        )
    recipes = {"as configured": make_recipes(**views)}
    if views["num_local"]:
        for overlap in OVERLAPS:
            name = f"local_overlap={overlap:g}"
            recipes[name] = make_recipes(**views | {"local_overlap": overlap})
    rng = np.random.default_rng(config.seed)
    indices = rng.choice(len(source), min(_IMAGES.value, len(source)), replace=False)
    rates = shared_object_rates(
        source.masks,
        indices.tolist(),
        recipes,
        draws=_DRAWS.value,
        seed=config.seed,
        min_visible=_MIN_VISIBLE.value,
        min_fill=_MIN_FILL.value,
    )
    images = len(rates["as configured"].get("globals", ()))
    if not images:
        raise ValueError(f"none of {len(indices)} images has an object: more --images")
    print(rate_table(rates))
    print(
        f"\nPercent, mean and standard error of {images} images with objects out of {len(indices)}, "
        f"each drawn {_DRAWS.value} times; {time.perf_counter() - started:.0f} s."
    )


if __name__ == "__main__":
    app.run(main, flags_parser=parse_flags)
