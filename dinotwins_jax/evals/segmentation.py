"""Unsupervised segmentation of the main object by a normalised cut of the graph of patch features.

Letters: M images, N patches, D features, n objects of an image, h x w patches, H x W pixels.
"""

from collections.abc import Sequence

import numpy as np
import scipy.linalg
from scipy import ndimage

from dinotwins_jax.evals.object_masks import (
    component_found,
    grid_jaccards,
    mean_sem,
    scored_images,
)

WEAK_EDGE = 1e-5  # keeps the graph connected


def affinity(patches: np.ndarray, *, tau: float, centre: bool) -> np.ndarray:
    """Edge weights of the patch graph: 1 where the cosine is above tau, else 1e-5.

    Args:
      patches: f32[N, D]; tau: cosine; centre: subtract the mean patch first.
    Returns:
      f64[N, N], symmetric; the diagonal is 1 except for zero patches.
    """
    patches = np.asarray(patches, np.float64)
    if centre:
        patches = patches - patches.mean(axis=0)
    unit = patches / np.maximum(np.linalg.norm(patches, axis=1, keepdims=True), 1e-12)
    return np.where(unit @ unit.T > tau, 1.0, WEAK_EDGE)


def second_eigenvector(weights: np.ndarray) -> np.ndarray:
    """Second smallest solution y of (D - W) y = lambda D y, D the diagonal of W's row sums.

    With z = D^(1/2) y it is the second largest eigenvector of D^(-1/2) W D^(-1/2): the same vector,
    three times faster at N = 784 than the generalised problem.

    Args:
      weights: f64[N, N] symmetric, > 0, N >= 2.
    Returns:
      f64[N], up to sign and length.
    Source: Shi and Malik, Normalized Cuts and Image Segmentation, PAMI 2000, Eq. 7-11.
    """
    scale = 1.0 / np.sqrt(weights.sum(axis=1))
    second = len(weights) - 2
    _, vectors = scipy.linalg.eigh(
        scale[:, None] * weights * scale, subset_by_index=[second, second]
    )
    return scale * vectors[:, 0]


def normalised_cut(
    patches: np.ndarray,
    grid: tuple[int, int],
    *,
    tau: float = 0.2,
    centre: bool = True,
    seed_part_only: bool = False,
) -> np.ndarray:
    """Foreground of one image: one side of the normalised cut of its patches.

    The second smallest eigenvector is cut at its mean; the foreground is the side of its largest
    absolute entry, the seed.

    Args:
      patches: f32[N, D] patch features of one image, row-major over the grid.
      grid: (h, w), h * w = N >= 2.
      tau: cosine above which edges are strong, in (-1, 1).
      centre: subtract the image's mean patch first. Otherwise a component common to all patches can keep
        every cosine above tau, and no cut exists: for a small DINO trained on the scenes (mean cosine
        of two patches 0.97), Jaccard was 63% with and 0% without.
      seed_part_only: keep only the 4-connected component with the seed (for a box).
    Returns:
      bool[h, w]. All False if all edges are equal (no cut is better than another).
    Raises:
      ValueError: patches, grid or tau that do not fit, or non-finite features.
    Source: TokenCut, arXiv:2202.11539, Eq. 4-6 (tau 0.2, weak edges 1e-5).
    Differs: TokenCut uses the keys of the last block, uncentred.
    """
    patches = np.asarray(patches, np.float32)
    if patches.ndim != 2 or len(patches) != grid[0] * grid[1] or len(patches) < 2:
        raise ValueError(f"patches {patches.shape} must be [N, D] with N = {grid[0]} x {grid[1]}")
    if not -1.0 < tau < 1.0:
        raise ValueError(f"tau={tau} must be a cosine in (-1, 1)")
    if not np.isfinite(patches).all():
        raise ValueError("patch features must be finite")
    weights = affinity(patches, tau=tau, centre=centre)
    edges = weights[~np.eye(len(weights), dtype=bool)]
    if (edges == edges[0]).all():
        return np.zeros(grid, bool)
    vector = second_eigenvector(weights)
    above, seed = vector > vector.mean(), int(np.abs(vector).argmax())
    foreground = (above == above[seed]).reshape(grid)
    if seed_part_only:
        parts, _ = ndimage.label(foreground)
        foreground = parts == parts.flat[seed]
    return foreground


def segmentation_scores(foregrounds: np.ndarray, masks: Sequence[np.ndarray]) -> dict:
    """Scores of foregrounds against the objects of each image, in %.

    Args:
      foregrounds: bool[M, h, w].
      masks: M times bool[n, H, W], the objects of the view; n may be 0 (the image is then left out).
    Returns:
      "protocol", "images" scored; "jaccard_mean", "jaccard_sem": with the union of the objects, nearest
      upsampled, and its standard error over images; "corloc", "corloc_sem": images where the box of
      the foreground's largest 4-connected component has IoU >= 0.5 with the box of an object.
    Raises:
      ValueError: shapes that do not fit, or fewer than two images with an object.
    """
    foregrounds = np.asarray(foregrounds)
    if foregrounds.ndim != 3 or foregrounds.dtype != bool:
        found = f"{foregrounds.dtype}{list(foregrounds.shape)}"
        raise ValueError(f"foregrounds must be bool[M, h, w], got {found}")
    jaccards, found = [], []
    for i, objects in scored_images(masks, len(foregrounds)).items():
        union = objects.any(axis=0, keepdims=True)
        jaccards.append(grid_jaccards(foregrounds[i : i + 1], union)[0, 0])
        found.append(float(component_found(foregrounds[i], objects)))
    jaccard, jaccard_sem = mean_sem(np.array(jaccards))
    corloc, corloc_sem = mean_sem(np.array(found))
    return {
        "protocol": "ncut-v1",
        "images": len(jaccards),
        "jaccard_mean": jaccard,
        "jaccard_sem": jaccard_sem,
        "corloc": corloc,
        "corloc_sem": corloc_sem,
    }
