"""Tests of dinotwins_jax.evals.pca."""

import struct

import numpy as np
import pytest
from sklearn.decomposition import PCA

from dinotwins_jax.evals import pca, pictures


def scene_patches(seed=0, images=3, grid=(5, 6), width=12, away=4.0):
    """Patches with a block of the object in the middle of every image, and the block bool[M, N]."""
    rng = np.random.RandomState(seed)
    inside = np.zeros((images, *grid), bool)
    inside[:, 1:4, 2:5] = True
    inside = inside.reshape(images, -1)
    patches = rng.randn(*inside.shape, width) * np.linspace(1.0, 0.3, width)
    direction = rng.randn(width)
    return patches + away * inside[..., None] * direction, inside


def signs_of(axes):
    return np.sign(axes[np.arange(len(axes)), np.abs(axes).argmax(axis=1)])


def test_joint_fit_equals_scikit_learn():
    patches, _ = scene_patches()
    projections, foreground = pca.patch_pca(patches, components=4)
    assert projections.shape == (3, 30, 4) and foreground.all()
    model = PCA(4, svd_solver="full").fit(patches.reshape(-1, 12))
    expected = model.transform(patches.reshape(-1, 12)) * signs_of(model.components_)
    np.testing.assert_allclose(projections.reshape(-1, 4), expected, rtol=1e-4, atol=1e-5)
    again, _ = pca.patch_pca(patches, components=4)
    np.testing.assert_array_equal(again, projections)


def test_second_fit_sees_the_foreground_alone():
    patches, inside = scene_patches()
    projections, foreground = pca.patch_pca(patches, foreground=0.5, grid=(5, 6))
    np.testing.assert_array_equal(foreground, inside)
    model = PCA(3, svd_solver="full").fit(patches[inside])
    expected = model.transform(patches[inside]) * signs_of(model.components_)
    np.testing.assert_allclose(projections[inside], expected, rtol=1e-4, atol=1e-5)
    assert (projections[~inside] == 0).all()


def test_which_side_is_the_foreground():
    """With a grid the middle of the images; without, the side of the component's largest entry."""
    for seed in range(4):
        patches, inside = scene_patches(seed)
        for features in (patches, -patches):
            _, foreground = pca.patch_pca(features, foreground=0.5, grid=(5, 6))
            np.testing.assert_array_equal(foreground, inside)
            mean, axes = pca.principal_axes(features.reshape(-1, 12), 1)
            assert axes[0, np.abs(axes[0]).argmax()] > 0
            first = (features - mean) @ axes[0]
            _, foreground = pca.patch_pca(features, foreground=0.5)
            np.testing.assert_array_equal(foreground, first > (first.min() + first.max()) / 2)


def test_errors_say_what_is_wrong():
    patches, _ = scene_patches()
    with pytest.raises(ValueError, match=r"patches \(3, 30, 12\) must be .* D >= 13"):
        pca.patch_pca(patches, components=13)
    with pytest.raises(ValueError, match=r"foreground=1\.0 must be a threshold"):
        pca.patch_pca(patches, foreground=1.0)
    with pytest.raises(ValueError, match="grid 5 x 5 does not hold 30 patches"):
        pca.patch_pca(patches, foreground=0.5, grid=(5, 5))
    with pytest.raises(ValueError, match=r"foreground=0.5 keeps 0 patches"):
        pca.patch_pca(np.ones((1, 4, 3)), foreground=0.5)
    with pytest.raises(ValueError, match="must be finite"):
        pca.patch_pca(patches * np.inf)


def test_picture(tmp_path):
    pytest.importorskip("matplotlib")
    patches, _ = scene_patches(images=2)
    images = np.random.RandomState(0).randint(0, 255, (2, 40, 48, 3), np.uint8)
    projections, foreground = pca.patch_pca(patches, foreground=0.5, grid=(5, 6))
    path = tmp_path / "pca.png"
    pictures.pca_grid(path, images, projections, (5, 6), foreground, ["a", "b"])
    content = path.read_bytes()
    width, height = struct.unpack(">II", content[16:24])
    assert content[:4] == b"\x89PNG" and 2 * 225 < width < 2 * 260 and 375 < height < 550
    with pytest.raises(ValueError, match=r"projections \(2, 30, 3\) must be \[2, 36, 3 or more\]"):
        pictures.pca_grid(path, images, projections, (6, 6))
