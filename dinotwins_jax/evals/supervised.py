"""The whole network trained with labels: from random weights the supervised baseline, from a pretrained
backbone full fine-tuning.

Letters: M training images, N test images, C classes.
"""

import contextlib
import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np

from dinotwins_jax.augment.multi_crop import make_random_crop
from dinotwins_jax.evals.features import checksum
from dinotwins_jax.evals.protocol import final_scores, selection_score, summed_up
from dinotwins_jax.evals.splits import holdout, stratified_indices
from dinotwins_jax.evals.supervised_step import (
    SupervisedSettings,
    fit,
    fitting_in_memory,
    make_step,
    predict,
    start_of,
    supervised_loss,
)
from dinotwins_jax.evals.view import View
from dinotwins_jax.files import replace_text
from dinotwins_jax.models.vit import VisionTransformer

VERSION = 2  # of remembered fits; increment it when a fit changes
# The crop and the colours of DINO's global views, whatever the method; blur and solarisation belong to
# methods without labels.
CROPS = {"blur_prob": (0.0, 0.0, 0.0), "solarize_prob": (0.0, 0.0, 0.0)}


class Supervised:
    """Training of one network from one start, for any labels of the same classes.

    A fit's outcome, a score or the test logits' scores, is remembered under everything that it depends
    on: runs with the same random weights share the baseline, and a killed evaluation repeats one fit.
    """

    def __init__(
        self,
        backbone: VisionTransformer,
        params,
        sources: tuple,
        view: View,
        settings: SupervisedSettings,
        *,
        orientation: dict[str, float],
        cache: Path | None,
        data: list[str],
    ):
        """
        Args:
          backbone, params: network and its start; never modified.
          sources: (train, test), labelled. view: of evaluation; its crop is the size of the training's.
          orientation: probabilities flip, vertical_flip and rotate90 of the training views.
          cache: directory of what is remembered; None: nothing is.
          data: `source_checksum` of each source.
        """
        self._backbone, self._view, self._settings = backbone, view, settings
        self._train, self._test = sources
        self._params = jax.device_put(params)
        views = {"global_size": view.crop, "local_size": view.crop, **CROPS, **orientation}
        many = jax.local_device_count() > 1  # a loop over sharded images would gather all of them
        moments = {"mean": view.mean, "std": view.std}
        crop = make_random_crop(**views, **moments, one_by_one=False if many else None)
        self._step = make_step(backbone, crop, settings)
        self._cache = cache if jax.process_count() == 1 else None
        identity = [VERSION, checksum(params), str(backbone.clone(parent=None)), settings, views]
        self._identity = [*identity, view.resize, view.crop, view.canvas_size, moments, data]

    def score(
        self, labels: np.ndarray, test_labels: np.ndarray, fractions, split_seeds, num_classes: int
    ) -> dict[str, dict]:
        """{"10%": scores} of networks trained with each fraction of the labels.

        Learning rate, then length are selected on a held-out fifth of the drawn training images by
        top-1 or mAP, of equal ones by the loss, the rate at the shortest length; then the network is
        trained on all of them.

        Args:
          labels, test_labels: i32[M] and i32[N], -1 = none; or bool[M, C] and bool[N, C].
          fractions: of the labels, each in (0, 1].
          split_seeds: draws of the labels (`stratified_indices`), and of batches and crops.
        Returns:
          for each fraction {"protocol", "fraction", "num_test", "recipe", "top1_mean", "top1_std", … or
          "map_mean", …, "splits": [{"split_seed", "learning_rate", "steps", "holdout_top1" or
          "holdout_map" (None where nothing could be held out), "num_train", "top1", … or "map", …}]}.
        Raises:
          ValueError: no labelled or readable images, a fraction outside (0, 1], or too little memory.
        """
        draws = {}
        for fraction in fractions:
            for seed in split_seeds:
                kept = stratified_indices(labels, fraction, seed)
                draws.setdefault((fraction, kept.tobytes()), (kept, seed))  # all labels: one draw
        count = _Count(self._settings, len(draws), self._view.report)
        found: dict[str, list] = {}
        for (fraction, _), (kept, seed) in draws.items():
            of = self._draw(labels, test_labels, kept, seed, num_classes, count)
            found.setdefault(fraction, []).append({"split_seed": seed} | of)
        recipe = {
            name: list(v) if isinstance(v, tuple) else v
            for name, v in self._settings._asdict().items()
        }
        several = "-multilabel" if labels.ndim == 2 else ""
        return {
            f"{100 * fraction:g}%": {
                "protocol": f"supervised-whole{several}-v1",
                "fraction": fraction,
                "num_test": splits[0]["num_test"],
                "recipe": recipe,
                **summed_up(splits),
                "splits": splits,
            }
            for fraction, splits in found.items()
        }

    def _draw(self, labels, test_labels, kept, seed: int, num_classes: int, count) -> dict:
        """Scores of one draw of the labels: selection, final fit, test."""
        settings = self._settings
        chosen, held = holdout(labels, kept, settings.holdout_fraction, seed)
        lengths = sorted({max(1, round(share * settings.steps)) for share in settings.shares})

        def selection(rate, steps):
            judges = held if held.size else chosen

            def judged(network):
                logits, seen = self._logits(network, self._train, judges)
                if not np.isfinite(logits).all():
                    return {"score": None, "loss": None}
                loss = float(supervised_loss(logits, labels[seen], np.ones(len(seen), bool), 0.0))
                return {"score": selection_score(logits, labels[seen]), "loss": loss}

            return self._fitted(
                (labels, chosen, judges), rate, steps, seed, num_classes, judged, count
            )

        rates = sorted(settings.learning_rates)
        rate, best = _best({rate: selection(rate, lengths[0]) for rate in rates})
        steps, best = _best(
            {lengths[0]: best} | {steps: selection(rate, steps) for steps in lengths[1:]}
        )
        known = np.arange(len(test_labels))
        known = known if test_labels.ndim == 2 else np.flatnonzero(test_labels >= 0)

        def tested(network):
            logits, seen = self._logits(network, self._test, known)
            return final_scores(logits, test_labels[seen], threshold=0.0) | {"num_test": len(seen)}

        final = self._fitted(
            (labels, kept, test_labels), rate, steps, seed, num_classes, tested, count
        )
        metric = "holdout_map" if labels.ndim == 2 else "holdout_top1"
        held_out = best["score"] if held.size else None
        report = {"learning_rate": rate, "steps": steps, metric: held_out, "num_train": len(kept)}
        return report | final

    def _fitted(self, given, rate, steps, seed, num_classes, judge: Callable, count) -> dict:
        """judge(network) after a fit, or what is remembered of it; given: labels, the rows to train on, and
        an array that says on what is judged."""
        digest = hashlib.sha256()
        for part in given:
            digest.update(
                f"{part.dtype}{part.shape}".encode() + np.ascontiguousarray(part).tobytes()
            )
        labels, rows, _ = given
        key = [*self._identity, digest.hexdigest(), rate, steps, seed, num_classes]
        path = None
        if self._cache is not None:
            name = hashlib.sha256(json.dumps(key, default=str).encode()).hexdigest()[:24]
            path = self._cache / f"supervised-{name}.json"
            with contextlib.suppress(OSError, ValueError):  # none, or damaged: fitted again
                found = json.loads(path.read_text())
                count.add(steps * self._settings.batch_size)
                return found
        network = fit(
            self._step,
            start_of(self._backbone, self._params, num_classes),
            self._train,
            labels,
            rows,
            self._settings,
            rate=rate,
            steps=steps,
            seed=seed,
            canvas_size=self._view.canvas_size,
            put=self._view.put,
            advanced=count.add,
        )
        found = judge(network)
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            replace_text(path, json.dumps(found) + "\n")
        return found

    def _logits(self, network, source, indices) -> tuple[np.ndarray, np.ndarray]:
        """Logits f32[n, C] of the readable images, and their indices."""
        quiet = self._view._replace(report=lambda done, total: None)
        logits, seen = [], []
        with fitting_in_memory(f"scoring with config.evals.batch_size={quiet.batch_size}"):
            for views, index in quiet.of(source, indices):
                logits.append(np.asarray(predict(network, views, backbone=self._backbone)))
                seen.append(index)
        if not seen:
            raise ValueError(f"none of the {len(indices)} labelled images was read")
        return np.concatenate(logits), np.concatenate(seen)


class _Count:
    """Images of all fits, counted."""

    def __init__(self, settings: SupervisedSettings, draws: int, report: Callable):
        lengths = sorted({max(1, round(share * settings.steps)) for share in settings.shares})
        fits = len(settings.learning_rates) * lengths[0] + sum(lengths[1:]) + lengths[-1]
        self._done, self._report = 0, report
        self._total = draws * fits * settings.batch_size  # where the longest is selected each time

    def add(self, images: int) -> None:
        self._done += images
        self._report(self._done, max(self._total, self._done))


def _best(scores: dict) -> tuple:
    """(setting, its {"score", "loss"}): the best score, of equal ones the lowest loss. A fit that diverged
    has None, and is never the best."""

    def rank(setting):
        score, loss = (scores[setting][key] for key in ("score", "loss"))
        return (-1.0, 0.0) if score is None else (score, -loss)

    setting = max(scores, key=rank)
    return setting, scores[setting]
