"""The tasks on frozen features: linear probes, k-NN, few-shot. One dictionary of scores a task.

Letters: M training images, N test images, D columns, C classes.
"""

from typing import NamedTuple

import numpy as np

from dinotwins_jax.evals.bank import bank_probe_splits
from dinotwins_jax.evals.features import Embed
from dinotwins_jax.evals.fewshot import few_shot
from dinotwins_jax.evals.knn import knn_scores
from dinotwins_jax.evals.linear import linear_probe_splits


class Labelled(NamedTuple):
    """Features of one split with what is known of its images.

    features: f32[M, D]; labels: i32[M], dominant category, -1 none; multi_hot: bool[M, C], or None
    where an image has one label only; indices: i64[M], the records of the source.
    """

    features: np.ndarray
    labels: np.ndarray
    multi_hot: np.ndarray | None
    indices: np.ndarray


def with_labels(features: np.ndarray, indices: np.ndarray, source) -> Labelled:
    """Features f32[M, D] of the records i64[M] of a labelled source, beside their labels."""
    multi_hot = getattr(source, "multi_hot", None)
    return Labelled(
        features,
        source.labels[indices],
        None if multi_hot is None else multi_hot[indices],
        indices,
    )


class ProbeOptions(NamedTuple):
    """What the probes share."""

    num_classes: int
    label_fractions: tuple[float, ...]  # of the training labels, stratified
    split_seeds: tuple[int, ...]  # one draw of the labels each
    bank_solver: str  # ridge | logistic
    knn_k: tuple[int, ...]
    knn_temp: float
    shots: tuple[int, ...]  # images a class


def label_kinds(train: Labelled, test: Labelled) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Prefix of a group's name -> (training labels, test labels): single-label, then multi-label."""
    kinds = {"": (train.labels, test.labels)}
    if train.multi_hot is not None and test.multi_hot is not None:
        kinds["multilabel "] = (train.multi_hot, test.multi_hot)
    return kinds


def score_linear(embed: Embed, train: Labelled, test: Labelled, options: ProbeOptions) -> dict:
    """The official SGD protocol and the bank, for every fraction of the labels and kind of label."""
    official = embed.sets[embed.linear]
    banks = [
        {name: split.features[:, columns] for name, columns in embed.sets.items()}
        for split in (train, test)
    ]
    seeds, scores = {"split_seeds": options.split_seeds}, {}
    for prefix, (y, t) in label_kinds(train, test).items():
        for fraction in options.label_fractions:
            common = {"num_classes": options.num_classes, "fraction": fraction, **seeds}
            share = f"{100 * fraction:g}%"
            scores[f"{prefix}sgd {share}"] = linear_probe_splits(
                train.features[:, official], y, test.features[:, official], t, **common
            )
            scores[f"{prefix}{options.bank_solver} {share}"] = bank_probe_splits(
                banks[0], y, banks[1], t, solver=options.bank_solver, **common
            )
    return {"linear": scores}


def score_knn(embed: Embed, train: Labelled, test: Labelled, options: ProbeOptions) -> dict:
    """Weighted k-NN with all training labels, one entry a kind of label."""
    columns = embed.sets[embed.knn]
    return {
        f"knn {prefix}".strip(): knn_scores(
            train.features[:, columns],
            y,
            test.features[:, columns],
            t,
            ks=options.knn_k,
            temperature=options.knn_temp,
            num_classes=options.num_classes,
        )
        for prefix, (y, t) in label_kinds(train, test).items()
    }


def score_few_shot(embed: Embed, train: Labelled, test: Labelled, options: ProbeOptions) -> dict:
    """Nearest class means of a few images a class."""
    columns = embed.sets[embed.knn]
    scores = few_shot(
        train.features[:, columns],
        train.labels,
        test.features[:, columns],
        test.labels,
        num_classes=options.num_classes,
        shots=options.shots,
        split_seeds=options.split_seeds,
    )
    return {"fewshot": scores}


PROBES = {"linear": score_linear, "knn": score_knn, "fewshot": score_few_shot}
