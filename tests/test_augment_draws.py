"""Random parameters of views: rates and distributions of every preset against the official ones, and
boxes of local views held to the global ones."""

import inspect
import itertools
import math
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import refs
from absl import flags
from ml_collections import config_flags

from configs import barlow_twins, base, hybrid
from dinotwins_jax.augment import draws as augment_draws
from dinotwins_jax.augment.multi_crop import make_multi_crop
from dinotwins_jax.augment.presets import PRESETS
from dinotwins_jax.augment.views import make_view_specs

DRAWS = 20_000
ERRORS = 5.0  # standard errors, about 1 in 2 million for one comparison
# Kolmogorov-Smirnov: the largest distance of n draws exceeds KS / sqrt(n) about once in a million.
KS = math.sqrt(math.log(2e6) / 2)
SIZE = (480, 640)
RATIO = (3 / 4, 4 / 3)
LOCALS = 2  # enough: all local views are drawn alike
EDGE = 4 / 255  # one pixel of a ramp: crops end at the centres of their last pixels

# As in the official files named in augment_presets.py; (global 0, global 1, each local).
OFFICIAL = {
    "dino": ((0.4, 1.0), (0.05, 0.4), 8, 0, (1.0, 0.1, 0.5)),
    "barlow_twins": ((0.08, 1.0), None, 0, 0, (1.0, 0.1)),
    "dinov2_as_written": ((0.32, 1.0), (0.05, 0.32), 8, 9, (1.0, 0.1, 0.5)),
    "dinov2_as_trained": ((0.32, 1.0), (0.05, 0.32), 8, 9, (1 - 1.0, 1 - 0.1, 1 - 0.5)),
}
SOLARIZE = (0.0, 0.2, 0.0)
VIEWS = [
    (preset, view)
    for preset in OFFICIAL
    for view in ("global 0", "global 1", "local")
    if view != "local" or OFFICIAL[preset][2]
]


def draw_images(count, recipes, size=SIZE, seed=0):
    """(globals, locals): ViewDraw of arrays [count, views, ...]."""
    global_spec, local_spec = recipes
    draw = partial(augment_draws.draw_image_views, global_spec=global_spec, local_spec=local_spec)
    keys = jax.random.split(jax.random.key(seed), count)
    sizes = jnp.broadcast_to(jnp.array(size, jnp.int32), (count, 2))
    return jax.tree.map(np.asarray, jax.jit(jax.vmap(draw))(keys, sizes))


@pytest.fixture(scope="module")
def drawn():
    """preset -> (globals, locals), drawn once."""
    memory = {}

    def of(preset):
        if preset not in memory:
            few = {"num_local": min(PRESETS[preset]["num_local"], LOCALS)}
            memory[preset] = draw_images(DRAWS, make_view_specs(**PRESETS[preset] | few))
        return memory[preset]

    return of


def view_of(draws, view):
    """The ViewDraw [DRAWS, ...] of "global 0", "global 1" or "local"."""
    groups = {"global 0": (0, 0), "global 1": (0, 1), "local": (1, 0)}
    group, number = groups[view]
    return jax.tree.map(lambda leaf: leaf[:, number], draws[group])


def assert_rate(fired, probability, what):
    if probability in (0.0, 1.0):
        assert fired.mean() == probability, what
    else:
        error = math.sqrt(probability * (1 - probability) / len(fired))
        assert abs(fired.mean() - probability) < ERRORS * error, what


def assert_uniform(sample, low, high, what):
    position = (np.sort(sample.astype(np.float64)) - low) / (high - low)
    steps = np.arange(len(position) + 1) / len(position)
    distance = max(np.abs(position - steps[1:]).max(), np.abs(position - steps[:-1]).max())
    assert distance < KS / math.sqrt(len(position)), what


def assert_equally_often(counts):
    """Chi-square with f degrees of freedom: mean f, variance 2 f."""
    expected, freedom = np.mean(counts), len(counts) - 1
    chi_square = ((np.array(counts) - expected) ** 2 / expected).sum()
    assert chi_square < freedom + ERRORS * math.sqrt(2 * freedom)


def assert_same_distribution(a, b, what):
    places = np.union1d(a, b)
    below = [np.searchsorted(np.sort(x), places, side="right") / len(x) for x in (a, b)]
    distance = np.abs(below[0] - below[1]).max()
    assert distance < KS * math.sqrt(1 / len(a) + 1 / len(b)), what


@pytest.mark.parametrize(("preset", "view"), VIEWS)
def test_every_operation_fires_as_often_as_it_should(drawn, preset, view):
    draw, kind = view_of(drawn(preset), view), ["global 0", "global 1", "local"].index(view)
    jittered = draw.hue != 0
    assert_rate(draw.flip, 0.5, "flip")
    assert_rate(jittered, 0.8, "jitter")
    assert_rate(draw.grayscale, 0.2, "grayscale")
    assert_rate(draw.radius > 0, OFFICIAL[preset][4][kind], "blur")
    assert_rate(draw.solarize, SOLARIZE[kind], "solarize")
    assert (draw.factors[~jittered] == 1).all() and (draw.factors[jittered] != 1).any(1).all()


@pytest.mark.parametrize(("preset", "view"), VIEWS)
def test_every_parameter_is_uniform_in_its_range(drawn, preset, view):
    draw = view_of(drawn(preset), view)
    jittered, blurred = draw.hue != 0, draw.radius > 0
    for number, strength in enumerate((0.4, 0.4, 0.2)):
        factors = draw.factors[jittered, number]
        assert_uniform(factors, 1 - strength, 1 + strength, ("factor", number))
    assert_uniform(draw.hue[jittered], -0.1, 0.1, "hue")
    if blurred.any():
        assert_uniform(draw.radius[blurred], 0.1, 2.0, "radius")
    orders, counts = np.unique(draw.order[jittered], axis=0, return_counts=True)
    assert set(map(tuple, orders)) == set(itertools.permutations(range(4)))
    assert_equally_often(counts)


@pytest.mark.parametrize("preset", ["dino", "dinov2_as_trained"])
def test_operations_and_views_are_independent(drawn, preset):
    """The eight random parameters of each of four views are pairwise uncorrelated."""
    columns = {}
    for group, draws in enumerate(drawn(preset)):
        for view in range(draws.flip.shape[1]):
            draw = jax.tree.map(lambda leaf, v=view: leaf[:, v], draws)
            things = {
                "flip": draw.flip,
                "jitter": draw.hue != 0,
                "brightness": draw.factors[:, 0],
                "hue": draw.hue,
                "grayscale": draw.grayscale,
                "blur": draw.radius,
                "solarize": draw.solarize,
                "first": draw.order[:, 0] == 0,
                "area": draw.box[2] * draw.box[3],
            }
            columns |= {(group, view, name): x for name, x in things.items() if x.std() > 0}
    names, table = list(columns), np.array(list(columns.values()), np.float64)
    correlation = np.abs(np.corrcoef(table) - np.eye(len(names)))
    worst = np.unravel_index(correlation.argmax(), correlation.shape)
    assert len(names) > 30
    assert correlation.max() < ERRORS / math.sqrt(DRAWS), [names[k] for k in worst]


@pytest.mark.parametrize(("preset", "view"), VIEWS)
def test_boxes_are_torchvisions(drawn, preset, view):
    """Two-sample comparison with the plain loop, on a non-square image."""
    scale = OFFICIAL[preset][1 if view == "local" else 0]
    rng = np.random.default_rng(1)
    count = 10_000
    reference = [refs.random_resized_crop(rng, *SIZE, scale, RATIO) for _ in range(count)]
    box = view_of(drawn(preset), view).box
    names = ("top", "left", "height", "width")
    for name, ours, theirs in zip(names, box, np.array(reference).T, strict=True):
        assert_same_distribution(ours, theirs, name)


def test_boxes_are_uniform_where_every_draw_fits():
    """Square image, small boxes: area, log ratio and position are uniform up to whole pixels."""
    _, recipe = make_view_specs(local_scale=(0.1, 0.5), num_local=1)
    _, draws = draw_images(DRAWS, (recipe, recipe), size=(2000, 2000))
    top, left, height, width = (side[:, 0].astype(float) for side in draws.box)
    assert min(top.min(), left.min()) >= 0
    assert max((top + height).max(), (left + width).max()) <= 2000
    assert_uniform(height * width / 2000**2, 0.1, 0.5, "area")
    assert_uniform(np.log(width / height), math.log(3 / 4), math.log(4 / 3), "log ratio")
    assert_uniform((top + 0.5) / (2001 - height), 0, 1, "top")
    assert_uniform((left + 0.5) / (2001 - width), 0, 1, "left")


def test_every_place_is_equally_likely_to_the_pixel():
    """3 x 3 boxes in 5 x 7 pixels have 3 x 5 positions."""
    recipe, _ = make_view_specs(global_scale=(0.25, 0.25), ratio=(1.0, 1.0))
    draws, _ = draw_images(DRAWS, (recipe, recipe), size=(5, 7))
    assert (draws.box[2] == 3).all() and (draws.box[3] == 3).all()
    places, counts = np.unique(np.stack(draws.box[:2]).reshape(2, -1), axis=1, return_counts=True)
    assert places.shape[1] == 15 and places.max(axis=1).tolist() == [2, 4]
    assert_equally_often(counts)


def test_box_falls_back_to_the_central_crop():
    for size, expected in [((10, 100), (0, 43, 10, 13)), ((100, 10), (43, 0, 13, 10))]:
        box = augment_draws.random_box(jax.random.key(0), size, (1.0, 1.0), RATIO)
        assert tuple(int(side) for side in box) == expected
    box = augment_draws.random_box(jax.random.key(0), (50, 60), (1.0, 1.0), (1.2, 1.2))
    assert tuple(int(side) for side in box) == (0, 0, 50, 60)


@pytest.mark.slow
def test_view_is_drawn_from_its_key_alone():
    """View v of an image depends only on fold_in(key, v)."""
    recipes = make_view_specs(num_local=3)
    groups = draw_images(5, recipes)
    key = jax.random.split(jax.random.key(0), 5)[4]
    for view in range(5):
        recipe, number = (recipes[0], view) if view < 2 else (recipes[1], view - 2)
        probabilities = (recipe.blur_probs[number], recipe.solarize_probs[number])
        draw = jax.jit(partial(augment_draws.draw_view, spec=recipe))
        alone = draw(jax.random.fold_in(key, view), jnp.array(SIZE), *probabilities)
        together = jax.tree.map(lambda leaf, n=number: leaf[4, n], groups[view >= 2])
        for a, b in zip(jax.tree.leaves(alone), jax.tree.leaves(together), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-6)


# Local crops held to the global ones


def shares(global_draws, local_draws):
    """Largest share of each local box inside one global box, by a plain formula: f64[images, locals]."""
    best = np.zeros(local_draws.flip.shape)
    top, left, height, width = (side.astype(np.int64) for side in local_draws.box)
    for view in range(2):
        g_top, g_left, g_height, g_width = (side[:, view, None] for side in global_draws.box)
        rows = np.minimum(top + height, g_top + g_height) - np.maximum(top, g_top)
        columns = np.minimum(left + width, g_left + g_width) - np.maximum(left, g_left)
        best = np.maximum(best, np.clip(rows, 0, None) * np.clip(columns, 0, None))
    return best / (height * width)


EXTREME = {"global_scale": (0.05, 0.3), "local_scale": (0.05, 0.6), "ratio": (1 / 4, 4.0)}


@pytest.mark.parametrize("overlap", [0.25, 0.5, 1.0])
@pytest.mark.parametrize("size", [(480, 640), (640, 64), (33, 640), (7, 5)])
@pytest.mark.parametrize(
    "recipe",
    [pytest.param({}, id="dino"), pytest.param(EXTREME, id="extreme", marks=pytest.mark.slow)],
)
def test_local_boxes_keep_their_overlap(overlap, size, recipe):
    count = 5_000
    globals_, locals_ = draw_images(
        count, make_view_specs(num_local=LOCALS, local_overlap=overlap, **recipe), size=size
    )
    assert shares(globals_, locals_).min() >= overlap
    top, left, height, width = locals_.box
    assert min(top.min(), left.min()) >= 0 and min(height.min(), width.min()) >= 1
    assert (top + height).max() <= size[0] and (left + width).max() <= size[1]


@pytest.mark.slow
def test_overlap_moves_only_the_boxes_that_lack_it():
    """All other parameters are unchanged, even sizes; a box is cut only if it fits in no global one."""
    free = draw_images(DRAWS, make_view_specs(num_local=LOCALS))
    held = draw_images(DRAWS, make_view_specs(num_local=LOCALS, local_overlap=1.0))
    for a, b in zip(jax.tree.leaves(free[0]), jax.tree.leaves(held[0]), strict=True):
        np.testing.assert_array_equal(a, b)
    for a, b in zip(free[1][1:], held[1][1:], strict=True):
        np.testing.assert_array_equal(a, b)
    (*_, height, width), (*_, held_height, held_width) = free[1].box, held[1].box
    enough = shares(*free) >= 1.0
    moved = np.any([a != b for a, b in zip(free[1].box, held[1].box, strict=True)], axis=0)
    assert 0.2 < enough.mean() < 0.8 and not moved[enough].any() and moved[~enough].mean() > 0.99
    heights, widths = free[0].box[2][:, None], free[0].box[3][:, None]
    holds = ((heights >= height[..., None]) & (widths >= width[..., None])).any(axis=-1)
    cut = (held_height != height) | (held_width != width)
    np.testing.assert_array_equal(cut, ~holds)
    assert 0 < cut.mean() < 0.02  # and so the areas keep their distribution


@pytest.mark.parametrize(
    ("overlap", "boxes", "places"),
    [
        (0.5, [(2, 3, 9, 8)], 6 * 8 + 2 * 6 + 2 * 4),
        (1.0, [(0, 0, 6, 7), (5, 9, 8, 9)], 3 * 3 + 5 * 5),  # one in five takes none of ten places
    ],
)
def test_places_with_overlap_are_uniform_over_those_that_have_it(overlap, boxes, places):
    """Boxes of one size and fixed global ones; the reference tries all positions in a plain loop."""
    others = tuple(jnp.array(side) for side in zip(*boxes, strict=True))
    size, height, width = (14, 22), 4, 5
    allowed = {}
    for top in range(size[0] - height + 1):
        for left in range(size[1] - width + 1):
            for g_top, g_left, g_height, g_width in boxes:
                rows = range(max(top, g_top), min(top + height, g_top + g_height))
                columns = range(max(left, g_left), min(left + width, g_left + g_width))
                if len(rows) * len(columns) >= overlap * height * width:
                    allowed[top, left] = 0

    def draw(key):
        place, again = jax.random.split(key)
        top, left = jax.random.randint(
            place, (2,), 0, jnp.array(size) - jnp.array([height, width]) + 1
        )
        box = (top, left, height, width)
        return augment_draws.overlapping_box(again, box, size, others, overlap)

    drawn_boxes = jax.jit(jax.vmap(draw))(jax.random.split(jax.random.key(2), DRAWS))
    for top, left in np.stack(drawn_boxes[:2], axis=1).tolist():
        allowed[top, left] += 1
    assert len(allowed) == places
    assert_equally_often(list(allowed.values()))


@pytest.mark.slow
def test_overlap_reaches_the_pixels():
    """Images whose red and green are coordinates: each local crop overlaps a global one."""
    ramp = np.arange(0, 240, 4, dtype=np.uint8)
    picture = np.stack([*np.meshgrid(ramp, ramp, indexing="ij"), np.zeros((60, 60), np.uint8)], -1)
    count = 200
    plain = {"jitter_prob": 0.0, "grayscale_prob": 0.0, "mean": (0, 0, 0), "std": (1, 1, 1)}
    plain |= {"blur_prob": (0.0, 0.0, 0.0), "solarize_prob": (0.0, 0.0, 0.0)}
    inside = {}
    for overlap in (0.0, 1.0):
        multi_crop = make_multi_crop(
            **plain, global_size=24, local_size=16, num_local=2, local_overlap=overlap
        )
        crops = jax.jit(multi_crop)(
            jnp.broadcast_to(picture, (count, *picture.shape)),
            jnp.full((count, 2), 60),
            jax.random.split(jax.random.key(0), count),
        )
        low, high = [
            {name: edge(np.asarray(views)[..., :2], axis=(2, 3)) for name, views in crops.items()}
            for edge in (np.min, np.max)
        ]
        starts = low["local_crops"][:, :, None] >= low["global_crops"][:, None] - EDGE
        ends = high["local_crops"][:, :, None] <= high["global_crops"][:, None] + EDGE
        inside[overlap] = (starts & ends).all(axis=-1).any(axis=-1).mean()
    assert inside[1.0] == 1.0 and inside[0.0] < 0.8


# Presets and their way into a config


@pytest.mark.parametrize("preset", OFFICIAL)
def test_presets_are_the_official_recipes(preset):
    global_scale, local_scale, num_local, blur_kernel, _ = OFFICIAL[preset]
    global_spec, local_spec = make_view_specs(**PRESETS[preset])
    assert global_spec.scale == global_scale and global_spec.ratio == RATIO
    assert len(local_spec.blur_probs) == num_local
    assert num_local == 0 or local_spec.scale == local_scale
    assert global_spec.blur_kernel == local_spec.blur_kernel == blur_kernel
    assert local_spec.overlap == 0.0
    assert hybrid.get_config(f"coco+{preset}").views.to_dict() == (
        base.get_config().views.to_dict() | PRESETS[preset]
    )


def test_defaults_configs_and_the_preset_of_dino_agree():
    defaults = {k: v.default for k, v in inspect.signature(make_view_specs).parameters.items()}
    sizes = {name: defaults[name] for name in ("global_size", "local_size")}
    assert PRESETS["dino"] | sizes == defaults == base.get_config().views.to_dict()
    views = barlow_twins.get_config("coco").views.to_dict()
    assert views == PRESETS["barlow_twins"] | sizes
    back = barlow_twins.get_config("coco+dino").views.to_dict()
    assert back == defaults


def test_explicit_keys_win_over_presets(monkeypatch):
    key = "--config.views.blur_prob=(0.25,0.0,0.0)"
    line = ["main", f"--config={hybrid.__file__}:demo+dinov2_as_trained", key]
    monkeypatch.setattr(sys, "argv", line)  # where ml_collections looks for the keys
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", flag_values=values)
    values(line)
    views = values.config.views
    assert views.blur_prob == (0.25, 0.0, 0.0) and views.global_scale == (0.32, 1.0)
    assert views.global_size == 32  # of the place


@pytest.mark.parametrize(
    ("preset", "message"),
    [
        ("coco+dinov3", r"unknown preset '\+dinov3': choose one of dino, barlow_twins"),
        ("coco+", r"unknown preset '\+'"),
        ("barlow_twins", r"unknown preset 'barlow_twins': .* \(as in demo\+barlow_twins\)"),
        ("dinov2_as_trained+coco", "unknown preset 'dinov2_as_trained'"),
    ],
)
def test_unknown_presets_are_one_line(preset, message):
    with pytest.raises(ValueError, match=message) as error:
        hybrid.get_config(preset)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"local_overlap": 1.2}, r"local_overlap must lie in \[0, 1\], got \(1.2,\)"),
        ({"local_overlap": -0.1}, "local_overlap"),
        (
            {"local_overlap": 0.9, "local_scale": (0.5, 0.6), "global_scale": (0.1, 0.4)},
            "local_overlap 0.9 of local_scale .* does not fit into global_scale",
        ),
        ({"blur_kernel": 4}, "blur_kernel must be 0 or odd and at least 3, got 4"),
        ({"blur_kernel": 1}, "blur_kernel"),
        ({"blur_kernel": -3}, "blur_kernel"),
        ({"blur_kernel": 17, "local_size": 8}, "blur_kernel 17 needs local_size above 8 pixels"),
    ],
)
def test_recipes_that_cannot_be_drawn_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        make_view_specs(**options)
