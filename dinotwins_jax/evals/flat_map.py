"""A map of images in two dimensions by t-SNE, as a page: points by class, each with its picture.

Letters: M images, D features, S pixels of a thumbnail's side.
"""

import base64
import io
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from dinotwins_jax.data.base import BadImage, printable
from dinotwins_jax.evals.clusters import check_finite
from dinotwins_jax.evals.neighbours import unit
from dinotwins_jax.evals.pictures import picture_of
from dinotwins_jax.files import replace_text

MOST = 1500  # points: t-SNE's time and the size of the page grow with them
LEAST = 5  # points
PERPLEXITY = 30.0
COMPONENTS = 50  # principal components that t-SNE sees
THUMBNAIL, SHOWN = 40, 120  # pixels: in the page, on the screen
PLANE = 1000  # units of the drawing's side
UNKNOWN = "#8c959f"
COLOURS = ("#1f77b4", "#ff7f0e", "#2ca02c", "#d62728", "#9467bd", "#8c564b", "#e377c2", "#bcbd22",
           "#17becf", "#4b5bdc", "#aec7e8", "#ffbb78", "#98df8a", "#ff9896", "#c5b0d5", "#c49c94",
           "#f7b6d2", "#dbdb8d", "#9edae5", "#393b79")  # fmt: skip


def flat_map(features: np.ndarray, seed: int = 0) -> np.ndarray:
    """Places of images in a plane by t-SNE of the cosine, f32[M, 2] in [0, 1].

    Images close in feature space are close in the plane; distances between groups and their sizes mean
    nothing.

    Args:
      features: f32[M, D], M >= 5, normalised here.
      seed: equal arguments give equal places on one machine.
    Raises:
      ValueError: fewer than 5 images, or features that are not finite.
    """
    from sklearn.manifold import TSNE
    from threadpoolctl import threadpool_limits

    if len(features) < LEAST:
        raise ValueError(f"a map needs at least {LEAST} pictures, not {len(features)}")
    check_finite(features)
    rows = unit(features)
    # Threads wait for each other at every step, which on a busy machine takes many times the work.
    with threadpool_limits(1):
        u, sizes, _ = np.linalg.svd(rows - rows.mean(axis=0), full_matrices=False)
        components = (u * sizes)[:, :COMPONENTS]
        start = np.random.default_rng(seed).normal(scale=1e-6, size=(len(rows), 2))
        # Noise, since scikit-learn crashes on images that all start in one place, as of a collapsed model.
        start[:, : components.shape[1]] += (
            1e-4 * components[:, :2] / max(components[:, 0].std(), 1e-6)
        )
        perplexity = min(PERPLEXITY, (len(rows) - 1) / 3)
        tsne = TSNE(init=start.astype(np.float32), perplexity=perplexity, random_state=seed)
        places = tsne.fit_transform(components)
    low, high = places.min(axis=0), places.max(axis=0)
    middle, side = (low + high) / 2, max(float((high - low).max()), 1e-12)
    return ((places - middle) / side + 0.5).astype(np.float32)


def write_map(
    path: Path,
    features: np.ndarray,
    groups: np.ndarray,
    group_names: Sequence[str],
    names: Sequence[str],
    picture: Callable[[int], np.ndarray | None],
    *,
    title: str = "map",
) -> int:
    """Writes a page with a map; of more than 1,500 images, those of a fixed draw.

    Args:
      path: file to write.
      features: f32[M, D].
      groups: i[M], indices into group_names, -1 = none: the colours.
      names: of the images.
      picture: index -> u8[h, w, 3], or None where it is not there.
      title: of the page.
    Returns:
      the number of points.
    Raises:
      ValueError: see `flat_map`.
    """
    shown = np.arange(len(features))
    if len(shown) > MOST:
        shown = np.sort(np.random.default_rng(0).choice(len(shown), MOST, replace=False))
    places = flat_map(features[shown])
    fragment = _figure(
        places,
        np.asarray(groups)[shown],
        group_names,
        [str(names[i]) for i in shown],
        _sprite([picture(int(i)) for i in shown]),
    )
    head = (
        '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_PAGE}</style></head><body>"
    )
    replace_text(path, f"{head}{fragment}</body></html>\n")
    return len(shown)


def draw_map(path: Path, source, images, embed) -> None:
    """A map of the images of a source, coloured by class; none of fewer than 5.

    Args:
      path: file to write.
      source: of the images; images: Labelled, their features; embed: Embed, their columns.
    """

    if len(images.features) < LEAST:
        print(f"{len(images.features)} test images are too few for a map: left out", flush=True)
        return

    def picture(i: int) -> np.ndarray | None:
        try:
            return picture_of(source, int(images.indices[i]))
        except BadImage:
            return None

    features = images.features[:, embed.sets[embed.knn]]
    names = [printable(source.name(int(i))) for i in images.indices]
    write_map(path, features, images.labels, source.class_names, names, picture)


def read_map(path: Path) -> str:
    """What `write_map` wrote, to be put into another page."""
    text = path.read_text(encoding="utf-8")
    _, body, rest = text.partition("<body>")
    fragment, end, _ = rest.rpartition("</body>")
    if not body or not end:
        raise ValueError(f"{path} is damaged: it is no map; evaluate with --tasks=map again")
    return fragment


def _sprite(pictures: list[np.ndarray | None]) -> str:
    """All pictures, cut to squares, in rows of one image: a data URI."""
    columns = _columns(len(pictures))
    rows = -(-len(pictures) // columns)
    sheet = Image.new("RGB", (columns * THUMBNAIL, rows * THUMBNAIL), "#d0d4da")
    for k, picture in enumerate(pictures):
        if picture is not None:
            small = ImageOps.fit(Image.fromarray(picture), (THUMBNAIL, THUMBNAIL))
            sheet.paste(small, (k % columns * THUMBNAIL, k // columns * THUMBNAIL))
    data = io.BytesIO()
    sheet.save(data, "JPEG", quality=60, optimize=True)
    return f"data:image/jpeg;base64,{base64.b64encode(data.getvalue()).decode()}"


def _columns(count: int) -> int:
    return max(1, int(np.ceil(np.sqrt(count))))


def _figure(
    places: np.ndarray,
    groups: np.ndarray,
    group_names: Sequence[str],
    names: list[str],
    sprite: str,
) -> str:
    """The map as HTML: coloured points that say their names, and a script that shows pictures."""
    xy = np.rint(places * (PLANE - 40) + 20).astype(int)
    top, height = int(xy[:, 1].min()) - 20, int(np.ptp(xy[:, 1])) + 40
    layers, legend = [], []
    for group in sorted(set(groups.tolist()), key=lambda g: (g < 0, g)):
        members = np.flatnonzero(groups == group)
        text = escape(str(group_names[group])) if group >= 0 else "none" if len(group_names) else ""
        label = f"{text}: " if text else ""
        points = "".join(
            f'<circle cx="{x}" cy="{y}" r="6" data-k="{k}"><title>{label}{escape(names[k])}</title>'
            "</circle>"
            for k, (x, y) in zip(members.tolist(), xy[members].tolist(), strict=True)
        )
        colour = _colour(group)
        layers.append(f'<g fill="{colour}" data-g="{group}">{points}</g>')
        if text:
            legend.append(
                f'<button type="button" data-g="{group}"><i style="background:{colour}"></i>{text} '
                f"<small>{len(members)}</small></button>"
            )
    columns = _columns(len(names))
    size = f"--sheet:url({sprite});--size:{columns * SHOWN}px"
    return (
        f'<style>{_STYLE}</style><figure class="map" style="{size}" data-columns="{columns}">'
        f'<div class="keys">{"".join(legend)}</div>'
        f'<svg viewBox="0 {top} {PLANE} {height}" tabindex="0" role="img" aria-label="map of {len(names)} '
        f'pictures">{"".join(layers)}</svg>'
        '<div class="shown" hidden><div></div><span></span></div>'
        f"<figcaption>{_CAPTION}</figcaption></figure><script>{_SCRIPT}</script>"
    )


def _colour(group: int) -> str:
    if group < 0:
        return UNKNOWN
    if group < len(COLOURS):
        return COLOURS[group]
    return f"hsl({group * 137.5 % 360:.0f} 60% {(40, 55, 70)[group % 3]}%)"


_CAPTION = (
    "t-SNE of the features: pictures close to each other have similar features; distances between "
    "groups mean nothing. Point at a picture, or use the arrow keys; point at a name to see its group."
)
_PAGE = """:root { color-scheme: light dark; } body { margin: 0 auto; max-width: 900px; padding: 1rem;
  font: 15px/1.5 system-ui, sans-serif; }"""
_STYLE = f"""
.map {{ position: relative; max-width: 820px; margin: 1rem 0; }}
.map svg {{ display: block; width: 100%; height: auto; border: 1px solid #8c959f66; border-radius: 6px; }}
.map circle {{ fill-opacity: .75; }} .map .far {{ opacity: .08; }}
.map circle.at {{ stroke: currentColor; stroke-width: 4; fill-opacity: 1; }}
.map .keys {{ display: flex; flex-wrap: wrap; gap: .1rem .7rem; margin-bottom: .5rem; }}
.map button {{ all: unset; font-size: .8rem; cursor: default; }}
.map button:focus-visible {{ outline: 2px solid; }}
.map i {{ display: inline-block; width: .7em; height: .7em; border-radius: 50%; margin-right: .35em; }}
.map small {{ opacity: .65; }}
.map .shown {{ position: absolute; width: {SHOWN}px; padding: 4px; background: #ffffff; color: #1f2328;
  border: 1px solid #8c959f; border-radius: 6px; font-size: 11px; line-height: 1.25;
  overflow-wrap: anywhere; pointer-events: none; }}
.map .shown div {{ width: {SHOWN}px; height: {SHOWN}px; background-image: var(--sheet);
  background-size: var(--size) auto; }}
@media print {{ .map .shown {{ display: none; }} }}
"""
_SCRIPT = (
    """(() => {
const map = document.currentScript.previousElementSibling, svg = map.querySelector("svg");
const box = map.querySelector(".shown"), picture = box.firstChild, text = box.lastChild;
const points = [...svg.querySelectorAll("circle")], columns = +map.dataset.columns;
const titles = points.map(p => p.textContent);
points.forEach(p => p.replaceChildren());
let at = -1;
const show = k => {
  if (at >= 0) points[at].classList.remove("at");
  at = k; box.hidden = k < 0;
  if (k < 0) return;
  const p = points[k], i = +p.dataset.k, a = p.getBoundingClientRect(), b = map.getBoundingClientRect();
  p.classList.add("at"); text.textContent = titles[k];
  picture.style.backgroundPosition = `-${i % columns * SIDE}px -${Math.floor(i / columns) * SIDE}px`;
  const x = a.left - b.left, right = x + 20 + box.offsetWidth;
  box.style.left = Math.max(0, right > b.width ? x - box.offsetWidth - 8 : x + 16) + "px";
  box.style.top = Math.max(0, Math.min(a.top - b.top, b.height - box.offsetHeight)) + "px";
};
svg.addEventListener("pointerover", e => show(points.indexOf(e.target)));
svg.addEventListener("pointerleave", () => show(-1));
svg.addEventListener("blur", () => show(-1));
svg.addEventListener("keydown", e => {
  const step = {ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1}[e.key];
  if (e.key == "Escape") show(-1);
  if (step) { show((at + step + points.length) % points.length); e.preventDefault(); }
});
const alone = g => svg.querySelectorAll("g").forEach(
  x => x.classList.toggle("far", g != null && x.dataset.g != g));
map.querySelectorAll("button").forEach(b => {
  for (const on of ["pointerenter", "focus"]) b.addEventListener(on, () => alone(b.dataset.g));
  for (const off of ["pointerleave", "blur"]) b.addEventListener(off, () => alone(null));
});
})();"""
).replace("SIDE", str(SHOWN))
