"""The contract of a loss, and the weighted sum that makes a hybrid of several.

Axis letters, here and everywhere: B batch, V views, K prototypes, D projection, E embed, N tokens,
H W C image. The batch axis leads. Views are ordered: the two global crops, then the local ones.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax

Weight = float | Callable[[Any], jax.Array]  # a number, or a schedule: step i32[] -> f32[]


class HeadSpec(NamedTuple):
    """A Linen module that a loss puts on the backbone's class token.

    module: called as module(x [N, E]) or, if its __call__ has a `train` argument, module(x, train=True).
    crops: "all" or "global", the student crops that it sees (the teacher sees global crops alone).
    teacher: keep an EMA copy and run it on the teacher's features too.
    per_view: one call a view instead of one call on everything; matters to batch statistics. A module
      with the attribute takes_views gets all of them as x [V, N, E] in one call and keeps them apart.
    """

    module: nn.Module
    crops: str = "all"
    teacher: bool = True
    per_view: bool = False


class Loss(NamedTuple):
    """Three pure parts, as in optax; it never sees parameters or config.

    heads: name -> HeadSpec. The outputs appear under the same names.
    init: () -> loss_state, the running statistics that it keeps ({} when none).
    apply: (loss_state, student, teacher, hparams) -> (loss f32[], new loss_state, metrics).
      student, teacher: {"cls": f32[B, V, E], "patches": {"global": f32[B, 2, N, E], "local": …},
        "<head>": f32[B, V, …]}; the teacher's V is 2 and carries no gradient.
      hparams: this step's scalars: "step", "lr", "weight_decay", "teacher_momentum", "teacher_temp";
        and "axis_name", None under jit, the mapped axis under pmap: batch means must then be pmean'ed.
      It sees the outputs of the heads that it declares.
    terms: of a weighted sum, name -> (weight, loss); the step differentiates them one by one, so that
      their gradients can be compared. None: the loss is one piece.
    """

    heads: dict[str, HeadSpec]
    init: Callable[[], Any]
    apply: Callable[..., tuple[jax.Array, Any, dict[str, jax.Array]]]
    terms: dict[str, tuple[Weight, "Loss"]] | None = None


def weighted_sum(terms: dict[str, tuple[Weight, Loss]]) -> Loss:
    """Sum of weighted losses. State and metrics of each live under its name.

    Args:
      terms: name -> (weight, loss); a weight is a number or a schedule, step i32[] -> f32[]. A term
        of weight 0 is still measured.
    Returns:
      a Loss whose metrics hold "<name>/loss", each unweighted, beside the terms' own metrics.
    Raises:
      ValueError: no terms, or two losses declare one head name with different specs.
    """
    if not terms:
        raise ValueError("no loss: config.loss needs at least one term, such as loss.dino")
    heads: dict[str, HeadSpec] = {}
    for name, (_, loss) in terms.items():
        for head, spec in loss.heads.items():
            if heads.setdefault(head, spec) != spec:
                raise ValueError(
                    f"loss '{name}' declares head '{head}' unlike another loss: name it otherwise"
                )

    def init():
        return {name: loss.init() for name, (_, loss) in terms.items()}

    def apply(loss_state, student, teacher, hparams):
        total, new_state, metrics = 0.0, {}, {}
        for name, (weight, loss) in terms.items():
            value, new_state[name], own = loss.apply(loss_state[name], student, teacher, hparams)
            total = total + weight_at(weight, hparams) * value
            metrics |= named(name, value, own)
        return total, new_state, metrics

    return Loss(heads, init, apply, terms)


def weight_at(weight: Weight, hparams: dict) -> jax.Array | float:
    """The weight of a term in the step of hparams["step"]."""
    return weight(hparams["step"]) if callable(weight) else weight


def named(name: str, value: jax.Array, metrics: dict) -> dict[str, jax.Array]:
    """A term's unweighted value and its own metrics, under its name."""
    return {f"{name}/loss": value} | {f"{name}/{key}": v for key, v in metrics.items()}
