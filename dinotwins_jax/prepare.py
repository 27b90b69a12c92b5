"""Converts the images of a source to small JPEGs in a few large files, once, for training.

    python -m dinotwins_jax.prepare --config=configs/hybrid.py:coco --config.data.dir=/data/coco \\
        --out=/data/coco256

Then train with --config.data.source=array_record --config.data.dir=/data/coco256. A second start of
the same command continues where the first one stopped. --dry_run only prints what would be done, and
--crop_sheet=crops.png draws the views that training will see.
"""

import shlex
import sys
from pathlib import Path

import numpy as np
from absl import flags

from dinotwins_jax.cli import command, exit_code, fail
from dinotwins_jax.configuration import config_name, load_config
from dinotwins_jax.data import (
    data_section,
    has_probe_data,
    make_source,
    open_source,
    shards,
    source_options,
    workers,
)
from dinotwins_jax.data.base import SPLITS, BadImage, printable
from dinotwins_jax.data.describe import describe
from dinotwins_jax.data.look import Look, look_at, settle_window
from dinotwins_jax.data.records import image_record
from dinotwins_jax.data.store import (
    Settings,
    Store,
    check_begun,
    check_settings,
    identify,
    is_done,
    shard_names,
    union,
)
from dinotwins_jax.data.subset import subset
from dinotwins_jax.data.window import window_keys

SAMPLE = 64  # images that the estimate encodes


def prepare(values: flags.FlagValues) -> None:
    """Prints the dry run or does the work, then draws the crop sheet; see the flags."""
    config = values.config
    settings = Settings(
        values.short_side,
        values.quality,
        tuple(filter(None, values.masks)),
        values.images_per_shard,
    )
    check_settings(settings)
    out = Path(values.out).expanduser() if values.out else None
    sheet = Path(values.crop_sheet).expanduser() if values.crop_sheet else None
    if sheet and not sheet.parent.is_dir():
        raise FileNotFoundError(f"--crop_sheet: no such directory: {sheet.parent}")
    part = (config.data.get("subset") or {}, config.data.source)
    if values.dry_run or out:
        whole = data_section(config) | {"subset": {}}  # which is chosen when they are read
        sources = {split: open_source(whole, split) for split in SPLITS}
        subset(sources["pretrain"], "pretrain", *part)  # what training cannot choose is said here
        reading = settle_window(sources["pretrain"], config.seed)
        for source in sources.values() if reading.window else ():
            source.reading = reading
        window = reading.window and window_keys(reading.window)
        settings = settings._replace(channels=reading.channels, window=window)
        store, look = union(sources), look_at(sources["pretrain"])
        for line in look.warnings:
            print(f"WARNING {line}", file=sys.stderr)
        print(summary(store, look))
        if has_probe_data(config.data):
            print("data.probe is not part of it: prepare it by itself, as data.source and data.dir")
    if values.dry_run:
        print(forecast(store, settings, out, values.workers, values.overwrite))
    elif out:
        write(store, settings, out, values)
    if sheet:
        from dinotwins_jax.crop_sheet import draw_crop_sheet  # needs JAX, which nothing else does

        prepared = out is not None and not values.dry_run
        if prepared:
            source = subset(make_source("array_record", "pretrain", dir=out), "pretrain", *part)
        else:
            source = open_source(data_section(config), "pretrain")
        settle_window(source, config.seed)
        draw_crop_sheet(
            sheet,
            source,
            config.views.to_dict(),
            canvas_size=config.data.canvas_size,
            seed=config.seed,
            mean=config.data.mean,
            std=config.data.std,
        )
        print(f"{sheet}: one image a row, then its global and local views")


def write(store: Store, settings: Settings, out: Path, values: flags.FlagValues) -> None:
    """Writes `out` and prints what was written and left out."""
    config = values.config
    options = source_options(config.data.to_dict())
    description = {"name": config.data.source, "dir": str(config.data.dir), **options}
    manifest = shards.write(
        store,
        out,
        settings,
        description=description,
        command=f"python -m dinotwins_jax.prepare {shlex.join(sys.argv[1:])}",
        workers=values.workers,
        overwrite=values.overwrite,
    )
    kept, skipped = manifest["verbatim"], manifest["skipped"]
    print(
        f"{out}: {manifest['images']:,} images in {len(manifest['shards'])} shards, "
        f"{_size(manifest['bytes'])} of {_size(manifest['source']['bytes'])}; "
        f"{kept:,} as they were, {len(skipped)} unreadable left out"
    )
    for entry in skipped[:5]:
        print(f"  left out: {printable(entry['name'])}: {entry['reason']}")
    if len(skipped) > 5:
        print(f"  and {len(skipped) - 5} more, all in {out / 'manifest.json'}")
    masks = [split for split, part in manifest["splits"].items() if part["masks"]]
    print(f"masks: {', '.join(masks) or 'none'}")
    keys = {"data.source": "array_record", "data.dir": shlex.quote(str(out))}
    keys |= {"model.in_channels": settings.channels} if settings.channels != 3 else {}
    file = values["config"].config_filename
    print(
        f"to train: python -m dinotwins_jax.main --config={config_name(file)} "
        + " ".join(f"--config.{key}={value}" for key, value in (keys | _part(config, file)).items())
    )


def _part(config, file: str) -> dict[str, object]:
    """The keys of data.subset that differ from those of the config file."""
    named = load_config(file).data.get("subset") or {}
    given = config.data.get("subset") or {}
    return {f"data.subset.{key}": v for key, v in given.items() if named.get(key) != v}


def summary(store: Store, look: Look | None = None) -> str:
    """Lines: what the splits hold, and how many images they are together."""
    return "\n".join(
        [*describe(store.sources, look), f"in all: {len(store.names):,} images, each stored once"]
    )


def forecast(
    store: Store,
    settings: Settings,
    out: Path | None,
    num_workers: int = 0,
    overwrite: bool = False,
) -> str:
    """Lines: shards, how many are there already, and a size from SAMPLE images."""
    names = shard_names("images", len(store.names), settings.images_per_shard)
    done = 0
    if out is not None and not overwrite:
        complete = check_begun(out, identify(store, settings)) is not None
        done = len(names) if complete else sum(is_done(out / name) for name in names)
    count = min(SAMPLE, len(store.names))
    sizes, sources, verbatim, bad = [], [], 0, []
    for k in np.linspace(0, len(store.names) - 1, count).round().astype(int):
        split, i = store.origin[k]
        try:
            record = image_record(
                store.sources[split], i, short_side=settings.short_side, quality=settings.quality
            )
        except BadImage as error:
            bad.append(f"unreadable: {error}")
            continue
        sizes.append(len(record.data))
        sources.append(len(record.source))
        verbatim += record.verbatim
    total, before = (np.sum(x) / max(count, 1) * len(store.names) for x in (sizes, sources))
    lines = [
        f"shards: {len(names)}, {done} of them done",
        f"of a sample of {count}: {verbatim} kept as they are, {len(bad)} unreadable",
        f"size: about {_size(total)} of {_size(before)}, masks not counted",
        f"processes: {min(num_workers or workers.num_cores(), len(names))}, a shard at a time each",
    ]
    return "\n".join([*lines, *bad])


def _size(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def _define(values: flags.FlagValues) -> None:
    default, options = Settings(), {"flag_values": values}
    flags.DEFINE_string("out", None, "directory to write", **options)
    flags.DEFINE_integer(
        "short_side",
        default.short_side,
        "pixels that larger images are shrunk to; 0: keep all sizes",
        **options,
    )
    flags.DEFINE_integer("quality", default.quality, "of the JPEGs, 1 to 95", **options)
    flags.DEFINE_list(
        "masks", list(default.masks), "splits whose masks are stored, if there are any", **options
    )
    flags.DEFINE_integer(
        "images_per_shard", default.images_per_shard, "largest number in one file", **options
    )
    flags.DEFINE_integer("workers", 0, "processes; 0: one a core", lower_bound=0, **options)
    flags.DEFINE_bool("dry_run", False, "print what would be done, write nothing", **options)
    flags.DEFINE_string("crop_sheet", None, "PNG file for training's views of 8 images", **options)
    flags.DEFINE_bool("overwrite", False, "remove what an earlier start wrote to --out", **options)


def _prepare(values: flags.FlagValues) -> int:
    if not (values.out or values.dry_run or values.crop_sheet):
        return fail("nothing to do: give --out=DIRECTORY, --dry_run or --crop_sheet=FILE.png")
    return exit_code(lambda: prepare(values), "interrupted: the same command goes on from here")


def run(argv=None, program="python -m dinotwins_jax.prepare") -> int:
    """The command; returns the exit code, errors are one line on stderr."""
    return command(program, __doc__, _define, _prepare, argv)


if __name__ == "__main__":
    sys.exit(run())
