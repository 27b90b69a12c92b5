"""Losses against the official numbers, and the properties stated in their papers."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import refs
from golden_files import assert_close, load

from dinotwins_jax.losses import make_loss, weighted_sum
from dinotwins_jax.losses.barlow_twins import barlow_twins, barlow_twins_loss, cross_correlation
from dinotwins_jax.losses.columns import batch_product
from dinotwins_jax.losses.dino import dino, dino_loss, update_center


def test_dino_loss_and_center_equal_official_over_four_calls():
    golden = load("dino_loss")
    for i in range(4):
        student, teacher = golden[f"student_{i}"], golden[f"teacher_{i}"]
        center, temp = golden[f"center_before_{i}"], float(golden[f"teacher_temp_{i}"])
        loss, grad = jax.value_and_grad(dino_loss)(student, teacher, center, 0.1, temp)
        assert_close(loss, golden[f"loss_{i}"])
        assert_close(grad, golden[f"grad_student_{i}"])
        assert_close(update_center(center, teacher, 0.9), golden[f"center_after_{i}"])


@pytest.mark.parametrize(("views", "student_temp"), [(2, 0.1), (3, 0.2), (6, 0.05)])
def test_dino_loss_equals_the_plain_loop(views, student_temp):
    rng = np.random.default_rng(views)
    student, teacher = rng.normal(size=(3, views, 7)), rng.normal(size=(3, 2, 7))
    center = rng.normal(size=7)
    ours = dino_loss(
        jnp.float32(student), jnp.float32(teacher), jnp.float32(center), student_temp, 0.07
    )
    assert_close(ours, refs.dino_loss(student, teacher, center, student_temp, 0.07))


def test_teacher_gets_no_gradient():
    rng = np.random.default_rng(0)
    args = [jnp.float32(rng.normal(size=s)) for s in ((2, 3, 5), (2, 2, 5), (5,))]
    grads = jax.grad(lambda *a: dino_loss(*a, 0.1, 0.04), argnums=(1, 2))(*args)
    assert all(float(jnp.abs(g).max()) == 0 for g in grads)


def test_barlow_twins_equals_official():
    golden = load("barlow_loss")
    z_a, z_b, lambd = golden["z_a"], golden["z_b"], float(golden["lambd"])
    assert_close(cross_correlation(z_a, z_b), golden["c"])
    (loss, terms), grads = jax.value_and_grad(barlow_twins_loss, argnums=(0, 1), has_aux=True)(
        z_a, z_b, lambd
    )
    assert_close(loss, golden["loss"])
    assert_close(terms["on_diag"], golden["on_diag"])
    assert_close(terms["off_diag"], golden["off_diag"])
    assert_close(grads[0], golden["grad_a"])
    assert_close(grads[1], golden["grad_b"])


def test_barlow_twins_equals_the_plain_loop():
    rng = np.random.default_rng(3)
    z_a, z_b = rng.normal(size=(2, 9, 4))
    loss, terms = barlow_twins_loss(jnp.float32(z_a), jnp.float32(z_b), 0.02)
    expected = refs.barlow_twins_loss(z_a, z_b, 0.02)
    np.testing.assert_allclose([loss, terms["on_diag"], terms["off_diag"]], expected, rtol=1e-5)


def test_barlow_twins_does_not_see_a_feature_s_scale_and_offset():
    rng = np.random.default_rng(1)
    z_a, z_b = jnp.float32(rng.normal(size=(2, 64, 8)))
    scale, offset = jnp.float32(rng.uniform(1, 3, 8)), jnp.float32(rng.normal(size=8))
    plain, _ = barlow_twins_loss(z_a, z_b)
    moved, _ = barlow_twins_loss(z_a * scale + offset, z_b)
    assert_close(moved, plain, 1e-4)  # not exact: eps is added to the variance


def test_barlow_twins_of_equal_decorrelated_views_is_zero():
    z = jnp.float32(np.linalg.qr(np.random.default_rng(0).normal(size=(64, 9)))[0][:, 1:] * 8)
    z = z - z.mean(0)
    z = jnp.float32(np.linalg.qr(np.asarray(z))[0] * 8)
    loss, _ = barlow_twins_loss(z, z)
    assert float(loss) < 1e-6


def outputs(views=4, batch=8, seed=0):
    rng = np.random.default_rng(seed)
    student = {
        "dino": rng.normal(size=(batch, views, 16)),
        "barlow_twins": rng.normal(size=(batch, views, 6)),
    }
    teacher = {
        "dino": rng.normal(size=(batch, 2, 16)),
        "barlow_twins": rng.normal(size=(batch, 2, 6)),
    }
    return jax.tree.map(jnp.float32, (student, teacher))


HPARAMS = {"teacher_temp": 0.05, "axis_name": None}


def test_a_hybrid_has_the_heads_states_and_patches_of_all_terms():
    parts = {"dino": {"out_dim": 16}, "barlow_twins": {"weight": 0.3, "hidden_dims": (6,)}}
    hybrid = make_loss(parts)
    assert {name: weight for name, (weight, _) in hybrid.terms.items()} == {
        "dino": 1.0,
        "barlow_twins": 0.3,
    }
    assert hybrid.heads == {
        "dino": dino(out_dim=16).heads["dino"],
        "barlow_twins": barlow_twins(hidden_dims=(6,)).heads["barlow_twins"],
    }
    assert hybrid.init()["dino"]["center"].shape == (16,) and hybrid.init()["barlow_twins"] == {}
    reads = {
        "dino": (False, False),
        "gram": (True, False),  # the anchor's tokens are always made
        "ibot": (True, True),
        "koleo": (False, False),
    }
    for name, expected in reads.items():
        loss = make_loss({"dino": {"out_dim": 16}, name: {}} if name != "dino" else {name: {}})
        assert tuple(map(loss.reads_patches, ("student", "teacher"))) == expected
    with pytest.raises(ValueError, match="of 'student', 'teacher'"):
        weighted_sum({"mine": (1.0, dino(out_dim=4)._replace(patches=("students",)))})


@pytest.mark.parametrize(
    ("options", "expected_pairs"),
    [
        ({}, [("s0", "s1")]),
        ({"views": "all"}, [("s0", "s1"), ("s0", "s2"), ("s1", "s2")]),
        ({"pair": "student_teacher"}, [("s0", "t1"), ("s1", "t0")]),
        (
            {"pair": "student_teacher", "views": "all"},
            [("s0", "t1"), ("s1", "t0"), ("s2", "t0"), ("s2", "t1")],
        ),
    ],
)
def test_barlow_pairs(options, expected_pairs):
    student, teacher = outputs(views=3)
    if options.get("views") != "all":
        student["barlow_twins"] = student["barlow_twins"][:, :2]
    loss = barlow_twins(hidden_dims=(6,), **options)
    value, _, _ = loss.apply({}, student, teacher, HPARAMS)

    def z(name):
        group = student if name[0] == "s" else teacher
        return np.asarray(group["barlow_twins"][:, int(name[1])], np.float64)

    expected = [refs.barlow_twins_loss(z(a), z(b), 0.0051)[0] for a, b in expected_pairs]
    assert_close(value, np.mean(expected), 1e-5)
    assert loss.heads["barlow_twins"].teacher == (options.get("pair") == "student_teacher")
    assert loss.heads["barlow_twins"].crops == options.get("views", "global")


@pytest.mark.slow
def test_diagnostics_name_the_two_collapses():
    loss = dino(out_dim=16)
    student, teacher = outputs(views=2)
    uniform = {"dino": jnp.zeros_like(teacher["dino"])}
    one = {"dino": jnp.zeros_like(teacher["dino"]).at[..., 3].set(9.0)}
    _, _, flat = loss.apply(loss.init(), {"dino": uniform["dino"]}, uniform, HPARAMS)
    assert_close(flat["teacher_entropy"], 1.0)
    assert float(flat["kl"]) < 1e-6
    _, _, peaked = loss.apply(loss.init(), student, one, HPARAMS)
    assert float(peaked["teacher_entropy"]) < 1e-6 and float(peaked["marginal_entropy"]) < 1e-6
    _, _, spread = loss.apply(
        loss.init(), student, {"dino": 9 * jnp.eye(16)[:16].reshape(8, 2, 16)}, HPARAMS
    )
    assert_close(spread["marginal_entropy"], 1.0)


@pytest.mark.parametrize(
    ("terms", "message"),
    [
        ({"barlow_twin": {}}, "did you mean 'barlow_twins'"),
        ({"mine": {"fn": "no_such_pkg.loss:vicreg"}}, "no_such_pkg"),
        ({"dino": {"outdim": 3}}, r"config\.loss\.dino.*outdim"),
        ({"dino": {"student_temp": 0.0}}, "student_temp is 0.0"),
        ({"dino": {"center_momentum": 1.5}}, "center_momentum is 1.5"),
        ({"barlow_twins": {"pair": "teacher"}}, "pair is 'teacher'"),
        ({"barlow_twins": {"views": "local"}}, "views is 'local'"),
        ({"barlow_twins": {"hidden_dims": ()}}, "hidden_dims is empty"),
        ({}, "no loss"),
        ({"a": {"fn": "dino", "out_dim": 4}, "b": {"fn": "dino", "out_dim": 5}}, "head 'dino'"),
    ],
)
def test_bad_losses_are_named(terms, message):
    with pytest.raises(ValueError, match=message):
        make_loss(terms)


def test_shapes_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match=r"\(2, 3, 5\)"):
        dino_loss(jnp.ones((2, 3, 5)), jnp.ones((2, 2, 4)), jnp.ones(5), 0.1, 0.04)
    with pytest.raises(ValueError, match=r"\(2, 3\).*\(2, 4\)"):
        cross_correlation(jnp.ones((2, 3)), jnp.ones((2, 4)))


@pytest.mark.parametrize(("images", "split"), [(16, True), (32, False)])
def test_a_product_over_a_split_batch_sends_the_smaller_of_features_and_matrix(images, split):
    """Up to as many images as features every device gathers the features for its columns; above, the
    matrix is summed. Both are the product of the whole batch."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    over = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    a, b = np.random.default_rng(0).normal(size=(2, images, 16)).astype(np.float32)

    def product(a, b):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return batch_product(a, b)

    compiled = jax.jit(product, in_shardings=(over, over)).lower(a, b).compile()
    assert_close(compiled(*jax.device_put((a, b), over)), a.T @ b / images)
    assert bool(re.search(rf"f32\[{images},16\]\S* all-gather", compiled.as_text())) == split
    assert bool(re.search(r"f32\[16,16\]\S* all-reduce", compiled.as_text())) == (not split)
