"""From images to patch tokens: one linear map of each patch, or a few convolutions."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from dinotwins_jax.models.layers import PatchEmbed, operations, torch_uniform


class ConvStem(nn.Module):
    """images [B, H, W, C] -> [B, N, D]: 3 x 3 convolutions of stride 2, each followed by ReLU, until a
    pixel is a patch, then a linear map; row-major.

    There are log2(patch_size) of them; the last has embed_dim channels, each one before 1 / growth as
    many. They are computed in float32 whatever the dtype, so that the gradients of their kernels are summed
    in it.

    Source: "Early Convolutions Help Transformers See Better", arXiv:2106.14881, section 3. Differs: no
    batch normalisation, so that the backbone has no running statistics; no block fewer.
    """

    embed_dim: int
    patch_size: int
    dtype: Any = jnp.float32
    plain_gradients: bool = False
    growth: int = 2

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        of, x = operations(self.plain_gradients), images.astype(jnp.float32)
        for number, width in enumerate(stem_widths(self.embed_dim, self.patch_size, self.growth)):
            x = jax.nn.relu(_Conv(width, self.plain_gradients, name=f"conv_{number}")(x))
        x = x.reshape(x.shape[0], -1, x.shape[-1]).astype(self.dtype)
        init = torch_uniform(self.embed_dim)
        kernel = self.param("kernel", init, (self.embed_dim, self.embed_dim))
        bias = self.param("bias", init, (self.embed_dim,))
        return of.add(of.product(x, kernel), bias)


class NarrowConvStem(ConvStem):
    """`ConvStem` with channels that grow fourfold: half the work where there are two convolutions."""

    growth: int = 4


class _Conv(nn.Module):
    """[B, H, W, C] -> [B, H / 2, W / 2, features], as PyTorch's Conv2d(C, features, 3, 2, padding=1)."""

    features: int
    plain_gradients: bool

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        init, channels = torch_uniform(9 * x.shape[-1]), x.shape[-1]
        kernel = self.param("kernel", init, (3, 3, channels, self.features))
        bias = self.param("bias", init, (self.features,))
        around = ((1, 1), (1, 1))
        axes = ("NHWC", "HWIO", "NHWC")
        x = jax.lax.conv_general_dilated(x, kernel, (2, 2), around, dimension_numbers=axes)
        return operations(self.plain_gradients).add(x, bias)


def stem_widths(embed_dim: int, patch_size: int, growth: int = 2) -> list[int]:
    """Channels of each convolution.

    Raises:
      ValueError: patch_size is no power of 2, or embed_dim cannot be divided so often.
    """
    number = patch_size.bit_length() - 1
    if patch_size < 2 or patch_size != 1 << number:
        raise ValueError(f"stem=conv halves images: patch_size {patch_size} is not 2, 4, 8, 16, …")
    if embed_dim % (whole := growth ** (number - 1)):
        raise ValueError(
            f"the stem's channels grow {growth}-fold {number - 1} times: embed_dim {embed_dim} is not a "
            f"multiple of {whole}"
        )
    return [embed_dim // growth**left for left in reversed(range(number))]


STEMS: dict[str, Callable[..., nn.Module]] = {
    "linear": PatchEmbed,
    "conv": ConvStem,
    "conv4": NarrowConvStem,
}
