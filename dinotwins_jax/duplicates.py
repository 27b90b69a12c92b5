"""Finds near-duplicates by features: python -m dinotwins_jax.duplicates --features=features.npz

FEATURES is what embed wrote. Lists the pairs of pictures whose cosine is at least --threshold, inside the
set or with --against=OTHER.npz across two, and the groups that they form. Which cosine means "the same
picture" depends on the model: look at the sheet of --out=duplicates.png, then choose.
"""

import sys
from pathlib import Path

import numpy as np
from absl import flags

from dinotwins_jax.cli import command, exit_code, fail

PRINTED = 50  # pairs
GROUPS, MEMBERS = 15, 8  # on the sheet


def _define(values: flags.FlagValues) -> None:
    options = {"flag_values": values}
    flags.DEFINE_string(
        "features", None, "a file .npz or .parquet, or a folder, of embed", **options
    )
    flags.DEFINE_string("against", None, "features of other pictures by the same model", **options)
    flags.DEFINE_float("threshold", 0.95, "smallest cosine of a pair", **options)
    flags.DEFINE_enum("tokens", "cls", ["cls", "mean_patch"], "what is compared", **options)
    flags.DEFINE_multi_string(
        "out", [], "a sheet .png, a list .csv or .json; may be given again", **options
    )


def _duplicates(values: flags.FlagValues) -> int:
    if not values.features:
        return fail("--features is required, such as --features=features.npz")

    def work():
        from dinotwins_jax.evals.duplicates import groups, near_pairs
        from dinotwins_jax.features.gallery import Gallery, same_model
        from dinotwins_jax.features.outputs import outputs, write_lists

        files = outputs(values.out, (".png", ".csv", ".json"))
        gallery = Gallery(values.features, values.tokens)
        other = Gallery(values.against, values.tokens) if values.against else None
        if other is not None:
            same_model(gallery, other)
        pairs = near_pairs(
            gallery.features, values.threshold, None if other is None else other.features
        )
        found = groups(pairs, len(gallery) if other is not None else 0)
        group_of = {int(i): k for k, members in enumerate(found, start=1) for i in members}
        second = gallery if other is None else other
        rows = [
            (group_of[int(a)], round(float(cosine), 4), str(gallery.names[a]), str(second.names[b]))
            for a, b, cosine in zip(*pairs, strict=True)
        ]
        for group, cosine, a, b in rows[:PRINTED]:
            print(f"group {group}  {cosine:.3f}  {a}  {b}")
        if len(rows) > PRINTED:
            print(f"and {len(rows) - PRINTED:,} more pairs; --out=duplicates.csv writes all")
        pictures = sum(map(len, found))
        print(
            f"{len(rows):,} pairs with a cosine of {values.threshold} or more: {pictures:,} pictures in "
            f"{len(found):,} groups"
        )
        write_lists(files, ("group", "cosine", "name", "other"), rows)
        if ".png" in files and found:
            _draw(files[".png"], gallery, other, pairs, found)
        elif ".png" in files:
            print(f"no pairs, so {files['.png']} is not written: try a lower --threshold")

    return exit_code(work)


def _draw(path: Path, gallery, other, pairs, found: list[np.ndarray]) -> None:
    """A row a group, each picture with the highest cosine that it has in a pair."""
    from dinotwins_jax.evals.sheets import tile_grid

    first = len(gallery) if other is not None else 0
    highest: dict[int, float] = {}
    for a, b, cosine in zip(*pairs, strict=True):
        for i in (int(a), int(b) + first):
            highest.setdefault(i, float(cosine))

    def tile(i: int):
        caption = f"{highest[i]:.3f}"
        if other is None:
            return gallery.tile(i, caption)
        inside = i < first
        of, k, which = (gallery, i, "features") if inside else (other, i - first, "against")
        return of.tile(k, f"{caption} {which}")

    shown = found[:GROUPS]
    rows = [[tile(int(i)) for i in members[:MEMBERS]] for members in shown]
    titles = [f"group {k}: {len(members)} pictures" for k, members in enumerate(shown, start=1)]
    tile_grid(path, rows, titles=titles)
    more = f", the first {GROUPS} of {len(found):,}" if len(found) > GROUPS else ""
    print(f"{path}: {len(shown)} groups{more}, at most {MEMBERS} pictures of each")


def run(argv=None, program="python -m dinotwins_jax.duplicates") -> int:
    """The command; returns the exit code, errors are one line on stderr."""
    options = {"takes_config": False, "directories": ()}
    return command(program, __doc__, _define, _duplicates, argv, **options)


if __name__ == "__main__":
    sys.exit(run())
