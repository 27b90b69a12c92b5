"""A block of the transformer: attention and feed-forward network, each on its residual branch.

Letters: B batch, T tokens, H heads, D embed.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange

from dinotwins_jax.models.attention import ATTENTION
from dinotwins_jax.models.barriers import in_rows
from dinotwins_jax.models.layers import (
    Dense,
    LayerNorm,
    Operations,
    attention_weights,
    operations,
    silu_gate,
)
from dinotwins_jax.models.positions import Rope, rotate

INIT_STD = 0.02  # official; DINO truncates at +-2.0 absolute, a hundred times that: a plain normal


def stream_dtype(dtype: Any, layer_scale_init: float | None) -> Any:
    """Dtype of the tokens between blocks that compute in `dtype`. With LayerScale float32: bfloat16 would
    round most of a branch that is scaled by 1e-5 away."""
    return dtype if layer_scale_init is None else jnp.float32


class Drop(NamedTuple):
    """Stochastic depth of a block in a step: a key for each residual branch, and the rate of both."""

    keys: list[jax.Array]
    rate: float | jax.Array

    @classmethod
    def of(cls, block: nn.Module) -> "Drop":
        """Draws the keys of a bound block."""
        return cls([block.make_rng("drop_path") for _ in range(2)], block.drop_path_rate)


def drop_path(
    x: jax.Array, key: jax.Array, rate: float | jax.Array, sample_ids: jax.Array
) -> jax.Array:
    """Zero a residual branch for whole samples, rescale the rest (stochastic depth, arXiv:1603.09382).

    Each sample draws from (key, its id), so the mask does not depend on how the batch is split over
    devices. x: [B, T, D]; sample_ids: i32[B]; rate: fraction dropped, [0, 1).
    Differs: above a rate of 0.1, dinov2 layers/block.py drops a fixed number of the samples of a device,
    and saves their compute; here each sample is drawn by itself.
    """
    draw = jax.vmap(lambda i: jax.random.uniform(jax.random.fold_in(key, i)))(sample_ids)
    keep = (draw >= rate) / (1.0 - rate)
    return x * keep.astype(x.dtype)[:, None, None]


class Attention(nn.Module):
    """Multi-head self-attention with a fused qkv projection."""

    num_heads: int
    dtype: Any = jnp.float32
    init_std: float = INIT_STD
    implementation: str = "xla"
    plain_gradients: bool = False

    @nn.compact
    def __call__(
        self, x: jax.Array, norm: Callable, cls_only: bool = False, rope: Rope | None = None
    ) -> tuple[jax.Array, jax.Array]:
        D = x.shape[-1]
        init = nn.initializers.normal(self.init_std)
        options = {"dtype": self.dtype, "plain_gradients": self.plain_gradients}
        qkv = Dense(3 * D, norm, kernel_init=init, name="qkv", **options)
        if cls_only:
            queries, rest = qkv(x[:, :1], slice(D)), qkv(x, slice(D, None))
            q = rearrange(queries, "b t (h d) -> b h t d", h=self.num_heads)
            k, v = rearrange(rest, "b t (n h d) -> n b h t d", n=2, h=self.num_heads)
        else:
            q, k, v = rearrange(qkv(x), "b t (n h d) -> n b h t d", n=3, h=self.num_heads)
        if rope is not None:
            q, k = (
                q if cls_only else rotate(q, rope),
                rotate(k, rope),
            )  # a class token has no position
        plain = self.plain_gradients and self.implementation == "xla"
        y = (operations(True).attend if plain else ATTENTION[self.implementation])(q, k, v)
        # The weights are computed only if they are used; XLA removes them otherwise.
        y = Dense(D, kernel_init=init, name="proj", **options)(y)
        return y, attention_weights(q, k)


def swiglu_width(hidden_dim: int) -> int:
    """Two thirds of an MLP's hidden width, up to a multiple of 8: as many weights in three matrices."""
    return (int(hidden_dim * 2 / 3) + 7) // 8 * 8


def ratio_of(hidden_dim: int, embed_dim: int) -> float:
    """The mlp_ratio r with int(embed_dim * r) == hidden_dim, in spite of rounding."""
    ratio = hidden_dim / embed_dim
    return ratio if int(embed_dim * ratio) == hidden_dim else math.nextafter(ratio, math.inf)


class FeedForward(nn.Module):
    """Linear - activation - Linear.

    names: of the two layers; width: outputs of the first; activation: (operations, […, width]) -> input of
    the second.
    """

    names: tuple[str, str]
    width: int
    activation: Callable
    dtype: Any = jnp.float32
    init_std: float = INIT_STD
    plain_gradients: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, norm: Callable) -> jax.Array:
        D, (first, second) = x.shape[-1], self.names
        init = nn.initializers.normal(self.init_std)
        options = {"dtype": self.dtype, "plain_gradients": self.plain_gradients}
        dense = partial(Dense, kernel_init=init, **options)
        of = operations(self.plain_gradients)
        x, bias = dense(self.width, norm, bias_apart=True, name=first)(x)
        return dense(D, lambda x: self.activation(of, of.add(x, bias)), name=second)(x)


def _gelu(of: Operations, x: jax.Array) -> jax.Array:
    return of.gelu(x)


def _silu_gate(of: Operations, x: jax.Array) -> jax.Array:
    return silu_gate(x)


def mlp(hidden_dim: int, **options) -> FeedForward:
    """PyTorch's default GELU, the exact one, in between."""
    return FeedForward(("fc1", "fc2"), hidden_dim, _gelu, **options)


def swiglu(hidden_dim: int, **options) -> FeedForward:
    """Gated; hidden_dim: that of the MLP in its place. Source: dinov2 swiglu_ffn.py, SwiGLUFFNFused."""
    return FeedForward(("w12", "w3"), 2 * swiglu_width(hidden_dim), _silu_gate, **options)


FFN = {"mlp": mlp, "swiglu": swiglu}


class Block(nn.Module):
    """Pre-norm transformer block with LayerScale and drop path."""

    num_heads: int
    mlp_ratio: float
    drop_path_rate: float
    layer_scale_init: float | None
    dtype: Any = jnp.float32
    init_std: float = INIT_STD
    attention: str = "xla"
    ffn: str = "mlp"
    norm_eps: float = 1e-6
    plain_gradients: bool = False

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        sample_ids: jax.Array | None,
        train: bool,
        cls_only: bool = False,
        rope: Rope | None = None,
        drop: Drop | None = None,
    ) -> tuple[jax.Array, jax.Array]:
        if drop is None and train and self.drop_path_rate > 0:
            drop = Drop.of(self)

        def residual(branch, number):
            if self.layer_scale_init is not None:
                init = nn.initializers.constant(self.layer_scale_init)
                gamma = self.param(f"gamma{number}", init, (x.shape[-1],))
                branch = operations(self.plain_gradients).scale(branch, gamma)
            if drop is not None:
                ids = jnp.arange(len(x)) if sample_ids is None else sample_ids
                branch = drop_path(branch, drop.keys[number - 1], drop.rate, ids)
            return branch

        x = in_rows(x)
        D = x.shape[-1]
        plain = {"plain_gradients": self.plain_gradients}
        options = {"dtype": self.dtype, "init_std": self.init_std, **plain}
        attn = Attention(self.num_heads, implementation=self.attention, name="attn", **options)
        y, attention = attn(x, LayerNorm(self.norm_eps, name="norm1", **plain)(D), cls_only, rope)
        x = x[:, :1] if cls_only else x
        x = in_rows(x + residual(y, 1))
        ffn = FFN[self.ffn](int(D * self.mlp_ratio), name="mlp", **options)
        y = ffn(x, LayerNorm(self.norm_eps, name="norm2", **plain)(D))
        return x + residual(y, 2), attention
