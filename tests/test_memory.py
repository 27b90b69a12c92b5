"""Memory of a step and its savings, by XLA's analysis; sharding rules; precision; the dry run."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec
from shrunk import SHRUNK, shrunk
from test_train import command_line

from dinotwins_jax.build import build
from dinotwins_jax.devices.sharding import spec_of
from dinotwins_jax.memory import abstract_batch, memory_table, step_memory
from dinotwins_jax.training.forward import join, split
from experiments.benchmark.memory import table
from experiments.benchmark.settings import Settings, config_of


@pytest.mark.parametrize(
    ("path", "shape", "parts", "spec"),
    [
        ("params/backbone/blocks_0/attn/qkv/kernel", (48, 144), 4, (None, "fsdp")),
        ("opt_state/1/mu/backbone/blocks_0/mlp/fc1/kernel", (48, 192), 4, (None, "fsdp")),
        ("params/backbone/patch_embed/kernel", (4, 4, 3, 48), 4, (None, None, None, "fsdp")),
        ("teacher_params/heads/dino/last_layer/weight_v", (64, 15), 4, ("fsdp", None)),
        ("params/heads/dino/last_layer/weight_v", (66, 16), 4, ()),  # 66 does not divide
        ("params/heads/dino/mlp_0/kernel", (48, 30), 4, ("fsdp", None)),  # the next one does
        ("loss_state/dino/center", (64,), 4, ("fsdp",)),
        ("params/backbone/blocks_0/attn/qkv/kernel", (48, 144), 1, ()),
        ("params/backbone/blocks_0/norm1/scale", (48,), 4, ()),
        ("step", (), 4, ()),
    ],
)
def test_rules(path, shape, parts, spec):
    assert spec_of(path, shape, parts) == PartitionSpec(*spec)


def test_a_batch_is_split_within_each_device_and_joined_in_order():
    batch = {"a": jnp.arange(24).reshape(12, 2), "b": jnp.arange(12)}
    parts = split(batch, 3)
    assert parts["a"].shape == (3, 4, 2) and parts["b"].tolist()[0] == [0, 3, 6, 9]
    for name, array in join(parts).items():
        assert array.tolist() == batch[name].tolist()


@pytest.fixture(scope="module")
def figures():
    """{what: bytes} of a step whose activations outweigh its parameters, in three ways."""
    found = {}
    for name, options in {
        "whole": {"mesh__data": 1},
        "in parts": {"mesh__data": 1, "micro_batches": 8},
        "remat": {"mesh__data": 1, "model__remat": True},
        "fsdp": {"mesh__fsdp": 8},
    }.items():
        run = build(shrunk(batch_size=128, views__num_local=1, model__depth=4, **options))
        found[name] = step_memory(run, 128)
    return found, run


@pytest.mark.slow
def test_parts_save_activations_and_fsdp_saves_state(figures):
    found, run = figures
    assert found["in parts"]["temporaries"] < 0.5 * found["whole"]["temporaries"]
    assert found["remat"]["temporaries"] < 0.7 * found["whole"]["temporaries"]  # 0.57 with 4 blocks
    assert found["in parts"]["opt_state"] == found["whole"]["opt_state"]
    for name in ("params", "teacher_params", "opt_state"):
        assert found["fsdp"][name] < 0.25 * found["whole"][name]
    state = jax.eval_shape(run.fresh_state)
    assert found["whole"]["params"] == sum(4 * x.size for x in jax.tree.leaves(state.params))
    for of in found.values():
        assert of["peak"] > sum(of[k] for k in ("params", "teacher_params", "opt_state", "batch"))
    text = memory_table(found["fsdp"], run)
    assert "| opt_state" in text and "8 x cpu" in text
    pmapped = step_memory(build(shrunk(parallel="pmap", mesh__data=8)), 8)
    assert pmapped["batch"] == 24 * 24 * 3 + 16  # one image with its labels


def test_the_table_of_ways():
    settings = Settings("dino", "vit_base", batch_size=32, way="remat+micro4", dtype="bfloat16")
    config = config_of(settings, "/data")
    assert (config.data.source, config.data.dir, config.model.dtype) == (
        "coco",
        "/data",
        "bfloat16",
    )
    assert (config.model.name, config.model.remat, config.micro_batches) == ("vit_base", True, 4)
    with pytest.raises(ValueError, match=r"'mikro4' is no way to train"):
        config_of(settings._replace(way="mikro4"))
    text = table({"vit_small, batch 64": {"plain": {"peak": 3 * 2**30}}}, ["plain", "remat"])
    assert "| vit_small, batch 64 | 3.00  | –     |" in text


def equations(jaxpr):
    """All equations, those of inner jaxprs too."""
    for equation in jaxpr.eqns:
        yield equation
        for value in equation.params.values():
            for inner in value if isinstance(value, tuple | list) else [value]:
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from equations(inner)


def test_bfloat16_leaves_norms_softmax_losses_and_correlations_in_float32():
    config = shrunk(model__dtype="bfloat16", mesh__data=1)
    config.loss.dino.out_dim = 40
    run = build(config)
    state = jax.eval_shape(run.fresh_state)
    jaxpr = jax.make_jaxpr(run.train_step)(state, abstract_batch(run, 8)).jaxpr
    found = list(equations(jaxpr))
    dtypes = {}
    for equation in found:
        for x in equation.invars:
            dtypes.setdefault(equation.primitive.name, set()).add(str(x.aval.dtype))
    # Softmax and logsumexp take a maximum first; an exp of bfloat16 is left in the derivative of GELU.
    for name in ("reduce_max", "log", "rsqrt", "sqrt", "log1p", "is_finite"):
        assert "bfloat16" not in dtypes.get(name, ()), name
    assert "float32" in dtypes["exp"] and "bfloat16" in dtypes["dot_general"]
    matmuls = [e for e in found if e.primitive.name == "dot_general"]
    # Logits [images x views, K = 40 prototypes] come out in float32, cross-correlations [32, 32] go in.
    logits = [e for e in matmuls if e.invars[1].aval.shape == (40, 16)]
    logits = [e for e in logits if e.outvars[0].aval.shape[-1] == 40]
    assert logits and {str(e.outvars[0].aval.dtype) for e in logits} == {"float32"}
    inside = [e for e in matmuls if [v.aval.shape for v in e.invars] == [(8, 32), (8, 32)]]
    correlations = [e for e in inside if "float32" in {str(v.aval.dtype) for v in e.invars}]
    assert len(correlations) == 1  # the others are gradients of the projector's weights
    assert {str(v.aval.dtype) for v in correlations[0].invars} == {"float32"}
    new_state, metrics = jax.eval_shape(run.train_step, state, abstract_batch(run, 8))
    assert all(x.dtype != jnp.bfloat16 for x in jax.tree.leaves((new_state, metrics)))


@pytest.mark.slow
def test_a_dry_run_prints_memory_of_any_mesh_recipe_and_advice_and_writes_nothing(tmp_path):
    flags = [f"--config.{name}={value}" for name, value in SHRUNK.items()]
    flags += ["--config.mesh.data=3", "--config.mesh.fsdp=2", "--config.batch_size=12"]
    flags += ["--config.optim.clip=0", "--config.optim.lr=0.2"]
    done = command_line(
        "--config=configs/dino.py:demo+auto", f"--workdir={tmp_path / 'run'}", *flags, "--dry_run"
    )
    assert done.returncode == 0, done.stderr
    assert "| opt_state" in done.stdout and "| peak" in done.stdout and "6 x cpu" in done.stdout
    assert "recipe for 60 images, batch 12, 4 steps:" in done.stdout
    assert "loss.dino.out_dim" in done.stdout and "optim.lr " in done.stdout
    assert "WARNING config.optim.clip is 0 with a peak rate of 0.009375" in done.stderr
    assert not (tmp_path / "run").exists()
