"""A number for each array of a tree that a change of any one of its bits changes."""

import jax
import jax.numpy as jnp


def fingerprint(tree) -> dict[str, int]:
    """{path: u32} of all arrays; the same however they are spread over devices."""
    found = paths(tree)
    sums = jax.device_get(_sums([leaf for _, leaf in found]))
    return {path: int(value) for (path, _), value in zip(found, sums, strict=True)}


def paths(tree) -> list[tuple[str, object]]:
    """(path, leaf) of all leaves, a path as "params/backbone/pos_embed"."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return [(jax.tree_util.keystr(p, simple=True, separator="/"), leaf) for p, leaf in leaves]


@jax.jit
def _sums(leaves: list[jax.Array]) -> list[jax.Array]:
    """u32[] of each array: its bits, each word times an odd number of its own, added modulo 2^32."""

    def of(x):
        words = jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * x.dtype.itemsize}"))
        words = words.astype(jnp.uint32).reshape(-1)
        return jnp.sum(words * (2 * jnp.arange(words.size, dtype=jnp.uint32) + 1), dtype=jnp.uint32)

    return [of(x) for x in leaves]
