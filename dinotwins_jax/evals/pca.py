"""PCA of patch features over many images: principal components of the foreground, as colours.

Letters: M images, N patches of an image, D features, h x w patches, H x W pixels.
"""

import numpy as np


def principal_axes(rows: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Mean and principal directions.

    Args:
      rows: f64[m, D]; count: directions, at most D.
    Returns:
      f64[D], and f64[count, D] orthonormal, largest variance first; each direction's entry of largest
      absolute value is positive (the first in a tie).
    """
    mean = rows.mean(axis=0)
    centred = rows - mean
    _, vectors = np.linalg.eigh(centred.T @ centred)
    axes = vectors.T[::-1][:count]
    largest = np.abs(axes).argmax(axis=1)
    return mean, axes * np.sign(axes[np.arange(count), largest])[:, None]


def patch_pca(
    patches: np.ndarray,
    *,
    components: int = 3,
    foreground: float | None = None,
    grid: tuple[int, int] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Principal components of patch features, fitted to all images together.

    foreground=None: one fit to all patches. Otherwise the first component is scaled to [0, 1] over
    all patches, patches above `foreground` are kept, and a second fit uses only these.
    Use images of one kind of object, as DINOv2 does: with several kinds, the first component separates
    the images instead of objects and background.

    Args:
      patches: f32[M, N, D].
      components: at most D.
      foreground: threshold in [0, 1), such as 0.5; None: every patch is foreground.
      grid: (h, w), h * w = N: chooses the sign of the first fit's component, otherwise arbitrary, so
        that patches at the border of the images are lower on average than the others. None: its largest
        entry is positive, as for all other components.
    Returns:
      f32[M, N, components], 0 outside the foreground, and the foreground bool[M, N].
    Raises:
      ValueError: shapes that do not fit, a threshold outside [0, 1), features that are not finite, or
        fewer foreground patches than components.
    Source: DINOv2, arXiv:2304.07193, figure 1; scaling to [0, 1], the arbitrary sign: its issues 23, 420.
    Differs: DINOv2 keeps scores above 0 of the first component; the best threshold depends on the images
      (its issue 292 shows the sides exchanged), so here it is an argument.
    """
    patches = np.asarray(patches, np.float64)
    if patches.ndim != 3 or not 1 <= components <= patches.shape[-1]:
        raise ValueError(f"patches {patches.shape} must be [M, N, D] with D >= {components}")
    if not np.isfinite(patches).all():
        raise ValueError("patch features must be finite")
    kept = np.ones(patches.shape[:2], bool)
    if foreground is not None:
        kept = _above(patches, foreground, grid)
    if kept.sum() < components:
        raise ValueError(f"foreground={foreground} keeps {kept.sum()} patches: too few to fit")
    mean, axes = principal_axes(patches[kept], components)
    projections = np.where(kept[..., None], (patches - mean) @ axes.T, 0.0)
    return projections.astype(np.float32), kept


def _above(patches: np.ndarray, threshold: float, grid: tuple[int, int] | None) -> np.ndarray:
    """Whether the first component of all patches, scaled to [0, 1], exceeds the threshold: bool[M, N]."""
    if not 0.0 <= threshold < 1.0:
        raise ValueError(f"foreground={threshold} must be a threshold in [0, 1)")
    mean, axes = principal_axes(patches.reshape(-1, patches.shape[-1]), 1)
    first = (patches - mean) @ axes[0]
    if grid is not None:
        h, w = grid
        if h * w != patches.shape[1]:
            raise ValueError(f"grid {h} x {w} does not hold {patches.shape[1]} patches")
        border = np.ones(grid, bool)
        border[1:-1, 1:-1] = False
        if first[:, border.ravel()].mean() > first.mean():
            first = -first
    spread = first.max() - first.min()
    return (first - first.min()) / max(spread, 1e-30) > threshold
