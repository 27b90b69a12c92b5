"""A ViT as a StableHLO program with its weights, for any code that has JAX and not this package."""

from collections.abc import Iterator
from contextlib import contextmanager

import jax
import jax.numpy as jnp
import numpy as np
from jax import export

from dinotwins_jax.models.barriers import forward_only
from dinotwins_jax.models.vit import VisionTransformer

PLATFORMS = ("cpu", "cuda", "tpu")


def stablehlo_program(
    vit: VisionTransformer,
    params,
    size: tuple[int, int],
    mean: tuple[float, ...],
    std: tuple[float, ...],
) -> bytes:
    """The forward pass at one image size, for any number of images and each of PLATFORMS.

    Args:
      vit: of dtype float32.
      size: (height, width) of the images in pixels, multiples of the patch size; learned positions are
        interpolated to it.
      mean, std: of each channel, for values in [0, 1].
    Returns:
      What jax.export.deserialize reads. The program takes images u8[b, h, w, C], normalises them and
      returns {"cls": f32[b, D], "patches": f32[b, N, D]}, the fields of ViTOutput.
    """
    params, vit = jax.tree.map(np.asarray, params), vit.clone(remat=False, gather=None)

    def features(images):
        pixels = images.astype(jnp.float32) / 255.0
        output = vit.apply({"params": params}, (pixels - np.float32(mean)) / np.float32(std))
        return {"cls": output.cls, "patches": output.patches}

    (batch,) = export.symbolic_shape("b")
    images = jax.ShapeDtypeStruct((batch, *size, len(mean)), jnp.uint8)
    with forward_only(), _no_source_files():
        program = export.export(jax.jit(features), platforms=PLATFORMS)(images)
    return bytes(program.serialize())


@contextmanager
def _no_source_files() -> Iterator[None]:
    """Leaves the paths of this machine's source files out of the program."""
    name = "jax_traceback_in_locations_limit"
    before = getattr(jax.config, name)
    jax.config.update(name, 0)
    try:
        yield
    finally:
        jax.config.update(name, before)
