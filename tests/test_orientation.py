"""Vertical flips and turns of views: their rates, independent of all other draws, and numpy's pixels."""

import itertools
import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import hybrid, presets
from dinotwins_jax.augment.draws import draw_image_views, draw_view
from dinotwins_jax.augment.multi_crop import make_multi_crop, render_view
from dinotwins_jax.augment.views import largest_box, make_view_specs
from dinotwins_jax.workdir import claim_workdir

PLAIN = {"jitter_prob": 0.0, "grayscale_prob": 0.0, "flip": 0.0}
PLAIN |= {"blur_prob": (0.0, 0.0, 0.0), "solarize_prob": (0.0, 0.0, 0.0)}
SIZES = {"global_size": 12, "local_size": 6, "num_local": 2}
COUNT = 4000
ERROR = 5 * 0.5 / COUNT**0.5  # five standard errors at most of a rate


def images(count, side, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (count, side, side, 3), np.uint8)
    return jnp.asarray(pixels)


def drawn(**views):
    """(globals, locals): the draws of COUNT images, from the same keys whatever the views."""
    global_spec, local_spec = make_view_specs(**SIZES | views)
    draw = partial(draw_image_views, global_spec=global_spec, local_spec=local_spec)
    keys = jax.random.split(jax.random.key(3), COUNT)
    return jax.tree.map(np.asarray, jax.jit(jax.vmap(draw))(keys, jnp.full((COUNT, 2), 50)))


@pytest.fixture(scope="module")
def turned():
    return drawn(vertical_flip=0.3, rotate90=0.6, local_overlap=0.5)


def test_flips_and_turns_are_as_frequent_as_asked(turned):
    for group in turned:
        for view in range(2):
            assert abs(group.vertical_flip[:, view].mean() - 0.3) < ERROR
            for turns, rate in enumerate((0.4, 0.2, 0.2, 0.2)):
                assert abs((group.turns[:, view] == turns).mean() - rate) < ERROR


def test_certain_ones_always_happen():
    spec, _ = make_view_specs(vertical_flip=1.0, rotate90=1.0)
    draw = jax.jit(jax.vmap(lambda key: draw_view(key, (50, 50), 0.0, 0.0, spec=spec)))
    draws = draw(jax.random.split(jax.random.key(0), 100))
    assert draws.vertical_flip.all() and set(np.unique(draws.turns)) == {1, 2, 3}


def test_flips_and_turns_are_independent_of_all_other_draws(turned):
    columns = {}
    for number, group in enumerate(turned):
        for view in range(2):
            draw = jax.tree.map(lambda leaf, v=view: leaf[:, v], group)
            things = {"up": draw.vertical_flip, "turned": draw.turns > 0, "half": draw.turns == 2}
            things |= {"flip": draw.flip, "top": draw.box[0], "area": draw.box[2] * draw.box[3]}
            things |= {"hue": draw.hue, "gray": draw.grayscale, "radius": draw.radius}
            columns |= {(number, view, name): thing for name, thing in things.items()}
    names, table = list(columns), np.array(list(columns.values()), np.float64)
    found = np.abs(np.corrcoef(table))
    for a, b in itertools.combinations(range(len(names)), 2):
        alike = names[a][:2] == names[b][:2] and {names[a][2], names[b][2]} == {"turned", "half"}
        tested = {names[a][2], names[b][2]} & {"up", "turned", "half"} and not alike
        assert not tested or found[a, b] < 5 / COUNT**0.5, (names[a], names[b])


def test_no_other_draw_changes(turned):
    for plain, group in zip(drawn(local_overlap=0.5), turned, strict=True):
        assert plain.vertical_flip is None and plain.turns is None
        rest = group._replace(vertical_flip=None, turns=None)
        for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(rest), strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("banded", [False, True])
def test_pixels_are_numpys_flip_and_rot90_of_the_crop(banded):
    """All 16 orientations of one crop: mirrored left to right, top to bottom, then turned."""
    spec, _ = make_view_specs(global_size=24, num_local=0, vertical_flip=0.5, rotate90=0.5)
    spec = spec._replace(
        jitter_prob=0.0, grayscale_prob=0.0, blur_probs=(0, 0), solarize_probs=(0,)
    )
    rows = images(1, 96)[0].swapaxes(1, 2)
    draw = draw_view(jax.random.key(1), jnp.array([90, 96]), 0.0, 0.0, spec=spec)
    max_box = largest_box(spec, 96) if banded else None
    render = jax.jit(partial(render_view, spec=spec, max_box=max_box))
    off = jnp.array(False)
    plain = draw._replace(flip=off, vertical_flip=off, turns=jnp.array(0))
    crop = np.asarray(render(rows, plain)).transpose(1, 2, 0)
    for flip, upend, turns in itertools.product((False, True), (False, True), range(4)):
        given = {"flip": jnp.array(flip), "vertical_flip": jnp.array(upend)}
        ours = render(rows, plain._replace(**given, turns=jnp.array(turns)))
        expected = crop[:: -1 if upend else 1, :: -1 if flip else 1]
        expected = np.rot90(expected, turns)
        np.testing.assert_allclose(np.asarray(ours).transpose(1, 2, 0), expected, atol=1e-5)


def test_both_ways_of_rendering_turn_alike():
    """A picture that is bright on top, whole in each view: turned views have all orientations."""
    ramp = np.broadcast_to(np.linspace(255, 0, 16).astype(np.uint8)[:, None, None], (16, 16, 3))
    batch = jnp.broadcast_to(ramp, (64, 16, 16, 3)), jnp.full((64, 2), 16)
    keys = jax.random.split(jax.random.key(0), 64)
    whole = {"global_scale": (1.0, 1.0), "ratio": (1.0, 1.0), "num_local": 0, "global_size": 8}
    crops = [
        jax.jit(make_multi_crop(**PLAIN | whole, rotate90=0.75, one_by_one=one))(*batch, keys)
        for one in (True, False)
    ]
    first, second = (np.asarray(views["global_crops"]) for views in crops)
    np.testing.assert_allclose(first, second, atol=1e-5)
    upright = np.sign(first[:, :, 0, 4, 0] - first[:, :, -1, 4, 0]).astype(int)
    left = np.sign(first[:, :, 4, 0, 0] - first[:, :, 4, -1, 0]).astype(int)
    found = {tuple(pair) for pair in np.stack([upright, left], -1).reshape(-1, 2).tolist()}
    assert found == {(1, 0), (-1, 0), (0, 1), (0, -1)}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"vertical_flip": 1.5}, r"vertical_flip must lie in \[0, 1\], got \(1.5,\)"),
        ({"rotate90": -0.1}, r"rotate90 must lie in \[0, 1\]"),
        (
            {"rotate90": 0.5, "global_size": (8, 6)},
            r"rotate90 0.5 needs square crops, global_size is",
        ),
        (
            {"rotate90": 0.5, "local_size": (8, 6)},
            r"rotate90 0.5 needs square crops, local_size is",
        ),
    ],
)
def test_what_cannot_be_drawn_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        make_view_specs(**options)


def test_a_published_recipe_turns_nothing():
    config = hybrid.get_config("coco")
    config.views.rotate90 = config.views.vertical_flip = 0.5

    views = presets.apply(config, "coco+dino").views
    assert views.rotate90 == views.vertical_flip == 0.0


def test_a_run_from_before_these_keys_goes_on(tmp_path):
    """A missing key means its default; any other value is another run."""
    config = hybrid.get_config("demo").to_dict()
    before = config | {"views": dict(config["views"])}
    del before["views"]["vertical_flip"], before["views"]["rotate90"]
    (tmp_path / "checkpoints" / "1").mkdir(parents=True)
    (tmp_path / "config.json").write_text(json.dumps(before))
    with pytest.raises(ValueError, match=r"differs in views\.rotate90 \(0\.0 -> 0\.5\)$"):
        claim_workdir(tmp_path, config | {"views": config["views"] | {"rotate90": 0.5}})
    claim_workdir(tmp_path, config)
    assert json.loads((tmp_path / "config.json").read_text())["views"]["rotate90"] == 0.0
