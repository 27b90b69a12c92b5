"""Frozen features of a labelled source, computed once and shared by all evaluations.

Letters: M images, B batch, D columns, E width of a token.
"""

import hashlib
import json
import os
import sys
import zipfile
import zlib
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dinotwins_jax.augment.multi_crop import IMAGENET_MEAN, IMAGENET_STD
from dinotwins_jax.evals.content import update_with_labels
from dinotwins_jax.evals.view import View
from dinotwins_jax.files import FullDisk, replacing
from dinotwins_jax.models.vit import VisionTransformer

PIXELS = 32  # side of the raw-pixel baseline: 118,287 images of COCO take 1.5 GB
VERSION = 1  # of the cache; increment it when a feature or a protocol changes


class Embed(NamedTuple):
    """Frozen features of images.

    apply: views f32[B, h, w, C] -> f32[B, D].
    sets: name -> columns of D, the feature sets of the bank of probes.
    linear, knn: the feature set of the official linear probe and of k-NN.
    identity: cache key of the features, such as a checksum of the weights.
    """

    apply: Callable[[jax.Array], jax.Array]
    sets: dict[str, slice]
    linear: str
    knn: str
    identity: str


def check_last_blocks(backbone: VisionTransformer, n_last_blocks: int) -> None:
    """Raises ValueError if the backbone has fewer blocks."""
    if not 1 <= n_last_blocks <= backbone.depth:
        raise ValueError(
            f"config.evals.n_last_blocks is {n_last_blocks}: the backbone has {backbone.depth} blocks "
            "(config.model.depth)"
        )


def backbone_features(backbone: VisionTransformer, n_last_blocks: int) -> Callable:
    """Builds the jitted function (params, views f32[B, h, w, C]) -> f32[B, (n + 1) * E].

    The class tokens of the last n blocks, the last one at the end, each after the final LayerNorm;
    then the mean patch token of the last block.
    """

    @jax.jit
    def features(params, views):
        layers = backbone.apply(
            {"params": params}, views, n=n_last_blocks, method="intermediate_layers"
        )
        parts = [cls for cls, _ in layers] + [jnp.mean(layers[-1][1], axis=1)]
        return jnp.concatenate(parts, axis=-1)

    return features


def backbone_embed(
    backbone: VisionTransformer,
    params,
    features: Callable,
    *,
    n_last_blocks: int,
    mean_patch: bool,
) -> Embed:
    """Builds the Embed of a backbone.

    Args:
      params: of the backbone, frozen.
      features: its `backbone_features`; compiled once for several sets of parameters.
      n_last_blocks: number of class tokens for the linear probe.
      mean_patch: whether the linear probe also uses the mean patch token.
    Source: dino eval_linear.py and eval_knn.py.
    """
    n, E = n_last_blocks, backbone.embed_dim
    last = f"cls of last {n}"
    sets = {
        "cls": slice((n - 1) * E, n * E),
        "mean patch": slice(n * E, (n + 1) * E),
        "cls + mean patch": slice((n - 1) * E, (n + 1) * E),
    }
    if n > 1:
        sets |= {last: slice(0, n * E), f"{last} + mean patch": slice(0, (n + 1) * E)}
    linear = ("cls" if n == 1 else last) + (" + mean patch" if mean_patch else "")
    identity = f"{checksum(params)} last {n} of {backbone.clone(parent=None)}"
    return Embed(partial(features, params), sets, linear, "cls", identity)


def pixel_embed() -> Embed:
    """Embed of the raw pixels, at most 32 x 32: a baseline without learning."""

    @jax.jit
    def features(views):
        height, width = (min(side, PIXELS) for side in views.shape[1:3])
        shape = len(views), height, width, views.shape[-1]
        small = jax.image.resize(views, shape, "linear")
        return small.reshape(len(views), -1)

    return Embed(features, {"pixels": slice(None)}, "pixels", "pixels", f"{PIXELS} pixels")


def checksum(tree) -> str:
    """sha256 of the names, shapes and values of a pytree."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        leaf = np.asarray(leaf)
        digest.update(f"{jax.tree_util.keystr(path)} {leaf.dtype} {leaf.shape}".encode())
        digest.update(np.ascontiguousarray(leaf).tobytes())
    return digest.hexdigest()


def source_checksum(source, description: dict) -> str:
    """sha256 of a source: its description in the config, names, file sizes and times, labels.

    Not of data.canvas_size, which a run's config.json states and a config file may leave open: features
    depend on that of their view.
    """
    description = {key: value for key, value in description.items() if key != "canvas_size"}
    digest = hashlib.sha256(json.dumps(description, sort_keys=True, default=str).encode())
    for i in range(len(source)):
        name, stamp = source.name(i), ""
        with suppress(OSError, ValueError):
            status = os.stat(name)
            stamp = f"{status.st_size} {status.st_mtime_ns}"
        digest.update(f"{name} {stamp}\0".encode(errors="surrogateescape"))
    update_with_labels(digest, source)
    return digest.hexdigest()


def extract(
    embeds: dict[str, Embed], source, view: View, *, cache: Path | None = None, data: str = ""
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Extracts features of all readable records with all embeds, in one pass over the data.

    Args:
      embeds: name -> embed.
      cache: directory of earlier results; None: no cache.
      data: `source_checksum` of the source; part of the key with the embed's identity and the view.
    Returns:
      ({name: f32[M, D]}, record indices i64[M]); unreadable records are left out.
    """
    files = {name: _cache_file(cache, embed, view, data) for name, embed in embeds.items()}
    found = {name: _load(path) for name, path in files.items()}
    missing = [name for name in embeds if found[name] is None]
    if missing:
        rows, indices = view.map(
            lambda views: {name: embeds[name].apply(views) for name in missing}, source
        )
        for name in missing:
            found[name] = rows[name], indices
            _save(files[name], rows[name], indices)
    return {name: found[name][0] for name in embeds}, next(iter(found.values()))[1]


def _cache_file(cache: Path | None, embed: Embed, view: View, data: str) -> Path | None:
    if cache is None:
        return None
    # The batch size changes only the last bits.
    parts = [VERSION, embed.identity, view.resize, view.crop, view.canvas_size, data]
    moments = [list(view.mean), list(view.std)]
    parts += [] if moments == [list(IMAGENET_MEAN), list(IMAGENET_STD)] else moments
    key = json.dumps(parts)
    return cache / f"{hashlib.sha256(key.encode()).hexdigest()[:24]}.npz"


def _load(path: Path | None) -> tuple[np.ndarray, np.ndarray] | None:
    if path is None or not path.is_file():
        return None
    try:
        with np.load(path) as file:
            return file["features"], file["indices"]
    except (ValueError, OSError, EOFError, KeyError, zipfile.BadZipFile, zlib.error):  # damaged
        return None


def _save(path: Path | None, features: np.ndarray, indices: np.ndarray) -> None:
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with replacing(path) as temporary, temporary.open("wb") as file:
            np.savez(file, features=features, indices=indices)
    except FullDisk as error:  # costs time at the next evaluation, no score
        print(f"WARNING features are not cached: {error}", file=sys.stderr, flush=True)
