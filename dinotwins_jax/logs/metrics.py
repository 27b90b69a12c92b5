"""Running means of the metrics, and collapse warnings derived from them."""

import time

import jax
import numpy as np


class Interval:
    """Metrics since the last log; they stay on the device until `fetch`."""

    def __init__(self):
        self._steps: list[dict] = []
        self._start, self.wait_s, self.images = time.perf_counter(), 0.0, 0

    def add(self, metrics: dict, images: int, wait_s: float) -> None:
        """metrics: f32[] on the device; wait_s: seconds that the device waited for this batch."""
        self._steps.append(metrics)
        self.images += images
        self.wait_s += wait_s

    def fetch(self) -> dict[str, float]:
        """Means over the steps that were not skipped, and for the whole interval images_per_s,
        data_wait (fraction of the time) and skipped (steps of the run so far with a non-finite loss or
        gradient)."""
        steps = jax.device_get(self._steps)
        if not steps:
            return {}
        seconds = time.perf_counter() - self._start
        kept = [m for m in steps if m["skipped/in_a_row"] == 0]
        names = [name for name in steps[0] if not name.startswith("skipped/")]
        means = {name: float(np.mean([m[name] for m in kept])) for name in names if kept}
        return means | {
            "skipped": int(steps[-1]["skipped/total"]),
            "images_per_s": self.images / seconds,
            "data_wait": self.wait_s / seconds,
        }


# message, conditions (metric, "<" or ">", threshold) that must all hold, setting to try
_COLLAPSE = [
    (
        "uniform collapse: the teacher gives every prototype the same probability",
        [("teacher_entropy", ">", 0.995), ("kl", "<", 1e-3)],
        "lower teacher.temp and teacher.warmup_temp, or raise loss.dino.center_momentum",
    ),
    (
        "one-prototype collapse: the teacher gives all images the same prototype",
        [("marginal_entropy", "<", 0.05)],
        "raise teacher.warmup_temp, lower loss.dino.center_momentum, or freeze the last layer longer",
    ),
    (
        "dimensional collapse: the backbone's features lie on a line",
        [("effective_rank", "<", 1.1)],
        "lower optim.lr or lengthen optim.warmup_epochs; with Barlow Twins raise its weight, with BYOL "
        "optim.predictor_lr_mult",
    ),
    (
        "constant features: all images have nearly the same feature",
        [("feature_std", "<", 0.01)],
        "lower optim.lr or lengthen optim.warmup_epochs",
    ),
    (
        "views that share nothing: Barlow Twins' diagonal stays near zero",
        [("diag_mean", "<", 0.02)],
        "raise optim.lr or weaken the crops (views.global_scale)",
    ),
    (
        "redundant projection: Barlow Twins' features are copies of each other",
        [("off_diag_rms", ">", 0.95)],
        "raise loss.barlow_twins.lambd or the batch size",
    ),
]

# The metrics that these conditions use.
DIAGNOSTICS = tuple(
    dict.fromkeys(metric for _, conditions, _ in _COLLAPSE for metric, _, _ in conditions)
)


class CollapseWatch:
    """Warns once per kind of collapse, with a setting to try.

    The conditions must hold for `patience` logs in a row after step `from_step` (warm-up).
    """

    def __init__(self, from_step: int, patience: int = 3):
        self._from_step, self._patience = from_step, patience
        self._held = dict.fromkeys((name for name, _, _ in _COLLAPSE), 0)

    def check(self, step: int, means: dict[str, float]) -> list[str]:
        """Returns the warnings triggered by this log."""
        due = []
        for name, conditions, knob in _COLLAPSE:
            sick = [] if step < self._from_step else _terms_where(conditions, means)
            self._held[name] = self._held[name] + 1 if sick else 0
            if self._held[name] == self._patience:
                names = [sick[0] + metric for metric, _, _ in conditions]
                values = ", ".join(f"{metric} = {means[metric]:.4g}" for metric in names)
                due.append(f"step {step}: {name} ({values}). To try: {knob}.")
        return due


def _terms_where(conditions, means: dict[str, float]) -> list[str]:
    """Prefixes ("" or "<term of the loss>/") under which all metrics exist and all conditions hold."""
    prefixes = dict.fromkeys(name[: name.rfind("/") + 1] for name in means)
    return [
        prefix
        for prefix in prefixes
        if all(
            prefix + metric in means
            and (means[prefix + metric] < bound if sign == "<" else means[prefix + metric] > bound)
            for metric, sign, bound in conditions
        )
    ]
