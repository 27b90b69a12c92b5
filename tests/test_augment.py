"""Augmentation: agreement with Pillow, and what a view depends on. Draws: test_augment_draws.py."""

import colorsys
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

from dinotwins_jax.augment import draws as augment_draws
from dinotwins_jax.augment import multi_crop as augment
from dinotwins_jax.augment import ops
from dinotwins_jax.augment.blur import blur_matrix, gaussian_blur

GOLDEN = np.load(pathlib.Path(__file__).parent / "golden" / "views.npz")
IMAGE = GOLDEN["image"].astype(np.float32) / 255
PLANES = jnp.asarray(IMAGE.transpose(2, 0, 1))
# Pillow rounds each of the two passes of an operation (0.5 level); float32 adds a trace.
TWO_ROUNDINGS = 1.11
PLAIN = {
    "flip": 0.0,
    "jitter_prob": 0.0,
    "grayscale_prob": 0.0,
    "blur_prob": (0.0, 0.0, 0.0),
    "solarize_prob": (0.0, 0.0, 0.0),
    "mean": (0.0, 0.0, 0.0),
    "std": (1.0, 1.0, 1.0),
}
TINY = {"global_size": 8, "local_size": 4, "num_local": 2}
SPEC = augment_draws.ViewSpec(
    out=(8, 8),
    scale=(0.4, 1.0),
    ratio=(3 / 4, 4 / 3),
    flip=0.5,
    jitter_prob=0.8,
    strengths=(0.4, 0.4, 0.2, 0.1),
    grayscale_prob=0.2,
    blur_radius=(0.1, 2.0),
    blur_probs=(0.5,),
    solarize_probs=(0.2,),
)


@pytest.fixture(scope="module")
def default_crop():
    return jax.jit(augment.make_multi_crop(**TINY))


def levels(ours, reference):
    """|ours - reference| in 8-bit levels; ours planes [3, h, w] or [h, w] in [0, 1]."""
    ours = np.asarray(ours)
    ours = ours.transpose(1, 2, 0) if ours.ndim == 3 else ours
    return np.abs(255 * ours - reference.astype(np.float64))


def keys_of(count, seed=0):
    return jax.random.split(jax.random.key(seed), count)


def random_images(count, side, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (count, side, side, 3), dtype=np.uint8)
    return jnp.asarray(pixels)


def draw_many(count, size=(48, 64), spec=SPEC):
    def draw(key):
        return augment_draws.draw_view(key, size, 0.5, 0.2, spec=spec)

    return jax.tree.map(np.asarray, jax.jit(jax.vmap(draw))(keys_of(count)))


def pillow_crop(pixels, box, out):
    left, top, right, bottom = (int(edge) for edge in box)
    cut = Image.fromarray(pixels).crop((left, top, right, bottom))
    return np.asarray(cut.resize(out[::-1], Image.Resampling.BICUBIC))


@pytest.mark.parametrize("out", [24, 40])
@pytest.mark.parametrize("number", range(5))
def test_resize_weights_are_pillows(number, out):
    """Pillow clips between its two passes, whose order depends on the box: do so here too."""
    left, top, right, bottom = (int(edge) for edge in GOLDEN[f"box_{number}"])
    reference = GOLDEN[f"crop{out}_{number}"]
    vertical = ops.resize_weights(top, bottom - top, top, bottom, in_size=48, out_size=out)
    horizontal = ops.resize_weights(left, right - left, left, right, in_size=64, out_size=out)
    rows_last = jnp.clip(jnp.einsum("cyx,wx->cyw", PLANES, horizontal), 0, 1)
    rows_last = jnp.clip(jnp.einsum("hy,cyw->chw", vertical, rows_last), 0, 1)
    rows_first = jnp.clip(jnp.einsum("hy,cyx->chx", vertical, PLANES), 0, 1)
    rows_first = jnp.clip(jnp.einsum("chx,wx->chw", rows_first, horizontal), 0, 1)
    errors = [levels(planes, reference).max() for planes in (rows_last, rows_first)]
    assert min(errors) < TWO_ROUNDINGS

    box = (top, left, bottom - top, right - left)
    crop = ops.resize_crop(jnp.asarray(IMAGE), box, (out, out))
    error = np.abs(255 * np.asarray(crop) - reference)
    # Without that clip a few pixels beside the sharpest edges differ by some levels.
    assert np.mean(error < TWO_ROUNDINGS) > 0.97 and error.mean() < 0.35


@pytest.mark.parametrize("box", [(0, 0, 64, 48), (3, 5, 30, 46), (10, 7, 17, 41), (60, 40, 63, 47)])
@pytest.mark.parametrize("out", [(24, 40), (9, 5)])
def test_resize_crop_equals_pillow_without_overshoot(box, out):
    pixels = (64 + GOLDEN["image"] // 2).astype(np.uint8)
    left, top, right, bottom = box
    crop = ops.resize_crop(jnp.float32(pixels) / 255, (top, left, bottom - top, right - left), out)
    assert np.abs(255 * np.asarray(crop) - pillow_crop(pixels, box, out)).max() < TWO_ROUNDINGS


def test_flip_mirrors():
    rows = jnp.asarray(IMAGE.transpose(0, 2, 1))
    plain = ops.resize_rows(rows, (3, 5, 30, 40), (12, 10))
    mirrored = ops.resize_rows(rows, (3, 5, 30, 40), (12, 10), flip=True)
    np.testing.assert_allclose(mirrored, plain[..., ::-1], atol=1e-6)


@pytest.mark.parametrize("radius", [0.5, 1.0, 2.0])
def test_blur_is_pillows(radius):
    """Pillow rounds after each of six passes: up to 2.4 levels where the roundings agree."""
    error = levels(gaussian_blur(PLANES, radius), GOLDEN[f"blur_{radius}"])
    assert error.max() < 2.5 and error.mean() < 0.6


def test_blur_has_the_gaussians_variance_and_zero_is_identity():
    offsets = np.arange(41) - 20
    for radius in (0.1, 0.7, 1.3, 2.0, 3.5):
        kernel = np.asarray(blur_matrix(radius, 41))[20]
        assert kernel.sum() == pytest.approx(1, abs=1e-5)
        assert (kernel * offsets**2).sum() == pytest.approx(radius**2, rel=1e-3)
    np.testing.assert_allclose(blur_matrix(0.0, 7), np.eye(7), atol=1e-6)


@pytest.mark.parametrize(
    ("planes", "name"),
    [
        (ops.solarize(PLANES), "solarize_128"),
        (ops.luma(PLANES), "grayscale"),
        (ops.blend(PLANES, ops.BRIGHTNESS, 1.3), "brightness_1.3"),
        (ops.blend(PLANES, ops.CONTRAST, 0.7), "contrast_0.7"),
        (ops.blend(PLANES, ops.SATURATION, 1.2), "saturation_1.2"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_color_operations_are_pillows(planes, name):
    # Pillow's enhancers cut the fraction off: up to one level, plus the rounding of the grey.
    assert levels(planes, GOLDEN[name]).max() < TWO_ROUNDINGS


def test_hue_is_pillows_up_to_its_8_bit_hsv():
    """Hue and saturation cut to 8 bits: a hue level is 6/256 of the chroma, up to 6 levels."""
    error = levels(ops.shift_hue(PLANES, int(0.05 * 255) / 256), GOLDEN["hue_0.05"])
    assert error.max() < 9 and error.mean() < 0.6 and np.mean(error < 2) > 0.9


@pytest.mark.parametrize("shift", [-0.5, -0.1, 0.0, 0.23])
def test_hue_equals_colorsys(shift):
    pixels = np.random.default_rng(0).random((60, 3), np.float32)
    pixels[:4] = [[0, 0, 0], [1, 1, 1], [0.5, 0.5, 0.2], [0.3, 0.7, 0.7]]
    expected = []
    for pixel in pixels.tolist():
        hue, saturation, value = colorsys.rgb_to_hsv(*pixel)
        expected.append(colorsys.hsv_to_rgb((hue + shift) % 1.0, saturation, value))
    ours = ops.shift_hue(jnp.asarray(pixels.T[:, :, None]), shift)[:, :, 0].T
    np.testing.assert_allclose(ours, expected, atol=2e-6)


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (3, 2, 1, 0), (1, 3, 0, 2), (2, 0, 3, 1)])
@pytest.mark.parametrize("with_hue", [True, False])
def test_color_jitter_follows_the_order(order, with_hue):
    factors, shift = jnp.array([1.3, 0.7, 1.2]), 0.07
    expected = PLANES
    for operation in order:
        if operation != ops.HUE:
            expected = ops.blend(expected, operation, factors[operation])
        elif with_hue:
            expected = ops.shift_hue(expected, shift)
    ours = ops.color_jitter(PLANES, factors, shift if with_hue else None, jnp.array(order))
    np.testing.assert_allclose(ours, expected, atol=1e-5)


@pytest.fixture(scope="module")
def plain_views():
    """600 images of 8 x 8 and their views with only the crop."""
    batch = (random_images(600, 8), jnp.full((600, 2), 8), keys_of(600))
    return batch, jax.jit(augment.make_multi_crop(**TINY, **PLAIN))(*batch)


@pytest.mark.parametrize(
    ("option", "value", "rates"),
    [
        ("blur_prob", (1.0, 0.1, 0.5), (1.0, 0.1, 0.5)),
        ("solarize_prob", (0.0, 0.2, 0.6), (0.0, 0.2, 0.6)),
        pytest.param("grayscale_prob", 0.2, (0.2, 0.2, 0.2), marks=pytest.mark.slow),
        pytest.param("jitter_prob", 0.8, (0.8, 0.8, 0.8), marks=pytest.mark.slow),
        pytest.param("flip", 0.5, (0.5, 0.5, 0.5), marks=pytest.mark.slow),
    ],
)
def test_operation_reaches_the_views_it_is_meant_for(plain_views, option, value, rates):
    """The keys are those of the plain views, so a view differs exactly when the operation fires."""
    batch, plain = plain_views
    recipe = {**TINY, **PLAIN, "blur_radius": (1.0, 2.0), option: value}
    fired = jax.jit(augment.make_multi_crop(**recipe))(*batch)
    differs = {name: np.abs(plain[name] - fired[name]).max(axis=(2, 3, 4)) > 1e-3 for name in plain}
    first, second = differs["global_crops"].T
    for sample, rate in zip((first, second, differs["local_crops"]), rates, strict=True):
        # Three standard errors of 600 draws are at most 0.061; 0 and 1 are exact.
        assert sample.mean() == pytest.approx(rate, abs=0.061 if 0 < rate < 1 else 0)


def pillow_view(pixels, draw, out):
    """The official order of operations on Pillow images, with the numbers of a ViewDraw."""
    top, left, height, width = (int(side) for side in draw.box)
    view = Image.fromarray(pillow_crop(pixels, (left, top, left + width, top + height), out))
    view = ImageOps.mirror(view) if draw.flip else view
    enhancers = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)
    for operation in draw.order:
        if operation != ops.HUE:
            view = enhancers[operation](view).enhance(float(draw.factors[operation]))
        else:
            hue, saturation, value = view.convert("HSV").split()
            turned = (np.asarray(hue).astype(int) + round(256 * float(draw.hue))) % 256
            hue = Image.fromarray(turned.astype(np.uint8))
            view = Image.merge("HSV", (hue, saturation, value)).convert("RGB")
    view = view.convert("L").convert("RGB") if draw.grayscale else view
    view = view.filter(ImageFilter.GaussianBlur(float(draw.radius))) if draw.radius else view
    return np.asarray(ImageOps.solarize(view, 128) if draw.solarize else view)


def test_composition_equals_pillow():
    spec = SPEC._replace(out=(24, 20))
    smooth = Image.fromarray(GOLDEN["image"]).filter(ImageFilter.GaussianBlur(2))
    pixels = np.asarray(smooth)
    rows = jnp.asarray(pixels.transpose(0, 2, 1), jnp.float32) / 255
    draws = draw_many(48, spec=spec)
    render = jax.jit(jax.vmap(lambda draw: augment.render_view(rows, draw, spec=spec)))
    planes = np.asarray(render(draws))
    for number in range(48):
        draw = jax.tree.map(lambda leaf, n=number: leaf[n], draws)
        error = levels(planes[number], pillow_view(pixels, draw, spec.out))
        # A dozen 8-bit roundings; about its threshold solarize turns one into up to 255 levels.
        assert np.median(error) < 2.5 and np.quantile(error, 0.97) < 8, (number, draw)


@pytest.mark.slow
def test_view_depends_only_on_image_size_and_key(default_crop):
    images, keys = random_images(6, 16), keys_of(6)
    sizes = jnp.array([[16, 16], [9, 16], [16, 5], [12, 12], [7, 8], [16, 15]])
    whole = default_crop(images, sizes, keys)
    again = default_crop(images, sizes, keys)
    shuffled = default_crop(images[::-1], sizes[::-1], keys[::-1])
    alone = default_crop(images[2:3], sizes[2:3], keys[2:3])
    for name, crops in whole.items():
        np.testing.assert_array_equal(again[name], crops)
        np.testing.assert_array_equal(shuffled[name][::-1], crops)
        # Another batch size is another program, which may add in another order.
        np.testing.assert_allclose(alone[name], crops[2:3], atol=2e-5)


def test_padding_never_leaks():
    sizes = jnp.array([[16, 16], [9, 16], [16, 5], [12, 12]])
    inside = (jnp.arange(16)[:, None] < sizes[:, :1, None]) & (
        jnp.arange(16)[None] < sizes[:, 1:, None]
    )
    images = random_images(4, 16)
    filled = [jnp.where(inside[..., None], images, jnp.uint8(fill)) for fill in (0, 255)]
    multi_crop = jax.jit(augment.make_multi_crop(**TINY, **PLAIN))
    black, white = (multi_crop(canvas, sizes, keys_of(4)) for canvas in filled)
    for name in black:
        np.testing.assert_array_equal(black[name], white[name])
    views = [augment.center_view(canvas, sizes, resize=8, crop=6) for canvas in filled]
    np.testing.assert_array_equal(*views)


def test_views_differ_among_views_images_and_keys(default_crop):
    images = jnp.broadcast_to(random_images(1, 16), (6, 16, 16, 3))
    crops = default_crop(images, jnp.full((6, 2), 16, jnp.int32), keys_of(6))
    for group in crops.values():
        views = np.asarray(group).reshape(12, -1)
        gaps = np.abs(views[:, None] - views[None]).max(axis=-1)
        assert gaps[~np.eye(12, dtype=bool)].min() > 0.05


def test_shapes_and_normalisation():
    recipe = {
        "global_size": (6, 8),
        "num_local": 0,
        "global_scale": (1.0, 1.0),
        "ratio": (1.0, 1.0),
    }
    multi_crop = jax.jit(augment.make_multi_crop(**PLAIN | recipe | {"mean": (0.5, 0, 0.25)}))
    images = jnp.full((2, 8, 8, 3), 255, jnp.uint8)
    crops = multi_crop(images, jnp.full((2, 2), 8), keys_of(2))
    assert crops["local_crops"].shape == (2, 0, 96, 96, 3)
    assert crops["global_crops"].shape == (2, 2, 6, 8, 3)
    assert crops["global_crops"].dtype == crops["local_crops"].dtype == jnp.float32
    expected = np.broadcast_to([0.5, 1.0, 0.75], (2, 2, 6, 8, 3))
    np.testing.assert_allclose(crops["global_crops"], expected, atol=1e-6)


@pytest.mark.parametrize("size", [(48, 64), (64, 41), (37, 37)])
@pytest.mark.parametrize(("resize", "crop"), [(32, (28, 28)), (80, (70, 80)), (21, (16, 9))])
def test_center_view_equals_pillow(size, resize, crop):
    pixels = 64 + random_images(1, 64, seed=3)[:, : size[0], : size[1]] // 2
    canvas = jnp.zeros((1, 64, 64, 3), jnp.uint8).at[:, : size[0], : size[1]].set(pixels)
    plain = {"mean": (0, 0, 0), "std": (1, 1, 1)}
    ours = augment.center_view(canvas, jnp.array([size]), resize=resize, crop=crop, **plain)

    short = min(size)
    height, width = (int(resize * side / short) for side in size)
    resized = Image.fromarray(np.asarray(pixels[0])).resize((width, height), Image.BICUBIC)
    top, left = round((height - crop[0]) / 2), round((width - crop[1]) / 2)
    expected = np.asarray(resized)[top : top + crop[0], left : left + crop[1]]
    assert np.abs(255 * np.asarray(ours[0]) - expected).max() < TWO_ROUNDINGS


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("num_local", -1, "num_local .* got -1"),
        ("global_size", 0, "global_size .* got"),
        ("local_size", (4, -4), "local_size .* got"),
        ("global_scale", (0.9, 0.4), "global_scale .*0.9, 0.4"),
        ("local_scale", (0.0, 0.4), "local_scale"),
        ("local_scale", (0.1, 1.4), "local_scale"),
        ("ratio", (2.0, 1.0), "ratio"),
        ("flip", 1.5, "flip .*1.5"),
        ("jitter_prob", -0.1, "jitter_prob"),
        ("grayscale_prob", 2.0, "grayscale_prob"),
        ("blur_prob", (0.0, 1.1, 0.0), "blur_prob"),
        ("blur_prob", (0.0, 1.0), "blur_prob .*global 0, global 1, locals"),
        ("solarize_prob", (0.0, 0.0, -1.0), "solarize_prob"),
        ("blur_radius", (2.0, 1.0), "blur_radius"),
        ("brightness", -0.1, "brightness"),
        ("hue", 0.6, "hue .* 0.6"),
        ("std", (1.0, 0.0, 1.0), "std"),
    ],
)
@pytest.mark.parametrize("num_local", [0, 2])
def test_bad_recipes_are_refused(option, value, message, num_local):
    with pytest.raises(ValueError, match=message):
        augment.make_multi_crop(**{"num_local": num_local, option: value})


def test_bad_images_and_crops_are_refused():
    multi_crop = augment.make_multi_crop(**TINY)
    with pytest.raises(ValueError, match=r"uint8 .* got float32"):
        multi_crop(jnp.zeros((1, 8, 8, 3)), jnp.full((1, 2), 8), keys_of(1))
    with pytest.raises(ValueError, match="crop must be from 1 to resize = 8"):
        augment.center_view(random_images(1, 8), jnp.full((1, 2), 8), resize=8, crop=9)
