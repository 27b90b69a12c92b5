"""Tests of dinotwins_jax.evals.splits."""

import numpy as np
import pytest

from dinotwins_jax.evals import splits


def test_stratified_indices_counts():
    labels = np.repeat([0, 1, 2, -1], [40, 5, 1, 30])
    chosen = splits.stratified_indices(labels, 0.1, seed=3)
    assert chosen.dtype == np.int64
    assert (np.diff(chosen) > 0).all()
    assert np.bincount(labels[chosen]).tolist() == [4, 1, 1]  # -1 would raise in bincount
    more = splits.stratified_indices(labels, 0.1, seed=3, minimum=3)
    assert np.bincount(labels[more]).tolist() == [4, 3, 1]
    everything = splits.stratified_indices(labels, 1.0, seed=3)
    np.testing.assert_array_equal(everything, np.flatnonzero(labels >= 0))


def test_stratified_indices_are_frozen_nested_and_independent_between_classes():
    labels = np.arange(60) % 3
    chosen = splits.stratified_indices(labels, 0.1, seed=0)
    # Written down once: a published split must never change with a library.
    assert chosen.tolist() == [14, 22, 30, 35, 46, 48]
    assert set(chosen) < set(splits.stratified_indices(labels, 0.3, seed=0))
    assert chosen.tolist() != splits.stratified_indices(labels, 0.1, seed=1).tolist()
    without_class_0 = np.where(labels == 0, -1, labels)
    np.testing.assert_array_equal(
        splits.stratified_indices(without_class_0, 0.1, seed=0), chosen[labels[chosen] != 0]
    )


def drawn_class_by_class(labels, indices, seed, count):
    """A new stream and a search through all images for each class."""
    drawn = []
    for category in np.unique(labels[indices]):
        members = indices[labels[indices] == category]
        order = np.random.RandomState([seed, int(category)]).permutation(len(members))
        drawn += members[order[: count(len(members))]].tolist()
    return sorted(drawn)


@pytest.mark.parametrize("seed", [0, 7, 2**32 - 1])
def test_draws_of_unbalanced_labels_are_those_of_a_stream_a_class(seed):
    rng = np.random.RandomState(seed % 1000)
    labels = rng.choice(30, 500, p=rng.dirichlet(np.full(30, 0.3))).astype(np.int32)
    labels[::9] = -1
    known = np.flatnonzero(labels >= 0)
    for fraction, minimum in ((0.05, 1), (0.3, 1), (0.01, 7), (1.0, 1)):
        expected = drawn_class_by_class(
            labels, known, seed, lambda n, f=fraction, m=minimum: min(n, max(m, round(f * n)))
        )
        assert splits.stratified_indices(labels, fraction, seed, minimum).tolist() == expected
    some = np.sort(rng.choice(known, 200, replace=False))
    _, held = splits.holdout(labels, some, 0.2, seed)
    expected = drawn_class_by_class(
        labels, some, seed, lambda n: min(n - 1, max(1, round(0.2 * n)))
    )
    assert held.tolist() == expected


def test_holdout_is_a_stratified_partition():
    labels = np.repeat([0, 1, 2, 3, -1], [20, 3, 2, 1, 4])
    indices = np.arange(len(labels))[::-1]
    fit, held = splits.holdout(labels, indices, 0.2, seed=0)
    assert np.bincount(labels[held], minlength=4).tolist() == [4, 1, 1, 0]
    np.testing.assert_array_equal(np.sort(np.concatenate([fit, held])), np.flatnonzero(labels >= 0))
    again = splits.holdout(labels, indices[::-1], 0.2, seed=0)
    np.testing.assert_array_equal(held, again[1])


def test_split_errors_name_the_value():
    for fraction in (0.0, 1.5, float("nan")):
        with pytest.raises(ValueError, match=f"fraction={fraction}"):
            splits.stratified_indices(np.zeros(4, int), fraction, 0)
    with pytest.raises(ValueError, match=r"fraction=1.0 held out"):
        splits.holdout(np.zeros(4, int), np.arange(4), 1.0, 0)
    with pytest.raises(ValueError, match="no labelled images"):
        splits.stratified_indices(np.full(4, -1), 0.5, 0)


def shows(num_images=400, seed=0):
    """bool[M, 4]: a common class, two rarer ones, a very rare one; some images show nothing."""
    rng = np.random.RandomState(seed)
    return rng.uniform(size=(num_images, 4)) < [0.6, 0.2, 0.1, 0.015]


@pytest.mark.parametrize("seed", range(5))
def test_several_labels_keep_their_shares_and_nest(seed):
    labels = shows()
    small, large = (splits.stratified_indices(labels, f, seed) for f in (0.1, 0.5))
    assert set(small) < set(large)
    for kept, fraction in ((small, 0.1), (large, 0.5)):
        assert len(kept) == round(fraction * len(labels))
        assert labels[kept].any(axis=0).all()
        wanted = fraction * labels.sum(axis=0)
        assert (np.abs(labels[kept].sum(axis=0) - wanted) <= 2).all()
        nothing = ~labels.any(axis=1)
        assert nothing[kept].sum() == pytest.approx(fraction * nothing.sum(), abs=2)
    fit, held = splits.holdout(labels, large, 0.2, seed)
    assert sorted([*fit, *held]) == sorted(large) and labels[fit].any(axis=0).all()


def test_several_labels_are_frozen():
    labels = shows(40)
    chosen = splits.stratified_indices(labels, 0.2, seed=0)
    # Written down once: a published split must never change with a library.
    assert chosen.tolist() == [0, 3, 9, 14, 21, 24, 32, 38]
    assert chosen.tolist() != splits.stratified_indices(labels, 0.2, seed=1).tolist()


def test_every_class_has_its_minimum_and_no_class_loses_its_last_example():
    labels = np.zeros((60, 4), bool)
    labels[:50, 0] = labels[48:52, 1] = labels[3, 2] = True  # class 3 has no image
    assert labels[splits.stratified_indices(labels, 0.02, 0)].sum(axis=0).tolist()[1:] == [1, 1, 0]
    three = splits.stratified_indices(labels, 0.02, 0, minimum=3)
    assert (labels[three].sum(axis=0) >= [3, 3, 1, 0]).all()
    fit, held = splits.holdout(labels, np.arange(60), 0.2, 0)
    assert labels[fit].any(axis=0).tolist() == [True, True, True, False]
    assert labels[held].any(axis=0).tolist() == [True, True, False, False]


def test_images_without_a_class_are_not_held_out_alone():
    labels = np.zeros((9, 3), bool)
    labels[:3] = np.eye(3)
    fit, held = splits.holdout(labels, np.arange(9), 0.5, 0)
    assert held.size == 0 and fit.tolist() == list(range(9))
    for draw in (
        lambda none: splits.stratified_indices(none, 0.5, 0),
        lambda none: splits.holdout(none, np.arange(9), 0.5, 0),
    ):
        with pytest.raises(ValueError, match="none of the 9 given has a class"):
            draw(np.zeros((9, 3), bool))


def test_pictures_show_several_classes():
    labels = np.repeat([0, 1, 2, 3, -1], [10, 5, 2, 1, 4])  # sorted by class, as folders are
    assert splits.spread_over_classes(labels, 22, 3).tolist() == [0, 15, 17]  # of 0, 2 and 3
    assert splits.spread_over_classes(labels, 22, 4).tolist() == [0, 10, 15, 17]
    assert splits.spread_over_classes(labels, 22, 7).tolist() == [0, 10, 15, 17, 1, 11, 16]
    everything = splits.spread_over_classes(labels, 22, 50)
    assert sorted(everything) == list(range(22)) and labels[everything[-4:]].tolist() == [-1] * 4
    shuffled = np.random.default_rng(0).permutation(labels)
    for count in (1, 3, 4, 9):
        chosen = splits.spread_over_classes(shuffled, 22, count)
        assert chosen.dtype == np.int64 and len(set(chosen)) == count
        assert len(set(shuffled[chosen])) == min(count, 4)


def test_pictures_without_labels_are_spread_evenly():
    assert splits.spread_over_classes(None, 11, 3).tolist() == [0, 5, 10]
    assert splits.spread_over_classes(None, 2, 8).tolist() == [0, 1]
    assert splits.spread_over_classes(np.full(5, -1), 5, 2).tolist() == [0, 1]
