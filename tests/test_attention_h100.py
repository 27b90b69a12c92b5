"""Attention by cuDNN compiled, forward and backward, for an H100 that is absent. What cuDNN itself makes of
its calls is decided on a card."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from dinotwins_jax.devices.attention import attention_for
from dinotwins_jax.models import create_vit
from dinotwins_jax.models.attention import attend_cudnn

FORWARD, BACKWARD = "__cudnn$fmhaSoftmax", "__cudnn$fmhaSoftmaxBackward"
CHIPS, BATCH = 4, 8


@pytest.fixture(scope="module")
def devices():
    pytest.importorskip(
        "jax_cuda12_plugin", reason="no compiler for GPUs: pip install 'jax[cuda12]'"
    )
    from experiments.benchmark.targets.absent import card_devices

    return card_devices("h100", CHIPS)


def argument(devices, shape, dtype, *axes) -> jax.ShapeDtypeStruct:
    """An array over the devices, split by "data" along the axes so named."""
    mesh = jax.make_mesh((CHIPS,), ("data",), axis_types=(AxisType.Auto,), devices=devices)
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, PartitionSpec(*axes)))


def compiled(f, *args) -> str:
    # Tuning runs kernels, which needs a card.
    options = {"xla_gpu_autotune_level": 0}
    return jax.jit(f).lower(*args).compile(compiler_options=options).as_text()


def calls(program: str) -> list[str]:
    return re.findall(r'custom_call_target="(__cudnn[^"]*)"', program)


@pytest.mark.parametrize(("queries", "keys"), [(197, 197), (37, 37), (1, 197), (1, 37), (38, 38)])
def test_attention_and_its_gradient(devices, queries, keys):
    """One kernel each way on a quarter of the batch, without the weights in memory and without
    communication."""
    split = partial(argument, devices)
    q, k = (split((BATCH, 6, n, 64), jnp.bfloat16, "data") for n in (queries, keys))

    def both_ways(q, k, v, g):
        y, backward = jax.vjp(attend_cudnn, q, k, v)
        return y, backward(g)

    program = compiled(both_ways, q, k, k, split((BATCH, queries, 384), jnp.bfloat16, "data"))
    assert sorted(calls(program)) == [FORWARD, BACKWARD]
    even = keys + keys % 2
    assert f"bf16[{BATCH // CHIPS},6,{even},64]" in program  # dk and dv
    assert not re.search(rf"\[[\d,]*{queries + queries % 2},(?:{keys}|{even})\]", program)
    assert not re.search(r"all-(?:gather|reduce|to-all)|collective-permute", program)


@pytest.mark.slow
@pytest.mark.parametrize("remat", [False, True])
def test_the_gradient_of_a_backbone(devices, remat):
    """A block of 197 tokens and one whose only query is the class token, as `auto` builds it."""
    attention = attention_for(devices, "auto", dtype=jnp.dtype(jnp.bfloat16), head_dim=64)
    vit = create_vit(
        "vit_tiny",
        depth=2,
        dtype=jnp.bfloat16,
        attention=attention,
        remat=remat,
        drop_path_rate=0.1,
    )
    images = argument(devices, (BATCH, 224, 224, 3), jnp.float32, "data")
    params = jax.tree.map(
        lambda x: argument(devices, x.shape, x.dtype),
        jax.eval_shape(vit.init, jax.random.key(0), images)["params"],
    )

    def loss(params, images):
        drop = {"drop_path": jax.random.key(1)}
        out = vit.apply({"params": params}, images, train=True, patches=False, rngs=drop)
        return jnp.sum(out.cls**2)

    found = calls(compiled(jax.grad(loss), params, images))
    assert found.count(BACKWARD) == 2 and found.count(FORWARD) >= 2
