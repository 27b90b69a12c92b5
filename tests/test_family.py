"""The family's losses against official numbers and plain loops, under jit and over devices."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import refs_family as refs
import scipy.special
from golden_files import assert_close, load

from dinotwins_jax.losses import make_loss
from dinotwins_jax.losses.byol import byol_loss
from dinotwins_jax.losses.dino import teacher_probabilities
from dinotwins_jax.losses.gram import gram_loss
from dinotwins_jax.losses.ibot import (
    ibot_patch_loss,
    masked_cross_entropy,
    update_center,
)
from dinotwins_jax.losses.koleo import koleo_loss
from dinotwins_jax.losses.simclr import nt_xent_loss
from dinotwins_jax.losses.sinkhorn import sinkhorn_knopp
from dinotwins_jax.losses.vicreg import vicreg_loss


def normal(*shape, seed=0, scale=1.0):
    return scale * np.random.default_rng(seed).normal(size=shape)


def test_sinkhorn_equals_official():
    golden = load("sinkhorn_knopp")
    ours = sinkhorn_knopp(golden["logits"], float(golden["temp"]))
    assert_close(ours, golden["assignments"])


def test_koleo_equals_official():
    golden = load("koleo")
    loss, grad = jax.value_and_grad(koleo_loss)(golden["x"])
    assert_close(loss, golden["loss"])
    assert_close(grad, golden["grad"])


def test_ibot_equals_official():
    golden = load("ibot")
    temps = float(golden["student_temp"]), float(golden["teacher_temp"])
    loss, grad = jax.value_and_grad(ibot_patch_loss)(
        golden["student_logits"],
        golden["teacher_logits"],
        golden["center"],
        golden["masks"],
        *temps,
    )
    assert_close(loss, golden["loss"])
    assert_close(grad, golden["grad"])


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("image", {}),
        ("batch", {"level": "batch"}),
        ("image_no_neg", {"remove_negatives": True}),
        ("image_unnormalised", {"normalise": False}),
    ],
)
def test_gram_equals_official(name, options):
    golden = load("gram")
    loss, grad = jax.value_and_grad(partial(gram_loss, **options))(
        golden["student"], golden["teacher"]
    )
    assert_close(loss, golden[f"loss_{name}"])
    assert_close(grad, golden[f"grad_{name}"])


PLAIN = {
    "sinkhorn": (
        partial(sinkhorn_knopp, temp=0.3),
        partial(refs.sinkhorn_knopp, temp=0.3),
        [(10, 6)],
    ),
    "koleo": (koleo_loss, refs.koleo_loss, [(7, 5)]),
    "byol": (byol_loss, refs.byol_loss, [(5, 2, 6)] * 2),
    "simclr": (
        lambda z: nt_xent_loss(z, 0.2)[0],
        partial(refs.nt_xent_loss, temp=0.2),
        [(6, 2, 5)],
    ),
    "vicreg": (lambda *z: vicreg_loss(*z)[0], refs.vicreg_loss, [(9, 4)] * 2),
}


@pytest.mark.parametrize("name", PLAIN)
def test_equals_the_plain_loop(name):
    ours, plain, shapes = PLAIN[name]
    inputs = [normal(*shape, seed=i, scale=0.7) for i, shape in enumerate(shapes)]
    assert_close(ours(*map(jnp.float32, inputs)), plain(*inputs), 1e-5)


@pytest.mark.parametrize("name", ["koleo", "byol", "simclr", "vicreg"])
def test_gradient_equals_differences_of_the_plain_loop(name):
    ours, plain, shapes = PLAIN[name]
    inputs = [normal(*shape, seed=i, scale=0.7) for i, shape in enumerate(shapes)]
    grad = jax.grad(ours)(*map(jnp.float32, inputs))
    differences = np.zeros(shapes[0])
    for place in np.ndindex(*shapes[0]):
        moved = [np.array(inputs[0]) for _ in range(2)]
        moved[0][place] += 1e-5
        moved[1][place] -= 1e-5
        up, down = (plain(x, *inputs[1:]) for x in moved)
        differences[place] = (up - down) / 2e-5
    assert_close(grad, differences, 1e-4)


@pytest.mark.parametrize(
    "name",
    [n if n == "vicreg" else pytest.param(n, marks=pytest.mark.slow) for n in PLAIN],
)
def test_four_devices_see_the_global_batch(name):
    """Under pmap, with a fourth of the images on each device; gradients as the step averages them."""
    ours, _, shapes = PLAIN[name]
    inputs = [jnp.float32(normal(8, *shape[1:], seed=i)) for i, shape in enumerate(shapes)]
    axis = {
        "sinkhorn": partial(sinkhorn_knopp, temp=0.3, axis_name="data"),
        "koleo": partial(koleo_loss, axis_name="data"),
        "byol": partial(byol_loss, axis_name="data"),
        "simclr": lambda z: nt_xent_loss(z, 0.2, axis_name="data")[0],
        "vicreg": lambda *z: vicreg_loss(*z, axis_name="data")[0],
    }[name]
    parts = [x.reshape(4, 2, *x.shape[1:]) for x in inputs]
    value = jax.pmap(axis, axis_name="data", devices=jax.devices()[:4])(*parts)
    if name == "sinkhorn":
        return assert_close(value.reshape(8, -1), ours(*inputs), 1e-5)
    assert_close(value[0], ours(*inputs), 1e-5)
    # The parameter is a factor of all inputs: its gradient crosses the collectives.
    by_factor = jax.pmap(
        lambda *x: jax.lax.pmean(jax.grad(lambda f: axis(jnp.sin(f * x[0]), *x[1:]))(1.3), "data"),
        axis_name="data",
        devices=jax.devices()[:4],
    )(*parts)
    expected = jax.grad(lambda f: ours(jnp.sin(f * inputs[0]), *inputs[1:]))(1.3)
    assert_close(by_factor[0], expected, 1e-4)


def test_gram_of_a_batch_over_devices():
    student, teacher = jnp.float32(normal(2, 4, 3, 5))
    whole = gram_loss(student, teacher, "batch")
    parts = [x.reshape(2, 2, 3, 5) for x in (student, teacher)]
    mapped = jax.pmap(
        lambda s, t: gram_loss(s, t, "batch", axis_name="data"),
        axis_name="data",
        devices=jax.devices()[:2],
    )(*parts)
    assert_close(mapped[0], whole, 1e-5)


def test_sinkhorn_shares_prototypes_equally_and_ignores_padding():
    logits = normal(12, 4, scale=3.0)
    q = np.asarray(sinkhorn_knopp(jnp.float32(logits), 1.0, num_iters=200))
    np.testing.assert_allclose(q.sum(0), 3.0, rtol=1e-4)
    np.testing.assert_allclose(q.sum(1), 1.0, rtol=1e-4)
    padded = np.concatenate([logits, normal(5, 4, seed=9, scale=50.0)])
    weight = jnp.arange(17) < 12
    ours = sinkhorn_knopp(jnp.float32(padded), 1.0, num_iters=200, weight=weight)
    assert_close(ours[:12], q, 1e-5)
    assert not np.any(ours[12:])
    assert np.all(np.isfinite(sinkhorn_knopp(jnp.float32(1e4 * logits), 0.04)))  # no overflow


@pytest.mark.parametrize("depth", [70.0, 1e4])
def test_sinkhorn_assigns_an_image_whose_logits_lie_far_below_the_others(depth):
    """Its entries would all be zero beside the others'; float64 and logarithms know the answer."""
    logits = normal(6, 4, scale=3.0)
    logits[2] -= depth
    ours = np.asarray(sinkhorn_knopp(jnp.float32(logits), 1.0))
    q = logits
    for _ in range(3):
        q = q - scipy.special.logsumexp(q, axis=0)
        q = q - scipy.special.logsumexp(q, axis=1, keepdims=True)
    np.testing.assert_allclose(ours.sum(axis=1), 1.0, rtol=1e-5)
    np.testing.assert_allclose(ours, np.exp(q), rtol=2e-3, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("copies", [2, 6])
def test_koleo_bears_duplicates(copies):
    """Equal features count as one image: no infinity, and no gradient between them."""
    x = np.array(normal(6, 5), np.float32)
    x[:copies] = x[0]
    loss, grad = jax.value_and_grad(koleo_loss)(jnp.asarray(x))
    assert np.isfinite(loss) and float(jnp.abs(grad).max()) < 10
    if copies == 6:
        assert float(loss) == 0 and not np.any(grad)
    assert np.isfinite(koleo_loss(jnp.ones((1, 5)))) and np.isfinite(koleo_loss(jnp.zeros((3, 5))))


def test_ibot_in_rows_equals_the_plain_loop_and_ignores_padding():
    student, teacher = normal(4, 9, 7), normal(4, 9, 7, seed=1)
    center, masks = normal(7, seed=2), normal(4, 9, seed=3) > 0.3
    masks[1] = False  # a crop without hidden patches
    expected = refs.ibot_loss(student, teacher, center, masks, 0.1, 0.05)
    rows = np.flatnonzero(masks)
    padded = np.concatenate([rows, np.zeros(3, int)])
    weight = np.concatenate([1 / masks.sum(1)[rows // 9], np.zeros(3)])
    s, t = (jnp.float32(x.reshape(-1, 7)[padded]) for x in (student, teacher))
    targets = teacher_probabilities(t, jnp.float32(center), 0.05)
    ours = masked_cross_entropy(s, targets, jnp.float32(weight), 4, 0.1)
    assert_close(ours, expected, 1e-5)
    new = update_center(jnp.float32(center), t, jnp.float32(weight), 0.9)
    assert_close(new, 0.9 * center + 0.1 * teacher[masks].mean(0), 1e-5)


def test_byol_of_equal_views_is_zero_and_of_opposite_ones_eight():
    z = jnp.float32(normal(3, 2, 4))
    assert float(byol_loss(z, z[:, ::-1])) < 1e-5
    assert_close(byol_loss(z, -z[:, ::-1]), 8.0, 1e-6)
    assert not np.any(jax.grad(byol_loss, argnums=1)(z, z))


def test_simclr_of_orthogonal_images_has_a_closed_form():
    z = jnp.repeat(jnp.eye(5)[:, None], 2, axis=1)
    loss, metrics = nt_xent_loss(z, 0.5)
    assert_close(loss, np.log(np.exp(2) + 8) - 2, 1e-6)
    assert float(metrics["accuracy"]) == 1.0


@pytest.mark.parametrize(
    ("terms", "message"),
    [
        (
            {"dino": {"centering": "sinkhorn"}},
            "centering is 'sinkhorn': choose ema or sinkhorn_knopp",
        ),
        ({"ibot": {"mask_ratio": (0.5, 0.1)}}, "mask_ratio"),
        ({"ibot": {"image_fraction": 0.0}}, "image_fraction 0.0"),
        ({"ibot": {"shared_head": "dino"}}, "ibot.shared_head is 'dino': no loss"),
        (
            {"dino": {"use_bn": True}, "ibot": {"shared_head": "dino"}},
            "shared_head is 'dino', whose batch norm",
        ),
        ({"gram": {"level": "pixel"}}, "level is 'pixel': choose image or batch"),
        ({"simclr": {"temp": 0.0}}, "temp is 0.0"),
        (
            {"ibot": {}, "second": {"fn": "ibot", "head": "b", "min_patches": 2}},
            "the losses of a sum have one masks",
        ),
    ],
)
def test_what_does_not_fit_is_named(terms, message):
    with pytest.raises(ValueError, match=message):
        make_loss(terms)
