"""Random streams of a run: all random numbers derive from the seed, with one stream per use."""

import jax

INIT, AUGMENT, DROP_PATH, MASKS = range(4)


def stream(seed: int, use: int) -> jax.Array:
    """PRNG key of one use; fold in the step or an image's position before drawing from it."""
    return jax.random.fold_in(jax.random.key(seed), use)
