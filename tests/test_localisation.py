"""Tests of dinotwins_jax.evals.localisation and object_masks."""

import json
import os
from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest
import refs_attention as refs

from dinotwins_jax.augment.multi_crop import IMAGENET_MEAN, IMAGENET_STD, center_view
from dinotwins_jax.data.coco import Coco
from dinotwins_jax.evals import localisation, object_masks
from dinotwins_jax.evals.attention import cls_attention, mass_mask
from dinotwins_jax.models.vit import VisionTransformer

ROOT = Path(__file__).resolve().parents[1]
COCO = Path(os.environ.get("DINOTWINS_DATA", ROOT.parent / "shared" / "data")) / "coco_sample"


class Painted:
    """A source with the same objects in every image: a disc, a bar, and a dot in a corner."""

    def __init__(self, height, width):
        y, x = np.mgrid[:height, :width]
        disc = np.hypot(y - 0.4 * height, x - 0.55 * width) < 0.3 * min(height, width)
        bar = (y > 0.7 * height) & (x > 0.1 * width) & (x < 0.8 * width)
        dot = (y < 2) & (x < 2)
        self._masks = np.stack([disc, bar, dot])

    def masks(self, i):
        return self._masks, np.array([3, 1, 2], np.int32)


def seen_by_center_view(mask, resize, crop):
    """bool[h, w]: the mask painted white on black, through `center_view`."""
    size = np.array(mask.shape)
    canvas = np.zeros((1, size.max(), size.max(), 3), np.uint8)
    canvas[0, : size[0], : size[1]] = mask[..., None] * np.uint8(255)
    view = jax.jit(partial(center_view, resize=resize, crop=crop))(canvas, size[None])
    return (np.asarray(view[0]) * IMAGENET_STD + IMAGENET_MEAN).mean(axis=-1) > 0.5


@pytest.mark.parametrize(
    ("size", "resize", "crop", "visible"),
    [
        ((90, 131), 48, 48, [3, 1]),
        ((131, 90), 56, 40, [3, 1]),
        ((60, 60), 97, (64, 80), [3, 1]),
        ((75, 50), 96, 96, [3, 1]),
        ((60, 60), 64, 64, [3, 1, 2]),
    ],
)
def test_view_masks_lie_where_center_view_shows_them(size, resize, crop, visible):
    source = Painted(*size)
    masks, categories = localisation.view_masks(source, 0, resize=resize, crop=crop)
    assert categories.tolist() == visible
    for mask, painted in zip(masks, source.masks(0)[0], strict=False):
        expected = seen_by_center_view(painted, resize, crop)
        assert mask.shape == expected.shape and mask.dtype == bool
        assert (mask == expected).mean() > 0.99


def test_view_masks_of_photographs():
    if not COCO.is_dir():
        pytest.skip(f"no coco_sample in DINOTWINS_DATA ({COCO.parent})")
    source = Coco("test", dir=str(COCO))
    for i in (0, 3, 19):
        masks, categories = localisation.view_masks(source, i, resize=64, crop=64)
        assert masks.shape == (len(categories), 64, 64)
        union, expected = masks.any(axis=0), source.masks(i)[0].any(axis=0)
        assert (union == seen_by_center_view(expected, 64, 64)).mean() > 0.98
        assert masks.any(axis=(1, 2)).all()
    with pytest.raises(ValueError, match="crop must be from 1 to resize = 32 pixels, got 64"):
        localisation.view_masks(source, 0, resize=32, crop=64)


@pytest.mark.parametrize("registers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_attention_maps_of_a_backbone(registers):
    backbone = VisionTransformer(48, 2, 3, 8, (16, 24), num_register_tokens=registers)
    views = jax.random.normal(jax.random.key(0), (2, 16, 24, 3))
    params = jax.jit(backbone.init)(jax.random.key(1), views)["params"]
    maps, rollouts = localisation.attention_maps(backbone, params, views)
    apply = jax.jit(backbone.apply, static_argnames=("method", "return_attention"))
    last = apply({"params": params}, views, return_attention=True).attention
    blocks = apply({"params": params}, views, method="attentions")
    assert len(blocks) == 2
    np.testing.assert_allclose(blocks[-1], last, rtol=1e-6)
    assert np.abs(blocks[0] - blocks[1]).max() > 1e-4
    expected = cls_attention(last, (2, 3), 1 + registers)
    np.testing.assert_allclose(maps, expected, rtol=1e-5)
    np.testing.assert_allclose(rollouts, refs.rollout(blocks, (2, 3), 1 + registers), rtol=1e-5)
    before = localisation.attention_maps._cache_size()
    localisation.attention_maps(backbone, params, views)
    assert localisation.attention_maps._cache_size() == before


def random_case(seed, images=7, heads=3, grid=(4, 5), size=(22, 31)):
    """Maps, rollouts, masks; image 1 has two tiny objects, 2 has none, 3 has one without a pixel."""
    rng = np.random.RandomState(seed)
    maps = (rng.rand(images, heads, *grid) ** 3).astype(np.float32)
    rollouts = rng.rand(images, *grid).astype(np.float32)
    masks = []
    for i in range(images):
        objects = np.zeros((0 if i == 2 else rng.randint(1, 4), *size), bool)
        for mask in objects:
            top, left = rng.randint(0, size[0] - 3), rng.randint(0, size[1] - 3)
            mask[top : top + rng.randint(1, 16), left : left + rng.randint(1, 20)] = True
        masks.append(objects)
    masks[1] = np.zeros((2, *size), bool)
    masks[1][0, 2, 3] = masks[1][1, 12, 16:18] = True
    masks[3] = np.concatenate([masks[3], np.zeros((1, *size), bool)])
    return maps, rollouts, masks


@pytest.mark.parametrize("size", [(22, 31), (4, 5), (16, 20)])
def test_grid_jaccards_equal_loops_over_pixels(size):
    maps, _, masks = random_case(0)
    kept, objects = mass_mask(maps[0]), np.concatenate(masks)[:, -size[0] :, -size[1] :]
    found = object_masks.grid_jaccards(kept, objects)
    assert found.shape == (len(objects), len(kept))
    for n, k in np.ndindex(found.shape):
        expected = refs.jaccard(refs.upsample(kept[k], size), objects[n])
        np.testing.assert_allclose(found[n, k], expected, rtol=1e-12)
    with pytest.raises(ValueError, match=r"masks of \(3, 31\) pixels are smaller than the grid"):
        object_masks.grid_jaccards(kept, np.zeros((1, 3, 31), bool))


def test_boxes_equal_loops():
    rng = np.random.RandomState(1)
    answers = []
    for _ in range(40):
        kept = rng.rand(4, 5) > 0.5
        objects = np.zeros((2, 22, 31), bool)
        for mask in objects:
            top, left = rng.randint(0, 12), rng.randint(0, 12)
            mask[top : top + rng.randint(3, 20), left : left + rng.randint(3, 30)] = True
        answers.append(object_masks.component_found(kept, objects))
        region = refs.upsample(refs.largest_part(kept), (22, 31))
        assert answers[-1] == refs.box_found(region, objects)
    assert 0 < sum(answers) < 40
    assert not object_masks.component_found(np.zeros((4, 5), bool), objects)


def reference_columns(maps, rollouts, masks, keep):
    """Per-image values of the images with an object, one loop after the other."""
    rows = {name: [] for name in ("heads", "mean", "rollout", "pointing", "corloc", "shares")}
    sizes = {name: [] for name in ("small", "medium", "large")}
    for i, objects in enumerate(masks):
        objects = [mask for mask in objects if mask.any()]
        if not objects:
            continue
        size, (h, w) = objects[0].shape, maps.shape[2:]
        foreground, mean = np.any(objects, axis=0), maps[i].mean(axis=0)
        kept = mass_mask(np.stack([*maps[i], mean, rollouts[i]]), keep)
        pixels = [refs.upsample(cells, size) for cells in kept]
        rows["heads"].append([refs.jaccard(p, foreground) for p in pixels[:-2]])
        rows["mean"].append(refs.jaccard(pixels[-2], foreground))
        rows["rollout"].append(refs.jaccard(pixels[-1], foreground))
        masses = [mass_mask(mean[None], share)[0] for share in localisation.KEEPS]
        rows["shares"].append([refs.jaccard(refs.upsample(m, size), foreground) for m in masses])
        row, column = divmod(int(mean.argmax()), w)
        at = int((row + 0.5) * size[0] / h), int((column + 0.5) * size[1] / w)
        rows["pointing"].append(float(foreground[at]))
        part = refs.upsample(refs.largest_part(mass_mask(mean[None], keep)[0]), size)
        rows["corloc"].append(float(refs.box_found(part, objects)))
        for mask in objects:
            area = mask.sum() / mask.size * 640 * 480
            name = "small" if area < 32**2 else "medium" if area < 96**2 else "large"
            best = max(refs.jaccard(p, mask) for p in pixels[:-2])
            sizes[name].append((100 * best, 100.0 * mask[at]))
    return rows, sizes


@pytest.mark.parametrize("keep", [0.6, 0.3])
def test_attention_scores_equal_plain_loops(keep):
    maps, rollouts, masks = random_case(2, images=12)
    scores = localisation.attention_scores(maps, rollouts, masks, keep=keep)
    rows, sizes = reference_columns(maps, rollouts, masks, keep)
    best, used = refs.cross_fit(rows["heads"])
    fitted, shares = refs.cross_fit(rows["shares"])
    assert scores["keep_of_halves"] == [localisation.KEEPS[i] for i in shares]
    expected = {
        "jaccard_best_head": best,
        "jaccard_best_head_oracle": [max(row) for row in rows["heads"]],
        "jaccard_mean_map": rows["mean"],
        "jaccard_fitted": fitted,
        "jaccard_rollout": rows["rollout"],
        "pointing": rows["pointing"],
        "corloc": rows["corloc"],
    }
    for name, values in expected.items():
        found = scores[name], scores[f"{name}_sem"]
        np.testing.assert_allclose(found, refs.mean_sem(values), rtol=1e-9, err_msg=name)
    heads = [refs.mean_sem(column) for column in zip(*rows["heads"], strict=True)]
    np.testing.assert_allclose(scores["jaccard_heads"], [mean for mean, _ in heads], rtol=1e-9)
    np.testing.assert_allclose(scores["jaccard_heads_sem"], [sem for _, sem in heads], rtol=1e-9)
    assert scores["best_head_of_halves"] == used
    assert (scores["protocol"], scores["images"]) == ("attention-mask-v1", 11)
    assert all(sizes.values())  # the case has objects of every size
    for name, values in sizes.items():
        found = scores["sizes"][name]
        assert found["objects"] == len(values)
        pair = found["jaccard_best_head_oracle"], found["pointing"]
        np.testing.assert_allclose(pair, np.mean(values, axis=0), rtol=1e-9)
    json.dumps(scores)


def test_known_answers():
    """Two heads: one attends to the object's four patches, the other to the opposite corner."""
    grid, size = (4, 4), (8, 8)
    maps = np.zeros((4, 2, *grid), np.float32)
    maps[:, 0, :2, :2] = 1.0
    maps[:, 0, 0, 0] = 1.2
    maps[:, 1, 3, 3] = 1.0
    masks = [np.zeros((1, *size), bool) for _ in range(4)]
    for mask in masks:
        mask[0, :4, :4] = True
    scores = localisation.attention_scores(maps, maps[:, 0], masks, keep=0.9)
    assert scores["jaccard_heads"] == [100.0, 0.0] and scores["best_head_of_halves"] == [0, 0]
    assert scores["jaccard_best_head"] == scores["jaccard_rollout"] == 100.0
    assert scores["jaccard_mean_map"] == 80.0  # four right patches of five kept ones
    assert scores["pointing"] == scores["corloc"] == 100.0
    large = {"objects": 4, "jaccard_best_head_oracle": 100.0, "pointing": 100.0}
    none = {"objects": 0}
    assert scores["sizes"] == {"small": none, "medium": none, "large": large}
    masks[0] = masks[0][:, ::-1, ::-1]  # one image's object where the other head looks
    scores = localisation.attention_scores(maps, maps[:, 0], masks, keep=0.9)
    assert scores["jaccard_best_head"] == 75.0  # head 0 for all
    assert scores["jaccard_best_head_oracle"] == 100.0 * (3 + 0.25) / 4
    assert scores["pointing"] == 75.0


def test_cross_fitting_never_uses_an_image_for_its_own_head():
    """Head 0 is best on even images, head 1 on odd ones: each half is scored with the other's best."""
    maps = np.zeros((4, 2, 2, 2), np.float32)
    maps[:, 0, 0, 0], maps[:, 1, 1, 1] = 1.0, 1.0
    masks = [np.zeros((1, 4, 4), bool) for _ in range(4)]
    for i, mask in enumerate(masks):
        corner = slice(0, 2) if i % 2 == 0 else slice(2, 4)
        mask[0, corner, corner] = True
    scores = localisation.attention_scores(maps, maps[:, 0], masks)
    assert scores["best_head_of_halves"] == [1, 0]
    assert (scores["jaccard_best_head"], scores["jaccard_best_head_oracle"]) == (0.0, 100.0)


def test_centre_box_equals_plain_loops():
    _, _, masks = random_case(4, images=12)
    sides = (0.3, 0.5, 0.8, 1.0)
    scores = localisation.centre_box_scores(masks, sides=sides)
    rows, found, middle, best = [], [], [], {name: [] for name in ("small", "medium", "large")}
    for objects in masks:
        objects = [mask for mask in objects if mask.any()]
        if not objects:
            continue
        (H, W), foreground = objects[0].shape, np.any(objects, axis=0)
        boxes = []
        for side in sides:
            top, left = round((1 - side) / 2 * H), round((1 - side) / 2 * W)
            boxes.append(refs.box_pixels((top, left, H - top, W - left), (H, W)))
        rows.append([refs.jaccard(box, foreground) for box in boxes])
        found.append([float(refs.box_found(box, objects)) for box in boxes])
        middle.append(float(foreground[H // 2, W // 2]))
        for mask in objects:
            area = mask.mean() * 640 * 480
            name = "small" if area < 32**2 else "medium" if area < 96**2 else "large"
            best[name].append(max(refs.jaccard(box, mask) for box in boxes))
    values, used = refs.cross_fit(rows)
    corloc = [row[used[i % 2]] for i, row in enumerate(found)]
    oracle = [max(row) for row in rows]
    expected = {"jaccard_best_head": values, "jaccard_best_head_oracle": oracle}
    for name, column in (expected | {"pointing": middle, "corloc": corloc}).items():
        pair = scores[name], scores[f"{name}_sem"]
        np.testing.assert_allclose(pair, refs.mean_sem(column), rtol=1e-9, err_msg=name)
    assert scores["best_head_of_halves"] == used and scores["sides"] == list(sides)
    for name, column in best.items():
        mean = scores["sizes"][name]["jaccard_best_head_oracle"]
        np.testing.assert_allclose(mean, 100 * np.mean(column), rtol=1e-9)
    assert set(scores) <= set(localisation.attention_scores(*random_case(4))) | {"sides"}
    json.dumps(scores)


def test_errors_say_what_is_wrong():
    maps, rollouts, masks = random_case(0)
    with pytest.raises(ValueError, match=r"maps \(7, 3, 4, 5\) must be .* rollouts \(7, 5, 4\)"):
        localisation.attention_scores(maps, rollouts.swapaxes(1, 2), masks)
    with pytest.raises(ValueError, match="7 maps and masks of 6 images"):
        localisation.attention_scores(maps, rollouts, masks[:-1])
    empty = [np.zeros((1, 22, 31), bool)] * 6 + masks[-1:]
    with pytest.raises(ValueError, match="1 of 7 images show an object: at least 2"):
        localisation.attention_scores(maps, rollouts, empty)
    with pytest.raises(ValueError, match="keep=0 of the attention"):
        localisation.attention_scores(maps, rollouts, masks, keep=0)
    with pytest.raises(ValueError, match=r"sides \(0.5, 1.5\)"):
        localisation.centre_box_scores(masks, sides=(0.5, 1.5))
