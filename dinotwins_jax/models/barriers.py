"""What XLA's CPU backend has to be told about memory."""

import jax


def in_memory(x: jax.Array) -> jax.Array:
    """x itself, made once, where all that read it find it.

    XLA's CPU backend takes sums and products for so cheap that it makes them again in every loop that
    reads them: the gradient of a block then holds those of all blocks behind it. On other devices this
    is nothing. devices/placement.py keeps the backend from dropping the barrier.
    """
    return jax.lax.platform_dependent(x, cpu=jax.lax.optimization_barrier, default=lambda x: x)
