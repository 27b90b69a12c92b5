"""Arrays as they have to lie in memory: XLA recomputes some and transposes others, where it should not."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import jax
from jax.experimental.layout import Layout, with_layout_constraint

_forward_only = ContextVar("forward_only", default=False)


@contextmanager
def forward_only() -> Iterator[None]:
    """What is traced inside has no barriers: an exported forward pass, of other devices and programs."""
    token = _forward_only.set(True)
    try:
        yield
    finally:
        _forward_only.reset(token)


def in_memory(x: jax.Array) -> jax.Array:
    """Returns x, computed once and stored in memory for all its readers.

    XLA's CPU backend considers sums and products so cheap that it recomputes them in every loop that
    reads them: the gradient of a block then recomputes those of all later blocks. No effect on other
    devices. devices/compilation.py keeps the backend from removing the barrier.
    """
    if _forward_only.get():
        return x
    return jax.lax.platform_dependent(x, cpu=jax.lax.optimization_barrier, default=lambda x: x)


def in_rows(x: jax.Array) -> jax.Array:
    """`in_memory`, and in a training step on one NVIDIA GPU with the last axis contiguous.

    XLA's GPU backend otherwise keeps the tokens [B, T, D] of a training step with the images last, in
    every block, and transposes them for each product: a fifth more bytes. Over several devices its
    partitioner would gather x for the constraint.
    """
    if _forward_only.get():
        return x
    alone = jax.sharding.get_abstract_mesh().size == 1  # that of the step; an empty one has size 0
    cuda = _row_major if alone else _unchanged
    barrier = jax.lax.optimization_barrier
    return jax.lax.platform_dependent(x, cpu=barrier, cuda=cuda, default=_unchanged)


def _unchanged(x):
    return x


def _row_major(x):
    return with_layout_constraint(x, Layout(major_to_minor=tuple(range(x.ndim))))
