"""Rendering view by view (bands, branches) equals rendering all at once (dense products, selections)."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from refs import truncated_gaussian_blur

from dinotwins_jax.augment import ops
from dinotwins_jax.augment.blur import gaussian_blur
from dinotwins_jax.augment.draws import random_box
from dinotwins_jax.augment.multi_crop import make_multi_crop
from dinotwins_jax.augment.views import largest_box, make_view_specs

SIDE = 160
PIXELS = np.random.default_rng(0).integers(64, 192, (SIDE, SIDE, 3), np.uint8)
ROWS = jnp.asarray(PIXELS.swapaxes(1, 2))
OUT = (24, 32)


@pytest.fixture(scope="module")
def banded():
    """resize_rows in bands for boxes up to 70 x 80 pixels."""

    def resize(box, flip):
        return ops.resize_rows(ROWS, box, OUT, flip=flip, max_box=(70, 80))

    return jax.jit(resize)


BOXES = [
    (0, 0, 70, 80),
    (90, 80, 70, 80),
    (33, 41, 70, 1),
    (159, 0, 1, 80),
    (159, 159, 1, 1),
    (10, 7, 24, 32),
    (51, 60, 13, 11),
    (100, 3, 45, 77),
]


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("box", BOXES)
def test_bands_equal_dense_products(banded, box, flip):
    dense = ops.resize_rows(ROWS, box, OUT, flip=flip)
    np.testing.assert_allclose(banded(jnp.array(box), flip), dense, atol=1e-5)  # 0.003 levels


@pytest.mark.parametrize("box", BOXES)
def test_bands_are_pillows(banded, box):
    """The images avoid 0 and 255, where Pillow clips between its two passes."""
    top, left, height, width = box
    cut = Image.fromarray(PIXELS).crop((left, top, left + width, top + height))
    expected = np.asarray(cut.resize(OUT[::-1], Image.Resampling.BICUBIC), np.float64)
    ours = 255 * np.asarray(banded(jnp.array(box), False)).transpose(1, 2, 0)
    assert np.abs(ours - expected).max() < 1.11  # two roundings to 8 bits


def test_bands_are_narrow():
    """The banded program has less than half the multiplications of the dense one."""

    def flops(max_box):
        resize = jax.jit(lambda box: ops.resize_rows(ROWS, box, OUT, max_box=max_box))
        return resize.lower(jnp.zeros(4)).compile().cost_analysis()["flops"]

    assert flops((70, 80)) < flops(None) / 2


@pytest.mark.parametrize(
    "size", [(480, 640), (640, 640), (640, 100), (30, 640), (640, 300), (9, 9)]
)
@pytest.mark.parametrize("scale", [(0.05, 0.4), (0.4, 1.0), (0.3, 0.6), (0.02, 0.05)])
def test_no_box_exceeds_the_largest_box(size, scale):
    recipe, _ = make_view_specs(global_scale=scale)
    keys = jax.random.split(jax.random.key(0), 3000)
    boxes = jax.vmap(lambda key: random_box(key, size, recipe.scale, recipe.ratio))(keys)
    height, width = largest_box(recipe, max(size))
    assert boxes[2].max() <= height and boxes[3].max() <= width
    assert height <= max(size) and width <= max(size)


@pytest.mark.slow
@pytest.mark.parametrize("blur_kernel", [0, pytest.param(5, marks=pytest.mark.slow)])
def test_a_loop_over_views_equals_all_views_at_once(blur_kernel):
    """Every operation fires in some of the views, and in some it does not."""
    recipe = {"global_size": 24, "local_size": 16, "num_local": 3, "blur_kernel": blur_kernel}
    recipe |= {"blur_prob": (0.5,) * 3, "solarize_prob": (0.5,) * 3, "grayscale_prob": 0.5}
    images = jnp.asarray(np.stack([PIXELS, PIXELS[::-1], PIXELS // 2]))
    sizes = jnp.array([[SIDE, SIDE], [100, SIDE], [SIDE, 57]])
    keys = jax.random.split(jax.random.key(1), 3)
    loop, at_once = (
        jax.jit(make_multi_crop(**recipe, one_by_one=choice))(images, sizes, keys)
        for choice in (True, False)
    )
    for name, views in at_once.items():
        # Solarize has a step: a pixel within rounding of it may fall on either side.
        differs = np.abs(loop[name] - views) > 3e-5
        assert differs.mean() < 1e-4, name


@pytest.mark.parametrize(("radius", "taps"), [(0.1, 9), (0.5, 3), (1.3, 9), (2.0, 9), (2.0, 5)])
def test_truncated_blur_equals_a_plain_loop(radius, taps):
    planes = np.random.default_rng(0).random((3, 12, 10), np.float32)
    ours = gaussian_blur(jnp.asarray(planes), radius, taps)
    expected = truncated_gaussian_blur(planes, radius, taps)
    np.testing.assert_allclose(ours, expected, atol=1e-6)


@pytest.mark.parametrize(("taps", "widest"), [(0, 2.0), (0, 5.0), (9, 2.0)])
@pytest.mark.parametrize(("height", "width"), [(48, 96), (61, 50)])
def test_a_blur_in_bands_is_the_dense_one(taps, widest, height, width):
    planes = jnp.asarray(np.random.default_rng(0).random((3, height, width), dtype=np.float32))
    blurs = [jax.jit(partial(gaussian_blur, taps=taps, max_radius=most)) for most in (None, widest)]
    for radius in (0.0, 0.3, 1.0, 1.9999, 2.0, widest)[bool(taps) :]:
        dense, banded = (blur(planes, radius) for blur in blurs)
        # A position of 61 pixels is rounded to 4e-6 in the dense matrix.
        np.testing.assert_allclose(banded, dense, atol=1e-4)
        assert np.abs(dense - planes).max() > 0.01 or radius == 0.0


def test_a_blur_that_reaches_too_far_for_bands_is_dense():
    planes = jnp.asarray(np.random.default_rng(0).random((1, 64, 64), dtype=np.float32))
    dense, banded = gaussian_blur(planes, 7.0), gaussian_blur(planes, 7.0, max_radius=7.0)
    np.testing.assert_array_equal(banded, dense)
