"""The tasks on frozen features: linear probes, k-NN, few-shot, clusters. One dictionary of scores per task.

Letters: M training images, N test images, D columns, C classes.
"""

import contextlib
import hashlib
import json
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from dinotwins_jax.evals.bank import bank_probe_splits
from dinotwins_jax.evals.clusters import cluster_scores
from dinotwins_jax.evals.features import (
    VERSION,
    Embed,
    backbone_embed,
    backbone_features,
    extract,
    pixel_embed,
)
from dinotwins_jax.evals.fewshot import few_shot
from dinotwins_jax.evals.knn import knn_scores
from dinotwins_jax.evals.linear import linear_probe_splits
from dinotwins_jax.evals.names import NEIGHBOURS, closest
from dinotwins_jax.evals.view import View
from dinotwins_jax.files import replace_text
from dinotwins_jax.models.vit import VisionTransformer

SCORES_VERSION = 2  # of cached scores; increment it when a task returns other keys


class Labelled(NamedTuple):
    """Features of one split with the labels of its images.

    features: f32[M, D]; labels: i32[M], dominant category, -1 none; multi_hot: bool[M, C], or None
    if images have a single label; indices: i64[M], the records of the source.
    """

    features: np.ndarray
    labels: np.ndarray
    multi_hot: np.ndarray | None
    indices: np.ndarray


def with_labels(features: np.ndarray, indices: np.ndarray, source) -> Labelled:
    """Combines features f32[M, D] of records i64[M] of a source with their labels, -1 if it has none."""
    multi_hot = getattr(source, "multi_hot", None)
    return Labelled(
        features,
        np.full(len(indices), -1) if source.labels is None else source.labels[indices],
        None if multi_hot is None else multi_hot[indices],
        indices,
    )


class ProbeOptions(NamedTuple):
    """Options of the probes."""

    num_classes: int
    label_fractions: tuple[float, ...]  # of the training labels, stratified
    split_seeds: tuple[int, ...]  # one draw of the labels each
    bank_solver: str  # ridge | logistic
    knn_k: tuple[int, ...]
    knn_temp: float
    shots: tuple[int, ...]  # images a class


def label_kinds(train: Labelled, test: Labelled) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Suffix of a task's name -> (training labels, test labels): single-label, then multi-label."""
    kinds = {"": (train.labels, test.labels)}
    if train.multi_hot is not None and test.multi_hot is not None:
        kinds["multilabel "] = (train.multi_hot, test.multi_hot)
    return kinds


def score_linear(embed: Embed, train: Labelled, test: Labelled, options: ProbeOptions) -> dict:
    """Scores the official SGD protocol and the bank, for every fraction and kind of labels.

    The bank's scores with the most labels are also given class by class.
    """
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
                banks[0],
                y,
                banks[1],
                t,
                solver=options.bank_solver,
                per_class=fraction == max(options.label_fractions),
                **common,
            )
    return {"linear": scores}


def score_knn(embed: Embed, train: Labelled, test: Labelled, options: ProbeOptions) -> dict:
    """Scores weighted k-NN with all training labels, one entry per kind of label.

    The scores of the k that tables show are also given class by class.
    """
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
            classes_of=closest(NEIGHBOURS, options.knn_k),
        )
        for prefix, (y, t) in label_kinds(train, test).items()
    }


def score_few_shot(embed: Embed, train: Labelled, test: Labelled, options: ProbeOptions) -> dict:
    """Scores nearest class means of a few images per class."""
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


def score_clusters(embed: Embed, train: Labelled, test: Labelled, options: ProbeOptions) -> dict:
    """Scores k-means of the labelled test images: the labels only name the clusters found."""
    del train
    columns = embed.sets[embed.knn]
    scores = cluster_scores(test.features[:, columns], test.labels, options.split_seeds)
    return {"clusters": scores}


PROBES = {
    "linear": score_linear,
    "knn": score_knn,
    "fewshot": score_few_shot,
    "clusters": score_clusters,
}


class FrozenFeatures:
    """Features of the teacher, of random weights and of raw pixels, extracted on first use."""

    def __init__(
        self,
        backbone: VisionTransformer,
        weights: dict[str, object],
        sources: tuple,
        view: View,
        *,
        n_last_blocks: int,
        mean_patch: bool,
        cache: Path,
        data: list[str],
    ):
        """
        Args:
          weights: row -> parameters of the backbone, such as {"teacher": …, "random weights": …}.
          sources: (train, test), labelled.
          view: of the images.
          n_last_blocks, mean_patch: see `backbone_embed`.
          cache: directory of features and baseline scores; not used with several processes, which would
            diverge on a file that only one of them finds.
          data: `source_checksum` of each source.
        """
        compiled = backbone_features(backbone, n_last_blocks)
        options = {"n_last_blocks": n_last_blocks, "mean_patch": mean_patch}
        self.embeds = {
            row: backbone_embed(backbone, params, compiled, **options)
            for row, params in weights.items()
        } | {"raw pixels": pixel_embed()}
        self._sources, self._view = sources, view
        self._cache = cache if jax.process_count() == 1 else None
        self._data, self._found = data, [None] * len(sources)

    def probe(self, task: str, row: str, options: ProbeOptions) -> dict[str, dict]:
        """Scores {task: scores} of one row; baselines are cached, since runs share them."""
        embed = self.embeds[row]
        key = json.dumps(
            [
                *(VERSION, SCORES_VERSION, task, embed.identity, embed.linear, options),
                *(self._view[:4], self._data),
            ]
        )
        name = f"{hashlib.sha256(key.encode()).hexdigest()[:24]}.json"
        path = None if row == "teacher" or self._cache is None else self._cache / name
        if path is not None and path.is_file():
            with contextlib.suppress(ValueError):  # damaged: computed again
                return json.loads(path.read_text())
        scores = PROBES[task](embed, *self.labelled()[row], options)
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            replace_text(path, json.dumps(scores) + "\n")
        return scores

    def labelled(self) -> dict[str, tuple]:
        """{row: (train, test)} as Labelled."""
        train, test = self.split(0), self.split(1)
        return {row: (train[row], test[row]) for row in self.embeds}

    def split(self, which: int) -> dict[str, Labelled]:
        """{row: Labelled} of one of the sources."""
        if self._found[which] is None:
            source, options = (
                self._sources[which],
                {"cache": self._cache, "data": self._data[which]},
            )
            found, indices = extract(self.embeds, source, self._view, **options)
            rows = {row: with_labels(x, indices, source) for row, x in found.items()}
            self._found[which] = rows
        return self._found[which]
