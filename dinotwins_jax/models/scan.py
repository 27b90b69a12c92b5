"""Blocks of one shape as a loop: one block is compiled, whatever their number."""

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

from dinotwins_jax.models.block import Drop
from dinotwins_jax.models.positions import Rope


def scan_blocks(
    blocks: Sequence[nn.Module],
    template: nn.Module,
    x: jax.Array,
    sample_ids: jax.Array | None,
    train: bool,
    ropes: Sequence[Rope | None],
) -> jax.Array:
    """Tokens [B, T, D] after the blocks: those of one block after the other, with the same draws.

    The parameters keep their names in every block. They are stacked before the loop, and so are their
    gradients after it.

    Args:
      blocks: bound, of one shape; template: an unbound one like them.
      x: tokens [B, T, D] before them; sample_ids, train: see Block; ropes: one for each block.
    """
    drops = train and any(block.drop_path_rate for block in blocks)
    each = [
        (block.variables["params"], rope, Drop.of(block) if drops else None)
        for block, rope in zip(blocks, ropes, strict=True)
    ]

    def step(x, one):
        params, rope, drop = one
        x, _ = template.apply({"params": params}, x, sample_ids, train, False, rope, drop)
        return x, None

    return jax.lax.scan(step, x, jax.tree.map(lambda *of: jnp.stack(of), *each))[0]
