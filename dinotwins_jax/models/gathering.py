"""Parameters that are sharded over devices, gathered where a module uses them."""

from collections.abc import Callable

import flax.linen as nn
import jax
from jax.ad_checkpoint import checkpoint_name

ALL_BUT_GATHERED = jax.checkpoint_policies.save_anything_except_these_names("gathered")


def gathering(module: type[nn.Module], gather: Callable | None) -> type[nn.Module]:
    """Wraps a module so that it gathers its sharded parameters before use."""
    if gather is None:
        return module

    def whole(variables):
        return jax.tree.map(lambda x: checkpoint_name(x, "gathered"), gather(variables))

    return nn.map_variables(module, "params", whole)
