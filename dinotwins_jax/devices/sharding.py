"""Which dimension of which array of a training state is split over the mesh axis "fsdp"."""

import re
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

DATA, FSDP = "data", "fsdp"

# Path of an array in the state -> its dimensions to try, in this order; the first rule that matches
# counts. Optimiser moments and the teacher have their parameter's path at the end of theirs. What no
# dimension of divides by the axis, and what is too small to be worth a collective, is whole everywhere.
RULES = (
    (r"last_layer/weight_[vg]$", (0,)),  # prototypes [K, D], by prototype
    (r"center$", (0,)),
    (r"kernel$", (-1, -2)),  # [in, out], and the patch embedding's [p, p, C, D]
    (r"pos_embed$", (-1,)),
    (r"", ()),  # biases, norms, tokens, batch statistics, counters
)


def spec_of(path: str, shape: tuple[int, ...], parts: int) -> PartitionSpec:
    """How one array is split into `parts`; path: as "params/backbone/blocks_0/attn/qkv/kernel"."""
    dimensions = next(dims for pattern, dims in RULES if re.search(pattern, path))
    for dimension in dimensions if parts > 1 else ():
        if shape[dimension] % parts == 0:
            spec = [None] * len(shape)
            spec[dimension] = FSDP
            return PartitionSpec(*spec)
    return PartitionSpec()


def shardings_of(mesh: Mesh, tree: Any) -> Any:
    """NamedSharding of every array (or shape) of a state, by RULES."""

    def of(path, leaf):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        return NamedSharding(mesh, spec_of(name, leaf.shape, mesh.shape[FSDP]))

    return jax.tree_util.tree_map_with_path(of, tree)
