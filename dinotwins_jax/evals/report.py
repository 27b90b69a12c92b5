"""Scores of frozen features side by side, as a dictionary, a table and a picture."""

from pathlib import Path

import jax
import numpy as np

from dinotwins_jax.augment import IMAGENET_MEAN, IMAGENET_STD, center_view
from dinotwins_jax.data.pipeline import BadImageLog, eval_batches
from dinotwins_jax.evals.attention import attention_grid, cls_attention
from dinotwins_jax.evals.features import Embed, extract
from dinotwins_jax.evals.knn import knn_classify
from dinotwins_jax.evals.linear import linear_probe_splits
from dinotwins_jax.evals.scores import top_k_accuracy
from dinotwins_jax.models.vit import VisionTransformer


def score_features(
    embeds: dict[str, Embed],
    train,
    test,
    *,
    resize: int,
    crop: int | tuple[int, int],
    canvas_size: int,
    batch_size: int,
    label_fraction: float,
    split_seeds: tuple[int, ...],
    knn_k: tuple[int, ...],
    knn_temp: float,
) -> dict[str, dict]:
    """Linear probe with part of the labels and weighted k-NN with all of them, for each embed.

    Args:
      embeds: name -> embed; all see the same images in the same view.
      resize, crop: of that view, the `center_view` of evaluation (pixels).
      train, test: sources with labels; the test labels are read for the final scores alone.
      label_fraction, split_seeds: of `linear_probe_splits`; knn_k, knn_temp: of `knn_classify`.
    Returns:
      name -> {"linear": …, "knn": {"k10": top-1 in %, …, "temperature"}}.
    Raises:
      ValueError: more than 1% of the images of a split are unreadable.
    """
    num_classes = len(train.class_names)
    features, labels = {}, {}
    for split, source in (("train", train), ("test", test)):
        batches = eval_batches(source, batch_size=batch_size, canvas_size=canvas_size)
        batches = _logged(batches, BadImageLog(source))
        features[split], indices = extract(embeds, batches, resize=resize, crop=crop)
        labels[split] = source.labels[indices]
    known = {split: labels[split] >= 0 for split in labels}  # COCO has images without any object
    scores = {}
    for name in embeds:
        x, z = (features[split][name][known[split]] for split in ("train", "test"))
        y, t = (labels[split][known[split]] for split in ("train", "test"))
        linear = linear_probe_splits(
            x, y, z, t, num_classes=num_classes, fraction=label_fraction, split_seeds=split_seeds
        )
        x, z = x[:, embeds[name].knn], z[:, embeds[name].knn]
        knn = {
            f"k{k}": float(top_k_accuracy(knn_classify(x, y, z, k, knn_temp, num_classes), t, 1))
            for k in knn_k
        }
        scores[name] = {"linear": linear, "knn": knn | {"temperature": knn_temp}}
    return scores


def _logged(batches, bad_images: BadImageLog):
    for batch in batches:
        bad_images.add(batch)
        yield batch


def score_table(scores: dict[str, dict]) -> str:
    """The scores as a Markdown table, one row an embed; top-1 in %, mean ± standard deviation over
    the draws of the labels."""
    some = next(iter(scores.values()))
    k_names = [k for k in some["knn"] if k.startswith("k")]
    fraction = some["linear"]["fraction"]
    header = [
        "features",
        f"linear probe, {fraction:.0%} of labels",
        *(f"k-NN, k={k[1:]}" for k in k_names),
    ]
    rows = [
        [
            name,
            f"{s['linear']['top1_mean']:.1f} ± {s['linear']['top1_std']:.1f}",
            *(f"{s['knn'][k]:.1f}" for k in k_names),
        ]
        for name, s in scores.items()
    ]
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    lines = [
        "| " + " | ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) + " |"
        for row in [header, *rows]
    ]
    lines.insert(1, "|" + "|".join("-" * (w + 2) for w in widths) + "|")
    return "\n".join(lines)


def draw_attention(
    path: Path,
    backbone: VisionTransformer,
    params,
    source,
    *,
    size: int,
    count: int,
    canvas_size: int,
) -> None:
    """The last block's class-token attention on the first `count` images, as a PNG grid.

    Args:
      path: where to write; size: side of the pictures in pixels, rounded down to whole patches.
    """
    size -= size % backbone.patch_size
    count = min(count, len(source))
    batch = next(
        eval_batches(source, batch_size=count, canvas_size=canvas_size, indices=range(count))
    )
    images = center_view(batch["image"], batch["size"], resize=size, crop=size)
    forward = jax.jit(
        lambda p, x: backbone.apply({"params": p}, x, return_attention=True).attention
    )
    maps = cls_attention(
        forward(params, images), backbone.grid((size, size)), 1 + backbone.num_register_tokens
    )
    pixels = np.asarray(images) * np.array(IMAGENET_STD) + np.array(IMAGENET_MEAN)
    pixels = np.clip(np.round(pixels * 255), 0, 255).astype(np.uint8)
    names = None
    if source.labels is not None:
        names = [source.class_names[i] if i >= 0 else "no object" for i in source.labels[:count]]
    attention_grid(path, pixels, np.asarray(maps), titles=names)
