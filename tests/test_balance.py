"""Gradient balance of two terms, against plain gradients of the whole loss."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import refs
from golden_files import assert_close, assert_trees_close
from ml_collections import ConfigDict
from small_steps import step_on_crops

from configs import hybrid
from dinotwins_jax.build import build
from dinotwins_jax.losses import Loss, make_loss, weighted_sum
from dinotwins_jax.models.vit import VisionTransformer
from dinotwins_jax.schedules import cosine_schedule
from dinotwins_jax.training.balance import balance
from dinotwins_jax.training.forward import student_features, teacher_features
from dinotwins_jax.training.objective import loss_gradients, project, teacher_outputs
from dinotwins_jax.training.optim import make_optimizer
from dinotwins_jax.training.state import create_state

VIT = VisionTransformer(embed_dim=48, depth=1, num_heads=3, patch_size=8, image_size=16)
TERMS = {
    "dino": {"out_dim": 24, "hidden_dim": 24, "bottleneck_dim": 12},
    "barlow_twins": {"weight": 0.1, "hidden_dims": (16, 16)},
}
HPARAMS = {"step": jnp.int32(3), "teacher_temp": 0.05, "axis_name": None, "masked": None}


@functools.cache
def setting():
    """(loss, state, crops) of a hybrid."""
    loss = make_loss(TERMS)
    state = create_state(VIT, loss, make_optimizer(), jax.random.key(0))
    keys = jax.random.split(jax.random.key(1), 2)
    crops = {
        "global_crops": jax.random.normal(keys[0], (6, 2, 16, 16, 3)),
        "local_crops": jax.random.normal(keys[1], (6, 1, 8, 8, 3)),
    }
    return loss, state, crops


def plain(loss, state, crops):
    """(value, gradients, {term: gradient at the class tokens}) by differentiating the sum as a whole."""
    teacher = teacher_features(VIT, state.teacher_params["backbone"], None, crops)
    teacher = teacher_outputs(loss.terms, state, teacher, None)
    features = student_features(
        VIT, state.params["backbone"], crops, jax.random.key(0), jnp.arange(6)
    )

    def total(params, term=None, cls=None):
        x = student_features(VIT, params["backbone"], crops, jax.random.key(0), jnp.arange(6))
        x = x if cls is None else x | {"cls": cls}
        heads, _ = project(loss.heads, params["heads"], state.batch_stats, x, None)
        value, of_terms, _ = refs.weighted_sum(loss, state.loss_state, x | heads, teacher, HPARAMS)
        return value if term is None else of_terms[term]

    def whole(params, cls):
        value, grads = jax.value_and_grad(total)(params)
        at_cls = {
            name: jax.grad(lambda cls, name=name: total(params, name, cls))(cls)
            for name in loss.terms
        }
        return value, grads, at_cls

    return jax.jit(whole)(state.params, features["cls"])


@functools.cache
def both(match_to=""):
    loss, state, crops = setting()

    @jax.jit
    def ours(state, crops):
        teacher = teacher_features(VIT, state.teacher_params["backbone"], None, crops)
        features, pull_back = jax.vjp(
            lambda p: student_features(VIT, p, crops, jax.random.key(0), jnp.arange(6)),
            state.params["backbone"],
        )
        value, grads, (_, _, metrics) = loss_gradients(
            loss.terms, state, features, teacher, HPARAMS, match_to
        )
        grads = {"backbone": pull_back(grads["features"])[0], "heads": grads["heads"]}
        return value, grads, metrics

    return *ours(state, crops), plain(loss, state, crops)


@pytest.mark.slow
def test_term_by_term_equals_the_gradient_of_the_sum():
    value, grads, _, (expected_value, expected_grads, _) = both()
    assert_close(value, expected_value, 1e-6)
    assert_trees_close(grads, expected_grads, 1e-5, floor=1e-2)


@pytest.mark.slow
def test_norms_and_cosine_are_those_at_the_class_tokens():
    _, _, metrics, (_, _, at_cls) = both()
    a, b = (np.asarray(at_cls[name], np.float64) for name in ("dino", "barlow_twins"))
    assert_close(metrics["balance/dino/norm"], np.linalg.norm(a), 1e-5)
    assert_close(metrics["balance/barlow_twins/norm"], np.linalg.norm(b), 1e-5)
    cosine = (a * b).sum() / np.linalg.norm(a) / np.linalg.norm(b)
    assert metrics["balance/cos/dino,barlow_twins"] == pytest.approx(cosine, abs=1e-5)
    assert metrics["balance/barlow_twins/weight"] == pytest.approx(0.1)


@pytest.mark.slow
def test_matched_norms():
    """The other term's weighted gradient has its weight times the norm of the named term's."""
    value, grads, metrics, (_, _, at_cls) = both("dino")
    norms = {name: float(jnp.linalg.norm(g.ravel())) for name, g in at_cls.items()}
    dino, other = (float(metrics[f"balance/{n}/weight"]) * norms[n] for n in TERMS)
    assert dino == pytest.approx(norms["dino"], rel=1e-5)
    assert other == pytest.approx(0.1 * dino, rel=1e-4)
    expected = (
        metrics["dino/loss"] + metrics["balance/barlow_twins/weight"] * metrics["barlow_twins/loss"]
    )
    assert value == pytest.approx(float(expected), rel=1e-6)
    unmatched = both()[1]["heads"]["barlow_twins"]["dense_0"]["kernel"]
    factor = metrics["balance/barlow_twins/weight"] / 0.1
    assert_close(grads["heads"]["barlow_twins"]["dense_0"]["kernel"], factor * unmatched, 1e-5)


ONES = jnp.ones((2, 2, 3))
ANGLED = ONES.at[:, :, 0].set(-1.0)  # cosine 1/3 with ONES
MATCHED = jax.jit(lambda g: balance({"a": 1.0, "b": 0.5}, g, match_to="a"))


@pytest.mark.parametrize(
    ("of_a", "of_b"),
    [(1.0, 2e-25), (2e-25, 3e-25), (1e-30, 1e-30), (1e25, 1.0), (1e30, 1e-30), (-1e30, 2e30)],
)
def test_norm_and_cosine_hold_over_the_range_of_float32(of_a, of_b):
    """Squares of these gradients vanish, or are infinite."""
    weights, metrics = MATCHED({"a": of_a * ONES, "b": of_b * ANGLED})
    assert metrics["balance/a/norm"] == pytest.approx(abs(of_a) * 12**0.5, rel=1e-6)
    assert metrics["balance/b/norm"] == pytest.approx(of_b * 12**0.5, rel=1e-6)
    assert metrics["balance/cos/a,b"] == pytest.approx(np.sign(of_a) / 3, rel=1e-6)
    assert weights["b"] == pytest.approx(0.5 * min(abs(of_a) / of_b, 1e4), rel=1e-6)


def test_the_cosine_of_parallel_gradients_is_at_most_one():
    rng = np.random.default_rng(0)
    for size in (3, 50, 384):
        g = jnp.asarray(rng.normal(size=(4, 2, size)), jnp.float32)
        for factor in (0.1, -3.0):
            cosine = MATCHED({"a": g, "b": factor * g})[1]["balance/cos/a,b"]
            assert 1.0 - 1e-6 < abs(cosine) <= 1.0


@pytest.mark.parametrize(("of_a", "of_b"), [(0.0, 1.0), (1.0, 0.0), (0.0, 0.0)])
def test_without_a_norm_to_match_all_terms_keep_their_weights(of_a, of_b):
    """A zero gradient, of the term to match or of the other."""
    weights, metrics = MATCHED({"a": of_a * ONES, "b": of_b * ANGLED})
    assert weights == {"a": 1.0, "b": 0.5}
    assert metrics["balance/cos/a,b"] == 0.0


@pytest.mark.parametrize("bad", [jnp.inf, jnp.nan])
def test_a_gradient_that_is_not_finite_changes_no_weight_and_has_no_cosine(bad):
    for g in ({"a": bad * ONES, "b": ANGLED}, {"a": ONES, "b": ANGLED.at[0, 0, 0].set(bad)}):
        weights, metrics = MATCHED(g)
        assert weights == {"a": 1.0, "b": 0.5} and np.isnan(metrics["balance/cos/a,b"])


def test_a_term_to_match_of_weight_zero_silences_the_others():
    weights, _ = balance({"a": 0.0, "b": 0.5}, {"a": ONES, "b": ANGLED}, match_to="a")
    assert weights["b"] == 0.0


@pytest.mark.parametrize("of_a", [1.0, 2e-25, 1e30, 0.0])
def test_devices_agree_on_norms_and_weights_where_one_holds_none(of_a):
    """Under pmap: the second device's images have no gradient, the first one's are out of range."""
    a, b = of_a * ONES.at[1].set(0.0), ANGLED
    whole = MATCHED({"a": a, "b": b})
    mapped = jax.pmap(
        lambda g: balance({"a": 1.0, "b": 0.5}, g, match_to="a", axis_name="data"),
        axis_name="data",
        devices=jax.devices()[:2],
    )({"a": 2.0 * a[:, None], "b": 2.0 * b[:, None]})  # of losses that are means over devices
    for part, expected in zip(mapped, whole, strict=True):
        for name, value in expected.items():
            np.testing.assert_allclose(part[name], value, rtol=1e-6, err_msg=name)


def test_a_step_trains_the_other_terms_while_the_one_to_match_has_no_gradient():
    """Step 0: its gradient is zero, the other term trains at its weight. Step 1: infinite, nothing changes.
    Step 2: matched."""

    def shaky(loss_state, student, teacher, hparams):
        scale = jnp.select([hparams["step"] == 0, hparams["step"] == 1], [0.0, jnp.inf], 1.0)
        return scale * jnp.mean(student["cls"][:, 0] ** 3), loss_state, {}

    def steady(loss_state, student, teacher, hparams):
        return jnp.mean(student["cls"] ** 3), loss_state, {}

    terms = {"shaky": (1.0, Loss({}, dict, shaky)), "steady": (0.5, Loss({}, dict, steady))}
    loss, tx = weighted_sum(terms), make_optimizer()
    values = {"lr": 1e-2, "weight_decay": 0.0, "teacher_momentum": 0.9, "teacher_temp": 0.05}
    step = jax.jit(step_on_crops(VIT, loss, tx, values, match_gradients_to="shaky"))
    state = create_state(VIT, loss, tx, jax.random.key(0))
    crops = {"global_crops": jax.random.normal(jax.random.key(1), (4, 2, 8, 8, 3))}
    crops["local_crops"], found = jnp.zeros((4, 0, 8, 8, 3)), []
    for _ in range(3):
        before, (state, metrics) = state, step(state, crops)
        kernels = (s.params["backbone"]["patch_embed"]["kernel"] for s in (before, state))
        moved = np.any(np.not_equal(*kernels))
        found.append((moved, int(metrics["skipped/total"]), metrics["balance/steady/weight"]))
    assert found[0] == (True, 0, 0.5)
    assert found[1] == (False, 1, 0.5)
    norms = [float(metrics[f"balance/{name}/norm"]) for name in terms]
    assert found[2] == (True, 1, pytest.approx(0.5 * norms[0] / norms[1], rel=1e-5))


@pytest.mark.slow
def test_weights_follow_their_schedules_in_the_step():
    weight = cosine_schedule(0.2, 0.0, 4, warmup_steps=2)
    terms = TERMS | {"barlow_twins": TERMS["barlow_twins"] | {"weight": weight}}
    loss, tx = make_loss(terms), make_optimizer()
    values = {"lr": 0.0, "weight_decay": 0.0, "teacher_momentum": 0.9, "teacher_temp": 0.05}
    step = jax.jit(step_on_crops(VIT, loss, tx, values))
    _, state, crops = setting()
    state = state.replace(opt_state=tx.init(state.params))
    for expected in (0.0, 0.2, 0.2, 0.1):
        state, metrics = step(state, crops)
        assert metrics["balance/barlow_twins/weight"] == pytest.approx(expected)
        total = metrics["dino/loss"] + expected * metrics["barlow_twins/loss"]
        assert metrics["loss"] == pytest.approx(float(total), rel=1e-6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"match_gradients_to": "dion"}, "match_gradients_to is 'dion'.*barlow_twins or dino"),
        ({"loss.dino.weight_warmup_epochs": 15.0}, r"weight_warmup_epochs is 15.*total_epochs 14"),
    ],
)
def test_bad_balance_is_named(changes, message):
    config = ConfigDict(hybrid.get_config("demo"))
    config.update_from_flattened_dict(changes | {"data.scenes.num_train": 200})
    with pytest.raises(ValueError, match=message):
        build(config)
