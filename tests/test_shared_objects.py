"""Rate of shared objects: against a plain loop over pixels, and its values on scenes and COCO."""

import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from dinotwins_jax.augment.draws import draw_image_views
from dinotwins_jax.augment.views import make_view_specs
from dinotwins_jax.data import make_source
from dinotwins_jax.evals.shared_objects import (
    area_table,
    objects_in_view,
    pair_rates,
    rate_table,
    shared_object_rates,
)

ROOT = Path(__file__).resolve().parents[1]
REAL_DATA = Path(os.environ.get("DINOTWINS_DATA", ROOT / "../shared/data"))


def random_masks(seed, count=4, size=(9, 12)):
    """Blobs of random rectangles, one of them empty."""
    rng = np.random.default_rng(seed)
    masks = np.zeros((count, *size), bool)
    for mask in masks[1:]:
        for _ in range(2):
            top, left = rng.integers(0, size[0] - 1), rng.integers(0, size[1] - 1)
            mask[top : top + rng.integers(1, 5), left : left + rng.integers(1, 6)] = True
    return masks


def looped_view(masks, box, min_visible, min_fill):
    """Which objects the box shows, pixel by pixel."""
    top, left, height, width = (int(side) for side in box)
    shown = []
    for mask in masks:
        inside = whole = 0
        for y in range(mask.shape[0]):
            for x in range(mask.shape[1]):
                whole += mask[y, x]
                inside += mask[y, x] and top <= y < top + height and left <= x < left + width
        part = inside > 0 and inside / whole >= min_visible
        shown.append(bool(part or (inside > 0 and inside / (height * width) >= min_fill)))
    return shown


@pytest.mark.parametrize(("min_visible", "min_fill"), [(0.25, 0.1), (0.9, 0.5), (1.0, 1.0)])
def test_objects_in_view_equal_a_loop_over_pixels(min_visible, min_fill):
    masks, rng = random_masks(0), np.random.default_rng(1)
    boxes = []
    for _ in range(60):
        top, left = rng.integers(0, 9), rng.integers(0, 12)
        boxes.append((top, left, rng.integers(1, 10 - top), rng.integers(1, 13 - left)))
    ours = objects_in_view(
        area_table(masks), np.array(boxes).T, min_visible=min_visible, min_fill=min_fill
    )
    expected = [looped_view(masks, box, min_visible, min_fill) for box in boxes]
    np.testing.assert_array_equal(ours, expected)
    assert not ours[:, 0].any() and ours.any()


@pytest.mark.slow
def test_rates_equal_loops_over_draws_and_pairs():
    """The whole measurement, from keys to averages, with the boxes drawn one image at a time."""
    all_masks = [random_masks(seed) for seed in range(3)]
    all_masks[1] = all_masks[1][:1]  # its only object is empty: to be left out
    recipes = make_view_specs(num_local=3)
    ours = shared_object_rates(
        lambda i: (all_masks[i], None), [2, 1, 0], {"plain": recipes}, draws=4, seed=5
    )["plain"]
    rows = []
    for i in (2, 0):
        masks = all_masks[i]
        largest = int(np.argmax(masks.sum(axis=(1, 2))))
        counts = dict.fromkeys(("gg", "gg top", "gl", "gl top", "empty", "area"), 0.0)
        for key in jax.random.split(jax.random.fold_in(jax.random.key(5), i), 4):
            groups = draw_image_views(
                key, np.array([9, 12]), global_spec=recipes[0], local_spec=recipes[1]
            )
            g, l_boxes = (np.stack(group.box, axis=1) for group in groups)
            g_seen = [looped_view(masks, box, 0.25, 0.1) for box in g]
            l_seen = [looped_view(masks, box, 0.25, 0.1) for box in l_boxes]
            counts["gg"] += any(a and b for a, b in zip(*g_seen, strict=True)) / 4
            counts["gg top"] += (g_seen[0][largest] and g_seen[1][largest]) / 4
            for box, seen in zip(l_boxes, l_seen, strict=True):
                counts["empty"] += (not any(seen)) / 12
                counts["area"] += box[2] * box[3] / (9 * 12) / 12
                for other in g_seen:
                    counts["gl"] += any(a and b for a, b in zip(seen, other, strict=True)) / 24
                    counts["gl top"] += (seen[largest] and other[largest]) / 24
        rows.append(list(counts.values()))
    columns = ("globals", "globals, dominant", "global-local", "global-local, dominant",
               "local empty", "local area")  # fmt: skip
    assert tuple(ours) == columns
    np.testing.assert_allclose(np.array(list(ours.values())).T, rows, atol=1e-6)


def test_rates_know_certain_answers():
    """Views of the whole image share all objects; an object in a corner only those that contain it."""
    full = make_view_specs(global_scale=(1.0, 1.0), local_scale=(1.0, 1.0), ratio=(1.0, 1.0))
    corner = np.zeros((1, 20, 20), bool)
    corner[0, :2, :2] = True
    rates = shared_object_rates(lambda i: (corner, None), [0], {"full": full}, draws=3)["full"]
    assert rates.pop("local empty") == 0.0 and all(v == 1.0 for v in rates.values())
    everywhere = np.ones((1, 2, 3), bool)
    nowhere = np.zeros((1, 2, 3), bool)
    assert pair_rates(everywhere[:, :, :], nowhere, 0)["global-local"] == 0.0
    without = pair_rates(everywhere, np.zeros((1, 0, 3), bool), 0)
    assert without == {"globals": 1.0, "globals, dominant": 1.0}


def measured(source, images, **recipe):
    recipes = {
        "free": make_view_specs(**recipe),
        "held": make_view_specs(**recipe, local_overlap=1.0),
    }
    rates = shared_object_rates(source.masks, range(images), recipes, draws=10)
    table = rate_table(rates)
    assert table.count("\n") == 3 and "± nan" not in table
    return rates


def check_order(rates):
    """Properties for any data: bounds, and local crops with local_overlap share more objects."""
    for row in rates.values():
        for values in row.values():
            assert (values >= 0).all() and (values <= 1).all()
        assert (row["globals"] >= row["globals, dominant"]).all()
        assert (row["global-local"] >= row["global-local, dominant"]).all()
        assert (row["global-local"] <= 1 - row["local empty"] + 1e-9).all()
    free, held = rates["free"], rates["held"]
    np.testing.assert_array_equal(free["globals"], held["globals"])
    gain = held["global-local"] - free["global-local"]
    assert gain.mean() > 3 * gain.std(ddof=1) / np.sqrt(len(gain))
    area = held["local area"] - free["local area"]
    assert abs(area.mean()) < 0.003  # the crops moved, they did not shrink


def test_overlap_raises_the_rate_on_scenes():
    """Small crops of scenes, which often miss the objects."""
    small = {"global_scale": (0.15, 0.3), "local_scale": (0.02, 0.08), "num_local": 4}
    rates = measured(make_source("scenes", "train"), 60, **small)
    check_order(rates)
    assert 0.2 < rates["free"]["global-local"].mean() < 0.8


@pytest.mark.slow
def test_overlap_raises_the_rate_on_coco():
    if not (REAL_DATA / "coco_sample").is_dir():
        pytest.skip(f"no coco_sample in DINOTWINS_DATA ({REAL_DATA})")
    source = make_source("coco", "train", dir=str(REAL_DATA / "coco_sample"))
    rates = measured(source, 40, num_local=8)
    check_order(rates)
    assert 0.7 < rates["free"]["global-local"].mean() < 0.95


@pytest.mark.parametrize("name", ["min_visible", "min_fill"])
@pytest.mark.parametrize("value", [0.0, 1.5])
def test_thresholds_outside_their_range_are_refused(name, value):
    table = area_table(random_masks(0))
    with pytest.raises(ValueError, match=rf"{name} must lie in \(0, 1\], got {value}"):
        objects_in_view(table, np.array([0, 0, 3, 3]), **{name: value})


def command_line(*arguments):
    command = [sys.executable, "-m", "experiments.shared_objects", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


@pytest.mark.slow
def test_the_command_prints_a_row_a_recipe():
    done = command_line("--config=configs/hybrid.py:demo", "--images=6", "--draws=3")
    assert done.returncode == 0, done.stderr
    names = re.findall(r"^\| ([^|]+) \|", done.stdout, re.M)
    assert names == [
        "recipe",
        "as configured",
        *(f"local_overlap={x}" for x in (0.25, 0.5, 0.75, 1)),
    ]
    assert "of 6 images with objects out of 6, each drawn 3 times" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--config=configs/hybrid.py:coco",), "data source 'coco' needs dir"),
        (("--config=configs/hybrid.py", "--images=0"), "images"),
        (("--config=configs/hybrid.py", "--min_fill=2"), "min_fill must lie in (0, 1], got 2"),
        (
            ("--config=configs/hybrid.py", "--config.views.local_overlap=2"),
            "local_overlap must lie",
        ),
    ],
)
def test_the_command_says_one_line(arguments, message):
    done = command_line(*arguments)
    assert done.returncode != 0 and message in done.stderr
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("error: ")
