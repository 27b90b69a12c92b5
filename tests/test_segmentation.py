"""Tests of dinotwins_jax.evals.segmentation."""

import struct

import numpy as np
import pytest
import refs_attention as refs

from dinotwins_jax.evals import pictures, segmentation


def two_regions(seed, grid=(6, 7), common=0.0, noise=0.1, width=32):
    """Patch features of a block on a background, with a common component, and the block's mask."""
    rng = np.random.RandomState(seed)
    inside = np.zeros(grid, bool)
    inside[1:4, 2:5] = True
    object_, background, shared = rng.randn(3, width)
    patches = np.where(inside.reshape(-1, 1), object_, background) + common * shared
    return patches + noise * rng.randn(*patches.shape), inside


@pytest.mark.parametrize("common", [0.0, 1.0, 10.0])
def test_two_regions_are_recovered_exactly(common):
    for seed in range(5):
        patches, inside = two_regions(seed, common=common)
        found = segmentation.normalised_cut(patches, inside.shape)
        assert found.dtype == bool and found.shape == inside.shape
        assert (found == inside).all()


def test_a_shared_part_leaves_nothing_to_cut_unless_centred():
    patches, inside = two_regions(0, common=10.0)
    assert not segmentation.normalised_cut(patches, inside.shape, centre=False).any()
    assert not segmentation.normalised_cut(np.ones((6, 4)), (2, 3)).any()
    patches, inside = two_regions(0)
    found = segmentation.normalised_cut(patches, inside.shape, centre=False)
    assert (found == inside).all() or (
        found == ~inside
    ).all()  # two cliques: either may hold the seed


@pytest.mark.parametrize("centre", [True, False])
@pytest.mark.parametrize("tau", [0.1, 0.2])
def test_equals_the_generalised_eigenproblem(tau, centre):
    """Features without clear regions, but with a well-separated second eigenvalue."""
    for seed in range(4):
        patches = np.random.RandomState(seed).randn(30, 6) + 0.3
        expected = refs.cut_vector(patches, tau, centre)
        weights = segmentation.affinity(patches, tau=tau, centre=centre)
        vector = segmentation.second_eigenvector(weights)
        cosine = expected @ vector / np.linalg.norm(expected) / np.linalg.norm(vector)
        np.testing.assert_allclose(abs(cosine), 1.0, rtol=1e-9)
        side = expected > expected.mean()
        foreground = (side == side[np.abs(expected).argmax()]).reshape(5, 6)
        found = segmentation.normalised_cut(patches, (5, 6), tau=tau, centre=centre)
        np.testing.assert_array_equal(found, foreground)


def test_seed_part_only_keeps_one_part():
    """Two blocks of the same object, the larger one more pronounced."""
    grid = (6, 8)
    inside = np.zeros(grid, bool)
    inside[1:4, 1:4], inside[4:6, 6:8] = True, True
    object_, background = np.random.RandomState(3).randn(2, 16)
    patches = np.where(inside.reshape(-1, 1), object_, background)
    assert (segmentation.normalised_cut(patches, grid) == inside).all()
    part = segmentation.normalised_cut(patches, grid, seed_part_only=True)
    assert part.sum() in (4, 9) and (part <= inside).all()
    assert (refs.largest_part(part) == part).all()


def test_scores_equal_plain_loops():
    rng = np.random.RandomState(0)
    foregrounds, masks = rng.rand(9, 4, 5) > 0.4, []
    foregrounds[5] = False
    for _ in range(9):
        objects = np.zeros((2, 16, 23), bool)
        for mask in objects:
            top, left = rng.randint(0, 8, 2)
            mask[top : top + rng.randint(4, 16), left : left + rng.randint(4, 23)] = True
        masks.append(objects)
    masks[2] = np.zeros((0, 16, 23), bool)
    scores = segmentation.segmentation_scores(foregrounds, masks)
    jaccards, found = [], []
    for i in (0, 1, 3, 4, 5, 6, 7, 8):
        pixels = refs.upsample(foregrounds[i], (16, 23))
        jaccards.append(refs.jaccard(pixels, masks[i].any(axis=0)))
        part = refs.upsample(refs.largest_part(foregrounds[i]), (16, 23))
        found.append(float(refs.box_found(part, masks[i])))
    assert 0 < sum(found) < 8
    pairs = scores["jaccard_mean"], scores["jaccard_sem"]
    np.testing.assert_allclose(pairs, refs.mean_sem(jaccards), rtol=1e-9)
    pairs = scores["corloc"], scores["corloc_sem"]
    np.testing.assert_allclose(pairs, refs.mean_sem(found), rtol=1e-9)
    assert (scores["protocol"], scores["images"]) == ("ncut-v1", 8)


def test_errors_say_what_is_wrong():
    patches = np.ones((6, 4))
    with pytest.raises(ValueError, match=r"patches \(6, 4\) must be \[N, D\] with N = 2 x 2"):
        segmentation.normalised_cut(patches, (2, 2))
    with pytest.raises(ValueError, match=r"tau=1\.5 must be a cosine"):
        segmentation.normalised_cut(patches, (2, 3), tau=1.5)
    with pytest.raises(ValueError, match="patch features must be finite"):
        segmentation.normalised_cut(patches * np.nan, (2, 3))
    with pytest.raises(ValueError, match=r"must be bool\[M, h, w\], got float64\[1, 2, 3\]"):
        segmentation.segmentation_scores(np.ones((1, 2, 3)), [])


def test_picture(tmp_path):
    pytest.importorskip("matplotlib")
    images = np.random.RandomState(0).randint(0, 255, (2, 32, 48, 3), np.uint8)
    foregrounds, masks = np.ones((2, 2, 3), bool), [np.zeros((n, 32, 48), bool) for n in (0, 2)]
    masks[1][0, :9, :9] = True
    pictures.segmentation_grid(tmp_path / "cut.png", images, foregrounds, masks, ["a", "b"])
    content = (tmp_path / "cut.png").read_bytes()
    width, height = struct.unpack(">II", content[16:24])
    assert content[:4] == b"\x89PNG" and 3 * 225 < width < 3 * 250 and 2 * 150 < height < 2 * 240
    pictures.segmentation_grid(tmp_path / "alone.png", images, foregrounds, None)
    (alone,) = struct.unpack(">I", (tmp_path / "alone.png").read_bytes()[16:20])
    assert 2 * 225 < alone < 2 * 250
    with pytest.raises(ValueError, match="2 images, 2 foregrounds and masks of 1"):
        pictures.segmentation_grid(tmp_path / "cut.png", images, foregrounds, masks[:1])
