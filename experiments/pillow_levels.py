"""What 8 bits between operations do to a view: ours, in float32, against Pillow's, in 8-bit levels.

    python -m experiments.pillow_levels [--images=DIR] [--count=64]

Each operation alone on crops of 96 pixels, then whole views of DINO's recipe (two of 96 pixels an image)
from the same draws. Pictures: the files in DIR, or generated scenes. Columns: ours minus Pillow's (mean),
its absolute value (mean, largest), and for blurs the energy of the Laplacian, ours over Pillow's. The last
row puts the difference beside what the jitter does: the spread of a view's mean level over draws.
"""

from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

from dinotwins_jax.augment import ops
from dinotwins_jax.augment.blur import gaussian_blur
from dinotwins_jax.augment.draws import ViewDraw, draw_image_views
from dinotwins_jax.augment.multi_crop import render_view
from dinotwins_jax.augment.views import ViewSpec, make_view_specs
from dinotwins_jax.cli import exit_code
from dinotwins_jax.data.scenes import Scenes
from dinotwins_jax.evals.table import markdown
from experiments.benchmark.pil_views import read, shift_hue

SIDE, LARGEST = 96, 256  # pixels: of a crop; of a picture
BLENDS = {
    "brightness": (ops.BRIGHTNESS, ImageEnhance.Brightness),
    "contrast": (ops.CONTRAST, ImageEnhance.Contrast),
    "saturation": (ops.SATURATION, ImageEnhance.Color),
}


def grey(image: Image.Image) -> Image.Image:
    """A grey picture of three channels."""
    return image.convert("L").convert("RGB")


def operations() -> dict[str, tuple]:
    """{title: (ours, planes f32[3, h, w] -> the same; Pillow's, image -> image)}."""
    found = {}
    for name, (number, enhancer) in BLENDS.items():
        for factor in (0.7, 1.3):
            found[f"{name} {factor}"] = (
                partial(ops.blend, operation=number, factor=factor),
                lambda image, enhancer=enhancer, factor=factor: enhancer(image).enhance(factor),
            )
    for shift in (0.07, -0.07):
        # The turn that Pillow's hue makes: whole levels of a circle of 256.
        turn = int(shift * 255) / 256
        found[f"hue {shift:+}"] = (
            partial(ops.shift_hue, shift=shift),
            partial(shift_hue, shift=shift),
        )
        found[f"hue {shift:+}, by the turn that 8 bits make of it"] = (
            partial(ops.shift_hue, shift=turn),
            partial(shift_hue, shift=shift),
        )
    found["grayscale"] = (ops.grayscale, grey)
    found["solarize"] = (ops.solarize, ImageOps.solarize)
    for radius in (0.5, 1.0, 2.0):
        found[f"blur {radius}"] = (
            partial(gaussian_blur, radius=radius),
            lambda image, radius=radius: image.filter(ImageFilter.GaussianBlur(radius)),
        )
    return found


def pillow_view(image: Image.Image, draw: ViewDraw, side: int) -> np.ndarray:
    """u8[side, side, 3]: the view of a draw by Pillow, in the order of render_view."""
    top, left, height, width = (int(x) for x in draw.box)
    view = image.crop((left, top, left + width, top + height))
    view = view.resize((side, side), Image.Resampling.BICUBIC)
    if draw.flip:
        view = view.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if np.any(draw.factors != 1.0) or draw.hue != 0.0:
        enhancers = [enhancer for _, enhancer in BLENDS.values()]
        for number in draw.order:
            if number == ops.HUE:
                view = shift_hue(view, float(draw.hue))
            else:
                view = enhancers[number](view).enhance(float(draw.factors[number]))
    if draw.grayscale:
        view = grey(view)
    if draw.radius > 0:
        view = view.filter(ImageFilter.GaussianBlur(float(draw.radius)))
    if draw.solarize:
        view = ImageOps.solarize(view)
    return np.asarray(view)


def our_views(images: list[np.ndarray], spec: ViewSpec, local_spec: ViewSpec, seed: int):
    """(views u8-like f32[n, V, side, side, 3] in levels, their draws with axes [n, V])."""

    @jax.jit
    def views(rows, size, key):
        draws, _ = draw_image_views(key, size, global_spec=spec, local_spec=local_spec)
        rendered = jax.vmap(lambda draw: render_view(rows, draw, spec=spec))(draws)
        return rendered, draws

    found = []
    for number, image in enumerate(images):
        rows = np.zeros((LARGEST, 3, LARGEST), np.uint8)
        height, width = image.shape[:2]
        rows[:height, :, :width] = image.transpose(0, 2, 1)
        key = jax.random.fold_in(jax.random.key(seed), number)
        found.append(jax.device_get(views(rows, jnp.array([height, width]), key)))
    rendered, draws = zip(*found, strict=True)
    levels = 255.0 * np.stack(rendered).transpose(0, 1, 3, 4, 2)
    return levels, jax.tree.map(lambda *x: np.stack(x), *draws)


def laplacian_energy(pixels: np.ndarray) -> float:
    """Sum of squares of the discrete Laplacian of [..., h, w, 3]."""
    x = np.asarray(pixels, np.float64)
    inner = x[..., 1:-1, 1:-1, :]
    around = x[..., :-2, 1:-1, :] + x[..., 2:, 1:-1, :] + x[..., 1:-1, :-2, :] + x[..., 1:-1, 2:, :]
    return float(np.square(around - 4 * inner).sum())


def difference(ours: np.ndarray, pillow: np.ndarray) -> dict[str, float]:
    """{"mean", "absolute", "largest"} of ours minus Pillow's, in levels, and "energy"."""
    apart = ours - pillow.astype(np.float64)
    size = np.abs(apart)
    energy = laplacian_energy(ours) / laplacian_energy(pillow)
    return {
        "mean": apart.mean(),
        "absolute": size.mean(),
        "largest": size.max(),
        "energy": energy,
    }


def figures(images: list[np.ndarray], seed: int = 0) -> tuple[dict[str, dict], float]:
    """({operation or "views": see `difference`}, standard deviation of a view's mean level over draws).

    Args: images: u8[h, w, 3] each, sides at most LARGEST and at least 8.
    """
    whole = [Image.fromarray(image) for image in images]
    crops = [image.resize((SIDE, SIDE), Image.Resampling.BICUBIC) for image in whole]
    planes = jnp.stack([np.asarray(crop).transpose(2, 0, 1) for crop in crops]) / 255.0
    found = {}
    for name, (ours, pillows) in operations().items():
        levels = 255.0 * np.asarray(jax.jit(jax.vmap(ours))(planes)).transpose(0, 2, 3, 1)
        found[name] = difference(levels, np.stack([np.asarray(pillows(crop)) for crop in crops]))
    specs = make_view_specs(global_size=SIDE, local_size=SIDE, num_local=0)
    levels, draws = our_views(images, *specs, seed)
    pillow = np.empty(levels.shape, np.uint8)
    for n, v in np.ndindex(levels.shape[:2]):
        draw = jax.tree.map(lambda x, at=(n, v): x[at], draws)
        pillow[n, v] = pillow_view(whole[n], draw, SIDE)
    found["views"] = difference(levels, pillow)
    means = levels.mean(axis=(2, 3, 4))
    return found, float(np.sqrt(np.mean(np.var(means, axis=1, ddof=1))))


def table(found: dict[str, dict], spread: float) -> str:
    """Markdown table."""
    rows = [["", "ours - Pillow's", "absolute", "largest", "Laplacian energy"]]
    for name, of in found.items():
        energy = f"{of['energy']:.2f}" if "blur" in name or name == "views" else ""
        cells = (f"{of['mean']:+.2f}", f"{of['absolute']:.2f}", f"{of['largest']:.1f}")
        rows.append([name, *cells, energy])
    return f"{markdown(rows)}\n\nmean level of a view over draws: ± {spread:.1f}"


def pictures(folder: str, count: int) -> list[np.ndarray]:
    """u8[h, w, 3] each: of the files in a folder, shrunk to LARGEST pixels, or generated scenes.

    Raises:
      ValueError: the folder has no image files.
    """
    if not folder:
        scenes = Scenes("pretrain", num_train=count, num_test=1, size=LARGEST)
        return [scenes[i] for i in range(count)]
    files = sorted(p for p in Path(folder).rglob("*") if p.suffix.lower() in (".jpg", ".png"))
    if not files:
        raise ValueError(f"--images={folder}: it has no .jpg or .png files")
    found = []
    for file in files[:count]:
        image = read(file)
        image.thumbnail((LARGEST, LARGEST), Image.Resampling.LANCZOS)
        found.append(np.asarray(image))
    return found


def main(argv) -> int:
    """The command; returns the exit code."""
    del argv
    given = flags.FLAGS
    return exit_code(lambda: print(table(*figures(pictures(given.images, given.count)))))


if __name__ == "__main__":
    flags.DEFINE_string("images", "", "Folder of pictures; empty: generated scenes")
    flags.DEFINE_integer("count", 64, "Pictures", lower_bound=1)
    app.run(main)
