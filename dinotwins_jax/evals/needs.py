"""What a data set can be scored for: known when it is opened, before anything is computed."""

import itertools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from dinotwins_jax.evals import LABEL_TASKS, MASK_TASKS, TASKS

FEWEST = 2  # images with masks: a standard error needs two


class Served(NamedTuple):
    """What the data serve.

    tasks: those asked for that are scored, in the order of TASKS, and those only drawn.
    left_out: the others -> why the data have no scores of them.
    objects: what the test images' objects have, "masks", "boxes", or "" where mask tasks have no scores.
    knn_k: numbers of neighbours that the training images allow.
    lines: the same for people, one a reason.
    """

    tasks: list[str]
    left_out: dict[str, str]
    objects: str
    knn_k: tuple[int, ...]
    lines: list[str]


def served(
    tasks: Sequence[str], train, test, *, knn_k: Sequence[int], mask_images: int = 0, draws: bool
) -> Served:
    """Parts tasks into those that the data can serve and the others.

    Args:
      tasks: of TASKS.
      train, test: sources; no image is read.
      knn_k: numbers of neighbours asked for.
      mask_images: first test images whose masks are used; 0: all.
      draws: whether pictures are drawn, which need no masks.
    """
    lacks, lines = {}, []
    if reason := _lacking_labels(train, test):
        lacks |= dict.fromkeys(LABEL_TASKS, reason)
    objects, those = "", [task for task in MASK_TASKS if task in tasks]
    if those:
        objects, reason = _objects(test, mask_images)
        if not objects:
            lacks |= dict.fromkeys(MASK_TASKS, reason)
        elif reason:
            lines.append(
                f"{' and '.join(those)}: scored against boxes, by pointing and CorLoc alone, because "
                f"{reason}"
            )
    fit = tuple(knn_k)
    if "knn" in tasks and "knn" not in lacks:
        images = int((np.asarray(train.labels) >= 0).sum())
        above, fit = _parted(knn_k, images)
        if above and not fit:
            given = f"config.evals.knn_k {tuple(knn_k)}"
            lacks["knn"] = f"{given} is more than the {images} training images with a label"
        elif above:
            lines.append(
                f"left out: k-NN with k {', '.join(map(str, above))}, because the data has {images} "
                "training images with a label"
            )
    left_out = {task: lacks[task] for task in TASKS if task in tasks and task in lacks}
    scored = [task for task in TASKS if task in tasks and task not in lacks]
    return Served(scored, left_out, objects, fit, _reasons(left_out, draws) + lines)


def _parted(ks: Sequence[int], images: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    return tuple(k for k in ks if k > images), tuple(k for k in ks if k <= images)


def _reasons(left_out: dict[str, str], draws: bool) -> list[str]:
    lines = []
    for reason in dict.fromkeys(left_out.values()):
        those = [task for task in left_out if left_out[task] == reason]
        if draws and those[0] in MASK_TASKS:
            verb = "is" if len(those) == 1 else "are"
            lines.append(f"{' and '.join(those)} {verb} drawn, not scored, because {reason}")
        else:
            lines.append(f"left out: {', '.join(those)}, because {reason}")
    return lines


def _lacking_labels(train, test) -> str:
    for name, source in (("training", train), ("test", test)):
        if source.labels is None:
            return "the data has no labels"
        if not (np.asarray(source.labels) >= 0).any():
            return f"no {name} image has a label"
    return ""


def _objects(test, mask_images: int) -> tuple[str, str]:
    """("masks", ""); ("boxes" or "", why there are no scores against masks)."""
    count = min(mask_images or len(test), len(test))
    lacking = "the data has no masks"
    if hasattr(test, "masks"):
        found = _with_objects(test.masks, getattr(test, "masked", None), count)
        if found == FEWEST:
            return "masks", ""
        lacking = (
            f"{found} of the {count} test images used have a mask, at least {FEWEST} are needed"
        )
    boxed = getattr(test, "boxed", None)
    if hasattr(test, "boxes") and _with_objects(test.boxes, boxed, count) == FEWEST:
        return "boxes", lacking
    return "", lacking


def _with_objects(objects: Callable, known: np.ndarray | None, count: int) -> int:
    """How many of the first `count` images have an object, at most FEWEST; not all are read."""
    if known is not None:
        return min(int(known[:count].sum()), FEWEST)
    have = (i for i in range(count) if objects(i)[0].any())
    try:
        return len(list(itertools.islice(have, FEWEST)))
    except (ValueError, OSError):  # damaged: the task that needs it says so, and fails alone
        return FEWEST
