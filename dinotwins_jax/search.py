"""Finds similar pictures: python -m dinotwins_jax.search --features=features.npz --query=picture.jpg

FEATURES is what embed wrote. The queries go through the model that made it, and are compared by the cosine
of the class tokens. Prints rank, cosine and name; --out=search.png draws them.
"""

import os
import sys
from pathlib import Path

import numpy as np
from absl import flags

from dinotwins_jax.cli import command, exit_code, fail

ROWS = 40  # of queries on a sheet
BLOCK = 1024  # queries compared at once


def _define(values: flags.FlagValues) -> None:
    options = {"flag_values": values}
    flags.DEFINE_string(
        "features", None, "a file .npz or .parquet, or a folder, of embed", **options
    )
    flags.DEFINE_multi_string(
        "query",
        [],
        "a picture, a folder or a glob pattern in quotes; may be given again",
        **options,
    )
    flags.DEFINE_string(
        "workdir", None, "the model; the one that made the features if not given", **options
    )
    flags.DEFINE_string("checkpoint", "last", "last, best or a step", **options)
    flags.DEFINE_integer("count", 12, "pictures a query", lower_bound=1, **options)
    flags.DEFINE_enum("tokens", "cls", ["cls", "mean_patch"], "what is compared", **options)
    flags.DEFINE_multi_string(
        "out", [], "a sheet .png, a list .csv or .json; may be given again", **options
    )


def _search(values: flags.FlagValues) -> int:
    if not values.features or not values.query:
        return fail(
            "--features and --query are required, such as --features=features.npz --query=picture.jpg"
        )

    def work():
        from dinotwins_jax.features.gallery import Gallery
        from dinotwins_jax.features.outputs import outputs, write_lists

        files = outputs(values.out, (".png", ".csv", ".json"))
        gallery = Gallery(values.features, values.tokens)
        names, wanted = _queries(values, gallery)
        near, cosines = _nearest(gallery, names, wanted, values.count)
        rows = [
            (query, rank, round(float(cosine), 4), str(gallery.names[i]))
            for query, indices, found in zip(names, near, cosines, strict=True)
            for rank, (i, cosine) in enumerate(zip(indices, found, strict=True), start=1)
        ]
        for query, rank, cosine, name in rows:
            if rank == 1:
                print(query)
            print(f"{rank:4}  {cosine:6.3f}  {name}")
        write_lists(files, ("query", "rank", "cosine", "name"), rows)
        if ".png" in files:
            _draw(files[".png"], gallery, names, near, cosines)

    return exit_code(work)


def _queries(values: flags.FlagValues, gallery) -> tuple[list[str], np.ndarray]:
    """Names and features f32[q, E] of the query pictures, by the model of the features."""
    import jax

    from dinotwins_jax.buckets import is_remote
    from dinotwins_jax.cli import compiled_beside
    from dinotwins_jax.data.pictures import pictures_in
    from dinotwins_jax.devices.compilation import remember_compilations
    from dinotwins_jax.devices.processes import warn
    from dinotwins_jax.features.embedding import features_of
    from dinotwins_jax.features.loading import load

    where = values.workdir or gallery.source
    if not where:
        raise ValueError(f"{gallery.path} does not say which model made it: give --workdir")
    if not values.workdir and not is_remote(where) and not os.path.exists(where):
        raise FileNotFoundError(f"{where}, which made {gallery.path}, is not there: give --workdir")
    remember_compilations(compiled_beside(where))
    model = load(where, values.checkpoint)
    if model.identity != gallery.model:
        raise ValueError(
            f"{gallery.path} holds features of another model than {where}, checkpoint "
            f"{values.checkpoint}: embed again, or give the --workdir and --checkpoint that made them"
        )
    names, features = [], []
    for source in [pictures_in(query, model.reading) for query in values.query]:
        source.max_pixels = model.max_pixels
        if len(source) == 1:
            source[0]  # raises BadImage, with the reason
        few = max(jax.local_device_count(), 1 << (len(source) - 1).bit_length())
        batch = min(model.view.batch_size, few)
        found = features_of(model, source, (values.tokens,), batch)
        if len(found["left_out"]):
            warn(f"cannot be read, left out: {', '.join(found['left_out'][:5])}")
        names += found["names"].tolist()
        features.append(found[values.tokens])
    return names, np.concatenate(features)


def _nearest(gallery, names: list[str], wanted: np.ndarray, count: int):
    """(indices i64[q, k], cosines f32[q, k]): a query that is among the pictures leaves itself out."""
    from dinotwins_jax.evals.neighbours import most_similar

    own = {os.path.abspath(name): i for i, name in enumerate(gallery.names.tolist())}
    without = np.array([own.get(os.path.abspath(name), -1) for name in names])
    count = min(count, len(gallery) - int((without >= 0).any()))
    if not count:
        raise ValueError(f"{gallery.path} holds no picture but the query")
    blocks = [slice(start, start + BLOCK) for start in range(0, len(names), BLOCK)]
    parts = [
        most_similar(gallery.features, wanted[rows], count, without=without[rows])
        for rows in blocks
    ]
    return tuple(np.concatenate(part) for part in zip(*parts, strict=True))


def _draw(path: Path, gallery, names: list[str], near: np.ndarray, cosines: np.ndarray) -> None:
    from functools import partial

    from dinotwins_jax.evals.sheets import Tile, tile_grid

    def image(name: str):
        try:
            return gallery.look(name)
        except (ValueError, OSError):  # a record of prepared data
            return None

    rows = [
        [
            Tile(partial(image, name), name=name),
            *(
                gallery.tile(int(i), f"{cosine:.3f}")
                for i, cosine in zip(indices, found, strict=True)
            ),
        ]
        for name, indices, found in zip(names[:ROWS], near, cosines, strict=False)
    ]
    columns = ["query", *(str(k + 1) for k in range(near.shape[1]))]
    tile_grid(path, rows, columns=columns, titles=names[:ROWS], first_apart=True)
    more = f", the first {ROWS} of {len(names):,} queries" if len(names) > ROWS else ""
    print(f"{path}: {near.shape[1]} pictures a query{more}")


def run(argv=None, program="python -m dinotwins_jax.search") -> int:
    """The command; returns the exit code, errors are one line on stderr."""
    options = {"takes_config": False, "directories": ()}
    return command(program, __doc__, _define, _search, argv, **options)


if __name__ == "__main__":
    sys.exit(run())
