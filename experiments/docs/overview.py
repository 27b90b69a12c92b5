"""The picture at the top of the README, composed of two others in docs/.

python -m experiments.docs.overview      # after one of the two changed
"""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

DOCS = Path(__file__).parents[2] / "docs"
ROWS = (1, 2, 3)  # of the pictures in compare_attention.png
COLUMNS = {0: "image", 1: "DINO", 3: "Barlow Twins", 5: "hybrid"}
BACKGROUND = 0.99  # lighter than this in all channels: no part of a panel


def runs(inside: np.ndarray, shortest: int) -> list[slice]:
    """The runs of True in bool[n] of at least `shortest` elements."""
    edges = np.flatnonzero(np.diff(np.concatenate(([0], inside.astype(int), [0]))))
    pairs = zip(edges[::2], edges[1::2], strict=True)
    return [slice(start, stop) for start, stop in pairs if stop - start >= shortest]


def panels(figure: np.ndarray, shortest: int = 100) -> list[list[np.ndarray]]:
    """The square panels of f32[H, W, C], row by row; titles are shorter than `shortest` pixels."""
    dark = (figure[..., :3] < BACKGROUND).any(axis=-1)
    rows = runs(dark.any(axis=1), shortest)
    return [
        [figure[row, column] for column in runs(dark[row].any(axis=0), shortest)] for row in rows
    ]


def compose(out: Path) -> None:
    """Attention of the three methods on the left, accuracy against labels on the right."""
    attention = panels(plt.imread(DOCS / "compare_attention.png"))
    fig = plt.figure(figsize=(13, 4.6), dpi=130)
    grid = fig.add_gridspec(
        len(ROWS),
        len(COLUMNS),
        left=0.01,
        right=0.405,
        bottom=0.02,
        top=0.84,
        wspace=0.04,
        hspace=0.04,
    )
    for i, row in enumerate(ROWS):
        for j, (column, title) in enumerate(COLUMNS.items()):
            ax = fig.add_subplot(grid[i, j])
            ax.imshow(attention[row][column], aspect="auto")
            ax.set_axis_off()
            if i == 0:
                ax.set_title(title, fontsize=12)
    fig.text(0.01, 0.945, "Attention of the class token on test images", fontsize=13)
    ax = fig.add_axes((0.43, 0.0, 0.57, 1.0))
    ax.imshow(plt.imread(DOCS / "label_efficiency.png"))
    ax.set_axis_off()
    fig.savefig(out)


if __name__ == "__main__":
    compose(DOCS / "overview.png")
