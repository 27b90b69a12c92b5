"""Forward pass: features of a batch by student and teacher, and the pullback to the parameters.

Letters: B images, A micro-batches, V views, N tokens, E width of a token.

With A > 1 the batch is processed in A parts, so only one part's activations are in memory at a time.
The loss still sees the features of the whole batch; the backward pass repeats each part's forward pass
with the gradient of the whole batch's loss at its features. That is exact even for losses that couple
the images of a batch (arXiv:2101.06983), at the cost of one more forward pass of the student.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

PyTree = Any


class Forward(NamedTuple):
    """Features of a batch, and their pullback.

    student: {"cls": [B, V, E], "patches": {"global": [B, 2, N, E], "local": …}} of all crops.
    teacher: the same for the global crops, without drop path and gradient; "anchor": the anchor's.
    pull_back: gradient with respect to `student` -> gradient with respect to the student's backbone.
    """

    student: dict
    teacher: dict
    pull_back: Callable[[dict], PyTree]


def forward(
    backbone,
    make_crops: Callable,
    params: PyTree,
    teacher_params: PyTree,
    batch: PyTree,
    drop_key: jax.Array,
    ids: jax.Array,
    *,
    hidden: jax.Array | None = None,
    anchor_params: PyTree | None = None,
    micro_batches: int = 1,
    patches: tuple[bool, bool] = (True, True),
) -> Forward:
    """Computes the features of a batch.

    Args:
      make_crops: batch -> {"global_crops": [B, 2, h, w, C], "local_crops": [B, n, h, w, C]}; what it
        returns for an image must not depend on the other images.
      params, teacher_params: of the backbone.
      ids: i32[B], position of each image in the global batch, for drop path.
      hidden: bool[B, 2, N], patches of the global crops that are masked for the student.
      anchor_params: of the backbone of an earlier teacher.
      micro_batches: A; must divide the images of each device.
      patches: whether patch tokens of the student and of the teacher are needed; without them the last
        block computes the class token only.
    """
    crops = make_crops(batch) if micro_batches == 1 else None

    def teacher_of(crops):
        networks = jax.lax.stop_gradient((teacher_params, anchor_params))
        return teacher_features(backbone, *networks, crops, patches=patches[1])

    def student_of(params, crops, ids, hidden):
        return student_features(backbone, params, crops, drop_key, ids, hidden, patches=patches[0])

    if micro_batches == 1:
        student, pull_back = jax.vjp(lambda params: student_of(params, crops, ids, hidden), params)
        return Forward(student, teacher_of(crops), lambda grads: pull_back(grads)[0])

    parts = split((batch, ids, hidden), micro_batches)

    def both(part):
        batch, *drawn = part
        crops = make_crops(batch)
        return student_of(params, crops, *drawn), teacher_of(crops)

    def pull_back(grads):
        def add(total, part):
            (batch, *drawn), grads = part
            crops = make_crops(batch)
            _, back = jax.vjp(lambda params: student_of(params, crops, *drawn), params)
            return jax.tree.map(jnp.add, total, back(grads)[0]), None

        zeros = jax.tree.map(jnp.zeros_like, params)
        return jax.lax.scan(add, zeros, (parts, split(grads, micro_batches)))[0]

    return Forward(*join(jax.lax.map(both, parts)), pull_back)


def split(tree: PyTree, parts: int) -> PyTree:
    """[B, …] -> [parts, B / parts, …]: every parts-th row, so that each device splits its own rows."""
    return jax.tree.map(
        lambda x: jnp.moveaxis(x.reshape(x.shape[0] // parts, parts, *x.shape[1:]), 1, 0), tree
    )


def join(tree: PyTree) -> PyTree:
    """Inverse of `split`."""
    return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1).reshape(-1, *x.shape[2:]), tree)


def teacher_features(
    backbone, params: PyTree, anchor_params: PyTree | None, crops: dict, patches: bool = True
) -> dict:
    """Features of the global crops by the teacher and the anchor, without drop path and gradient."""

    def of(params, patches):
        groups = {"global": crops["global_crops"]}
        return jax.lax.stop_gradient(_features(backbone, params, groups, False, None, patches))

    found = of(params, patches)
    return found if anchor_params is None else found | {"anchor": of(anchor_params, True)}


def student_features(
    backbone, params: PyTree, crops: dict, drop_key, ids, hidden=None, patches: bool = True
) -> dict:
    """Features of all crops by the student, with drop path; see `forward`."""
    groups = _student_groups(crops)
    return _features(backbone, params, groups, True, (drop_key, ids), patches, hidden)


def _student_groups(crops: dict) -> dict:
    groups = {"global": crops["global_crops"], "local": crops["local_crops"]}
    return {name: images for name, images in groups.items() if images.shape[1]}


def _features(backbone, params, groups, train, drop, patches, hidden=None) -> dict:
    """{"cls": [B, V, E], "patches": {group: [B, v, N, E]}}, by one backbone pass per crop size; only
    "cls", which is cheaper, without `patches`."""
    cls, tokens = [], {}
    for number, (name, images) in enumerate(groups.items()):
        B, v = images.shape[:2]
        kwargs = {"train": train, "patches": patches}
        if drop is not None and (backbone.drop_path_rate > 0 or backbone.moves is not None):
            key, ids = jax.random.fold_in(drop[0], number), drop[1]
            kwargs["rngs"] = {"drop_path": key, "rope": key}  # Flax folds the module's path in
            kwargs["sample_ids"] = (ids[:, None] * v + jnp.arange(v)).reshape(-1)
        if hidden is not None and name == "global":
            kwargs["hidden"] = hidden.reshape(B * v, -1)
        out = backbone.apply({"params": params}, images.reshape(B * v, *images.shape[2:]), **kwargs)
        cls.append(out.cls.reshape(B, v, -1))
        if patches:
            tokens[name] = out.patches.reshape(B, v, *out.patches.shape[1:])
    found = {"cls": jnp.concatenate(cls, axis=1)}
    return found | {"patches": tokens} if patches else found
