"""Interface of a loss, and the weighted sum of several losses.

Axis letters, here and everywhere: B batch, V views, K prototypes, D projection, E embed, N tokens,
H W C image. The batch axis leads. Views are ordered: the two global crops, then the local ones.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax

Weight = float | Callable[[Any], jax.Array]  # a number, or a schedule: step i32[] -> f32[]


class HeadSpec(NamedTuple):
    """A Linen module that a loss puts on the backbone's tokens.

    module: called as module(x [N, E]), or as module(x, train=True) where takes_train is set. None: the
      head that `shares` names, on another input.
    crops: "all" or "global", the student crops that it sees (the teacher sees global crops only).
    teacher: keep an EMA copy and run it on the teacher's features too.
    per_view: one call a view instead of one call on all rows, which matters to batch statistics. A
      module with the attribute takes_views gets x [V, N, E] in one call and keeps the views apart.
    input: "cls", the class tokens; "masked", the patch tokens that the loss's masks hide from the student
      (output [M, …], a row for each of hparams["masked"]); or the name of a head declared before it,
      whose output it takes.
    shares: the head, of any loss of the sum, whose module and parameters it uses.
    takes_train: pass train=True to the module, as batch norm and dropout need.
    """

    module: nn.Module | None
    crops: str = "all"
    teacher: bool = True
    per_view: bool = False
    input: str = "cls"
    shares: str = ""
    takes_train: bool = False


class Masks(NamedTuple):
    """Patches of global crops that are hidden from the student, see masks.py.

    image_fraction: share of the crops that get a mask; ratio: smallest and largest share of a crop's
    patches that it hides; min_patches: of one block.
    """

    image_fraction: float = 0.5
    ratio: tuple[float, float] = (0.1, 0.5)
    min_patches: int = 4


class Masked(NamedTuple):
    """Masked patches of the student in a step.

    where: bool[B, 2, N], True for masked patches. These, padded to a static number M:
    row: i32[M], index of each in B * 2 * N; weight: f32[M], 1 / masked patches of its crop; 0: padding.
    """

    where: jax.Array
    row: jax.Array
    weight: jax.Array


class Anchor(NamedTuple):
    """An earlier teacher's backbone: taken after `start` steps, and again every `refresh` steps (0: never),
    at most max_refreshes times."""

    start: int = 0
    refresh: int = 0
    max_refreshes: int = 0


class Loss(NamedTuple):
    """One loss as three pure parts, in the manner of optax; it never sees parameters or config.

    heads: name -> HeadSpec. The outputs appear under the same names.
    init: () -> loss_state, the running statistics that it keeps ({} when none).
    apply: (loss_state, student, teacher, hparams) -> (loss f32[], new loss_state, metrics).
      student, teacher: {"cls": f32[B, V, E], "<head>": f32[B, V, …]} and, for the networks named in
        `patches`, "patches": {"global": f32[B, 2, N, E], "local": f32[B, n, N', E]}. The teacher's V is
        2 and carries no gradient. With an anchor, teacher["anchor"] holds its "cls" and "patches".
      hparams: this step's scalars: "step", "lr", "weight_decay", "teacher_momentum", "teacher_temp";
        "masked", a `Masked` where a loss of the sum has masks, else None; and "axis_name", None under
        jit, the mapped axis under pmap: batch means must then be pmean'ed.
      It sees the outputs of the heads that it declares.
    patches: "student" and / or "teacher", the networks whose patch tokens `apply` reads. Where no loss
      reads them the last block computes the class token only. Heads on "masked" need no declaration.
    masks, anchor: required of the step, if any; all losses of a sum see the same masked crops.

    A factory makes it from the arguments of config.loss.<term>. An argument that the factory calls
    <name>_steps is a duration: the config states it in epochs, as <name>_epochs.
    """

    heads: dict[str, HeadSpec]
    init: Callable[[], Any]
    apply: Callable[..., tuple[jax.Array, Any, dict[str, jax.Array]]]
    masks: Masks | None = None
    anchor: Anchor | None = None
    patches: tuple[str, ...] = ()


class WeightedSum(NamedTuple):
    """Losses that train one backbone together. The sum is formed in training/objective.py.

    terms: name -> (weight, loss); heads, masks, anchor: those of all terms.
    """

    terms: dict[str, tuple[Weight, Loss]]
    heads: dict[str, HeadSpec]
    masks: Masks | None
    anchor: Anchor | None

    def init(self) -> dict[str, Any]:
        """{name: loss_state}."""
        return {name: loss.init() for name, (_, loss) in self.terms.items()}

    def reads_patches(self, network: str) -> bool:
        """Whether a term reads the patch tokens of the "student" or the "teacher"."""
        masked = [spec for spec in self.heads.values() if spec.input == "masked"]
        through_head = any(network == "student" or spec.teacher for spec in masked)
        return through_head or any(network in loss.patches for _, loss in self.terms.values())


def weighted_sum(terms: dict[str, tuple[Weight, Loss]]) -> WeightedSum:
    """The sum of weighted losses, checked.

    Args:
      terms: name -> (weight, loss); a weight is a number or a schedule, step i32[] -> f32[]. A term
        of weight 0 is still measured.
    Raises:
      ValueError: no terms; two losses that declare one head name with different specs, or different
        masks or anchors; a shared head that no loss declares; unknown names in `patches`.
    """
    if not terms:
        raise ValueError("no loss: config.loss needs at least one term, such as loss.dino")
    heads: dict[str, HeadSpec] = {}
    for name, (_, loss) in terms.items():
        if set(loss.patches) - {"student", "teacher"}:
            raise ValueError(f"loss '{name}' has patches={loss.patches}: of 'student', 'teacher'")
        for head, spec in loss.heads.items():
            if heads.setdefault(head, spec) != spec:
                raise ValueError(
                    f"loss '{name}' declares head '{head}' unlike another loss: rename one of them"
                )
    terms = {
        name: (weight, loss._replace(heads=_with_shared(loss.heads, heads)))
        for name, (weight, loss) in terms.items()
    }
    asked = {
        what: {getattr(loss, what) for _, loss in terms.values()} - {None}
        for what in ("masks", "anchor")
    }
    for what, of in asked.items():
        if len(of) > 1:
            raise ValueError(
                f"the losses of a sum have one {what}, not {' and '.join(map(str, of))}"
            )
    return WeightedSum(
        terms,
        _with_shared(heads, heads),
        **{what: next(iter(of), None) for what, of in asked.items()},
    )


def _with_shared(heads: dict[str, HeadSpec], known: dict[str, HeadSpec]) -> dict[str, HeadSpec]:
    """Fills in the modules of heads that share another head's."""

    def resolve(name, spec):
        if not spec.shares:
            return spec
        if spec.shares not in known or known[spec.shares].shares:
            raise ValueError(
                f"{name}.shared_head is '{spec.shares}': no loss of the sum declares such a head"
            )
        module = known[spec.shares].module
        if spec.input == "masked" and getattr(module, "use_bn", False):
            raise ValueError(
                f"{name}.shared_head is '{spec.shares}', whose batch norm (use_bn) would count the padding "
                "among the masked patches"
            )
        return spec._replace(module=module)

    return {name: resolve(name, spec) for name, spec in heads.items()}


def global_batch(x: jax.Array, axis_name: str | None) -> tuple[jax.Array, jax.Array | int]:
    """(rows of all devices, place of this device's first row among them); x itself under jit, where arrays
    are global."""
    if axis_name is None:
        return x, 0
    everyone = jax.lax.all_gather(x, axis_name, tiled=True)
    return everyone, jax.lax.axis_index(axis_name) * x.shape[0]


def weight_at(weight: Weight, hparams: dict) -> jax.Array | float:
    """The weight of a term in the step of hparams["step"]."""
    return weight(hparams["step"]) if callable(weight) else weight
