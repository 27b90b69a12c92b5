"""Vision Transformer (arXiv:2010.11929) with the conventions of the official DINO code.

Axis letters: B batch, T tokens (prefix + patches), N patch tokens, D embed, H W C image.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from dinotwins_jax.models.attention import ATTENTION
from dinotwins_jax.models.block import FFN, INIT_STD, Block, stream_dtype
from dinotwins_jax.models.gathering import ALL_BUT_GATHERED, gathering
from dinotwins_jax.models.layers import LayerNorm, operations
from dinotwins_jax.models.positions import (
    INTERPOLATIONS,
    Rope,
    RopeMoves,
    check_positions,
    interpolate_pos_embed,
    rope_of,
)
from dinotwins_jax.models.scan import scan_blocks
from dinotwins_jax.models.stem import STEMS


class ViTOutput(NamedTuple):
    """Features of a batch of images."""

    cls: jax.Array  # [B, D] class token after the final LayerNorm
    patches: jax.Array | None  # [B, N, D] patch tokens after the final LayerNorm, row-major
    attention: jax.Array | None  # f32[B, heads, T, T] softmax attention of the last block


def as_pair(size: int | tuple[int, int]) -> tuple[int, int]:
    """(height, width) of an int (square) or a pair."""
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))


class VisionTransformer(nn.Module):
    """Pre-norm ViT: class token, learned or rotary positions, exact GELU or SwiGLU, final LayerNorm.

    Fields:
      embed_dim, depth, num_heads, patch_size (pixels), image_size (pixels, int or (h, w); the grid
      that the position embedding is stored for; any other grid is interpolated), mlp_ratio (hidden width
      of the MLP over embed_dim; SwiGLU has two thirds of it), drop_path_rate (of the last block; a linear
      ramp from 0; only with train=True, which then needs rngs={"drop_path": key}), num_register_tokens
      (arXiv:2309.16588, after the class token, without position), layer_scale_init (None: no LayerScale),
      ffn ("mlp" | "swiglu"), positions ("learned" | "rope": rotary, any grid without interpolation, no
      pos_embed), position_interpolation (of learned ones to other grids, of `INTERPOLATIONS`),
      rope_shift, rope_jitter, rope_rescale (`RopeMoves`, drawn for every block, only with train=True,
      which then needs rngs={"rope": key}), norm_eps (of all LayerNorms; DINO and DINOv2 have 1e-6, DINOv3
      1e-5), dtype (of compute; parameters, norms and softmax stay float32, and with LayerScale the
      tokens between blocks), init_std (of dense kernels, class token and positions; the official 0.02
      leaves a narrow network, D around 100, almost linear and slow to start: there 1 / sqrt(D)),
      mask_token (whether there is one, to replace masked patches), attention ("xla" anywhere | "cudnn":
      flash attention, see models/attention.py),
      remat (recompute each block in the backward pass instead of storing its activations),
      plain_gradients (JAX's own gradients instead of hand-written ones, needed for forward mode), gather
      (gathers parameters sharded over devices, block by block, and again in the backward pass; None: they
      are not sharded), in_channels (C of the images), drop_path_uniform (drop_path_rate in every block),
      scan_blocks (all but the last as a loop where only its output is asked for, see models/scan.py), stem
      ("linear": one map of each patch | "conv", "conv4": convolutions, see models/stem.py).
    Source: dino vision_transformer.py; registers, LayerScale and SwiGLU as in dinov2, rotary positions as
    in dinov3.
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
    ffn: str = "mlp"
    positions: str = "learned"
    rope_shift: float | None = None
    rope_jitter: float | None = None
    rope_rescale: float | None = None
    norm_eps: float = 1e-6
    dtype: Any = jnp.float32
    init_std: float = INIT_STD
    mask_token: bool = False
    attention: str = "xla"
    remat: bool = False
    plain_gradients: bool = False
    gather: Callable | None = None
    in_channels: int = 3
    drop_path_uniform: bool = False
    position_interpolation: str = "dino"
    scan_blocks: bool = False
    stem: str = "linear"

    def setup(self):
        if self.embed_dim % self.num_heads:
            raise ValueError(
                f"embed_dim {self.embed_dim} is not a multiple of num_heads {self.num_heads}"
            )
        self._check_options()
        grid = self.grid(as_pair(self.image_size))
        init = nn.initializers.normal(self.init_std)
        self.cls_token = self.param("cls_token", init, (1, 1, self.embed_dim))
        if self.positions == "learned":
            shape = (1, 1 + grid[0] * grid[1], self.embed_dim)
            self.pos_embed = self.param("pos_embed", init, shape)
            if self.gather is not None:
                self.pos_embed = self.gather(self.pos_embed)
        if self.num_register_tokens:
            shape = (1, self.num_register_tokens, self.embed_dim)
            tiny = nn.initializers.normal(1e-6)
            self.register_tokens = self.param("register_tokens", tiny, shape)
        if self.mask_token:  # last, so that it does not change the initialisation of the others
            self.hidden = self.param("mask_token", nn.initializers.zeros, (1, self.embed_dim))
        self.patch_embed = gathering(STEMS[self.stem], self.gather)(
            self.embed_dim, self.patch_size, self.dtype, self.plain_gradients
        )
        first = self.drop_path_rate if self.drop_path_uniform else 0.0
        rates = np.linspace(first, self.drop_path_rate, self.depth)
        block = gathering(Block, self.gather)
        if self.remat or self.gather is not None:
            policy = None if self.remat else ALL_BUT_GATHERED
            block = nn.remat(block, static_argnums=(3, 4), policy=policy)  # train, cls_only
        make = partial(
            block,
            self.num_heads,
            self.mlp_ratio,
            layer_scale_init=self.layer_scale_init,
            dtype=self.dtype,
            init_std=self.init_std,
            attention=self.attention,
            ffn=self.ffn,
            norm_eps=self.norm_eps,
            plain_gradients=self.plain_gradients,
        )
        self.blocks = [make(float(rate)) for rate in rates]
        self.template = partial(make, 0.0, parent=None)
        self.norm = LayerNorm(self.norm_eps, self.plain_gradients)

    def _check_options(self):
        choices = {"attention": ATTENTION, "ffn": FFN, "positions": ("learned", "rope")}
        choices |= {"position_interpolation": INTERPOLATIONS, "stem": tuple(STEMS)}
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise ValueError(f"{name} is '{getattr(self, name)}': choose {' or '.join(known)}")
        check_positions(self.positions, self.embed_dim, self.num_heads, self.moves)

    @property
    def moves(self) -> RopeMoves | None:
        """Coordinate augmentation in training; None if it is off."""
        moves = RopeMoves(self.rope_shift, self.rope_jitter, self.rope_rescale)
        return None if moves == RopeMoves() else moves

    def grid(self, size: tuple[int, int]) -> tuple[int, int]:
        """Patch grid (rows, columns) of an image of `size` pixels; ValueError when patches do not fit."""
        if size[0] % self.patch_size or size[1] % self.patch_size or min(size) < self.patch_size:
            raise ValueError(
                f"image size {size[0]}x{size[1]} is not a multiple of patch_size {self.patch_size}"
            )
        return size[0] // self.patch_size, size[1] // self.patch_size

    def _embed(self, images, hidden=None):
        """Token sequence [B, T, D] that enters the first block; hidden: bool[B, N], patches replaced by
        the mask token."""
        stored, grid = self.grid(as_pair(self.image_size)), self.grid(images.shape[1:3])
        of = operations(self.plain_gradients)
        if images.shape[3] != self.in_channels:
            raise ValueError(
                f"images have {images.shape[3]} channels, the model in_channels={self.in_channels}"
            )
        x = self.patch_embed(images)  # [B, N, D]
        if hidden is not None:
            x = jnp.where(hidden[..., None], self.hidden.astype(self.dtype), x)
        prefix = self.cls_token[0]  # [1, D]
        if self.positions == "learned":
            positions = interpolate_pos_embed(
                self.pos_embed, stored, grid, self.position_interpolation
            )
            x = of.add(x, positions[0, 1:])
            prefix = prefix + positions[0, :1]
        if self.num_register_tokens:
            prefix = jnp.concatenate([prefix, self.register_tokens[0]])
        zeros = jnp.zeros((x.shape[0], *prefix.shape), self.dtype)
        tokens = jnp.concatenate([of.add(zeros, prefix), x], axis=1)
        return tokens.astype(stream_dtype(self.dtype, self.layer_scale_init))

    def _blocks(self, images):
        """Yields the token sequence [B, T, D] and attention [B, heads, T, T] of each block."""
        yield from self._through(self._embed(images), self.grid(images.shape[1:3]), self.blocks)

    def _through(self, x, grid, blocks, train=False, sample_ids=None, cls_only=False):
        for number, block in enumerate(blocks, start=1):
            last = number == len(blocks)
            x, attention = block(x, sample_ids, train, cls_only and last, self._rope(grid, train))
            yield x, attention

    def _last(self, x, grid, blocks, train=False, sample_ids=None, cls_only=False):
        """Tokens and attention of the last of the blocks; cls_only: only its class token."""
        if self.scan_blocks and len(blocks) > 1 and not self.is_initializing():
            *scanned, last = blocks
            ropes = [self._rope(grid, train) for _ in scanned]
            x, blocks = scan_blocks(scanned, self.template(), x, sample_ids, train, ropes), [last]
        *_, found = self._through(x, grid, blocks, train, sample_ids, cls_only)
        return found

    def _rope(self, grid, train) -> Rope | None:
        """Rotations of the tokens of a grid; with coordinate augmentation, a new draw for each call."""
        if self.positions != "rope":
            return None
        sizes = grid, self.embed_dim // self.num_heads, 1 + self.num_register_tokens
        if train and self.moves is not None:
            return rope_of(*sizes, self.moves, self.make_rng("rope"))
        return rope_of(*sizes)

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
          images: [B, H, W, C], normalised; H and W multiples of patch_size, not necessarily equal.
          train: apply drop path, and the augmentation of rotary positions.
          return_attention: also return the last block's attention.
          sample_ids: i32[B] identity of each sample for drop path (default 0..B-1).
          patches: False: the last block computes only the class token, the same numbers for a
            twelfth less work; the patch tokens are None.
          hidden: bool[B, N], patches replaced by the mask token; needs the field mask_token.
        Returns:
          ViTOutput, float32.
        """
        if return_attention and not patches:
            raise ValueError("return_attention=True needs patches=True")
        if hidden is not None and not self.mask_token:
            raise ValueError("masked patches (hidden) need the field mask_token=True")
        x, grid = self._embed(images, hidden), self.grid(images.shape[1:3])
        x, attention = self._last(x, grid, self.blocks, train, sample_ids, not patches)
        cls, tokens = self._split(x)
        return ViTOutput(cls, tokens if patches else None, attention if return_attention else None)

    def attentions(self, images) -> list[jax.Array]:
        """f32[B, heads, T, T] softmax attention of every block, the first block's first.

        Rows are queries. Call as apply(..., method="attentions").
        """
        return [attention for _, attention in self._blocks(images)]

    def intermediate_layers(self, images, n=1) -> list[tuple[jax.Array, jax.Array]]:
        """(cls [B, D], patches [B, N, D]) of the last n blocks, each after the final LayerNorm.

        Input of the official linear evaluation. Call as apply(..., method="intermediate_layers").
        """
        return [self._split(x) for x, _ in list(self._blocks(images))[-n:]]

    def embed_until(self, images, block: int) -> jax.Array:
        """Tokens [B, T, D] (of `stream_dtype`) that enter block `block`, 0 .. depth; depth: after the last.

        Call as apply(..., method="embed_until").
        """
        self._check_block(block)
        x, grid = self._embed(images), self.grid(images.shape[1:3])
        return self._last(x, grid, self.blocks[:block], False)[0] if block else x

    def finish_from(self, tokens, block: int, train=False, grid=None) -> ViTOutput:
        """Completes __call__ from `tokens` [B, T, D] of embed_until(images, block).

        Call as apply(..., method="finish_from"); train applies drop path. grid: (rows, columns) of patches,
        which rotary positions need; that of image_size by default.
        """
        self._check_block(block)
        grid = self.grid(as_pair(self.image_size)) if grid is None else grid
        if self.positions == "rope" and tokens.shape[1] != (
            wanted := 1 + self.num_register_tokens + grid[0] * grid[1]
        ):
            raise ValueError(
                f"{tokens.shape[1]} tokens, but grid {grid} has {wanted}: pass their grid"
            )
        x = tokens.astype(stream_dtype(self.dtype, self.layer_scale_init))
        if block < self.depth:
            x, _ = self._last(x, grid, self.blocks[block:], train)
        cls, patches = self._split(x)
        return ViTOutput(cls, patches, None)

    def _check_block(self, block):
        if not 0 <= block <= self.depth:
            raise ValueError(f"block={block} must be in 0 .. depth={self.depth}")
