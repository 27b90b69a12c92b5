"""Vision Transformer (arXiv:2010.11929) with the conventions of the official DINO code.

Axis letters: B batch, T tokens (prefix + patches), N patch tokens, D embed, H W C image.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jax.ad_checkpoint import checkpoint_name

from dinotwins_jax.models.barriers import in_memory
from dinotwins_jax.models.layers import (
    Dense,
    LayerNorm,
    attend,
    attention_weights,
    gelu,
    product,
)

INIT_STD = 0.02  # official; DINO truncates at +-2.0 absolute, a hundred times that: a plain normal


class ViTOutput(NamedTuple):
    cls: jax.Array  # [B, D] class token after the final LayerNorm
    patches: jax.Array | None  # [B, N, D] patch tokens after the final LayerNorm, row-major
    attention: jax.Array | None  # f32[B, heads, T, T] softmax attention of the last block


def as_pair(size: int | tuple[int, int]) -> tuple[int, int]:
    """(height, width) of an int (square) or a pair."""
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))


def torch_uniform(fan_in: int):
    """PyTorch's default initialiser of Linear and Conv: uniform within 1 / sqrt(fan_in)."""

    def init(key, shape, dtype=jnp.float32):
        return jax.random.uniform(key, shape, dtype, -1.0, 1.0) / np.sqrt(fan_in)

    return init


def bicubic_matrix(source: int, target: int, scale: float) -> np.ndarray:
    """Rows of PyTorch's bicubic weights (a = -0.75, no antialias, edges repeated): f64[target, source]."""

    def kernel(distance):
        d, a = np.abs(distance), -0.75
        near = (a + 2) * d**3 - (a + 3) * d**2 + 1
        far = a * d**3 - 5 * a * d**2 + 8 * a * d - 4 * a
        return np.where(d <= 1, near, np.where(d < 2, far, 0.0))

    centers = (np.arange(target) + 0.5) / scale - 0.5
    matrix = np.zeros((target, source))
    for tap in range(-1, 3):
        position = np.floor(centers) + tap
        column = np.clip(position, 0, source - 1).astype(int)
        np.add.at(matrix, (np.arange(target), column), kernel(centers - position))
    return matrix


def interpolate_pos_embed(
    pos_embed: jax.Array, grid: tuple[int, int], target: tuple[int, int]
) -> jax.Array:
    """Position embedding for another patch grid.

    Args:
      pos_embed: f32[1, 1 + h * w, D], class position first.
      grid: (h, w) that it was made for; target: (h', w') wanted.
    Returns:
      f32[1, 1 + h' * w', D]; the input itself when the grids agree.
    Source: dino vision_transformer.py, interpolate_pos_encoding: the scale factor is (h' + 0.1) / h.
    """
    if grid == target:
        return pos_embed
    rows = jnp.asarray(bicubic_matrix(grid[0], target[0], (target[0] + 0.1) / grid[0]), jnp.float32)
    columns = jnp.asarray(
        bicubic_matrix(grid[1], target[1], (target[1] + 0.1) / grid[1]), jnp.float32
    )
    patches = pos_embed[0, 1:].reshape(*grid, -1)  # [h, w, D]
    patches = jnp.einsum("ih,hwd->iwd", rows, patches, precision="highest")
    patches = jnp.einsum("jw,iwd->ijd", columns, patches, precision="highest")
    return jnp.concatenate(
        [pos_embed[:, :1], patches.reshape(1, target[0] * target[1], -1)], axis=1
    )


def drop_path(x: jax.Array, key: jax.Array, rate: float, sample_ids: jax.Array) -> jax.Array:
    """Zero a residual branch for whole samples, rescale the rest (stochastic depth, arXiv:1603.09382).

    Each sample draws from (key, its id), so the mask does not depend on how the batch is split over
    devices. x: [B, T, D]; sample_ids: i32[B]; rate: fraction dropped, [0, 1).
    """
    draw = jax.vmap(lambda i: jax.random.uniform(jax.random.fold_in(key, i)))(sample_ids)
    keep = (draw >= rate).astype(x.dtype) / (1.0 - rate)
    return x * keep[:, None, None]


class PatchEmbed(nn.Module):
    embed_dim: int
    patch_size: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        p, C = self.patch_size, images.shape[-1]
        kernel = self.param("kernel", torch_uniform(p * p * C), (p, p, C, self.embed_dim))
        bias = self.param("bias", torch_uniform(p * p * C), (self.embed_dim,))
        # One matmul over flattened patches: the same sums as the convolution, and faster on CPU.
        x = rearrange(images.astype(self.dtype), "b (h p) (w q) c -> b (h w) (p q c)", p=p, q=p)
        kernel = kernel.reshape(-1, self.embed_dim)
        return product(x, kernel.astype(self.dtype)) + bias.astype(self.dtype)


def attend_cudnn(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """`attend` by cuDNN's flash attention: bfloat16 or float16 on an NVIDIA GPU (Ampere or newer)."""
    q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))  # [B, T, H, D]
    y = jax.nn.dot_product_attention(q, k, v, scale=1.0, implementation="cudnn")
    return y.reshape(*y.shape[:2], -1)


ATTENTION = {"xla": attend, "cudnn": attend_cudnn}


class Attention(nn.Module):
    num_heads: int
    dtype: Any = jnp.float32
    init_std: float = INIT_STD
    implementation: str = "xla"

    @nn.compact
    def __call__(
        self, x: jax.Array, norm: Callable, cls_only: bool = False
    ) -> tuple[jax.Array, jax.Array]:
        D = x.shape[-1]
        init = nn.initializers.normal(self.init_std)
        head_dim = D // self.num_heads
        qkv = Dense(3 * D, norm, dtype=self.dtype, kernel_init=init, name="qkv")
        if cls_only:
            queries, rest = qkv(x[:, :1], slice(D)), qkv(x, slice(D, None))
            q = rearrange(queries, "b t (h d) -> b h t d", h=self.num_heads)
            k, v = rearrange(rest, "b t (n h d) -> n b h t d", n=2, h=self.num_heads)
        else:
            q, k, v = rearrange(qkv(x), "b t (n h d) -> n b h t d", n=3, h=self.num_heads)
        q = q * head_dim**-0.5
        y = ATTENTION[self.implementation](q, k, v)
        # The weights are made for those who look at them; where nobody does, they are never computed.
        y = Dense(D, dtype=self.dtype, kernel_init=init, name="proj")(y)
        return y, attention_weights(q, k)


class Mlp(nn.Module):
    hidden_dim: int
    dtype: Any = jnp.float32
    init_std: float = INIT_STD

    @nn.compact
    def __call__(self, x: jax.Array, norm: Callable) -> jax.Array:
        D, init = x.shape[-1], nn.initializers.normal(self.init_std)
        x = Dense(self.hidden_dim, norm, dtype=self.dtype, kernel_init=init, name="fc1")(x)
        # PyTorch's default GELU is the exact one.
        return Dense(D, gelu, dtype=self.dtype, kernel_init=init, name="fc2")(x)


class Block(nn.Module):
    num_heads: int
    mlp_ratio: float
    drop_path_rate: float
    layer_scale_init: float | None
    dtype: Any = jnp.float32
    init_std: float = INIT_STD
    attention: str = "xla"

    @nn.compact
    def __call__(
        self, x: jax.Array, sample_ids: jax.Array, train: bool, cls_only: bool = False
    ) -> tuple[jax.Array, jax.Array]:
        def residual(branch, scale_name):
            if self.layer_scale_init is not None:
                init = nn.initializers.constant(self.layer_scale_init)
                branch = branch * self.param(scale_name, init, (x.shape[-1],)).astype(self.dtype)
            if train and self.drop_path_rate > 0:
                key = self.make_rng("drop_path")
                branch = drop_path(branch, key, self.drop_path_rate, sample_ids)
            return branch

        x = in_memory(x)
        D = x.shape[-1]
        attn = Attention(self.num_heads, self.dtype, self.init_std, self.attention, name="attn")
        y, attention = attn(x, LayerNorm(name="norm1")(D), cls_only)
        x = x[:, :1] if cls_only else x
        x = in_memory(x + residual(y, "gamma1"))
        mlp = Mlp(int(D * self.mlp_ratio), self.dtype, self.init_std, name="mlp")
        y = mlp(x, LayerNorm(name="norm2")(D))
        return x + residual(y, "gamma2"), attention


_ALL_BUT_GATHERED = jax.checkpoint_policies.save_anything_except_these_names("gathered")


def gathering(module: type[nn.Module], gather: Callable | None) -> type[nn.Module]:
    """The module, which makes its own parameters whole before it uses them."""
    if gather is None:
        return module

    def whole(variables):
        return jax.tree.map(lambda x: checkpoint_name(x, "gathered"), gather(variables))

    return nn.map_variables(module, "params", whole)


class VisionTransformer(nn.Module):
    """Pre-norm ViT: class token, learned positions, exact GELU, final LayerNorm.

    Fields:
      embed_dim, depth, num_heads, patch_size (pixels), image_size (pixels, int or (h, w); the grid
      that the position embedding is stored for; any other grid is interpolated), mlp_ratio,
      drop_path_rate (of the last block; a linear ramp from 0; only with train=True, which then needs
      rngs={"drop_path": key}), num_register_tokens (arXiv:2309.16588, after the class token, without
      position), layer_scale_init (None: no LayerScale), dtype (of compute; parameters, norms and
      softmax stay float32), init_std (of dense kernels, class token and positions; the official 0.02
      leaves a narrow network, D around 100, almost linear and slow to start: there 1 / sqrt(D)),
      mask_token (there is one, to stand in for hidden patches), attention
      ("xla" anywhere | "cudnn": flash attention in bfloat16 on an NVIDIA GPU), remat
      (the backward pass computes each block again instead of keeping what is inside it), gather (makes
      parameters whole that are split over devices, block by block, and again on the way back; None: they
      are whole).
    Source: dino vision_transformer.py; registers and LayerScale as in dinov2.
    """

    embed_dim: int
    depth: int
    num_heads: int
    patch_size: int = 16
    image_size: int | tuple[int, int] = 224
    mlp_ratio: float = 4.0
    drop_path_rate: float = 0.0
    num_register_tokens: int = 0
    layer_scale_init: float | None = None
    dtype: Any = jnp.float32
    init_std: float = INIT_STD
    mask_token: bool = False
    attention: str = "xla"
    remat: bool = False
    gather: Callable | None = None

    def setup(self):
        if self.embed_dim % self.num_heads:
            raise ValueError(
                f"embed_dim {self.embed_dim} is not a multiple of num_heads {self.num_heads}"
            )
        if self.attention not in ATTENTION:
            raise ValueError(f"attention is '{self.attention}': {' or '.join(ATTENTION)}")
        grid = self.grid(as_pair(self.image_size))
        init = nn.initializers.normal(self.init_std)
        self.cls_token = self.param("cls_token", init, (1, 1, self.embed_dim))
        self.pos_embed = self.param("pos_embed", init, (1, 1 + grid[0] * grid[1], self.embed_dim))
        if self.num_register_tokens:
            shape = (1, self.num_register_tokens, self.embed_dim)
            self.register_tokens = self.param(
                "register_tokens", nn.initializers.normal(1e-6), shape
            )
        if self.mask_token:  # after all else that is random: it moves no other parameter's start
            self.hidden = self.param("mask_token", nn.initializers.zeros, (1, self.embed_dim))
        if self.gather is not None:
            self.pos_embed = self.gather(self.pos_embed)
        self.patch_embed = gathering(PatchEmbed, self.gather)(
            self.embed_dim, self.patch_size, self.dtype
        )
        rates = np.linspace(0.0, self.drop_path_rate, self.depth)
        block = gathering(Block, self.gather)
        if self.remat or self.gather is not None:
            keep = None if self.remat else _ALL_BUT_GATHERED
            block = nn.remat(block, static_argnums=(3, 4), policy=keep)  # train, cls_only
        self.blocks = [
            block(
                self.num_heads,
                self.mlp_ratio,
                float(rate),
                self.layer_scale_init,
                self.dtype,
                self.init_std,
                self.attention,
            )
            for rate in rates
        ]
        self.norm = LayerNorm()

    def grid(self, size: tuple[int, int]) -> tuple[int, int]:
        """Patch grid (rows, columns) of an image of `size` pixels; ValueError when patches do not fit."""
        if size[0] % self.patch_size or size[1] % self.patch_size or min(size) < self.patch_size:
            raise ValueError(
                f"image size {size[0]}x{size[1]} is not a multiple of patch_size {self.patch_size}"
            )
        return size[0] // self.patch_size, size[1] // self.patch_size

    def _embed(self, images, hidden=None):
        """Token sequence [B, T, D] that enters the first block; hidden: bool[B, N], patches that the mask
        token stands in for."""
        stored, grid = self.grid(as_pair(self.image_size)), self.grid(images.shape[1:3])
        pos_embed = interpolate_pos_embed(self.pos_embed, stored, grid).astype(self.dtype)
        x = self.patch_embed(images)  # [B, N, D]
        if hidden is not None:
            x = jnp.where(hidden[..., None], self.hidden.astype(self.dtype), x)
        cls = jnp.broadcast_to(self.cls_token.astype(self.dtype), (x.shape[0], 1, self.embed_dim))
        x = jnp.concatenate([cls, x], axis=1) + pos_embed
        if self.num_register_tokens:
            registers = self.register_tokens.astype(self.dtype)
            registers = jnp.broadcast_to(registers, (x.shape[0], *registers.shape[1:]))
            x = jnp.concatenate([x[:, :1], registers, x[:, 1:]], axis=1)
        return x

    def _blocks(self, images, train, sample_ids, cls_only=False, hidden=None):
        """Token sequence [B, T, D] and attention [B, heads, T, T] after each block; cls_only: after the
        last one of the class token alone."""
        x = self._embed(images, hidden)
        yield from self._through(x, self.blocks, train, sample_ids, cls_only)

    def _through(self, x, blocks, train, sample_ids=None, cls_only=False):
        if sample_ids is None:
            sample_ids = jnp.arange(x.shape[0])
        for number, block in enumerate(blocks, start=1):
            x, attention = block(x, sample_ids, train, cls_only and number == len(blocks))
            yield x, attention

    def _split(self, x):
        x = self.norm(self.embed_dim)(x)
        return x[:, 0], x[:, 1 + self.num_register_tokens :]

    def __call__(
        self,
        images,
        train=False,
        return_attention=False,
        sample_ids=None,
        patches=True,
        hidden=None,
    ) -> ViTOutput:
        """Features of a batch.

        Args:
          images: [B, H, W, 3], normalised; H and W multiples of patch_size, not necessarily equal.
          train: apply drop path.
          return_attention: also return the last block's attention.
          sample_ids: i32[B] identity of each sample for drop path (default 0..B-1).
          patches: False: the last block computes the class token alone, the same numbers for a
            twelfth less work; the patch tokens are None.
          hidden: bool[B, N], patches that the mask token stands in for; needs the field mask_token.
        Returns:
          ViTOutput, float32.
        """
        if return_attention and not patches:
            raise ValueError("return_attention=True needs patches=True")
        if hidden is not None and not self.mask_token:
            raise ValueError("hidden patches need the field mask_token=True")
        *_, (x, attention) = self._blocks(images, train, sample_ids, not patches, hidden)
        cls, tokens = self._split(x)
        return ViTOutput(cls, tokens if patches else None, attention if return_attention else None)

    def attentions(self, images) -> list[jax.Array]:
        """f32[B, heads, T, T] softmax attention of every block, the first block's first.

        Rows are queries. Call as apply(..., method="attentions").
        """
        return [attention for _, attention in self._blocks(images, False, None)]

    def intermediate_layers(self, images, n=1) -> list[tuple[jax.Array, jax.Array]]:
        """(cls [B, D], patches [B, N, D]) of the last n blocks, each after the final LayerNorm.

        What the official linear evaluation concatenates. Call as apply(..., method="intermediate_layers").
        """
        outputs = [x for x, _ in self._blocks(images, False, None)]
        return [self._split(x) for x in outputs[-n:]]

    def embed_until(self, images, block: int) -> jax.Array:
        """Tokens [B, T, D] (of `dtype`) that enter block `block`, 0 .. depth; depth: after the last.

        Call as apply(..., method="embed_until").
        """
        self._check_block(block)
        x = self._embed(images)
        return [x, *(y for y, _ in self._through(x, self.blocks[:block], False))][-1]

    def finish_from(self, tokens, block: int, train=False) -> ViTOutput:
        """What __call__ gives for the images of `tokens` [B, T, D] from embed_until(images, block).

        Call as apply(..., method="finish_from"); train applies drop path.
        """
        self._check_block(block)
        x = tokens.astype(self.dtype)
        outputs = [x, *(y for y, _ in self._through(x, self.blocks[block:], train))]
        cls, patches = self._split(outputs[-1])
        return ViTOutput(cls, patches, None)

    def _check_block(self, block):
        if not 0 <= block <= self.depth:
            raise ValueError(f"block={block} must be in 0 .. depth={self.depth}")
