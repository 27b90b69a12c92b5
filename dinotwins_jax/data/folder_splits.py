"""Splits of an image folder: by folders of usual names, or held out by a hash of the names."""

import hashlib
from collections import Counter
from pathlib import Path

from dinotwins_jax.data.base import EXTENSIONS, printable
from dinotwins_jax.data.listing import Listing

# Names of splits in any case of letters; of several test splits the first here is used.
TRAIN_NAMES = ("train", "training")
TEST_NAMES = ("val", "valid", "validation", "dev", "test", "testing", "eval", "evaluation")


def split_folders(root: Path, listing: Listing) -> tuple[str, str]:
    """The folders of the splits; ("", "") if there are none, (folder, "") if one holds all images."""
    full = {n.split("/")[0] for n in listing.names if "/" in n}
    trains = [f for f in listing.folders if f.lower() in TRAIN_NAMES]
    tests = [f for f in listing.folders if f.lower() in TEST_NAMES]
    trains = [f for f in trains if f in full] or trains
    tests = sorted(tests, key=lambda f: (f not in full, TEST_NAMES.index(f.lower()), f))
    if trains and tests:
        if len(trains) > 1:
            both = " and ".join(f"{f}/" for f in trains)
            raise ValueError(f"{root} has two training folders, {both}: rename or merge one")
        for folder in (trains[0], tests[0]):
            if folder not in full:
                kinds = " ".join(EXTENSIONS)
                raise FileNotFoundError(f"no images under {root / folder}; looked for {kinds}")
        return trains[0], tests[0]
    if len(full) > 1 and full <= set(tests):
        both = " and ".join(f"{f}/" for f in sorted(full))
        raise ValueError(f"{root} has {both} but no train/: rename one, or give one of them as dir")
    (alone,) = full if len(full) == 1 else ("",)
    beside = sum("/" not in n for n in listing.names)
    if alone.lower() in (*TRAIN_NAMES, *TEST_NAMES) and 2 * beside < len(listing.names):
        return alone, ""
    return "", ""


def inside(names: list[str], folder: str) -> list[str]:
    """Names in a folder, relative to it; all names for ""."""
    start = f"{folder}/" if folder else ""
    return [n[len(start) :] for n in names if n.startswith(start)]


def not_used(listing: Listing, *used: str) -> str:
    """How many images lie outside the folders used; "" if none."""
    counts = Counter(f"{n.split('/')[0]}/" if "/" in n else "beside them" for n in listing.names)
    parts = [f"{count:,} {printable(f)}" for f, count in counts.most_common() if f[:-1] not in used]
    more = [f"{len(parts) - 3} more folders"] * (len(parts) > 3)
    return f"; images not used: {', '.join([*parts[:3], *more])}" if parts else ""


def held_out(names: list[str], fraction: float, seed: int) -> set[str]:
    """The names to test on: a fraction of those given, at least one, at most all but one."""
    # By hash of the name, not by position: an added file moves few others to another split.
    ranked = sorted(names, key=lambda n: _digest(f"{seed}/{n}"))
    return set(ranked[: min(max(1, round(fraction * len(names))), len(names) - 1)])


def held_out_note(fraction: float, seed: int) -> str:
    """Says how the test images were drawn, for `Source.notes`."""
    return f"test: {100 * fraction:.3g}% of the labelled images, drawn with seed {seed}"


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode(errors="surrogateescape")).digest()
