"""Whole DINOv2 steps, DINOv3's ViT, and the family's losses, against arrays of the official codes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_files import assert_close, load, subset
from small_steps import step_on_crops

from dinotwins_jax.losses import make_loss
from dinotwins_jax.losses.base import Masked
from dinotwins_jax.losses.byol import byol_loss
from dinotwins_jax.losses.simclr import nt_xent_loss
from dinotwins_jax.losses.vicreg import vicreg_loss
from dinotwins_jax.models.heads import BarlowProjector
from dinotwins_jax.models.torch_weights import dino_head_from_torch, vit_from_torch
from dinotwins_jax.models.vit import VisionTransformer
from dinotwins_jax.streams import MASKS, stream
from dinotwins_jax.training.optim import make_optimizer
from dinotwins_jax.training.state import create_state

HEADS = {"dino": "dino_head", "ibot": "ibot_head"}


@pytest.mark.parametrize("size", ["32x32", "48x24", "16x16"])
def test_dinov3_s_vit_at_three_sizes(size):
    golden = load("dinov3_mlp")
    params = vit_from_torch(subset(golden, "w."))
    fields = {"embed_dim": 24, "depth": 2, "num_heads": 2, "patch_size": 8, "image_size": 32}
    vit = VisionTransformer(
        **fields,
        num_register_tokens=params["register_tokens"].shape[1],
        layer_scale_init=1.0,
        positions="rope",
        norm_eps=1e-5,
    )
    found = jax.jit(vit.apply)({"params": params}, np.float32(golden[f"{size}.image"]))
    assert_close(found.cls, golden[f"{size}.cls"], 1e-5)
    assert_close(found.patches, golden[f"{size}.patches"], 1e-5)


@pytest.mark.parametrize("scale", ["0.01", "1.0", "3.0"])
def test_vicreg_at_small_and_large_projections(scale):
    golden = load("family_losses")
    z = golden[f"vicregz{scale}.z"]
    loss, grads = jax.jit(jax.value_and_grad(lambda z: vicreg_loss(z[0], z[1])[0]))(z)
    assert_close(loss, golden[f"vicregz{scale}.loss"], 1e-5)
    assert_close(grads, golden[f"vicregz{scale}.d"], 1e-5)


def _mlp(layers, names):
    """Parameters of a BarlowProjector: {its name: the name in torch}, without the biases that its batch
    norms cancel."""
    params = {name: {"kernel": layers[f"{theirs}.weight"].T} for name, theirs in names.items()}
    for name, theirs in names.items():
        if name.startswith("bn"):
            params[name] = {"scale": layers[f"{theirs}.weight"], "bias": layers[f"{theirs}.bias"]}
    return params


def _projected(params, x):
    """[B, 2, D] of x [2, B, E], a pass a view in training."""
    mlp = BarlowProjector((*(p["kernel"].shape[1] for n, p in params.items() if n[0] == "d"),))
    stats = mlp.init(jax.random.key(0), x[0], train=True)["batch_stats"]
    variables = {"params": params, "batch_stats": stats}
    views = [mlp.apply(variables, view, train=True, mutable=["batch_stats"])[0] for view in x]
    return jnp.stack(views, axis=1)


def test_vicreg_through_its_expander():
    golden = load("family_losses")
    names = {"dense_0": "0", "bn_0": "1", "dense_1": "3", "bn_1": "4", "dense_2": "6"}
    params = _mlp(subset(golden, "vicreg.p."), names)

    def loss_of(x, params):
        z = _projected(params, x)
        return vicreg_loss(z[:, 0], z[:, 1])[0]

    gradients = jax.jit(jax.value_and_grad(loss_of, (0, 1)))
    loss, (dx, grads) = gradients(golden["vicreg.x"], params)
    assert_close(loss, golden["vicreg.loss"], 1e-5)
    assert_close(dx, golden["vicreg.dx"], 1e-4)
    expected = _mlp(subset(golden, "vicreg.d."), names)
    jax.tree.map(lambda a, b: assert_close(a, b, 1e-4), grads, expected)


def test_byol_through_projector_and_predictor():
    golden = load("family_losses")
    names = {"dense_0": "a", "bn_0": "bn", "dense_1": "b"}
    online, predictor, target = (
        _mlp(subset(golden, f"byol.{n}."), names) for n in ("on", "pr", "tg")
    )

    def loss_of(x, online, predictor):
        predictions = _projected(predictor, _projected(online, x).swapaxes(0, 1))
        return byol_loss(predictions, _projected(target, golden["byol.xt"]))

    gradients = jax.jit(jax.value_and_grad(loss_of, (0, 1, 2)))
    loss, (dx, *grads) = gradients(golden["byol.xs"], online, predictor)
    assert_close(loss, golden["byol.loss"], 1e-5)
    assert_close(dx, golden["byol.dxs"], 1e-4)
    for found, name in zip(grads, ("on", "pr"), strict=True):
        expected = _mlp(subset(golden, f"byol.d.{name}."), names)
        jax.tree.map(lambda a, b: assert_close(a, b, 1e-4), found, expected)


@pytest.mark.parametrize("temp", ["0.07", "0.1", "0.5"])
def test_nt_xent_is_half_of_simclr_s_own_code(temp):
    golden = load("family_losses")
    loss_of = jax.jit(jax.value_and_grad(lambda z: nt_xent_loss(z, float(temp))[0]))
    loss, grads = loss_of(golden[f"simclr{temp}.z"])
    assert_close(loss, golden[f"simclr{temp}.loss"], 1e-5)
    assert_close(grads, golden[f"simclr{temp}.d"], 1e-5)
    assert_close(2 * loss, golden[f"simclr{temp}.tf"], 1e-5)


def _masks_of(golden, seed):
    """draw_masks that gives the golden masks of the step whose key it gets."""
    masks = np.stack([golden["masks0"], golden["masks1"]])
    rows = int(masks.sum((1, 2, 3)).max())
    keys = jnp.stack(
        [jax.random.key_data(jax.random.fold_in(stream(seed, MASKS), step)) for step in (0, 1)]
    )

    def draw(spec, grid, key, ids, num_images):
        step = jnp.argmax(jnp.all(keys == jax.random.key_data(key), axis=-1))
        where = jnp.asarray(masks)[step]
        (row,) = jnp.nonzero(where.reshape(-1), size=rows, fill_value=0)
        hidden = jnp.sum(where, axis=-1).reshape(-1)
        real = jnp.arange(rows) < jnp.sum(hidden)
        weight = jnp.where(real, 1.0 / jnp.maximum(hidden[row // where.shape[-1]], 1), 0.0)
        return Masked(where, row, weight)

    return draw


def _without_key_bias(backbone):
    """The key part of qkv.bias has no gradient but rounding, which AdamW turns into steps of the rate."""
    kept = {}
    for name, part in backbone.items():
        if name.startswith("blocks_"):
            bias = np.array(part["attn"]["qkv"]["bias"]).reshape(3, -1)
            qkv = {"kernel": part["attn"]["qkv"]["kernel"], "bias": bias[[0, 2]]}
            part = part | {"attn": part["attn"] | {"qkv": qkv}}
        kept[name] = part
    return kept


def _network(golden, prefix):
    """Parameters by our names; the file has no patch kernel of the last teacher."""
    weights = {"backbone.patch_embed.proj.weight": np.zeros((12, 3, 8, 8), np.float32)}
    weights |= subset(golden, prefix)
    backbone = vit_from_torch(subset(weights, "backbone."))
    backbone["mask_token"] = weights["backbone.mask_token"]
    heads = {
        ours: dino_head_from_torch(subset(weights, f"{theirs}.")) for ours, theirs in HEADS.items()
    }
    return {"backbone": backbone, "heads": heads}


@pytest.mark.slow
def test_two_whole_dinov2_steps(monkeypatch):
    """DINO + iBOT + KoLeo with Sinkhorn-Knopp, layer-wise decay and trained prototype norms."""
    golden = load("dinov2_step")
    lr, decay, momentum, temp, layer_decay, patch_mult, koleo = map(float, golden["settings"])
    vit = VisionTransformer(
        embed_dim=12, depth=2, num_heads=3, patch_size=8, image_size=32, num_register_tokens=2,
        layer_scale_init=1.0, mask_token=True,
    )  # fmt: skip
    sizes = {"hidden_dim": 16, "bottleneck_dim": 8, "norm_last_layer": False}
    sizes["centering"] = "sinkhorn_knopp"
    loss = make_loss(
        {
            "dino": sizes | {"out_dim": 24},
            "ibot": sizes | {"out_dim": 32},
            "koleo": {"weight": koleo},
        }
    )
    tx = make_optimizer(
        "adamw", clip=0.0, layer_decay=layer_decay, patch_embed_lr_mult=patch_mult,
        freeze_last_layer_steps=0,
    )  # fmt: skip
    state = create_state(vit, loss, tx, jax.random.key(0))
    student, teacher = _network(golden, "student."), _network(golden, "teacher.")
    shapes = jax.tree.map(jnp.shape, state.params)
    assert shapes == jax.tree.map(jnp.shape, student)
    state = state.replace(
        params=jax.tree.map(jnp.asarray, student),
        teacher_params=jax.tree.map(jnp.asarray, teacher),
        opt_state=tx.init(student),
    )
    values = {"lr": lr, "weight_decay": decay, "teacher_momentum": momentum, "teacher_temp": temp}
    monkeypatch.setattr("dinotwins_jax.training.inputs.draw_masks", _masks_of(golden, 5))
    step = jax.jit(step_on_crops(vit, loss, tx, values, seed=5))
    for number in range(2):
        crops = {f"{name}_crops": np.float32(golden[name][number]) for name in ("global", "local")}
        state, metrics = step(state, crops)
        logged = subset(golden, f"loss{number}.")
        dino = logged["dino_local_crops_loss"] + logged["dino_global_crops_loss"]
        assert_close(metrics["ibot/loss"], 2 * logged["ibot_loss"], 1e-5)
        assert_close(koleo * metrics["koleo/loss"], 2 * logged["koleo_loss"], 1e-5)
        assert_close(metrics["dino/loss"], dino, 1e-5)
    found = {"student": state.params, "teacher": state.teacher_params}
    for network, params in found.items():
        expected = _network(golden, f"after.{network}.")
        for tree in (params, expected):
            tree["backbone"] = _without_key_bias(tree["backbone"])
            if network == "teacher":
                del tree["backbone"]["patch_embed"]["kernel"]
        for (path, ours), theirs in zip(
            jax.tree_util.tree_leaves_with_path(params), jax.tree.leaves(expected), strict=True
        ):
            assert_close(ours, theirs, 1e-4, f"{network}{jax.tree_util.keystr(path)}")
