"""The random streams of a run: every random number comes from the seed, one stream for each use."""

import jax

INIT, AUGMENT, DROP_PATH, MASKS = range(4)


def stream(seed: int, use: int) -> jax.Array:
    """The key of one use; fold in the step, or the place of an image, before drawing from it."""
    return jax.random.fold_in(jax.random.key(seed), use)
