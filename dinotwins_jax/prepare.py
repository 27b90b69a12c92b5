"""Entry point: makes training data of a source once, small and in few files.

    python -m dinotwins_jax.prepare --config=configs/hybrid.py:coco --config.data.dir=/data/coco \\
        --out=/data/coco256

Then train with --config.data.source=array_record --config.data.dir=/data/coco256. A second start of
the same command goes on where the first was stopped. --dry_run only says what would be done, and
--crop_sheet=crops.png shows what training will see.
"""

import shlex
import sys
from pathlib import Path

import numpy as np
from absl import app, flags, logging

from dinotwins_jax.cli import CONFIG, INTERRUPTED, exit_code, fail, parse_flags
from dinotwins_jax.data import make_source, open_source, shards, source_options, workers
from dinotwins_jax.data.base import SPLITS, BadImage
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

_DEFAULT = Settings()
_OUT = flags.DEFINE_string("out", None, "Directory to write")
_SHORT_SIDE = flags.DEFINE_integer(
    "short_side", _DEFAULT.short_side, "Pixels that larger images are shrunk to; 0: keep all sizes"
)
_QUALITY = flags.DEFINE_integer("quality", _DEFAULT.quality, "Of the JPEGs, 1 to 95")
_MASKS = flags.DEFINE_list(
    "masks", list(_DEFAULT.masks), "Splits whose masks are stored, if the source has any"
)
_PER_SHARD = flags.DEFINE_integer("images_per_shard", _DEFAULT.images_per_shard, "At most")
_WORKERS = flags.DEFINE_integer("workers", 0, "Processes; 0: one a core", lower_bound=0)
_DRY_RUN = flags.DEFINE_bool("dry_run", False, "Say what would be done, write nothing")
_CROP_SHEET = flags.DEFINE_string("crop_sheet", None, "PNG to draw training's views of 8 images in")
_OVERWRITE = flags.DEFINE_bool("overwrite", False, "Remove what an earlier start wrote to --out")

SAMPLE = 64  # images that the estimate encodes


def main(argv) -> int:
    """Prepares what the flags describe; returns the exit code, errors are one line on stderr."""
    if len(argv) > 1:
        return fail(f"unknown argument '{argv[1]}': options start with --")
    if not (_OUT.value or _DRY_RUN.value or _CROP_SHEET.value):
        return fail("where to? give --out=DIRECTORY, --dry_run or --crop_sheet=FILE.png")
    logging.set_verbosity(logging.WARNING)
    try:
        return exit_code(lambda: prepare(CONFIG.value))
    except KeyboardInterrupt:
        return fail("interrupted: the same command goes on from here", INTERRUPTED)


def prepare(config) -> None:
    """Dry run or the work itself, then the crop sheet; see the flags."""
    settings = Settings(
        _SHORT_SIDE.value, _QUALITY.value, tuple(filter(None, _MASKS.value)), _PER_SHARD.value
    )
    check_settings(settings)
    out = Path(_OUT.value).expanduser() if _OUT.value else None
    sheet = Path(_CROP_SHEET.value).expanduser() if _CROP_SHEET.value else None
    if sheet and not sheet.parent.is_dir():
        raise FileNotFoundError(f"--crop_sheet: no such directory: {sheet.parent}")
    if _DRY_RUN.value or out:
        store = union({split: open_source(config.data.to_dict(), split) for split in SPLITS})
        print(summary(store))
    if _DRY_RUN.value:
        print(forecast(store, settings, out))
    elif out:
        write(store, settings, out, config)
    if sheet:
        from dinotwins_jax.crop_sheet import draw_crop_sheet  # needs JAX, which nothing else does

        prepared = out is not None and not _DRY_RUN.value
        source = make_source("array_record", "pretrain", dir=out) if prepared else None
        source = source or open_source(config.data.to_dict(), "pretrain")
        draw_crop_sheet(
            sheet,
            source,
            config.views.to_dict(),
            canvas_size=config.data.canvas_size,
            seed=config.seed,
        )
        print(f"{sheet}: an image a row, then its global and local views")


def write(store: Store, settings: Settings, out: Path, config) -> None:
    """Writes `out` and says what became of it."""
    options = source_options(config.data.to_dict())
    description = {"name": config.data.source, "dir": str(config.data.dir), **options}
    manifest = shards.write(
        store,
        out,
        settings,
        description=description,
        command=f"python -m dinotwins_jax.prepare {shlex.join(sys.argv[1:])}",
        workers=_WORKERS.value,
        overwrite=_OVERWRITE.value,
    )
    kept, skipped = manifest["verbatim"], manifest["skipped"]
    print(
        f"{out}: {manifest['images']:,} images in {len(manifest['shards'])} shards, "
        f"{_size(manifest['bytes'])} of {_size(manifest['source']['bytes'])}; "
        f"{kept:,} as they were, {len(skipped)} unreadable left out"
    )
    for entry in skipped[:5]:
        print(f"  left out: {entry['name']}: {entry['reason']}")
    if len(skipped) > 5:
        print(f"  and {len(skipped) - 5} more, all in {out / 'manifest.json'}")
    masks = [split for split, part in manifest["splits"].items() if part["masks"]]
    print(f"masks: {', '.join(masks) or 'none'}")
    config_file = flags.FLAGS["config"].config_filename
    print(
        f"to train: python -m dinotwins_jax.main --config={config_file} "
        f"--config.data.source=array_record --config.data.dir={shlex.quote(str(out))}"
    )


def summary(store: Store) -> str:
    """Lines: what each split holds, and how many images they are together."""
    lines = []
    for split, source in store.sources.items():
        line = f"{split}: {len(source):,} images"
        if source.labels is not None:
            known = int(np.sum(np.asarray(source.labels) >= 0))
            line += f", {known:,} labelled, {len(source.class_names)} classes"
        lines.append(line)
    return "\n".join([*lines, f"in all: {len(store.names):,} images, each stored once"])


def forecast(store: Store, settings: Settings, out: Path | None) -> str:
    """Lines: shards, how many are there already, and a size from SAMPLE images."""
    names = shard_names("images", len(store.names), settings.images_per_shard)
    done = 0
    if out is not None and not _OVERWRITE.value:
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
        f"processes: {min(_WORKERS.value or workers.num_cores(), len(names))}, a shard at a time each",
    ]
    return "\n".join([*lines, *bad])


def _size(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def run() -> None:
    """Console entry."""
    app.run(main, flags_parser=parse_flags)


if __name__ == "__main__":
    run()
