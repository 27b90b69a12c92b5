"""Procedural COCO-like scenes: textured objects on a textured background, with masks and categories.

A category is a texture and an outline. Everything else is drawn at random for each object or image,
independently of the label: colours, brightness polarity, position, size, tilt, background and an uneven
illumination of the whole image. Raw pixels and colour histograms therefore predict little. Colours are
muted and the illumination uneven, so that two crops of an image share no shortcut besides the objects.
"""

import weakref

import numpy as np

_TILE = 48  # resolution of one period of a texture
_TILT = 0.2  # radians, standard deviation of an object's rotation


def _textures() -> np.ndarray:
    """One period of each texture: f32[categories, _TILE, _TILE] in [-1, 1]."""
    v, u = np.meshgrid(*[(np.arange(_TILE) + 0.5) / _TILE] * 2, indexing="ij")
    x, y = u - 0.5, v - 0.5
    radius = np.hypot(x, y)
    patterns = [
        u < 0.5,  # upright stripes
        (u < 0.5) ^ (v < 0.5),  # checks
        radius < 0.33,  # dots
        (u < 0.3) | (v < 0.3),  # grid
        v < 0.5,  # fine level stripes
        v < 0.5,  # level stripes
        (radius > 0.2) & (radius < 0.42),  # rings
        (u + v) % 1 < 0.5,  # fine slanted stripes
        u < 0.5,  # fine upright stripes
        (u + v) % 1 < 0.5,  # slanted stripes
    ]
    return np.stack(patterns).astype(np.float32) * 2 - 1


def _outlines(angles: np.ndarray) -> np.ndarray:
    """Radius of each outline by angle, largest radius 1: f32[categories, angles]."""

    def polygon(corners):
        sector = 2 * np.pi / corners
        return np.cos(sector / 2) / np.cos((angles % sector) - sector / 2)

    def box(width, height):
        edge = np.minimum(
            width / np.maximum(abs(np.cos(angles)), 1e-6),
            height / np.maximum(abs(np.sin(angles)), 1e-6),
        )
        return edge / np.hypot(width, height)

    cross = np.maximum(box(1, 0.35) * np.hypot(1, 0.35), box(0.35, 1) * np.hypot(1, 0.35))
    ellipse = 0.55 / np.sqrt((0.55 * np.cos(angles)) ** 2 + np.sin(angles) ** 2)
    outlines = [
        np.ones_like(angles),  # disc
        polygon(4),
        polygon(3),
        0.72 + 0.28 * np.cos(5 * angles),  # flower
        box(1, 0.5),
        cross / cross.max(),
        polygon(6),
        ellipse,
        0.62 + 0.38 * np.abs(np.cos(2.5 * angles)),  # star
        0.75 + 0.25 * np.cos(3 * angles),  # clover
    ]
    return np.stack(outlines).astype(np.float32)


_TEXTURES = _textures()
_PERIODS = np.array(
    [0.25, 0.25, 0.2, 0.2, 0.12, 0.25, 0.25, 0.17, 0.12, 0.34]
)  # of the image's side
_OUTLINES = _outlines(np.linspace(0, 2 * np.pi, 256, endpoint=False))
_NAMES = (
    "striped disc",
    "checked square",
    "dotted triangle",
    "gridded flower",
    "finely ruled bar",
    "ruled cross",
    "ringed hexagon",
    "finely slanted ellipse",
    "finely striped star",
    "slanted clover",
)


class _Drawn(dict):
    """Scenes drawn so far, index -> scene."""


# (seed, …, size) -> scenes, while a source has them: those of pretraining are those of the probes.
_DRAWN: "weakref.WeakValueDictionary[tuple, _Drawn]" = weakref.WeakValueDictionary()


class Scenes:
    """Scenes generated from a seed; an index gives the same image on every machine.

    Args:
      split: "pretrain" and "train" are the same images, "test" different ones.
      num_train, num_test: numbers of images; size: their side in pixels; seed: of the whole set.
    The label is the category of the largest object, which lies on top.
    """

    class_names = _NAMES

    def __init__(self, split, *, dir="", num_train=8000, num_test=2000, size=64, seed=0):
        if size < 16:
            raise ValueError(f"data.scenes.size is {size}: it must be at least 16 pixels")
        self.split, self.size = split, size
        count = num_test if split == "test" else num_train
        if count < 1:
            raise ValueError(f"data.scenes needs at least one image, got {count} for '{split}'")
        self._seed = (seed, 1 if split == "test" else 0)
        rng = np.random.default_rng((*self._seed, 0))
        self.labels = rng.integers(0, len(_NAMES), count).astype(np.int32)
        self._drawn = _DRAWN.setdefault((*self._seed, count, size), _Drawn())

    def __len__(self) -> int:
        return len(self.labels)

    def name(self, i: int) -> str:
        return f"scenes/{self.split}/{i}"

    def default_canvas(self, global_size: int) -> int:
        return self.size

    def __getitem__(self, i: int) -> np.ndarray:
        """u8[size, size, 3]."""
        return self._scene(i)[0]

    def masks(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        """Visible masks of the objects, bool[n, size, size], and their categories, i32[n]."""
        _, owner, categories = self._scene(i)
        return np.stack([owner == k for k in range(len(categories))]), categories

    def _scene(self, i):
        """(image u8[size, size, 3], topmost object i8[size, size] (-1: none), categories i32[n]); drawn on
        first use and kept."""
        if i not in self._drawn:
            self._drawn[i] = self._draw(i)
        return self._drawn[i]

    def _draw(self, i):
        rng = np.random.default_rng((*self._seed, 1, int(i)))
        image = _background(rng, self.size)
        owner = np.full((self.size, self.size), -1, np.int8)
        extras = rng.integers(1, 4)
        categories = rng.integers(0, len(_NAMES), extras + 1).astype(np.int32)
        categories[-1] = self.labels[i]  # the largest object is drawn last, over the others
        radii = np.append(rng.uniform(0.12, 0.2, extras), rng.uniform(0.36, 0.48)) * self.size
        margins = np.append(np.full(extras, 0.1), 0.36) * self.size
        for k, (category, radius, margin) in enumerate(
            zip(categories, radii, margins, strict=True)
        ):
            _paint(
                rng, image, owner, k, category, radius, rng.uniform(margin, self.size - margin, 2)
            )
        noise = rng.normal(0, rng.uniform(0, 6), image.shape)
        light = rng.uniform(20, 40) * _waves(rng, self.size, count=3, frequency=1.0)
        image = image + light[..., None] + noise
        return np.clip(image, 0, 255).astype(np.uint8), owner, categories


def _two_colours(rng, low, high) -> np.ndarray:
    """Two muted colours f32[2, 3]; half their difference in brightness lies in (low, high)."""
    middle, half = rng.uniform(105, 150), rng.uniform(low, high) * rng.choice([-1, 1])
    grey = np.array([[middle - half], [middle + half]])
    return (grey + rng.uniform(-12, 12, (2, 3))).astype(np.float32)


def _background(rng, size) -> np.ndarray:
    """Two colours mixed by a few random waves: f32[size, size, 3]."""
    field = _waves(rng, size, count=4, frequency=2.0)
    mix = 1 / (1 + np.exp(-field * rng.uniform(0.5, 2.0)))[..., None]
    low, high = _two_colours(rng, 10, 25)
    return low + (high - low) * mix


def _waves(rng, size, count, frequency) -> np.ndarray:
    """A sum of random plane waves with about `frequency` periods per image: f32[size, size]."""
    y, x = np.meshgrid(*[np.arange(size, dtype=np.float32) / size] * 2, indexing="ij")
    field = np.zeros((size, size), np.float32)
    for _ in range(count):
        fx, fy = rng.normal(0, frequency, 2)
        field += np.sin(2 * np.pi * (fx * x + fy * y + rng.uniform())).astype(np.float32)
    return field


def _paint(rng, image, owner, k, category, radius, center):
    """Draws object k over the image."""
    size = len(image)
    low = np.maximum(np.floor(center - radius).astype(int), 0)
    high = np.minimum(np.ceil(center + radius).astype(int) + 1, size)
    window = (slice(low[0], high[0]), slice(low[1], high[1]))
    y, x = np.meshgrid(np.arange(low[0], high[0]), np.arange(low[1], high[1]), indexing="ij")
    y, x = y - center[0], x - center[1]
    turn = rng.normal(0, _TILT)
    angle = (np.arctan2(y, x) + turn) % (2 * np.pi)
    outline = _OUTLINES[category][(angle * (256 / (2 * np.pi))).astype(int) % 256]
    inside = np.hypot(x, y) <= radius * outline
    period = size * _PERIODS[category] * rng.uniform(0.87, 1.15)
    tilt, phase = rng.normal(0, _TILT), rng.uniform(0, 1, 2)
    u = (np.cos(tilt) * x - np.sin(tilt) * y) / period + phase[0]
    v = (np.sin(tilt) * x + np.cos(tilt) * y) / period + phase[1]
    tile = _TEXTURES[category][
        ((v % 1) * _TILE).astype(int) % _TILE, ((u % 1) * _TILE).astype(int) % _TILE
    ]
    dark, light = _two_colours(rng, 40, 60)
    colour = dark + (light - dark) * (tile[..., None] * 0.5 + 0.5)
    image[window] = np.where(inside[..., None], colour, image[window])
    owner[window] = np.where(inside, k, owner[window])
