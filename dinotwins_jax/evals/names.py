"""Titles for the keys of logs and scores, as tables and charts show them."""

import re
from collections.abc import Iterable

NEIGHBOURS, SHOTS = 20, 5  # of the k-NN and few-shot scores that tables show, see `closest`
SCRATCH = "from scratch"  # the row of the network trained with the labels alone
TERMS = {
    "dino": "DINO",
    "barlow_twins": "Barlow Twins",
    "ibot": "iBOT",
    "koleo": "KoLeo",
    "gram": "Gram",
    "byol": "BYOL",
    "simclr": "SimCLR",
    "vicreg": "VICReg",
}
_TASKS = {
    "linear": "Linear probes",
    "knn": "k-NN",
    "fewshot": "Few-shot: nearest class mean",
    "finetune": "Fine-tuning",
    "whole": "Whole network trained with labels",
    "attention": "Attention of the last block and object masks",
    "clusters": "Clusters: k-means without labels",
    "segmentation": "Normalised cut and object masks",
    "attention boxes": "Attention of the last block and object boxes",
    "segmentation boxes": "Normalised cut and object boxes",
}
_KEYS = {
    "sgd": "SGD",
    "ridge": "ridge",
    "logistic": "logistic regression",
    "top1": "top-1",
    "top5": "top-5",
    "balanced": "balanced accuracy",
    "map": "mAP",
    "f1_macro": "F1, mean of the classes",
    "f1_micro": "F1, all labels pooled",
    "support": "test images",
    "f1": "F1",
    "average_precision": "average precision",
    "nmi": "normalised mutual information",
    "ari": "adjusted Rand index",
    "accuracy": "accuracy, a cluster matched to each class",
    "images": "number of images",
    "objects": "number of objects",
    "pointing": "pointing game",
    "corloc": "CorLoc",
    "jaccard": "Jaccard",
    "jaccard_best_head": "Jaccard, best head",
    "jaccard_best_head_oracle": "Jaccard, best head of each (oracle)",
    "jaccard_mean_map": "Jaccard, mean of the heads",
    "jaccard_rollout": "Jaccard, attention rollout",
    "jaccard_fitted": "Jaccard, mean of the heads, fitted share",
}
_MONITORS = {"knn": "k-NN", "ridge": "ridge probe"}


def closest(wanted: int, numbers: Iterable[int]) -> int | None:
    """The number that a table shows where not all fit: `wanted` if there, else the nearest, of two the
    smaller; None if there is none."""
    return min(numbers, key=lambda n: (abs(n - wanted), n), default=None)


def term_title(name: str) -> str:
    """ "Barlow Twins" for barlow_twins; the name itself for a loss of one's own."""
    return TERMS.get(name, name)


def task_title(task: str) -> str:
    """ "Fine-tuning" for finetune, "Multi-label fine-tuning" for "finetune multilabel"."""
    kind, _, labels = task.partition(" ")
    title = _TASKS.get(kind, kind)
    if not labels or task in _TASKS:
        return _TASKS.get(task, title)
    return f"Multi-label {title if title == 'k-NN' else title[0].lower() + title[1:]}"


def score_title(keys: tuple[str, ...]) -> str:
    """ "k-NN, k=10: top-1" for ("k10", "top1"), the path of a score within its task."""
    return ": ".join(filter(None, map(_key_title, keys)))


def monitor_title(key: str) -> str:
    """ "k-NN: top-1" for monitor/knn_top1."""
    probe, _, metric = key.removeprefix("monitor/").partition("_")
    return score_title((_MONITORS.get(probe, probe), metric))


def _key_title(key: str) -> str:
    if key == "sizes":  # the sizes themselves come next
        return ""
    if key in ("small", "medium", "large"):
        return f"{key} objects"
    if found := re.fullmatch(r"(multilabel )?(\w+) ([\d.]+%)", key):
        several, probe, share = found.groups()
        return (
            f"{'multi-label ' if several else ''}{_KEYS.get(probe, probe)}, {share} of the labels"
        )
    if re.fullmatch(r"[\d.]+%", key):
        return f"whole network, {key} of the labels"
    if found := re.fullmatch(r"k(\d+)", key):
        return f"k-NN, k={found[1]}"
    if found := re.fullmatch(r"shots(\d+)", key):
        return f"{found[1]} image{'' if found[1] == '1' else 's'} a class"
    return _KEYS.get(key, key.replace("_", " "))
