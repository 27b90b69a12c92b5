"""Loss and gradients of one step with given settings, and how far two of them differ."""

import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dinotwins_jax.damage import paths
from dinotwins_jax.data.scenes import Scenes
from dinotwins_jax.training.state import create_state
from dinotwins_jax.training.step import make_train_step
from experiments.benchmark.settings import Settings
from experiments.gpu.child import Job
from experiments.gpu.plan import Item
from experiments.gpu.program import Once, built, config_for, settings_of
from experiments.invariance import CONSTANTS, sgd

# Part of the model -> its parameters; the first that matches.
PARTS = {
    "DINO's head": r"^heads/dino/",
    "projector": r"^heads/barlow_twins/",
    "patch embedding": r"/patch_embed/",
    "tokens, positions": r"cls_token|pos_embed|register",
    "qkv": r"/attn/qkv/",
    "attention's output": r"/attn/proj/",
    "MLP": r"/mlp/",
    "norms": r"/norm\d*/",
}


class Compiled(NamedTuple):
    """step(state, crops) -> (state with the gradients as its optimiser's, metrics), and its arguments."""

    step: Any
    state: Any
    crops: dict[str, jax.Array]


class Gradients(NamedTuple):
    """loss f32[]; arrays: {path: gradient}, on the device."""

    loss: float
    arrays: dict[str, jax.Array]


_found: dict[str, Gradients] = {}  # by item; references
_state_once, _crops_once = Once(), Once()  # the same for all items of a part


def prepare(item: Item, job: Job) -> Compiled:
    """Compiles the step of an item."""
    config, given = config_for(item.values), settings_of(item.values)
    run = built(config, make_crops=lambda batch: batch)
    tx = sgd()
    step = make_train_step(
        backbone=run.backbone,
        loss=run.loss,
        make_crops=lambda batch: batch,
        tx=tx,
        schedules={k: lambda step, v=v: jnp.float32(v) for k, v in CONSTANTS.items()},
        seed=config.seed,
        match_gradients_to=config.match_gradients_to,
    )
    key, place = jax.random.key(config.seed), run.placement
    fresh = jax.jit(lambda: create_state(run.backbone, run.loss, tx, key))
    state = _state_once(lambda: place.init(fresh))
    crops = _crops_once(lambda: place.put_batch(scene_crops(given)))
    with jax.default_matmul_precision(item.values["precision"]):
        lowered = place.compile(step, state, keep_state=True).lower(state, crops)
        return Compiled(lowered.compile(), state, crops)


def measure(item: Item, ready: Compiled, job: Job) -> dict:
    """Loss and gradient norm, and the differences to the reference if the item has one."""
    ours = run_step(ready)
    norm = float(jnp.sqrt(sum(jnp.sum(jnp.square(g)) for g in ours.arrays.values())))
    if not np.isfinite([ours.loss, norm]).all():
        raise FloatingPointError(f"the loss is {ours.loss}, the norm of the gradient {norm}")
    figures = {"loss": ours.loss, "gradient_norm": norm}
    reference = item.values["reference"]
    if not reference:
        _found[item.name] = ours
        return figures
    if reference not in _found:
        raise RuntimeError(f"there is nothing to compare with: '{reference}' failed")
    return figures | {"reference": reference} | difference(ours, _found[reference])


def run_step(compiled: Compiled) -> Gradients:
    """Runs the step once."""
    state, metrics = compiled.step(compiled.state, compiled.crops)
    return Gradients(float(metrics["loss"]), trained(state.opt_state))


def trained(gradients) -> dict[str, jax.Array]:
    """{path: gradient} without the bias of the keys, whose gradient is zero but for rounding."""
    arrays = dict(paths(gradients))
    for name, array in arrays.items():
        if name.endswith("qkv/bias"):
            D = array.shape[-1] // 3
            arrays[name] = jnp.concatenate([array[..., :D], array[..., 2 * D :]], axis=-1)
    return arrays


def difference(ours: Gradients, theirs: Gradients) -> dict:
    """How far two results differ.

    Returns:
      loss_error: relative; cosine: of all gradients as one vector; parts: {part of the model: cosine};
      worst: {"name", "cosine"} of the array with the lowest cosine.
    """
    products = _products(ours.arrays, theirs.arrays)
    products = {name: np.asarray(of, np.float64) for name, of in products.items()}
    of_parts: dict[str, np.ndarray] = {}
    for name, of in products.items():
        part = part_of(name)
        of_parts[part] = of_parts.get(part, 0.0) + of
    cosines = {name: _cosine(of) for name, of in products.items()}
    worst = min(cosines, key=cosines.get)
    return {
        "loss_error": abs(ours.loss - theirs.loss) / abs(theirs.loss),
        "cosine": _cosine(sum(products.values())),
        "parts": {part: _cosine(of_parts[part]) for part in PARTS if part in of_parts},
        "worst": {"name": worst, "cosine": cosines[worst]},
    }


@jax.jit
def _products(ours, theirs):
    """(a . b, a . a, b . b) of each pair of arrays."""

    def of(a, b):
        return jnp.stack([jnp.sum(a * b), jnp.sum(a * a), jnp.sum(b * b)])

    return jax.tree.map(of, ours, theirs)


def _cosine(products: np.ndarray) -> float:
    ab, aa, bb = products
    return float(ab / np.sqrt(aa * bb)) if aa * bb else float(aa == bb)


def part_of(path: str) -> str:
    """The part of PARTS that a parameter belongs to."""
    return next(part for part, pattern in PARTS.items() if re.search(pattern, path))


def scene_crops(settings: Settings) -> dict[str, np.ndarray]:
    """Random windows of generated scenes, normalised: f32[B, V, h, w, 3]."""
    rng, side = np.random.default_rng(0), 2 * settings.global_size
    scenes = Scenes("train", num_train=settings.batch_size, size=side)
    images = [np.float32(scenes[i]) / 127.5 - 1.0 for i in range(settings.batch_size)]

    def windows(views: int, size: int) -> np.ndarray:
        out = np.empty((len(images), views, size, size, 3), np.float32)
        for image, of_image in zip(images, out, strict=True):
            for view in of_image:
                top, left = rng.integers(0, side - size + 1, 2)
                view[:] = image[top : top + size, left : left + size]
        return out

    return {
        "global_crops": windows(2, settings.global_size),
        "local_crops": windows(settings.num_local, settings.local_size),
    }
