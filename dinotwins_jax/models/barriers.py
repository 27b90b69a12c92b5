"""Optimisation barriers against recomputation by XLA's CPU backend."""

import jax


def in_memory(x: jax.Array) -> jax.Array:
    """Returns x, computed once and stored in memory for all its readers.

    XLA's CPU backend considers sums and products so cheap that it recomputes them in every loop that
    reads them: the gradient of a block then recomputes those of all later blocks. No effect on other
    devices. devices/compilation.py keeps the backend from removing the barrier.
    """
    return jax.lax.platform_dependent(x, cpu=jax.lax.optimization_barrier, default=lambda x: x)
