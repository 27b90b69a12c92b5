"""The log: means, the stop on NaN, collapse warnings."""

import jax.numpy as jnp
import pytest

from dinotwins_jax.logs.metrics import CollapseWatch, Interval


def metrics(total=0, in_a_row=0, **values):
    values = {
        "loss": 1.0,
        "grad_norm": 1.0,
        "skipped/total": total,
        "skipped/in_a_row": in_a_row,
    } | values
    return {k: jnp.float32(v) for k, v in values.items()}


def test_interval_gives_means_and_speed():
    interval = Interval()
    interval.add(metrics(loss=1.0), images=8, wait_s=0.0)
    interval.add(metrics(loss=3.0), images=8, wait_s=0.0)
    means = interval.fetch()
    assert means["loss"] == 2.0 and means["grad_norm"] == 1.0 and means["skipped"] == 0
    assert means["images_per_s"] > 0 and means["data_wait"] == 0.0


def test_skipped_steps_are_counted_and_not_averaged():
    interval = Interval()
    interval.add(metrics(loss=1.0, total=4), 8, 0.0)
    interval.add(metrics(loss=float("nan"), total=5, in_a_row=1), 8, 0.0)
    assert interval.fetch()["loss"] == 1.0 and interval.fetch()["skipped"] == 5
    interval = Interval()
    interval.add(metrics(loss=float("inf"), total=6, in_a_row=2), 8, 0.0)
    assert set(interval.fetch()) == {"skipped", "images_per_s", "data_wait"}


HEALTHY = {
    "dino/teacher_entropy": 0.5,
    "dino/marginal_entropy": 0.9,
    "dino/kl": 0.4,
    "effective_rank": 20.0,
    "feature_std": 0.8,
    "barlow_twins/diag_mean": 0.8,
    "barlow_twins/off_diag_rms": 0.1,
}


@pytest.mark.parametrize(
    ("sick", "named"),
    [
        ({"dino/teacher_entropy": 1.0, "dino/kl": 1e-5}, "uniform collapse"),
        ({"dino/marginal_entropy": 0.01}, "one-prototype collapse"),
        ({"effective_rank": 1.01}, "dimensional collapse"),
        ({"feature_std": 1e-3}, "constant features"),
        ({"barlow_twins/diag_mean": 0.0}, "share nothing"),
        ({"barlow_twins/off_diag_rms": 0.99}, "redundant"),
    ],
)
def test_each_collapse_is_named_once_after_it_has_held(sick, named):
    watch = CollapseWatch(from_step=10, patience=3)
    assert all(not watch.check(step, HEALTHY | sick) for step in range(10))  # warm-up
    said = [watch.check(step, HEALTHY | sick) for step in range(10, 20)]
    assert [len(s) for s in said] == [0, 0, 1] + [0] * 7
    assert named in said[2][0] and "step 12" in said[2][0] and "To try:" in said[2][0]


def test_a_term_under_another_name_is_watched_too():
    watch = CollapseWatch(from_step=0, patience=1)
    means = {"loss": 1.0, "a/teacher_entropy": 1.0, "b/kl": 0.0, "distill/marginal_entropy": 0.01}
    (warning,) = watch.check(1, means)  # a and b are two terms: no uniform collapse
    assert "one-prototype" in warning and "distill/marginal_entropy = 0.01" in warning


def test_a_healthy_run_and_a_passing_dip_are_left_alone():
    watch = CollapseWatch(from_step=0, patience=2)
    for step in range(10):
        dip = {"effective_rank": 1.0} if step % 2 else {}
        assert watch.check(step, HEALTHY | dip) == []
