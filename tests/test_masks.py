"""Patch masks: the official blocks, draw by draw, and their spread of mask ratios."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import refs_family as refs

from dinotwins_jax.losses.base import Masks
from dinotwins_jax.training import masks
from dinotwins_jax.training.masks import num_rows

blocks = jax.jit(masks.blocks, static_argnums=(2, 3))
draw_masks = jax.jit(masks.draw_masks, static_argnums=(0, 1, 4))


@pytest.mark.parametrize("target", [0, 3, 8, 30, 98])
def test_blocks_are_the_official_ones_draw_by_draw(target):
    for seed in range(4):
        key, tries = jax.random.key(seed), iter(range(10_000))

        def draws(key=key, tries=tries):
            return map(float, jax.random.uniform(jax.random.fold_in(key, next(tries)), (4,)))

        expected = refs.block_mask(draws, target, (14, 14), 4)
        ours = blocks(key, jnp.int32(target), (14, 14), 4)
        np.testing.assert_array_equal(ours, expected)
        assert ours.sum() <= target


def test_half_of_the_crops_climb_the_ladder():
    spec, N = Masks(), 14 * 14
    masked = draw_masks(spec, (14, 14), jax.random.key(0), jnp.arange(32), 32)
    hidden = np.asarray(masked.where.sum(-1)).reshape(-1)
    assert masked.where.shape == (32, 2, N)
    assert 28 <= (hidden > 0).sum() <= 32  # the smallest of the 32 targets may find no block
    borders = np.linspace(0.1, 0.5, 33)
    assert np.all(
        np.sort(hidden[hidden > 0])[::-1] <= np.floor(N * borders[:0:-1])[: (hidden > 0).sum()]
    )
    assert 0.13 < hidden.mean() / N < 0.15  # a half of 0.3, less what did not fit


def test_rows_are_the_hidden_patches_and_weights_sum_to_one_a_crop():
    masked = draw_masks(Masks(), (6, 6), jax.random.key(1), jnp.arange(8), 8)
    where, weight = np.asarray(masked.where).reshape(16, 36), np.asarray(masked.weight)
    real = weight > 0
    np.testing.assert_array_equal(np.sort(masked.row[real]), np.flatnonzero(where))
    crops = np.asarray(masked.row[real]) // 36
    sums = np.bincount(crops, weight[real], 16)
    np.testing.assert_allclose(sums[where.any(1)], 1.0, rtol=1e-6)
    assert len(weight) == num_rows(Masks(), 36, 8, 8) >= real.sum()


def test_an_image_s_mask_is_that_of_its_place_in_the_global_batch():
    key = jax.random.key(2)
    whole = draw_masks(Masks(), (6, 6), key, jnp.arange(8), 8)
    part = draw_masks(Masks(), (6, 6), key, jnp.arange(4, 8), 8)
    np.testing.assert_array_equal(part.where, whole.where[4:])
    assert int((part.weight > 0).sum()) == int(part.where.sum())
    other = draw_masks(Masks(), (6, 6), jax.random.key(3), jnp.arange(8), 8)
    assert np.any(other.where != whole.where)
