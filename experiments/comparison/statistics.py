"""Means over training seeds, and paired t-tests of their differences."""

import numpy as np
from scipy import stats

LEVEL = 0.95  # of the confidence interval


def mean_std(values: list[float]) -> tuple[float, float | None]:
    """Mean and standard deviation (n - 1) over seeds; None for one seed."""
    return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else None


def paired(ours: list[float], theirs: list[float]) -> dict:
    """Paired t-test over seeds of ours - theirs.

    Args:
      ours, theirs: one value per seed, in the same order, at least two.
    Returns:
      {"difference", "low", "high" (95% confidence), "p", "verdict": "better", "worse" or "level"};
      level means that the interval contains 0.
    Raises:
      ValueError: fewer than two seeds, different numbers of them, or a non-finite value.
    """
    if len(ours) != len(theirs) or len(ours) < 2:
        raise ValueError(f"{len(ours)} and {len(theirs)} values: pairs of at least two seeds")
    gaps = np.asarray(ours, np.float64) - np.asarray(theirs, np.float64)
    if not np.isfinite(gaps).all():
        raise ValueError(f"not finite: {ours} and {theirs}")
    difference = float(gaps.mean())
    if np.ptp(gaps) == 0.0:  # no spread: no test, only the difference
        low = high = difference
        p = 1.0 if difference == 0.0 else 0.0
    else:
        test = stats.ttest_1samp(gaps, 0.0)
        interval = test.confidence_interval(LEVEL)
        low, high, p = float(interval.low), float(interval.high), float(test.pvalue)
    verdict = "level" if low <= 0.0 <= high else "better" if difference > 0 else "worse"
    return {"difference": difference, "low": low, "high": high, "p": p, "verdict": verdict}
