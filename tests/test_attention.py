"""Tests of dinotwins_jax.evals.attention."""

import struct
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import refs_attention as refs

from dinotwins_jax.evals import attention, pictures
from dinotwins_jax.evals.object_masks import grid_jaccards

GOLDEN = Path(__file__).parent / "golden"


@pytest.mark.parametrize("keep", [60, 30])
def test_mass_mask_equals_the_official_code(keep):
    data = np.load(GOLDEN / "attention_mass.npz")
    for maps in (data["attention"], jnp.asarray(data["attention"] * 7.0)):
        np.testing.assert_array_equal(
            attention.mass_mask(maps, keep=keep / 100), data[f"mask_{keep}"]
        )


@pytest.mark.parametrize(("name", "width"), [("sq", 480), ("rect", 368)])
def test_masks_and_their_overlap_with_objects_equal_the_official_code_at_480(name, width):
    data = np.load(GOLDEN / "attention_480.npz")
    kept = attention.mass_mask(data[f"{name}.att"], keep=0.6)
    np.testing.assert_array_equal(kept, data[f"{name}.mask"])
    objects = np.unpackbits(data[f"{name}.masks"], axis=-1)[..., :width].astype(bool)
    np.testing.assert_allclose(grid_jaccards(kept, objects), data[f"{name}.iou"], atol=1e-12)


def test_mass_mask_keeps_the_fewest_patches_with_that_mass():
    maps = np.array([[[0.1, 0.5], [0.25, 0.15]], [[0.0, 0.0], [0.0, 0.0]]])
    expected = [[[False, True], [True, False]], [[False, False], [False, False]]]
    assert attention.mass_mask(maps, keep=0.6).tolist() == expected
    for keep in (0.0, 1.1):
        with pytest.raises(ValueError, match=f"keep={keep}"):
            attention.mass_mask(maps, keep=keep)


def test_cls_attention_skips_class_token_and_registers():
    full = np.arange(2 * 3 * 9 * 9, dtype=np.float32).reshape(2, 3, 9, 9)
    maps = attention.cls_attention(full, (2, 3), num_prefix_tokens=3)
    assert maps.shape == (2, 3, 2, 3)
    for b, head, row, column in np.ndindex(2, 3, 2, 3):
        assert maps[b, head, row, column] == full[b, head, 0, 3 + 3 * row + column]
    with pytest.raises(ValueError, match=r"attention has 9 tokens.* tokens: 7"):
        attention.cls_attention(full, (2, 3))


@pytest.mark.parametrize("prefix", [1, 3])
def test_rollout_equals_the_plain_loop(prefix):
    rng = np.random.RandomState(prefix)
    T = prefix + 6
    attentions = [rng.rand(2, heads, T, T) ** 2 for heads in (3, 1, 2)]
    attentions = [np.float32(a / a.sum(axis=-1, keepdims=True)) for a in attentions]
    maps = attention.rollout(attentions, (2, 3), prefix)
    assert maps.shape == (2, 2, 3)
    np.testing.assert_allclose(maps, refs.rollout(attentions, (2, 3), prefix), rtol=1e-5)
    with pytest.raises(ValueError, match="at least one block"):
        attention.rollout([], (2, 3))
    with pytest.raises(ValueError, match=f"attention has {T} tokens"):
        attention.rollout(attentions, (3, 3), prefix)


def test_rollout_of_known_blocks():
    """Attention to itself only leaves the class token; attention to patch 1 mixes in half of it."""
    itself = jnp.eye(5)[None, None]
    assert not attention.rollout([itself, itself], (2, 2)).any()
    elsewhere = itself.at[0, 0, 0].set(jax.nn.one_hot(2, 5))
    expected = [[[0.0, 0.5], [0.0, 0.0]]]
    assert attention.rollout([itself, elsewhere], (2, 2)).tolist() == expected
    both = attention.rollout([elsewhere, elsewhere], (2, 2))
    assert both.tolist() == [[[0.0, 0.75], [0.0, 0.0]]]


def test_outline_is_the_border_of_the_mask():
    mask = np.zeros((3, 4), bool)
    mask[1, 1:3] = True
    sides = {((1, 1), (2, 1)), ((2, 1), (3, 1)), ((1, 2), (2, 2)), ((2, 2), (3, 2))}
    assert set(pictures.mask_edges(mask)) == sides | {((1, 1), (1, 2)), ((3, 1), (3, 2))}


def test_attention_grid_writes_a_png(tmp_path):
    pytest.importorskip("matplotlib")
    rng = np.random.RandomState(0)
    images = rng.randint(0, 255, (2, 32, 48, 3), np.uint8)
    maps = rng.rand(2, 8, 2, 3)
    path = tmp_path / "attention.png"
    attention.attention_grid(path, images, maps, titles=["one", "two"])
    content = path.read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", content[16:24])
    # 9 columns (six of the eight heads) of 1.5 x 1 inch at 150 dpi, two rows, and margins.
    assert 9 * 225 < width < 9 * 240 and 2 * 150 < height < 2 * 240
    with pytest.raises(ValueError, match="1 titles for 2 images"):
        attention.attention_grid(path, images, maps, titles=["one"])
    with pytest.raises(ValueError, match=r"images \(1, 32, 48, 3\)"):
        attention.attention_grid(path, images[:1], maps)


def test_comparison_writes_a_png_with_two_columns_a_run(tmp_path):
    pytest.importorskip("matplotlib")
    rng = np.random.RandomState(0)
    images = rng.randint(0, 255, (2, 32, 48, 3), np.uint8)
    runs = {"DINO": rng.rand(2, 3, 2, 3), "DINO + Barlow Twins": rng.rand(2, 6, 4, 6)}
    path = tmp_path / "comparison.png"
    attention.attention_comparison(path, images, runs, ["one", "two"])
    content = path.read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", content[16:24])
    assert 5 * 225 < width < 5 * 245 and 2 * 150 < height < 2 * 240
    with pytest.raises(ValueError, match=r"attention \(1, 3, 2, 3\)"):
        attention.attention_comparison(path, images, {"DINO": runs["DINO"][:1]})
    with pytest.raises(ValueError, match="1 titles for 2 images"):
        attention.attention_comparison(path, images, runs, ["one"])
    with pytest.raises(ValueError, match="no images to draw"):
        attention.attention_comparison(path, images[:0], {})
