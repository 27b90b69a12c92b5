"""Classifiers on frozen features: fitted to someone's labels, saved in a small file, used on new pictures.

Letters: M images, D features, C classes.
"""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import scipy.special

from dinotwins_jax.evals.bank import HOLDOUT_FRACTION, REGULARISATIONS
from dinotwins_jax.evals.scores import single_label_scores
from dinotwins_jax.evals.solvers import logistic, ridge, standardise, targets_of
from dinotwins_jax.evals.splits import holdout
from dinotwins_jax.features.files import check_damage
from dinotwins_jax.features.labelled import arrays_of, columns_of, labels_of
from dinotwins_jax.files import replacing

KINDS = ("ridge", "logistic", "mean")
FORMAT = "dinotwins_jax classifier"
_TEMPERATURES = 10.0 ** np.linspace(-3, 2, 101)


class Predictions(NamedTuple):
    """labels: str[M], the most probable class; probabilities: f32[M, C]."""

    labels: np.ndarray
    probabilities: np.ndarray


class Classifier(NamedTuple):
    """A linear classifier, probabilities = softmax((z @ weight + bias) / temperature).

    z = (x - mean) * scale, divided by its norm for the kind "mean".
    """

    kind: str  # ridge | logistic | mean
    weight: np.ndarray  # f32[D, C]
    bias: np.ndarray  # f32[C]
    mean: np.ndarray  # f32[D]
    scale: np.ndarray  # f32[D]
    temperature: float
    class_names: tuple[str, ...]
    tokens: tuple[str, ...]  # the features that it takes, in their order
    model: str  # identity of the model that made them; "" if unknown
    about: dict  # num_train, regularisation, holdout_top1 and holdout_balanced in per cent, or None

    def logits(self, x: np.ndarray) -> np.ndarray:
        """f32[M, D] features -> f64[M, C] scores before the softmax."""
        z = (np.asarray(x, np.float64) - self.mean) * self.scale
        if self.kind == "mean":
            z /= np.maximum(np.linalg.norm(z, axis=1, keepdims=True), 1e-12)
        return (z @ self.weight + self.bias) / self.temperature

    def predict(self, features) -> Predictions:
        """Predicts from features: an array f32[M, D], the arrays of `embed`, or their file.

        Raises:
          ValueError: features of another model or width.
        """
        x = self._columns(features)
        probabilities = scipy.special.softmax(self.logits(x), axis=1).astype(np.float32)
        names = np.array(self.class_names, np.str_)
        return Predictions(names[probabilities.argmax(axis=1)], probabilities)

    def score(self, features, labels=None) -> dict[str, float]:
        """{"top1", "balanced", "images"} on labelled features, in per cent.

        Args: as of `probe`; a label that the classifier does not know is a miss.
        """
        arrays, x = arrays_of(features), self._columns(features)
        given, names = labels_of(arrays, labels)
        place = {name: k for k, name in enumerate(self.class_names)}
        known = np.flatnonzero(given >= 0)
        more = [name for name in names if name not in place]  # columns that are never the highest
        place |= {name: len(place) + k for k, name in enumerate(more)}
        mine = np.array([place[names[label]] for label in given[known]], np.int32)
        logits = np.pad(self.logits(x[known]), ((0, 0), (0, len(more))), constant_values=-np.inf)
        return single_label_scores(logits, mine, {"top1": 1}) | {"images": len(known)}

    def check_model(self, model: str) -> None:
        """Raises ValueError if features are those of another model; "" is unknown."""
        if model and self.model and model != self.model:
            raise ValueError(
                f"features of another model ({model[:12]}) than the classifier's ({self.model[:12]})"
            )

    def save(self, path: str | os.PathLike) -> None:
        """Writes the classifier, an .npz of a few kilobytes a class."""
        path = _checked_out(path)
        text = {key: getattr(self, key) for key in ("kind", "tokens", "model", "about")}
        text |= {"temperature": self.temperature, "format": FORMAT, "class_names": self.class_names}
        arrays = {key: getattr(self, key) for key in ("weight", "bias", "mean", "scale")}
        with replacing(path) as temporary, temporary.open("wb") as file:
            np.savez(file, about=np.array(json.dumps(text)), **arrays)

    def _columns(self, features) -> np.ndarray:
        arrays = arrays_of(features)
        self.check_model(str(arrays.get("model", "")))
        x = columns_of(arrays, self.tokens)
        if x.shape[1] != len(self.mean):
            raise ValueError(
                f"features of {x.shape[1]} columns: the classifier takes {len(self.mean)}"
            )
        return x


def _checked_out(path: str | os.PathLike) -> Path:
    """The path of a file to write; raises ValueError or OSError if that cannot be."""
    path = Path(path).expanduser()
    if path.suffix != ".npz":
        raise ValueError(f"a classifier is a file .npz, not {path}")
    if not path.absolute().parent.is_dir():
        raise FileNotFoundError(f"out is {path}: no such directory: {path.absolute().parent}")
    return path


def load_classifier(path: str | os.PathLike) -> Classifier:
    """Reads a classifier that `Classifier.save` wrote.

    Raises:
      FileNotFoundError: no such file.
      ValueError: it is damaged or holds something else.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"no file of a classifier: {path}")
    with check_damage(path, "classifier"), np.load(path, allow_pickle=False) as arrays:
        about = json.loads(str(arrays["about"]))
        if about.pop("format") != FORMAT:
            raise ValueError("another format")
        about |= {key: tuple(about[key]) for key in ("class_names", "tokens")}
        return Classifier(**about, **{key: arrays[key] for key in arrays.files if key != "about"})


def probe(
    features,
    labels=None,
    *,
    kind: str = "ridge",
    tokens: str | Sequence[str] = ("cls",),
    balanced: bool = False,
    out: str | os.PathLike | None = None,
) -> Classifier:
    """Fits a classifier to labels: `dinotwins_jax.probe`.

    The regularisation is picked on a held-out fifth of the labels, class by class, and the classifier is
    fitted again to all of them; the temperature of the probabilities is the one most likely there
    (arXiv:1706.04599). If no class has two images nothing is held out.

    Args:
      features: the arrays that `embed` returns, their file, or f32[M, D].
      labels: str[M] ("" for none), i32[M] (-1 for none), {name: label}, or a file .csv or .jsonl with
        the columns path and label; None: those in the features.
      kind: "ridge" or "logistic", the banks of evaluation; "mean", the nearest class mean, for a few
        images a class.
      tokens: the features to use, of those that were embedded: "cls", "mean_patch".
      balanced: every class counts alike, whatever its number of images, in the fit and in the choice.
      out: where to save it, an .npz.
    Returns:
      Classifier.
    Raises:
      ValueError, OSError: fewer than two classes with labels, labels that fit no image, or more than one
        label an image.
    """
    if kind not in KINDS:
        raise ValueError(f"kind is '{kind}': choose {', '.join(KINDS)}")
    if out is not None:
        _checked_out(out)
    arrays = arrays_of(features)
    tokens = (tokens,) if isinstance(tokens, str) else tuple(tokens)
    x = columns_of(arrays, tokens)
    given, names = labels_of(arrays, labels)
    known = np.flatnonzero(given >= 0)
    present = np.unique(given[known])
    if len(present) < 2:
        raise ValueError(
            f"{len(known)} of {len(x)} images have a label, of {len(present)} classes: two are needed"
        )
    names = tuple(names[k] for k in present)
    y = np.searchsorted(present, given[known]).astype(np.int32)
    found = _chosen(x[known], y, names, kind, balanced)
    found = found._replace(tokens=tokens, model=str(arrays.get("model", "")))
    if out is not None:
        found.save(out)
    return found


def _chosen(x: np.ndarray, y: np.ndarray, names, kind: str, balanced: bool) -> Classifier:
    """The classifier with the best regularisation and temperature on held-out images."""
    strengths = REGULARISATIONS if kind != "mean" else (None,)
    fit, held = holdout(y, np.arange(len(y)), HOLDOUT_FRACTION, seed=0)
    best, scores, temperature = 0, {"top1": None, "balanced": None}, 1.0
    if held.size:
        tries = _fitted(x[fit], y[fit], names, kind, strengths, balanced)
        logits = [one.logits(x[held]) for one in tries]
        found = [single_label_scores(some, y[held], {"top1": 1}) for some in logits]
        best = int(np.argmax([one["balanced" if balanced else "top1"] for one in found]))
        scores, temperature = found[best], _temperature(logits[best], y[held])
    (whole,) = _fitted(x, y, names, kind, strengths[best : best + 1], balanced)
    about = {"num_train": len(y), "regularisation": strengths[best], "balanced": balanced}
    about |= {f"holdout_{name}": value for name, value in scores.items()}
    return whole._replace(temperature=temperature, about=about)


def _fitted(x, y, names, kind: str, strengths, balanced: bool) -> list[Classifier]:
    """A classifier for each regularisation."""
    if kind == "mean":
        middle, scale = x.mean(axis=0, dtype=np.float64), np.ones(x.shape[1])
        z = x - middle
        z /= np.maximum(np.linalg.norm(z, axis=1, keepdims=True), 1e-12)
        means = np.stack([z[y == c].mean(axis=0) for c in range(len(names))])
        solved = [(means.T, -0.5 * np.square(means).sum(axis=1))]
    else:
        standard = standardise(x)
        middle, scale = standard
        weights = _class_weights(y) if balanced else None
        target = targets_of(y, len(names)) if kind == "ridge" else y
        more = () if kind == "ridge" else (len(names),)
        solve = ridge if kind == "ridge" else logistic
        solved = zip(*solve(standard(x), target, *more, strengths, weights), strict=True)
    return [
        Classifier(
            *(kind, w.astype(np.float32), b.astype(np.float32)),
            *(middle.astype(np.float32), scale.astype(np.float32)),
            *(1.0, names, (), "", {}),
        )
        for w, b in solved
    ]


def _class_weights(y: np.ndarray) -> np.ndarray:
    """Weight of each image, f64[M], with mean 1: every class has the same sum."""
    counts = np.bincount(y)
    return len(y) / (len(counts) * counts[y])


def _temperature(logits: np.ndarray, y: np.ndarray) -> float:
    """The temperature under which the labels are most likely."""
    rows = np.arange(len(y))
    losses = [-scipy.special.log_softmax(logits / t, axis=1)[rows, y].mean() for t in _TEMPERATURES]
    return float(_TEMPERATURES[int(np.argmin(losses))])
