"""Writes prepared data (format in data/store.py): every image once, reduced, in shards.

Every shard is one task for one process. It gets its name when it is complete, and counts once its
sidecar (the same name with .json: its contents) exists too. So after any interruption a second start
writes only what is missing, and the result is identical to the byte. At the end the sidecars are
removed, and the manifest is written last. No jax here.
"""

import contextlib
import fcntl
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter

from dinotwins_jax.data import workers as pool
from dinotwins_jax.data.base import BadImage, Source
from dinotwins_jax.data.records import image_record, mask_record
from dinotwins_jax.data.store import (
    ARRAYS,
    FORMAT,
    LOCK,
    MANIFEST,
    UNFINISHED,
    VERSION,
    Settings,
    Store,
    check_begun,
    check_ours,
    check_settings,
    identify,
    is_done,
    read_json,
    shard_names,
)
from dinotwins_jax.files import replace_text, replacing, writing

WRITER_OPTIONS = "group_size:1,uncompressed"  # JPEG does not compress any further


def write(
    store: Store,
    out: str | os.PathLike,
    settings: Settings,
    *,
    description: dict[str, Any],
    command: str,
    workers: int = 0,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Writes the store to `out`, or completes it.

    Args:
      description: of the source, in JSON types; kept in the manifest.
      command: command to continue; quoted when the unfinished directory is read.
      workers: processes; 0: one per core.
      overwrite: first remove the files of an earlier start.
    Returns:
      the manifest. Unreadable images are listed in it ("skipped"), and their rows dropped.
    Raises:
      ValueError: invalid settings, `out` was begun with other settings or another source, or it holds
        other files.
      OSError: cannot write, a worker was killed, or another process is writing there. Finished shards
        are kept: the same call continues from there.
    """
    check_settings(settings)
    if not store.names:
        raise ValueError("no images: every split of the source is empty")
    out = Path(out)
    identity = identify(store, settings)
    if overwrite:
        check_ours(out)
    else:
        check_begun(out, identity)
    out.mkdir(parents=True, exist_ok=True)
    with _locked(out):
        if overwrite:
            _clear(out, identity | {"command": command})
        manifest = check_begun(out, identity)
        _remove(out, "*.tmp")  # left by a killed start
        if manifest is None:
            replace_text(out / UNFINISHED, _dump(identity | {"command": command}))
            with_masks = _write_shards(store, out, settings, workers)
            manifest = _merge(store, out, settings, identity, description, with_masks)
        _remove(out, "images-*.json", "masks-*.json", UNFINISHED)
    return manifest


def _write_shards(store, out, settings, workers) -> dict[str, Source]:
    """Writes the missing shards; returns the sources whose masks are stored."""
    images = pool.pack(store.sources)  # before masks are read, which may be large
    wanted = {split: store.sources[split] for split in settings.masks if split in store.sources}
    with_masks = {split: s for split, s in wanted.items() if hasattr(s, "masks") and len(s)}
    for source in with_masks.values():
        source.masks(0)  # reports invalid masks now, not hours later
    tasks = _tasks(out, "images", store.origin, settings)
    pool.run(_write_images, tasks, images, workers, (settings.short_side, settings.quality))
    rows, kept, sizes = _kept(store, out, settings)
    masks = pool.pack(with_masks)
    tasks = []
    for split in with_masks:
        indices = np.flatnonzero(kept[store.rows[split]])
        stored = sizes[rows[store.rows[split][indices]]][:, :2].tolist()
        items = [(split, int(i), tuple(size)) for i, size in zip(indices, stored, strict=True)]
        tasks += _tasks(out, f"masks-{split}", items, settings)
    pool.run(_write_masks, tasks, masks, workers, ())
    return with_masks


def _tasks(out: Path, kind: str, items: Sequence, settings: Settings) -> list[tuple[Path, list]]:
    """(shard, its items) for every shard that is not done yet."""
    step = settings.images_per_shard
    names = shard_names(kind, len(items), step)
    parts = [(out / name, items[k * step : (k + 1) * step]) for k, name in enumerate(names)]
    return [(path, part) for path, part in parts if not is_done(path)]


def _write_images(path: Path, items: list, sources, tick, short_side: int, quality: int) -> None:
    """Writes one shard of images in a worker; items are (split, index)."""
    digest, source_bytes, sizes, skipped, verbatim = hashlib.sha256(), 0, [], [], 0
    with _new_shard(path) as write:
        for k, (split, i) in enumerate(items):
            tick()
            try:
                record = image_record(sources[split], i, short_side=short_side, quality=quality)
            except BadImage as error:
                skipped.append([k, error.name, error.reason])
                continue
            write(record.data)
            digest.update(record.source)
            source_bytes += len(record.source)
            sizes.append([*record.size, *record.original_size])
            verbatim += record.verbatim
    _write_sidecar(
        path,
        records=len(sizes),
        sha256=digest.hexdigest(),
        source_bytes=source_bytes,
        verbatim=verbatim,
        skipped=skipped,
        sizes=sizes,
    )


def _write_masks(path: Path, items: list, sources, tick) -> None:
    """Writes one shard of masks in a worker; items are (split, index, stored size)."""
    with _new_shard(path) as write:
        for split, i, size in items:
            tick()
            write(mask_record(*sources[split].masks(i), size))
    _write_sidecar(path, records=len(items))


@contextlib.contextmanager
def _new_shard(path: Path) -> Iterator[Callable[[bytes], None]]:
    """Appends records to a temporary file, renamed when the block succeeds."""
    temporary = path.with_suffix(f".{os.getpid()}.tmp")

    def checked(call, *args):
        try:
            return call(*args)
        except RuntimeError as error:  # from array_record: disk full, no permission, ...
            raise OSError(f"writing {path}: {' '.join(str(error).split())[:200]}") from None

    try:
        with writing(path):
            writer = checked(ArrayRecordWriter, str(temporary), WRITER_OPTIONS)
            yield partial(checked, writer.write)
            checked(writer.close)
            temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _write_sidecar(path: Path, **rows: Any) -> None:
    rows = {"bytes": path.stat().st_size, **rows}
    replace_text(path.with_suffix(".json"), json.dumps(rows))


def _kept(store, out, settings) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """From the sidecars: each image's row among the stored ones, whether it is stored, i32[n, 4] sizes."""
    kept, sizes = np.ones(len(store.names), bool), []
    step = settings.images_per_shard
    for shard, name in enumerate(shard_names("images", len(store.names), step)):
        rows = read_json((out / name).with_suffix(".json"))
        kept[[shard * step + k for k, _, _ in rows["skipped"]]] = False
        sizes += rows["sizes"]
    return np.cumsum(kept) - 1, kept, np.array(sizes, np.int32).reshape(-1, 4)


def _merge(store, out, settings, identity, description, with_masks) -> dict[str, Any]:
    """Writes splits.npz and the manifest from the sidecars."""
    rows, kept, sizes = _kept(store, out, settings)
    names = shard_names("images", len(kept), settings.images_per_shard)
    sidecars = _sidecars(out, names)
    skipped = [{"name": n, "reason": r} for s in sidecars for _, n, r in s["skipped"]]
    if not kept.any():
        name, reason = skipped[0].values()
        raise ValueError(f"none of {len(kept)} images is readable; the first is {name}: {reason}")
    with replacing(out / ARRAYS) as temporary, temporary.open("wb") as file:
        np.savez(file, **_arrays(store, rows, kept, sizes))
    splits = {}
    for split, source in store.sources.items():
        count = int(kept[store.rows[split]].sum())
        masks = shard_names(f"masks-{split}", count, settings.images_per_shard)
        splits[split] = {
            "images": count,
            "dropped": len(source) - count,
            "class_names": list(source.class_names),
            "notes": list(getattr(source, "notes", ())),
            "masks": _shard_list(out, masks) if split in with_masks else [],
        }
    digest = hashlib.sha256("".join(s["sha256"] for s in sidecars).encode()).hexdigest()
    source_bytes = sum(s["source_bytes"] for s in sidecars)
    manifest = {
        "format": FORMAT,
        "version": VERSION,
        "settings": identity,
        "source": description | {"bytes": source_bytes, "sha256": digest},
        "images": int(kept.sum()),
        "verbatim": sum(s["verbatim"] for s in sidecars),
        "bytes": sum(s["bytes"] for s in sidecars),
        "splits": splits,
        "skipped": skipped,
        "arrays": {"file": ARRAYS, "bytes": (out / ARRAYS).stat().st_size},
        "shards": _shard_list(out, names),
    }
    replace_text(out / MANIFEST, _dump(manifest))
    return manifest


def _arrays(store, rows, kept, sizes) -> dict[str, np.ndarray]:
    """Arrays of splits.npz."""
    names = [n.encode(errors="surrogateescape") for n in store.names]
    names = [n for n, k in zip(names, kept, strict=True) if k]
    arrays = {
        "sizes": sizes[:, :2],
        "original_sizes": sizes[:, 2:],
        "names": np.frombuffer(b"".join(names), np.uint8),
        "name_offsets": np.cumsum([0, *map(len, names)]),
    }
    for split, source in store.sources.items():
        there = kept[store.rows[split]]
        arrays[f"{split}_rows"] = rows[store.rows[split][there]].astype(np.int32)
        if source.labels is not None:
            arrays[f"{split}_labels"] = np.asarray(source.labels, np.int32)[there]
        multi_hot = getattr(source, "multi_hot", None)
        if multi_hot is not None:
            arrays[f"{split}_multi_hot"] = np.packbits(multi_hot[there], axis=1)
    return arrays


def _sidecars(out: Path, names: list[str]) -> list[dict]:
    return [read_json((out / name).with_suffix(".json")) for name in names]


def _shard_list(out: Path, names: list[str]) -> list[dict]:
    pairs = zip(names, _sidecars(out, names), strict=True)
    return [{"file": n, "records": s["records"], "bytes": s["bytes"]} for n, s in pairs]


def _dump(value: dict[str, Any]) -> str:
    return json.dumps(value, indent=1) + "\n"


@contextlib.contextmanager
def _locked(out: Path) -> Iterator[None]:
    """Locks the directory for one writer at a time; the lock ends with its process."""
    with open(out / LOCK, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise OSError(f"{out}: another process is writing there: wait until it ends") from None
        try:
            yield
        finally:
            (out / LOCK).unlink()


def _clear(out: Path, unfinished: dict[str, Any]) -> None:
    """Removes only the files of an earlier start, in an order that never looks complete."""
    _remove(out, "images-*.json", "masks-*.json")  # no shard counts without them
    replace_text(out / UNFINISHED, _dump(unfinished))
    _remove(out, MANIFEST, "images-*.array_record", "masks-*.array_record", ARRAYS)


def _remove(out: Path, *patterns: str) -> None:
    for path in [path for pattern in patterns for path in out.glob(pattern)]:
        path.unlink()
