"""Precision of a compute dtype: loss and gradients of one step, part by part, against float32.

    python -m experiments.precision --methods=hybrid,dinov2 --config.batch_size=64 --steps=50

For each of --methods (files in configs/, of --preset): --steps steps in float32, then one more from the
same state and batch in float32 and in --dtype. --config.key=value changes all methods' configs,
--<method>.key=value one. The table has a row for each part: the cosine and the relative error (L2) of its
whole gradient, and its tensor of least cosine. Gradients that are zero up to rounding are left out unless
--keep_rounding is given: of the keys' bias, and of biases before a batch norm. Exits with 1 where a loss
differs by more than LOSS or a tensor's cosine is below COSINE.
"""

import copy
import sys
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import flags, logging

from dinotwins_jax.build import Run, build, make_schedules
from dinotwins_jax.cli import exit_code, fail
from dinotwins_jax.damage import paths
from dinotwins_jax.data.pipeline import train_batches
from dinotwins_jax.durations import durations
from dinotwins_jax.evals.table import markdown
from dinotwins_jax.inputs import make_crops_of
from dinotwins_jax.settings.keys import terms_of
from dinotwins_jax.training.step import make_train_step
from experiments.comparison.command import run_with_overrides
from experiments.comparison.plan import METHODS, make_configs

LOSS, COSINE = 1e-2, 0.995  # of the whole loss, relative; of each tensor's gradient
ROUNDING = (
    1e-4  # a bias' gradient below this share of its kernel's or scale's is zero but for rounding
)
REFERENCE = "float32"


class Tensor(NamedTuple):
    """Gradients of a tensor in both dtypes, f64[n]."""

    reference: np.ndarray
    other: np.ndarray

    @property
    def cosine(self) -> float:
        norms = np.linalg.norm(self.reference) * np.linalg.norm(self.other)
        return float(self.reference @ self.other / norms) if norms > 0 else 0.0

    @property
    def error(self) -> float:
        """|other - reference| / |reference|."""
        return float(np.linalg.norm(self.other - self.reference) / np.linalg.norm(self.reference))


class Found(NamedTuple):
    """losses: {"loss" or "<term>/loss": (in float32, in the other dtype)}; tensors: by path."""

    losses: dict[str, tuple[float, float]]
    tensors: dict[str, Tensor]

    def loss_error(self) -> float:
        """Relative error of the whole loss."""
        reference, other = self.losses["loss"]
        return abs(other - reference) / abs(reference)

    def least_cosine(self) -> tuple[float, str]:
        """The least cosine of a tensor, and the tensor."""
        return min((tensor.cosine, name) for name, tensor in self.tensors.items())

    def parts(self) -> dict[str, dict[str, Tensor]]:
        """The tensors of each part of the backbone and each head."""
        found: dict[str, dict[str, Tensor]] = {}
        for name, tensor in self.tensors.items():
            found.setdefault(part_of(name), {})[name] = tensor
        return found


def part_of(path: str) -> str:
    """Part of a parameter: "patch_embed", "tokens", "blocks_<k>", "norm" or "head <name>"."""
    network, name, *_ = path.split("/")
    if network == "heads":
        return f"head {name}"
    blocks = name.startswith("blocks_")
    return name if blocks or name in ("patch_embed", "norm") else "tokens"


def measure(
    config, crops: Sequence[dict], dtype: str = "bfloat16", keep_rounding: bool = False
) -> Found:
    """One step in float32 and in `dtype`.

    Args:
      config: of a run; its model.dtype is not used. Gram anchoring is on from the start.
      crops: batches of crops; all but the last train in float32 first.
      keep_rounding: keep the tensors whose gradient is zero up to rounding.
    """
    runs = {name: _build(config, name) for name in (REFERENCE, dtype)}
    of_float32 = runs[REFERENCE]
    state = jax.jit(of_float32.fresh_state)()
    if len(crops) > 1:
        train_step = jax.jit(of_float32.train_step)
        for batch in crops[:-1]:
            state, _ = train_step(state, batch)
    state = state.replace(opt_state=_recorder().init(state.params))
    found = [jax.device_get(jax.jit(_step(run))(state, crops[-1])) for run in runs.values()]
    (first, losses), (second, other_losses) = ((s.opt_state, metrics) for s, metrics in found)
    width = of_float32.backbone.embed_dim
    reference, other = (_gradients(grads, width) for grads in (first, second))
    return Found(
        {
            name: (float(value), float(other_losses[name]))
            for name, value in losses.items()
            if name.endswith("loss")
        },
        {
            name: Tensor(gradient, other[name])
            for name, gradient in reference.items()
            if keep_rounding or not _is_rounding(name, reference)
        },
    )


def _build(config, dtype: str) -> Run:
    config = copy.deepcopy(config)
    config.model.dtype, config.mesh.data = dtype, 1
    for _, gram in terms_of(config, "gram"):
        gram.start_epochs = 0.0
    return build(config, make_crops=lambda batch: batch)


def _step(run: Run):
    """The step of a run that keeps its gradients as the state of its optimiser and changes no weight."""
    config = run.config
    return make_train_step(
        backbone=run.backbone,
        loss=run.loss,
        make_crops=lambda batch: batch,
        tx=_recorder(),
        schedules=make_schedules(config, run.total_steps, durations(config, run.total_steps)),
        seed=config.seed,
        match_gradients_to=config.match_gradients_to,
        micro_batches=config.micro_batches,
    )


def _recorder() -> optax.GradientTransformationExtraArgs:
    def update(grads, state, params, **_):
        del state
        return jax.tree.map(jnp.zeros_like, params), grads

    return optax.GradientTransformationExtraArgs(lambda p: jax.tree.map(jnp.zeros_like, p), update)


def _gradients(grads, width: int) -> dict[str, np.ndarray]:
    """{path: f64[n]}, with the keys' part of qkv as a tensor of its own, "qkv/bias of keys"."""
    found = {}
    for name, leaf in paths(grads):
        leaf, keys = np.asarray(leaf, np.float64), np.s_[width : 2 * width]
        if name.endswith("qkv/bias"):
            found[f"{name} of keys"] = leaf[keys]
            leaf = np.delete(leaf, keys)
        found[name] = leaf.ravel()
    return found


def _is_rounding(name: str, gradients: dict[str, np.ndarray]) -> bool:
    """Whether a bias' gradient is nothing beside that of its module's other tensor."""
    module, _, last = name.rpartition("/")
    if not last.startswith("bias"):
        return False
    others = [
        gradients[f"{module}/{k}"] for k in ("kernel", "scale") if f"{module}/{k}" in gradients
    ]
    return bool(others) and np.linalg.norm(gradients[name]) < ROUNDING * np.linalg.norm(others[0])


def crops_of(config, count: int) -> list[dict]:
    """Crops of the first `count` batches of a run."""
    run = _build(config, REFERENCE)
    crop = jax.jit(make_crops_of(run.config, run.placement))
    batches = train_batches(
        run.source,
        batch_size=run.config.batch_size,
        canvas_size=run.canvas_size,
        seed=run.config.seed,
    )
    wanted = ("image", "size", "place")
    found = []
    for _ in range(count):
        batch = next(batches)
        found.append(jax.device_get(crop({name: batch[name] for name in wanted})))
    batches.close()
    return found


def table(found: dict[str, Found]) -> str:
    """Markdown: two lines for each method's loss, then a line for each part."""
    rows = [["method", "part", "cosine", "relative error", "least cosine of a tensor", "which"]]
    for method, of in found.items():
        for name, (reference, other) in of.losses.items():
            error = abs(other - reference) / max(abs(reference), 1e-30)
            rows.append([method, name, f"{reference:.6g} / {other:.6g}", f"{error:.1e}", "", ""])
        for part, tensors in of.parts().items():
            whole = Tensor(*(np.concatenate(of) for of in zip(*tensors.values(), strict=True)))
            least, which = min((tensor.cosine, name) for name, tensor in tensors.items())
            which = which.split("/", 2)[-1]
            figures = [f"{whole.cosine:.5f}", f"{whole.error:.1e}", f"{least:.5f}", which]
            rows.append([method, part, *figures])
    return markdown(rows)


def misses(found: dict[str, Found]) -> list[str]:
    """A line for each method that misses LOSS or COSINE."""
    lines = []
    for method, of in found.items():
        if (error := of.loss_error()) > LOSS:
            lines.append(f"{method}: the loss differs by {error:.1e}, more than {LOSS:g}")
        low = [name for name, tensor in of.tensors.items() if not tensor.cosine >= COSINE]
        if low:
            least, name = of.least_cosine()
            lines.append(
                f"{method}: {len(low)} of {len(of.tensors)} tensors below a cosine of {COSINE:g}, the "
                f"least {least:.4f}: {name}"
            )
    return lines


def main(argv, overrides: dict) -> int:
    """The command; returns the exit code."""
    if len(argv) > 1:
        return fail(f"unknown argument '{argv[1]}': options start with --")
    logging.set_verbosity(logging.WARNING)
    given, missed = flags.FLAGS, []

    def work():
        configs = make_configs(given.preset, given.methods, given.seed, overrides)
        found = {}
        for method, config in configs.items():
            crops = crops_of(config, given.steps + 1)
            found[method] = measure(config, crops, given.dtype, given.keep_rounding)
            print(f"{method}: done", file=sys.stderr, flush=True)
        print(table(found))
        missed.extend(misses(found))
        for line in missed:
            print(line, file=sys.stderr)

    return exit_code(work) or int(bool(missed))


if __name__ == "__main__":
    flags.DEFINE_list("methods", list(METHODS), "Files in configs/")
    flags.DEFINE_string("preset", "demo", "Preset of the configs")
    flags.DEFINE_string("dtype", "bfloat16", "Compared with float32")
    flags.DEFINE_integer("steps", 0, "Steps in float32 before the one that is compared", 0)
    flags.DEFINE_integer("seed", 0, "Of weights and data", 0)
    flags.DEFINE_boolean("keep_rounding", False, "Keep gradients that are zero up to rounding")
    run_with_overrides(main, METHODS)
