"""Transformer layers with hand-written gradients: fewer passes over memory, fewer residuals stored.

The numbers are those of JAX's own gradients; tests/test_layers.py compares them. A hand-written gradient
can be differentiated in reverse mode only: plain_gradients=True takes JAX's own, for jax.jvp and
Hessian-vector products.
Letters: … leading axes (images, tokens), I input, O output, B images, H heads, T tokens, D width.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange


@jax.custom_vjp
def product(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """[…, I] @ [I, O] -> […, O] in the dtype of x; the gradient of the kernel is summed in float32."""
    return jax.lax.dot_general(x, kernel.astype(x.dtype), (((x.ndim - 1,), (0,)), ((), ())))


def _product_backward(kept, g):
    x, kernel = kept
    dx = jax.lax.dot_general(g, kernel.astype(g.dtype), (((g.ndim - 1,), (1,)), ((), ())))
    dkernel = jax.lax.platform_dependent(x, g, cpu=_rows_product_cpu, default=_rows_product)
    return dx, dkernel.astype(kernel.dtype)


def _rows_product(x, g):
    """[…, I], […, O] -> f32[I, O], the sum over rows."""
    rows = tuple(range(x.ndim - 1))
    return jax.lax.dot_general(x, g, ((rows, rows), ((), ())), preferred_element_type=jnp.float32)


def _rows_product_cpu(x, g):
    """The same. XLA's CPU backend is fast if the sum runs along the rows of the first factor. It
    transposes arrays in memory quickly and fused expressions slowly: hence the barriers, which
    devices/compilation.py keeps it from removing. The narrower factor is transposed."""
    cut = jax.lax.optimization_barrier
    dot = partial(jnp.matmul, preferred_element_type=jnp.float32)
    x, g = _rows(x), _rows(g)
    if x.shape[1] <= g.shape[1]:
        return dot(cut(cut(x).T), g)
    return cut(cut(dot(cut(cut(g).T), x)).T)


def _rows(x):
    """[…, D] -> [N, D]."""
    return x.reshape(-1, x.shape[-1])


product.defvjp(lambda x, kernel: (product(x, kernel), (x, kernel)), _product_backward)


@jax.custom_vjp
def add(x: jax.Array, parameter: jax.Array) -> jax.Array:
    """x […, *S] + parameter [*S] in the dtype of x; the gradient of the parameter is summed in float32."""
    return x + parameter.astype(x.dtype)


def _summed(g, parameter):
    """The gradient of a parameter [*S] from that of its sum with x […, *S]."""
    lead = g.ndim - parameter.ndim

    def over_rows(g):  # of several axes XLA's GPU backend makes transposed copies
        return jnp.sum(g.reshape(-1, *g.shape[lead:]).astype(jnp.float32), axis=0)

    def over_axes(g):
        return jnp.sum(g.astype(jnp.float32), axis=tuple(range(lead)))

    return jax.lax.platform_dependent(g, cpu=over_axes, default=over_rows).astype(parameter.dtype)


add.defvjp(
    lambda x, parameter: (add(x, parameter), parameter), lambda kept, g: (g, _summed(g, kept))
)


@jax.custom_vjp
def scale(x: jax.Array, parameter: jax.Array) -> jax.Array:
    """x […, *S] * parameter [*S] in the dtype of x; the gradient of the parameter is summed in float32."""
    return x * parameter.astype(x.dtype)


def _scale_backward(kept, g):
    x, parameter = kept
    products = g.astype(jnp.float32) * x.astype(jnp.float32)
    return g * parameter.astype(g.dtype), _summed(products, parameter)


scale.defvjp(lambda x, parameter: (scale(x, parameter), (x, parameter)), _scale_backward)


@jax.custom_vjp
def gelu(x: jax.Array) -> jax.Array:
    """x * Phi(x), exactly, as PyTorch's default."""
    return x * _normal_cdf(x)


def _normal_cdf(x):
    return 0.5 * (1.0 + jax.lax.erf(x * 0.5**0.5))


def _gelu_backward(x, g):
    density = jnp.exp(-0.5 * x * x) * (0.5 / jnp.pi) ** 0.5
    return (g * (_normal_cdf(x) + x * density),)


gelu.defvjp(lambda x: (gelu(x), x), _gelu_backward)


def silu_gate(x: jax.Array) -> jax.Array:
    """[…, 2 I] -> […, I]: silu(first half) * second half, the gate of SwiGLU (arXiv:2002.05202)."""
    gate, value = jnp.split(x, 2, axis=-1)
    return jax.nn.silu(gate) * value


@jax.custom_vjp
def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """softmax(q k^T / sqrt(D)) v of [B, H, T, D] each -> [B, T, H * D]; the softmax is float32.

    The weights are kept for the backward pass; the gradient of the softmax needs the output alone to
    know its row sums (arXiv:2205.14135, appendix B.2).
    """
    return _attend_forward(q, k, v)[0]


def _attend_forward(q, k, v):
    weights = attention_weights(q, k).astype(v.dtype)
    y = _joined(jnp.einsum("bhts,bhsd->bhtd", weights, v))
    return y, (q, k, v, weights, y)


def _joined(x):
    return x.swapaxes(1, 2).reshape(x.shape[0], x.shape[2], -1)


def _attend_backward(kept, g):
    q, k, v, weights, y = kept
    g = g.reshape(*g.shape[:2], q.shape[1], -1)  # [B, T, H, D]
    row_sums = jnp.sum(g.astype(jnp.float32) * y.astype(jnp.float32).reshape(g.shape), axis=-1)
    row_sums, g = row_sums.swapaxes(1, 2)[..., None], g.swapaxes(1, 2)
    dv = jnp.einsum("bhts,bhtd->bhsd", weights, g)
    dweights = jnp.einsum("bhtd,bhsd->bhts", g, v, preferred_element_type=jnp.float32)
    dlogits = (weights * (dweights - row_sums) * q.shape[-1] ** -0.5).astype(q.dtype)
    dq = jnp.einsum("bhts,bhsd->bhtd", dlogits, k)
    dk = jnp.einsum("bhts,bhtd->bhsd", dlogits, q)
    return dq, dk, dv


attend.defvjp(_attend_forward, _attend_backward)


def attention_weights(q: jax.Array, k: jax.Array) -> jax.Array:
    """softmax(q k^T / sqrt(D)) f32[B, H, T, T'] of q [B, H, T, D] and k [B, H, T', D]."""
    logits = jnp.einsum("bhtd,bhsd->bhts", q, k).astype(jnp.float32)
    return jax.nn.softmax(logits * q.shape[-1] ** -0.5, axis=-1)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def normalise(x: jax.Array, scale: jax.Array, bias: jax.Array, eps: float = 1e-6) -> jax.Array:
    """(x - mean) / sqrt(var + eps) * scale + bias over the last axis of x f32[…, D]; two-pass variance,
    as PyTorch's."""
    return _normalise_forward(x, scale, bias, eps)[0]


def _normalise_forward(x, scale, bias, eps):
    # On rows [N, D]: of an array with several leading axes XLA's GPU backend makes transposed copies.
    rows = _rows(x)
    mean = jnp.mean(rows, axis=-1, keepdims=True)
    rstd = jax.lax.rsqrt(jnp.mean(jnp.square(rows - mean), axis=-1, keepdims=True) + eps)
    y = (rows - mean) * (rstd * scale) + bias
    return y.reshape(x.shape), (rows, mean, rstd, scale)


def _normalise_backward(eps, kept, g):
    x, mean, rstd, scale = kept
    shape, g = g.shape, _rows(g)
    unit = (x - mean) * rstd
    scaled = g * scale
    along = jnp.mean(scaled * unit, axis=-1, keepdims=True)
    dx = rstd * (scaled - jnp.mean(scaled, axis=-1, keepdims=True) - unit * along)
    return dx.reshape(shape), jnp.sum(g * unit, axis=0), jnp.sum(g, axis=0)


normalise.defvjp(_normalise_forward, _normalise_backward)


class Operations(NamedTuple):
    """The operations that have both a hand-written gradient and JAX's own."""

    product: Callable
    add: Callable
    scale: Callable
    gelu: Callable
    attend: Callable
    normalise: Callable


_HAND_WRITTEN = Operations(product, add, scale, gelu, attend, normalise)
_PLAIN = Operations(*(operation.fun for operation in _HAND_WRITTEN))


def operations(plain_gradients: bool) -> Operations:
    """Operations with JAX's own gradients, or with hand-written ones."""
    return _PLAIN if plain_gradients else _HAND_WRITTEN


def torch_uniform(fan_in: int):
    """PyTorch's default initialiser of Linear and Conv: uniform within 1 / sqrt(fan_in)."""

    def init(key, shape, dtype=jnp.float32):
        return jax.random.uniform(key, shape, dtype, -1.0, 1.0) / np.sqrt(fan_in)

    return init


class Dense(nn.Module):
    """As flax.linen.Dense: parameters "kernel" f32[I, O] and "bias" f32[O], computed in `dtype`.

    __call__: x […, I] -> […, O], or only the outputs in the slice `columns`. `before` (an activation or a
    norm, which may narrow x) is applied to x first; the backward pass recomputes it instead of storing its
    output. bias_apart, with use_bias: -> ([…, O] without the bias, the bias), for a next layer whose
    `before` adds it: the sum is never written to memory.
    """

    features: int
    before: Callable | None = None
    use_bias: bool = True
    bias_apart: bool = False
    dtype: Any = jnp.float32
    kernel_init: Callable = nn.initializers.lecun_normal()
    plain_gradients: bool = False

    @nn.compact
    def __call__(
        self, x: jax.Array, columns: slice = slice(None)
    ) -> jax.Array | tuple[jax.Array, jax.Array]:
        enters = x if self.before is None else jax.eval_shape(self.before, x)
        kernel = self.param("kernel", self.kernel_init, (enters.shape[-1], self.features))
        kernel, of = kernel[:, columns], operations(self.plain_gradients)

        def from_input(x, kernel):
            x = x if self.before is None else self.before(x)
            return of.product(x.astype(self.dtype), kernel)

        y = (from_input if self.before is None else jax.checkpoint(from_input))(x, kernel)
        if not self.use_bias:
            return y
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        bias = bias[columns]
        return (y, bias) if self.bias_apart else of.add(y, bias)


class LayerNorm(nn.Module):
    """`normalise` in float32 whatever the dtype of x, with parameters "scale" and "bias" f32[D].

    __call__: width D -> the function x […, D] -> f32[…, D], to be applied where its output is used.
    """

    eps: float = 1e-6
    plain_gradients: bool = False

    @nn.compact
    def __call__(self, width: int) -> Callable[[jax.Array], jax.Array]:
        scale = self.param("scale", nn.initializers.ones, (width,))
        bias = self.param("bias", nn.initializers.zeros, (width,))
        normalise = operations(self.plain_gradients).normalise
        return lambda x: normalise(x.astype(jnp.float32), scale, bias, self.eps)


class PatchEmbed(nn.Module):
    """images [B, H, W, C] -> [B, N, D], a linear map of each patch; row-major."""

    embed_dim: int
    patch_size: int
    dtype: Any = jnp.float32
    plain_gradients: bool = False

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        p, C = self.patch_size, images.shape[-1]
        kernel = self.param("kernel", torch_uniform(p * p * C), (p, p, C, self.embed_dim))
        bias = self.param("bias", torch_uniform(p * p * C), (self.embed_dim,))
        # One matmul over flattened patches: the same sums as the convolution, and faster on CPU.
        x = rearrange(images.astype(self.dtype), "b (h p) (w q) c -> b (h w) (p q c)", p=p, q=p)
        kernel = kernel.reshape(-1, self.embed_dim)
        of = operations(self.plain_gradients)
        return of.add(of.product(x, kernel), bias)
