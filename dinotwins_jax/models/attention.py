"""The implementations of attention that a block chooses from by name.

Letters: B images, H heads, T queries, S keys, D width of a head.
"""

import jax
import jax.numpy as jnp

from dinotwins_jax.models.layers import attend


def attend_padded(q: jax.Array, k: jax.Array, v: jax.Array, implementation: str) -> jax.Array:
    """`attend` by jax.nn.dot_product_attention, with odd numbers of queries and keys padded to even ones.

    JAX refuses cuDNN's gradient for odd numbers. Keys that pad are masked by the number of keys, so no
    weight falls on them. Queries that pad are zeros and attend as any other; their outputs are dropped,
    so that their gradient is zero, and with it what they add to the gradients of k and v. The number of
    keys is given for even ones too: cuDNN's gradient on Hopper can be NaN without it where keys do not
    fill a tile (github.com/NVIDIA/cudnn-frontend/issues/160 and 1072).

    Args:
      q: [B, H, T, D].
      k, v: [B, H, S, D].
      implementation: "cudnn" | "xla", the same numbers without a kernel.
    Returns:
      [B, T, H * D].
    """
    T, S = q.shape[2], k.shape[2]
    q, k, v = (_to_even(x.swapaxes(1, 2)) for x in (q, k, v))  # [B, T, H, D]
    keys = jnp.full(len(k), S, jnp.int32)
    y = jax.nn.dot_product_attention(
        q, k, v, key_value_seq_lengths=keys, implementation=implementation
    )
    return y[:, :T].reshape(len(y), T, -1)


def _to_even(x):
    """Pads axis 1 of [B, T, H, D] with zeros to an even length."""
    return jnp.pad(x, ((0, 0), (0, x.shape[1] % 2), (0, 0), (0, 0)))


def attend_cudnn(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """`attend` by cuDNN's flash attention, forward and backward: bfloat16 or float16, D a multiple of 8, on
    NVIDIA GPUs (Ampere or newer). The weights [B, H, T, S] are never in memory."""
    return attend_padded(q, k, v, "cudnn")


ATTENTION = {"xla": attend, "cudnn": attend_cudnn}
