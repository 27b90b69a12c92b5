"""Description of the data for the start of a run, in a few lines."""

from collections.abc import Mapping

import numpy as np

from dinotwins_jax.data.base import Source, printable
from dinotwins_jax.data.look import Look

NAMES = 5  # classes that are named


def describe(sources: Mapping[str, Source], look: Look | None = None) -> list[str]:
    """Says what was found: images by split, classes and their sizes, and the sources' notes.

    Args:
      sources: split -> source.
      look: at the pictures of one of them, see data/look.py.
    Returns:
      Lines, usually three to six.
    """
    lines = ["data: " + ", ".join(_split(split, source) for split, source in sources.items())]
    labelled = next((s for s in reversed(sources.values()) if s.labels is not None), None)
    if labelled is not None:
        lines.append(_classes(sources.get("train", labelled), labelled.class_names))
    notes = [note for source in sources.values() for note in getattr(source, "notes", ())]
    return lines + [f"  {note}" for note in dict.fromkeys([*(look.lines if look else ()), *notes])]


def describe_run(
    source: Source, probe_sources: tuple[Source, Source], apart: bool, look: Look | None = None
) -> list[str]:
    """The description of a run's data.

    Args:
      source: of "pretrain"; probe_sources: of "train" and "test".
      apart: whether the probes have data of their own, which is then described by itself.
      look: at the pictures of source.
    """
    probes = dict(zip(("train", "test"), probe_sources, strict=True))
    if not apart:
        return describe({"pretrain": source} | probes, look)
    first, *rest = describe(probes)
    return [*describe({"pretrain": source}, look), f"{first} of other data, for the probes", *rest]


def _split(split: str, source: Source) -> str:
    text = f"{split} {len(source):,} {'image' if len(source) == 1 else 'images'}"
    if source.labels is None:
        return f"{text} (no labels)"
    known = int(np.sum(np.asarray(source.labels) >= 0))
    return text if known == len(source) else f"{text} ({known:,} labelled)"


def _classes(source: Source, names: tuple[str, ...]) -> str:
    """Number of classes, the first names, and the smallest and largest number of images."""
    more = len(names) - NAMES
    text = f"  {len(names):,} classes: {', '.join(printable(n) for n in names[:NAMES])}"
    text += f" and {more:,} more" if more > 0 else ""
    if source.labels is None or not names:
        return text
    labels = np.asarray(source.labels)
    counts = np.bincount(labels[labels >= 0], minlength=len(names))
    least, most = int(counts.argmin()), int(counts.argmax())
    if counts[least] == counts[most]:
        return f"{text}; {counts[most]:,} training images each"
    ends = [f"{counts[k]:,} ({printable(names[k])})" for k in (least, most)]
    return f"{text}; {' to '.join(ends)} training images"
