"""Features of many pictures, shard by shard, into a file.

    OUT.npz, OUT.parquet    one file, put together from the shards of OUT.parts/, which is then removed
    OUT/                    features-00000.npz … of at most SHARD_BYTES each, and embed.json

A shard is written as a whole, so a second start goes on after the last one. With several processes each
computes every n-th shard. Letters: M images, N patches, E width of a token.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils

from dinotwins_jax.data.base import Source, printable
from dinotwins_jax.evals.features import checksum, source_checksum
from dinotwins_jax.features.classifier import Classifier
from dinotwins_jax.features.files import ABOUT, KINDS, MANIFEST, check_damage, join
from dinotwins_jax.features.model import Model
from dinotwins_jax.files import replace_text, replacing
from dinotwins_jax.models.vit import VisionTransformer, as_pair

TOKENS = ("cls", "mean_patch", "patches")
SHARD_BYTES = 2**28
FORMAT = "dinotwins_jax features"


class Written(NamedTuple):
    """What `write_features` did: number of images with features, and of those left out."""

    images: int
    left_out: int


def write_features(
    model: Model,
    pictures: Source,
    out: Path,
    *,
    tokens: tuple[str, ...] = ("cls",),
    batch_size: int | None = None,
    classifier: Classifier | None = None,
    place: str = "",
    overwrite: bool = False,
    advance: Callable[[int], None] = lambda images: None,
) -> Written:
    """Writes the features of all readable pictures of a source.

    Arrays: names str[M]; of `tokens`: cls f32[M, E], mean_patch f32[M, E], patches f16[M, N, E]; labels
    i32[M] and class_names where the source has them; model, its identity, and source, where it was
    loaded from; place; left_out, names of the pictures that cannot be read.

    Args:
      out: a file .npz or .parquet, or a folder.
      place: of the pictures, for those who look at the features: a folder, or "split test".
      classifier: also writes its prediction str[M] and probabilities f32[M, C].
      overwrite: replace what an earlier start left there.
      advance: called with the number of images of each batch.
    Raises:
      ValueError, OSError: unknown tokens, `out` holds something else, or no picture can be read.
    """
    check_tokens(tokens)
    check_out(out, overwrite)
    if not len(pictures):
        raise ValueError("no images: give at least one")
    _wait("checked")  # before anything is written there
    single = out.suffix in KINDS
    folder = out.with_name(f"{out.name}.parts") if single else out
    plan = _plan(model, pictures, tokens, batch_size, classifier, place)
    first = jax.process_index() == 0
    if first:
        _begin(folder, plan, overwrite)
    _wait("begun")
    paths = shard_paths(folder, plan)
    for number in range(jax.process_index(), len(paths), jax.process_count()):
        rows = range(*_bounds(number, plan))
        if not paths[number].exists():
            _write_shard(paths[number], model, pictures, rows, plan, classifier, advance)
        else:
            advance(len(rows))
    _wait("written")
    counts = [_counts(path) for path in paths] if first else [(1, 0)]
    images, left_out = map(sum, zip(*counts, strict=True))
    if not images:
        raise ValueError(f"none of {len(pictures)} images can be read")
    if first:
        if single:
            join(paths, out, plan)
            shutil.rmtree(folder)
        else:
            replace_text(folder / MANIFEST, json.dumps(plan | {"complete": True}, indent=2) + "\n")
    _wait("joined")
    return Written(images, left_out)


def features_of(
    model: Model,
    pictures: Source,
    tokens,
    batch_size: int | None = None,
    classifier: Classifier | None = None,
    place: str = "",
) -> dict[str, np.ndarray]:
    """The arrays that `write_features` writes, in memory."""
    check_tokens(tokens)
    plan = _plan(model, pictures, tokens, batch_size, classifier, place)
    arrays = _arrays(model, pictures, range(len(pictures)), plan, classifier, lambda images: None)
    if not len(arrays["names"]):
        raise ValueError(f"none of {len(pictures)} images can be read")
    return arrays


def check_tokens(tokens) -> None:
    """Raises ValueError for tokens that a backbone does not have."""
    unknown = [name for name in tokens if name not in TOKENS]
    if unknown or not tokens:
        raise ValueError(f"tokens {tuple(tokens)}: choose from {', '.join(TOKENS)}")


def check_out(out: Path, overwrite: bool) -> None:
    """Raises ValueError or OSError unless features can be written to `out`."""
    if out.suffix and out.suffix not in KINDS:
        raise ValueError(
            f"out is {out}: a file {' or '.join(KINDS)}, or a folder without an extension"
        )
    if not out.absolute().parent.is_dir():
        raise FileNotFoundError(f"out is {out}: no such directory: {out.absolute().parent}")
    if out.suffix in KINDS and out.is_dir():
        raise IsADirectoryError(f"out is {out}: that is a directory")
    if out.suffix in KINDS and out.exists() and not overwrite:
        raise FileExistsError(f"{out} is there already: choose another file, or overwrite it")
    if not out.suffix and out.exists():
        names = {path.name for path in out.iterdir()} if out.is_dir() else {out.name}
        if names and MANIFEST not in names:
            raise FileExistsError(
                f"{out} holds something else ({min(names)}): choose another folder"
            )


def _plan(
    model: Model, pictures: Source, tokens, batch_size: int | None, classifier, place: str
) -> dict:
    """What decides the bytes of the shards."""
    if classifier is not None:
        classifier.check_model(model.identity)
        missing = [name for name in classifier.tokens if name not in tokens]
        if missing:
            raise ValueError(f"the classifier takes {missing[0]}: add it to tokens {tuple(tokens)}")
    batch = batch_size or model.view.batch_size
    patches = int(np.prod(model.module.grid(as_pair(model.view.crop))))
    width = {"cls": 4, "mean_patch": 4, "patches": 2 * patches}
    image = model.module.embed_dim * sum(width[name] for name in tokens)
    return {
        "format": FORMAT,
        "model": model.identity,
        "source": os.path.abspath(model.source) if model.source else "",
        "place": place,
        "images": source_checksum(pictures, {}),
        "count": len(pictures),
        "tokens": list(tokens),
        "batch_size": batch,
        "per_shard": max(1, SHARD_BYTES // (image * batch)) * batch,
        "class_names": list(pictures.class_names),
        "classifier": checksum(classifier[1:6]) if classifier else "",
        "predicted": list(classifier.class_names) if classifier else [],
    }


def _begin(folder: Path, plan: dict, overwrite: bool) -> None:
    """Makes the folder of the shards, or checks that it was begun with the same plan."""
    if folder.exists() and overwrite:
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / MANIFEST
    if path.exists():
        try:
            before = json.loads(path.read_text())
        except ValueError:
            raise ValueError(f"{path} is damaged: remove {folder}, or overwrite it") from None
        differ = [key for key, value in plan.items() if before.get(key) != value]
        if differ:
            raise ValueError(
                f"{folder} was begun with another {differ[0]}: choose another place, or overwrite it"
            )
    replace_text(path, json.dumps(plan, indent=2) + "\n")


def shard_paths(folder: Path, plan: dict) -> list[Path]:
    """The files of the shards."""
    count = -(-plan["count"] // plan["per_shard"])
    return [folder / f"features-{k:05d}.npz" for k in range(count)]


def _bounds(number: int, plan: dict) -> tuple[int, int]:
    start = number * plan["per_shard"]
    return start, min(start + plan["per_shard"], plan["count"])


def _write_shard(path: Path, model, pictures, rows: range, plan, classifier, advance) -> None:
    arrays = _arrays(model, pictures, rows, plan, classifier, advance)
    with replacing(path) as temporary, temporary.open("wb") as file:
        np.savez(file, **arrays)


def _arrays(model: Model, pictures: Source, rows: range, plan: dict, classifier, advance) -> dict:
    """The arrays of some records."""
    found, kept = {name: [] for name in plan["tokens"]}, []
    for tokens, index in _batches(model, pictures, rows, plan):
        for name, values in tokens.items():
            found[name].append(values)
        kept.append(index)
        advance(plan["batch_size"])
    indices = np.concatenate(kept)
    bad = np.setdiff1d(np.arange(rows.start, rows.stop), indices)
    names, left_out = (
        np.array([printable(pictures.name(int(i))) for i in some], np.str_)
        for some in (indices, bad)
    )
    arrays = {"names": names} | {name: np.concatenate(parts) for name, parts in found.items()}
    if pictures.labels is not None:
        arrays["labels"] = np.asarray(pictures.labels, np.int32)[indices]
        arrays["class_names"] = np.array(plan["class_names"], np.str_)
    if classifier is not None:
        prediction, probabilities = classifier.predict(arrays)
        arrays |= {"prediction": prediction, "probabilities": probabilities}
        arrays["predicted_names"] = np.array(plan["predicted"], np.str_)
    about = {name: np.array(plan[name], np.str_) for name in ABOUT}
    return arrays | about | {"left_out": left_out}


def _batches(model: Model, pictures: Source, rows: range, plan: dict) -> Iterator[tuple]:
    chosen = partial(_tokens, model.module, tuple(plan["tokens"]))
    return model.batches(pictures, chosen, indices=rows, batch_size=plan["batch_size"])


@partial(jax.jit, static_argnums=(0, 1))
def _tokens(backbone: VisionTransformer, names: tuple[str, ...], params, views) -> dict:
    output = backbone.apply({"params": params}, views)
    every = {
        "cls": lambda: output.cls,
        "mean_patch": lambda: output.patches.mean(axis=1),
        "patches": lambda: output.patches.astype(np.float16),
    }
    return {name: every[name]() for name in names}


def _counts(path: Path) -> tuple[int, int]:
    """Numbers of images and of those left out in a shard."""
    with check_damage(path, "features"), np.load(path) as arrays:
        return len(arrays["names"]), len(arrays["left_out"])


def _wait(point: str) -> None:
    """Waits for all processes."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(f"embed {point}")
