"""Projection heads. Letters: N rows (images x views), D input, K prototypes.

The three BatchNorm-free / BatchNorm parts follow dino vision_transformer.py (DINOHead) and
barlowtwins main.py (projector).
"""

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from dinotwins_jax.models.barriers import in_memory
from dinotwins_jax.models.block import INIT_STD
from dinotwins_jax.models.layers import Dense, operations, torch_uniform


def l2_normalise(x: jax.Array, eps: float = 1e-12) -> jax.Array:
    """x / max(|x|, eps) over the last axis in float32.

    Where |x| < eps, at x = 0 too, this is the linear map x / eps: its gradient is finite, but 1 / eps.
    Source: torch.nn.functional.normalize, whose value, eps and gradient at 0 are these.
    """
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.maximum(jnp.sum(x * x, axis=-1, keepdims=True), eps * eps))


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def cosine_logits(x: jax.Array, v: jax.Array, dtype) -> jax.Array:
    """<x, v / |v|> f32[N, K] of x f32[N, D] and prototypes v f32[K, D]; the product is computed in dtype.
    |v| is at least 1e-12: a prototype of zeros has logits of 0.

    The logits are scaled by 1 / |v| instead of the weights: the same numbers, without a K x D temporary,
    and XLA's CPU backend keeps the product a plain matmul. The gradient's part along v comes from the
    logits: no second pass over K x D either.
    """
    return _cosine_forward(x, v, dtype)[0]


def _cosine_forward(x, v, dtype):
    scale = jax.lax.rsqrt(jnp.maximum(jnp.sum(v * v, axis=1), 1e-24))
    # Logits are divided by a temperature of 0.04: bfloat16 would be coarse.
    logits = jnp.einsum(
        "nd,kd->nk", x.astype(dtype), v.astype(dtype), preferred_element_type=jnp.float32
    )
    logits = logits * scale
    return logits, (x, v, scale, logits)


def _cosine_backward(dtype, kept, g):
    x, v, scale, logits = kept
    scaled = (g * scale).astype(dtype)
    dx = jnp.einsum("nk,kd->nd", scaled, v.astype(dtype), preferred_element_type=jnp.float32)
    dv = jnp.einsum("nk,nd->kd", scaled, x.astype(dtype), preferred_element_type=jnp.float32)
    along = in_memory(jnp.sum(g * logits, axis=0) * scale * scale)
    return dx, dv - along[:, None] * v


cosine_logits.defvjp(_cosine_forward, _cosine_backward)


class Prototypes(nn.Module):
    """Weight-normalised linear layer without bias; weights stored [K, D]. Without weight_norm a plain
    one, whose initial weights are those of the MLP before it."""

    num_prototypes: int
    norm_last_layer: bool = True
    dtype: Any = jnp.float32
    plain_gradients: bool = False
    weight_norm: bool = True

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        D = x.shape[-1]
        if not self.weight_norm:
            shape = (self.num_prototypes, D)
            weight = self.param("weight", nn.initializers.normal(INIT_STD), shape)
            x, weight = x.astype(self.dtype), weight.astype(self.dtype)
            return jnp.einsum("nd,kd->nk", x, weight, preferred_element_type=jnp.float32)
        v = self.param("weight_v", torch_uniform(D), (self.num_prototypes, D))
        product = cosine_logits.fun if self.plain_gradients else cosine_logits
        logits = product(x.astype(jnp.float32), v, self.dtype)
        if self.norm_last_layer:
            return logits
        return logits * self.param("weight_g", nn.initializers.ones, (self.num_prototypes, 1))[:, 0]


class DINOHead(nn.Module):
    """MLP (exact GELU) -> L2-normalised bottleneck -> weight-normalised prototypes.

    __call__: x [N, D] -> logits f32[N, out_dim]. `norm_last_layer=True` fixes the prototypes' norm
    at 1 (no weight_g parameter, where PyTorch keeps a frozen one), `weight_norm=False` leaves the norms
    free (DINOv3, whose last layer is a plain linear one). `use_bn=True` puts batch norm
    before each GELU, over all rows of a call: images and views, over the global batch; the teacher's
    too uses its own batch, as in the official code.
    Source: DINO, arXiv:2104.14294, appendix C; dino vision_transformer.py, DINOHead; dinov3
    layers/dino_head.py.
    """

    out_dim: int
    hidden_dim: int = 2048
    bottleneck_dim: int = 256
    norm_last_layer: bool = True
    num_layers: int = 3
    use_bn: bool = False
    dtype: Any = jnp.float32
    axis_name: str | None = None
    plain_gradients: bool = False
    weight_norm: bool = True

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = True) -> jax.Array:
        init, gelu = nn.initializers.normal(INIT_STD), operations(self.plain_gradients).gelu
        options = {"dtype": self.dtype, "plain_gradients": self.plain_gradients}
        for layer in range(self.num_layers):
            last = layer == self.num_layers - 1
            width = self.bottleneck_dim if last else self.hidden_dim
            x = Dense(width, kernel_init=init, name=f"mlp_{layer}", **options)(x)
            if not last and self.use_bn:
                x = BatchNorm(axis_name=self.axis_name, name=f"bn_{layer}")(x, train)
            x = x if last else gelu(x)
        x = l2_normalise(x)
        options |= {"weight_norm": self.weight_norm, "name": "last_layer"}
        return Prototypes(self.out_dim, self.norm_last_layer, **options)(x)


class BatchNorm(nn.Module):
    """BatchNorm1d with PyTorch's numbers, float32, over the global batch.

    Differs from flax.linen.BatchNorm: two-pass variance, and the running variance is the unbiased one.
    `axis_name` is the mapped axis under pmap; under jit the batch axis is global already.
    """

    momentum: float = 0.9  # kept fraction; PyTorch's momentum is 0.1, the new fraction
    epsilon: float = 1e-5
    affine: bool = True  # a learned scale and bias
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        x = x.astype(jnp.float32)  # [N, D], or [V, N, D], where each [N, D] is a separate batch
        D = x.shape[-1]
        scale, bias = 1.0, 0.0
        if self.affine:
            scale = self.param("scale", nn.initializers.ones, (D,))
            bias = self.param("bias", nn.initializers.zeros, (D,))
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, (D,))
        running_var = self.variable("batch_stats", "var", jnp.ones, (D,))
        if not train:
            return (x - running_mean.value) * jax.lax.rsqrt(
                running_var.value + self.epsilon
            ) * scale + bias
        mean, var, count = batch_moments(x, self.axis_name)
        if not self.is_initializing():
            keep, new = self.momentum, 1.0 - self.momentum
            for m, v in zip(mean.reshape(-1, D), var.reshape(-1, D), strict=True):
                running_mean.value = keep * running_mean.value + new * m
                running_var.value = keep * running_var.value + new * v * (count / max(count - 1, 1))
        return (x - mean) * jax.lax.rsqrt(var + self.epsilon) * scale + bias


def batch_moments(x: jax.Array, axis_name: str | None) -> tuple[jax.Array, jax.Array, int]:
    """Mean and biased variance f32[…, 1, D] of x f32[…, B, D] over the global batch, and its size."""
    pmean = (lambda v: v) if axis_name is None else (lambda v: jax.lax.pmean(v, axis_name))
    mean = pmean(jnp.mean(x, axis=-2, keepdims=True))
    var = pmean(jnp.mean((x - mean) ** 2, axis=-2, keepdims=True))
    return mean, var, x.shape[-2] * (1 if axis_name is None else jax.lax.axis_size(axis_name))


class BarlowProjector(nn.Module):
    """(Linear - BatchNorm - ReLU) for all but the last width, then Linear; no biases.

    __call__: x [N, D], train -> z f32[N, hidden_dims[-1]], not normalised (the cross-correlation does
    that). Statistics are those of the rows passed in one call: the official code calls it once a view.
    x [V, N, D] is V such calls in one: the same numbers, and the weights are read once.
    norm_output: a batch norm without parameters after the last layer too (MoCo v3, arXiv:2104.02057).
    Source: Barlow Twins, arXiv:2103.03230, section 3; barlowtwins main.py, projector.
    """

    hidden_dims: tuple[int, ...] = (8192, 8192, 8192)
    norm_output: bool = False
    dtype: Any = jnp.float32
    axis_name: str | None = None
    plain_gradients: bool = False

    takes_views = True  # a class attribute, not a field

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = True) -> jax.Array:
        for layer, width in enumerate(self.hidden_dims):
            options = {"dtype": self.dtype, "plain_gradients": self.plain_gradients}
            options |= {"kernel_init": torch_uniform(x.shape[-1]), "use_bias": False}
            x = Dense(width, name=f"dense_{layer}", **options)(x)
            last = layer == len(self.hidden_dims) - 1
            if not last or self.norm_output:
                norm = BatchNorm(affine=not last, axis_name=self.axis_name, name=f"bn_{layer}")
                x = norm(x, train) if last else nn.relu(norm(x, train))
        return x.astype(jnp.float32)
