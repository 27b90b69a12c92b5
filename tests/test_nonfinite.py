"""Non-finite values: skipped, counted, and traced to the module that produced them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dinotwins_jax.losses import make_loss
from dinotwins_jax.models.vit import VisionTransformer
from dinotwins_jax.nonfinite import debugging_nans
from dinotwins_jax.stopping import NonFiniteError
from dinotwins_jax.training.diagnosis import make_diagnosis
from dinotwins_jax.training.optim import make_optimizer
from dinotwins_jax.training.state import create_state
from dinotwins_jax.training.step import make_train_step

VIT = VisionTransformer(embed_dim=24, depth=2, num_heads=2, patch_size=8, image_size=16)
TERMS = {
    "dino": {"out_dim": 12, "hidden_dim": 12, "bottleneck_dim": 6},
    "barlow_twins": {"weight": 0.1, "hidden_dims": (8, 8)},
}
CONSTANTS = {"lr": 0.01, "weight_decay": 0.0, "teacher_momentum": 0.9, "teacher_temp": 0.05}


def parts(terms):
    return {
        "backbone": VIT,
        "loss": make_loss(terms),
        "make_crops": lambda batch: {
            "global_crops": batch["image"],
            "local_crops": batch["image"][:, :0, :8, :8],
        },
        "schedules": {k: lambda step, v=v: jnp.float32(v) for k, v in CONSTANTS.items()},
        "seed": 0,
    }


def fresh(terms=TERMS):
    return create_state(VIT, make_loss(terms), make_optimizer(), jax.random.key(0))


@functools.cache
def step():
    return jax.jit(make_train_step(**parts(TERMS), tx=make_optimizer()))


def batch(bad=False):
    images = jax.random.normal(jax.random.key(1), (4, 2, 16, 16, 3))
    return {"image": images.at[1, 0, 3, 3, 0].set(jnp.nan if bad else 0.0)}


@pytest.mark.slow
def test_a_bad_step_changes_nothing_but_the_counts_and_a_good_one_ends_the_row():
    state, _ = step()(fresh(), batch())
    after, metrics = step()(state, batch(bad=True))
    for name in ("params", "teacher_params", "batch_stats", "opt_state", "loss_state"):
        jax.tree.map(np.testing.assert_array_equal, getattr(after, name), getattr(state, name))
    assert int(after.step) == 2 and not np.isfinite(metrics["loss"])
    assert {k: int(v) for k, v in after.skipped.items()} == {"total": 1, "in_a_row": 1}
    after, _ = step()(after, batch(bad=True))
    assert {k: int(v) for k, v in after.skipped.items()} == {"total": 2, "in_a_row": 2}
    after, metrics = step()(after, batch())
    assert {k: int(v) for k, v in after.skipped.items()} == {"total": 2, "in_a_row": 0}
    expected, _ = step()(state, batch())  # as if the bad ones had not been, but for the step count
    jax.tree.map(np.testing.assert_array_equal, after.params, expected.params)


def overflow(network, *path):
    """Scales the weights at `path` so that their output overflows."""

    def change(state):
        tree = jax.tree.map(lambda x: x, getattr(state, network))
        node = tree
        for name in path[:-1]:
            node = node[name]
        node[path[-1]] = jnp.sign(node[path[-1]]) * 3e38
        return state.replace(**{network: tree})

    return change


@pytest.mark.slow
@pytest.mark.parametrize(
    ("terms", "change", "bad_batch", "where"),
    [
        (TERMS, lambda s: s, False, ""),
        (TERMS, lambda s: s, True, "crops"),
        (
            TERMS,
            lambda s: s.replace(
                loss_state={
                    "dino": {"center": s.loss_state["dino"]["center"] * jnp.nan},
                    "barlow_twins": {},
                }
            ),
            False,
            "loss_state before the step",
        ),
        (
            TERMS,
            overflow("params", "backbone", "blocks_1", "mlp", "fc2", "kernel"),
            False,
            "student/backbone/blocks_1/mlp/fc2",
        ),
        (
            TERMS,
            overflow("teacher_params", "backbone", "blocks_0", "attn", "qkv", "kernel"),
            False,
            "teacher/backbone/blocks_0/attn/qkv",
        ),
        (
            TERMS,
            overflow("params", "heads", "barlow_twins", "dense_1", "kernel"),
            False,
            "student/heads of loss/barlow_twins/dense_1",
        ),
        ({"mine": {"fn": "fork:alignment", "nan_from_step": 0}}, lambda s: s, False, "loss/mine"),
        (
            {"mine": {"fn": "fork:infinite_gradient"}},
            lambda s: s,
            False,
            "gradient at the features",
        ),
    ],
    ids=["all finite", "crops", "state", "student", "teacher", "head", "loss", "gradient"],
)
def test_the_first_bad_module_is_named(terms, change, bad_batch, where):
    diagnose = make_diagnosis(
        **parts(terms) | {"backbone": VIT.clone(remat=where.startswith("student"))}
    )
    assert diagnose(change(fresh(terms)), batch(bad_batch)) == where


def test_debug_nans_stops_at_the_operation():
    log = jax.jit(lambda x: jnp.sum(jnp.log(x)))
    with debugging_nans(False):
        assert np.isnan(log(jnp.array([-1.0])))
    with debugging_nans(True):
        assert log(jnp.array([1.0])) == 0.0
        assert jax.config.jax_debug_nans
    with (
        pytest.raises(NonFiniteError, match=r"^debug_nans: .*nan.*log") as error,
        debugging_nans(True),
    ):
        log(jnp.array([-1.0]))
    assert "\n" not in str(error.value) and error.value.code == 3
    assert not jax.config.jax_debug_nans
