"""Gradient balance of a hybrid: norms, cosines and matched weights at the class tokens.

Letters: B images, V views, E width of the class token.
"""

from itertools import combinations

import jax
import jax.numpy as jnp

# Bounds the factor by which match_to scales a term whose gradient has almost vanished.
_LARGEST_FACTOR = 1e4


def balance(
    weights: dict[str, jax.Array | float],
    gradients: dict[str, jax.Array],
    *,
    match_to: str = "",
    axis_name: str | None = None,
) -> tuple[dict[str, jax.Array | float], dict[str, jax.Array]]:
    """Weights of this step, and metrics of the terms' gradients at the student's class tokens.

    Args:
      weights: name -> factor of each term.
      gradients: name -> f32[B, V, E], of each unweighted term with respect to the class tokens.
      match_to: "" keeps the weights. A term's name: every other term's gradient is scaled to its own
        weight times the norm of this term's weighted gradient. Terms that do not reach the class
        tokens (iBOT, Gram) keep their weights.
      axis_name: mapped axis of the batch, under pmap.
    Returns:
      weights: name -> factor, without gradient.
      metrics, all f32[]: "balance/<term>/norm", L2 over [B, V, E] of the global batch, unweighted;
        "balance/<term>/weight"; "balance/cos/<a>,<b>" in [-1, 1], the cosine of two gradients: below 0
        they conflict.
    Source: the idea of matched norms: GradNorm, arXiv:1711.02257, without its learned rates.
    """

    def inner(a, b):
        product = jnp.vdot(a, b)
        if axis_name is None:
            return product
        # Each device holds the gradient of a loss that is a mean over devices: N times too large.
        return jax.lax.psum(product, axis_name) / jax.lax.axis_size(axis_name) ** 2

    norms = {name: jnp.sqrt(inner(g, g)) for name, g in gradients.items()}
    if match_to:
        wanted = weights[match_to] * norms[match_to]
        factors = {
            name: jnp.where(
                norm > 0, jnp.minimum(wanted / jnp.maximum(norm, 1e-30), _LARGEST_FACTOR), 1.0
            )
            for name, norm in norms.items()
            if name != match_to
        }
        weights = weights | {name: weights[name] * f for name, f in factors.items()}
    metrics = {f"balance/{name}/norm": norm for name, norm in norms.items()}
    metrics |= {f"balance/{name}/weight": jnp.float32(w) for name, w in weights.items()}
    for a, b in combinations(gradients, 2):
        product = inner(gradients[a], gradients[b])
        metrics[f"balance/cos/{a},{b}"] = product / jnp.maximum(norms[a] * norms[b], 1e-30)
    return weights, metrics
