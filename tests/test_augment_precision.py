"""Views with the products of a GPU or TPU, whose matrix units round factors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dinotwins_jax.augment import blur, ops
from dinotwins_jax.augment.multi_crop import make_multi_crop

VIEWS = {"global_size": 32, "local_size": 16, "num_local": 0}
# No solarisation: at its threshold any difference becomes one of many levels.
DRAWN = {"jitter_prob": 1.0, "blur_prob": (1.0, 1.0, 1.0), "solarize_prob": (0.0, 0.0, 0.0)}
UNIT = {"mean": (0.0,) * 3, "std": (1.0,) * 3}
IMAGES = np.random.default_rng(0).integers(0, 256, (4, 48, 48, 3), dtype=np.uint8)
IMAGES[0, :24], IMAGES[0, 24:] = 255, 0  # an edge
IMAGES[1] = 200  # uniform: the sum of the weights


def rounded(x, bits):
    """f32 with `bits` bits of mantissa, the leading one included."""
    dropped = 24 - bits
    raw = jax.lax.bitcast_convert_type(x, jnp.uint32) + jnp.uint32(1 << (dropped - 1))
    return jax.lax.bitcast_convert_type(raw >> dropped << dropped, jnp.float32)


def in_parts(subscripts, a, b):
    """A TPU's HIGH: three products of the bfloat16 parts of the factors."""
    (a, a_rest), (b, b_rest) = ((rounded(x, 8), x - rounded(x, 8)) for x in (a, b))
    products = [(a, b), (a, rounded(b_rest, 8)), (rounded(a_rest, 8), b)]
    return sum(jnp.einsum(subscripts, *pair) for pair in products)


def with_factors_of(bits):
    return lambda subscripts, a, b: jnp.einsum(subscripts, rounded(a, bits), rounded(b, bits))


def views():
    crop = make_multi_crop(one_by_one=False, **VIEWS, **DRAWN, **UNIT)
    sizes = jnp.full((len(IMAGES), 2), 48)
    keys = jax.random.split(jax.random.key(0), len(IMAGES))
    return jax.jit(crop)(jnp.asarray(IMAGES), sizes, keys)["global_crops"]


@pytest.fixture(scope="module")
def exact():
    return views()


def difference(monkeypatch, exact, product):
    """Largest and mean difference in 8-bit levels."""
    monkeypatch.setattr(ops, "product", product)
    monkeypatch.setattr(blur, "product", product)
    found = 255 * np.abs(np.asarray(views() - exact))
    return found.max(), found.mean()


@pytest.mark.parametrize(
    ("product", "largest", "mean"),
    [(with_factors_of(11), 0.5, 0.1), (in_parts, 0.05, 0.002)],
    ids=["GPU, TF32", "TPU, three products"],
)
def test_products_of_an_accelerator_move_no_pixel_by_half_a_level(
    monkeypatch, exact, product, largest, mean
):
    found = difference(monkeypatch, exact, product)
    assert found[0] < largest
    assert found[1] < mean


@pytest.mark.slow
def test_a_tpus_default_would_be_visible(monkeypatch, exact):
    """So the precision is not left to the device."""
    assert difference(monkeypatch, exact, with_factors_of(8))[0] > 1.0
