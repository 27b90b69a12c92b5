"""Tests of dinotwins_jax.evals.neighbours."""

import numpy as np
import pytest

from dinotwins_jax.evals import neighbours, sheets


def plain_neighbours(features, queries, k):
    """A loop over pairs in float64; equal similarities by index."""
    found = []
    for query in queries:
        pairs = []
        for i, x in enumerate(features.astype(np.float64)):
            y = features[query].astype(np.float64)
            if i != query:
                cosine = sum(x * y) / (sum(x * x) ** 0.5 * sum(y * y) ** 0.5)
                pairs.append((-cosine, i))
        found.append([i for _, i in sorted(pairs)[:k]])
    return found


@pytest.mark.parametrize("rows", [7, 8192])
def test_nearest_neighbours_equal_a_plain_loop(monkeypatch, rows):
    monkeypatch.setattr(neighbours, "ROWS", rows)
    rng = np.random.RandomState(0)
    features = (rng.randn(50, 6) * rng.uniform(0.1, 30.0, (50, 1))).astype(np.float32)
    queries = np.array([0, 49, 13, 20])
    for k in (1, 5, 49):
        found = neighbours.nearest_neighbours(features, queries, k)
        assert found.dtype == np.int64
        assert found.tolist() == plain_neighbours(features, queries, k)


def test_copies_come_in_order_and_a_query_is_never_its_own(monkeypatch):
    monkeypatch.setattr(neighbours, "ROWS", 3)
    features = np.array([[1, 0], [2, 0], [0, 1], [-1, 0], [4, 0], [0, 0]], np.float32)
    found = neighbours.nearest_neighbours(features, np.array([1, 0]), 5)
    assert found.tolist() == [[0, 4, 2, 5, 3], [1, 4, 2, 5, 3]]


@pytest.mark.parametrize(
    ("features", "queries", "k", "message"),
    [
        (np.zeros((4, 2)), [0], 4, "k=4 must be from 1 to 3"),
        (np.zeros((4, 2)), [0, 4], 1, "query 4 must be an index of 4 images"),
        (np.zeros(4), [0], 1, r"features \(4,\) must be"),
        (np.full((4, 2), np.nan), [0], 1, "images 0 to 3: not finite"),
    ],
)
def test_what_does_not_fit_is_said(features, queries, k, message):
    with pytest.raises(ValueError, match=message):
        neighbours.nearest_neighbours(features, np.array(queries), k)


def test_grid_shows_each_picture_in_its_place_with_its_frame(tmp_path):
    matplotlib = pytest.importorskip("matplotlib")
    from matplotlib.image import imread

    colours = np.array([[250, 10, 10], [10, 10, 250], [10, 250, 250], [250, 250, 10]], np.uint8)
    path = tmp_path / "grid.png"
    neighbours.neighbours_grid(
        path,
        lambda i: np.broadcast_to(colours[i], (8, 8 if i else 16, 3)),  # picture 0 is wide
        queries=np.array([0, 1]),
        neighbours=np.array([[2, 3], [3, 0]]),
        titles=["a $ b", "<c>"],
        same=np.array([[True, False], [False, True]]),
    )
    pixels = np.round(imread(path)[..., :3] * 255).astype(int)
    # From left to right through the middle of each row of pictures, without repetitions.
    inch, n = 150, sheets
    green, red = (
        np.round(np.array(matplotlib.colors.to_rgb(n.FRAMES[agrees])) * 255).astype(int).tolist()
        for agrees in (True, False)
    )
    known = {tuple(c): i for i, c in enumerate(colours.tolist())}
    known |= {tuple(green): "green", tuple(red): "red"}
    for row, expected in enumerate(
        [
            [0, "green", 2, "green", "red", 3, "red"],
            [1, "red", 3, "red", "green", 0, "green"],
        ]
    ):
        top = n.MARGIN + n.HEADER + row * (n.CELL + n.GAP + n.ROW_TITLE) + n.ROW_TITLE
        line = pixels[round((top + n.CELL / 2) * inch)]
        seen = [known[tuple(pixel)] for pixel in line.tolist() if tuple(pixel) in known]
        assert [a for a, b in zip(seen, [*seen[1:], None], strict=True) if a != b] == expected


def test_grid_says_what_does_not_fit(tmp_path):
    def draw(queries, found, **options):
        blank = np.zeros((4, 4, 3), np.uint8)
        path = tmp_path / "grid.png"
        neighbours.neighbours_grid(path, lambda i: blank, np.array(queries), found, **options)

    found = np.array([[1, 2]])
    with pytest.raises(ValueError, match="0 queries"):
        draw([], found)
    with pytest.raises(ValueError, match=r"2 queries need neighbours \[2, k\], not \(1, 2\)"):
        draw([0, 1], found)
    with pytest.raises(ValueError, match="2 titles for 1 queries"):
        draw([0], found, titles=["a", "b"])
    with pytest.raises(ValueError, match=r"same \(1, 1\) and neighbours \(1, 2\) differ"):
        draw([0], found, same=np.array([[True]]))
    assert not list(tmp_path.iterdir())
