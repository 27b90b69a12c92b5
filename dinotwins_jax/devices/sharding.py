"""Sharding rules: the dimension of each state array that is split over the mesh axis "fsdp"."""

import re
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

DATA, FSDP = "data", "fsdp"

# Path of an array in the state -> dimensions to try, in this order; the first matching rule counts.
# The paths of optimiser moments and of the teacher end in their parameter's path. An array is replicated
# if no dimension is divisible by the axis, or if it is too small to be worth a collective.
RULES = (
    (r"last_layer/weight_[vg]$", (0,)),  # prototypes [K, D], by prototype
    (r"center$", (0,)),
    (r"kernel$", (-1, -2)),  # [in, out], and the patch embedding's [p, p, C, D]
    (r"pos_embed$", (-1,)),
    (r"", ()),  # biases, norms, tokens, batch statistics, counters
)


def spec_of(path: str, shape: tuple[int, ...], parts: int) -> PartitionSpec:
    """PartitionSpec of one array; path: such as "params/backbone/blocks_0/attn/qkv/kernel"."""
    dimensions = next(dims for pattern, dims in RULES if re.search(pattern, path))
    for dimension in dimensions if parts > 1 else ():
        if shape[dimension] % parts == 0:
            spec = [None] * len(shape)
            spec[dimension] = FSDP
            return PartitionSpec(*spec)
    return PartitionSpec()


def shardings_of(mesh: Mesh, tree: Any) -> Any:
    """NamedSharding of every array (or shape) of a state, according to RULES."""

    def of(path, leaf):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        return NamedSharding(mesh, spec_of(name, leaf.shape, mesh.shape[FSDP]))

    return jax.tree_util.tree_map_with_path(of, tree)
