"""Products of two matrices of features over the global batch, split over devices by their columns.

Letters: B images, D features.
"""

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec


def batch_product(a: jax.Array, b: jax.Array, axis_name: str | None = None) -> jax.Array:
    """mean_B(a[:, i] * b[:, j]) over the global batch.

    Under jit over several devices each one computes the columns of its own features from the whole batch:
    that sends B x D numbers where the sum of every device's D x D matrix would send D x D, and the matrix
    is never whole on a device. A batch larger than D is not split so: the sum sends less. Nor where the
    devices do not divide D, and under pmap.

    Args:
      a, b: [B, D]; axis_name: mapped axis of the batch, under pmap.
    Returns:
      f32[D, D]. Products are of float32, or of three parts each on devices that round their factors.
    """
    mesh, (B, D) = jax.sharding.get_abstract_mesh(), a.shape
    if axis_name is None and mesh.size > 1 and D % mesh.size == 0 and B <= D:
        split = jax.lax.with_sharding_constraint
        a, b = (split(x, PartitionSpec(mesh.axis_names)) for x in (a, b))  # as all before them
        a, b = split(a, PartitionSpec()), split(b, PartitionSpec(None, mesh.axis_names))
    product = jnp.einsum("bi,bj->ij", a, b, precision="high") / B
    return product if axis_name is None else jax.lax.pmean(product, axis_name)
