"""Gradient balance of a hybrid: norms, cosines and matched weights at the class tokens.

Letters: B images, V views, E width of the class token.
"""

from itertools import combinations

import jax
import jax.numpy as jnp

# Bounds the factor by which match_to scales a term whose gradient has almost vanished.
_LARGEST_FACTOR = 1e4
# Exponents of two whose inverse is a normal float32 too.
_EXPONENTS = (-126, 126)


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
        tokens (iBOT, Gram) keep their weights. Where this term's gradient is zero or not finite there
        is no norm to match, and all terms keep their weights: silenced terms could not lead out of a
        collapse in which this term's gradient has vanished, and a gradient that is not finite makes the
        step one that changes nothing. A weight of zero scales the other terms to zero.
      axis_name: mapped axis of the batch, under pmap.
    Returns:
      weights: name -> factor, without gradient.
      metrics, all f32[]: "balance/<term>/norm", L2 over [B, V, E] of the global batch, unweighted;
        "balance/<term>/weight"; "balance/cos/<a>,<b>" in [-1, 1], the cosine of two gradients: below 0
        they conflict; 0 where one is zero, NaN where one is not finite.
    Source: the idea of matched norms: GradNorm, arXiv:1711.02257, without its learned rates.
    """

    def inner(a, b):
        product = jnp.vdot(a, b)
        if axis_name is None:
            return product
        # Each device holds the gradient of a loss that is a mean over devices: N times too large.
        return jax.lax.psum(product, axis_name) / jax.lax.axis_size(axis_name) ** 2

    scales = {name: _power_of_two(g, axis_name) for name, g in gradients.items()}
    scaled = {name: g / scales[name] for name, g in gradients.items()}
    lengths = {name: jnp.sqrt(inner(g, g)) for name, g in scaled.items()}
    norms = {name: length * scales[name] for name, length in lengths.items()}
    if match_to:
        wanted, known = weights[match_to] * norms[match_to], _positive(norms[match_to])
        factors = {
            name: jnp.where(
                known & _positive(norm),
                jnp.minimum(wanted / jnp.where(norm > 0, norm, 1.0), _LARGEST_FACTOR),
                1.0,
            )
            for name, norm in norms.items()
            if name != match_to
        }
        weights = weights | {name: weights[name] * f for name, f in factors.items()}
    metrics = {f"balance/{name}/norm": norm for name, norm in norms.items()}
    metrics |= {f"balance/{name}/weight": jnp.float32(w) for name, w in weights.items()}
    for a, b in combinations(gradients, 2):
        cosine = inner(scaled[a], scaled[b]) / jnp.maximum(lengths[a] * lengths[b], 1e-30)
        metrics[f"balance/cos/{a},{b}"] = jnp.clip(cosine, -1.0, 1.0)
    return weights, metrics


def _positive(norm: jax.Array) -> jax.Array:
    return jnp.isfinite(norm) & (norm > 0)


def _power_of_two(x: jax.Array, axis_name: str | None) -> jax.Array:
    """f32[], the power of two near the largest |x| on all devices; 1 where that is zero or not finite.

    Squares of x divided by it neither overflow nor vanish, and no digit is rounded.
    """
    largest = jnp.max(jnp.abs(x))
    largest = largest if axis_name is None else jax.lax.pmax(largest, axis_name)
    exponent = jnp.clip(jnp.frexp(largest)[1], *_EXPONENTS)
    return jnp.where(_positive(largest), jnp.ldexp(jnp.float32(1.0), exponent), 1.0)
