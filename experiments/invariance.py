"""Invariance of training to its devices: one table of differences to a run on one device.

    python -m experiments.invariance [--real_crops]

Each row trains the same two steps (plain SGD, so that every difference of a gradient stays visible) on
virtual CPU devices: jit over a mesh, pmap, a state split over devices (fsdp), two processes connected
over loopback, micro-batches, and blocks as a loop. A number is an array's largest difference over its
largest value, and the maximum of that over all arrays. Arrays that are exactly zero up to rounding are left
out: the gradients of the keys' bias and of biases before a batch norm, and the mean that BYOL's predictor
sees of standardised projections. Images are cut into crops; with --real_crops the multi-crop of training is
used, which takes longer to compile. A row of bfloat16 is compared with one device in bfloat16. Exits with 1
above the limit of a row's dtype.
"""

import json
import os
import pickle
import re
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import app, flags, logging

from dinotwins_jax.augment.multi_crop import seeded_multi_crop
from dinotwins_jax.damage import paths
from dinotwins_jax.devices.placement import make_placement
from dinotwins_jax.devices.processes import join
from dinotwins_jax.evals.table import markdown
from dinotwins_jax.losses import make_loss
from dinotwins_jax.models.vit import VisionTransformer
from dinotwins_jax.training.state import create_state
from dinotwins_jax.training.step import make_train_step

LIMIT, LIMIT_BFLOAT16 = 2e-4, 1e-1
BATCH, STEPS, DEVICES, SEED = 16, 2, 8, 3
VIT = VisionTransformer(
    embed_dim=48, depth=2, num_heads=3, patch_size=4, image_size=16, drop_path_rate=0.2
)
DINO = {"out_dim": 24, "hidden_dim": 24, "bottleneck_dim": 16, "use_bn": True}
BARLOW = {"hidden_dims": (16, 16, 16)}
TERMS = {
    "dino": {"dino": DINO},
    "barlow_twins": {"barlow_twins": BARLOW},
    "hybrid": {"dino": DINO, "barlow_twins": BARLOW | {"weight": 0.1}},
    "dinov3": {
        "dino": DINO | {"use_bn": False, "centering": "sinkhorn_knopp"},
        "ibot": {"shared_head": "dino", "out_dim": 24},
        "koleo": {"weight": 0.1},
        "gram": {"weight": 2.0, "level": "batch", "start_steps": 1},
    },
    "two views": {
        "byol": {"hidden_dim": 16, "out_dim": 8, "norm_output": True},
        "simclr": {"hidden_dims": (16, 8)},
        "vicreg": {"hidden_dims": (16, 16), "weight": 0.1},
    },
}
CONSTANTS = {"lr": 0.1, "weight_decay": 1e-4, "teacher_momentum": 0.9, "teacher_temp": 0.05}


class Case(NamedTuple):
    """Set-up of a training; devices: of all processes together."""

    method: str = "hybrid"
    mode: str = "jit"
    devices: int = 1
    fsdp: int = 1
    processes: int = 1
    micro_batches: int = 1
    remat: bool = False
    scan: bool = False
    dtype: str = "float32"

    def title(self) -> str:
        parts = [self.method, self.mode, f"{self.devices} device{'s' * (self.devices > 1)}"]
        parts += [f"fsdp {self.fsdp}"] if self.fsdp > 1 else []
        parts += [f"{self.processes} processes"] if self.processes > 1 else []
        parts += [f"batch in {self.micro_batches} parts"] if self.micro_batches > 1 else []
        parts += ["remat"] * self.remat + ["blocks as a loop"] * self.scan
        return ", ".join(parts + [self.dtype] * (self.dtype != "float32"))

    @property
    def reference(self) -> "Case":
        """The same training on one device."""
        return Case(self.method, dtype=self.dtype)

    @property
    def limit(self) -> float:
        """Largest difference that rounding explains."""
        return {"float32": LIMIT, "bfloat16": LIMIT_BFLOAT16}[self.dtype]


PLACES = (
    Case(devices=2),
    Case(devices=8),
    Case(mode="pmap", devices=1),
    Case(mode="pmap", devices=2),
    Case(mode="pmap", devices=8),
    Case(devices=2, fsdp=2),
    Case(devices=8, fsdp=4),
    Case(devices=8, fsdp=8),
    Case(devices=4, processes=2),
    Case(devices=4, fsdp=4, processes=2),
    Case(micro_batches=4),
    Case(micro_batches=4, devices=4),
    Case(micro_batches=4, devices=4, mode="pmap"),
    Case(micro_batches=4, devices=4, fsdp=2),
    Case(remat=True),
    Case(micro_batches=4, remat=True),
    Case(devices=4, fsdp=2, scan=True),
)
# The hybrid in all set-ups, other methods where they could differ.
CASES = (
    *PLACES,
    *(
        place._replace(method=method)
        for method in ("dino", "barlow_twins")
        for place in (Case(devices=8, fsdp=8), Case(micro_batches=4))
    ),
    Case("dino", devices=8, dtype="bfloat16"),
    Case("dino", devices=8, fsdp=4, dtype="bfloat16"),
    *(
        place._replace(method=method)
        for method in ("dinov3", "two views")
        for place in (
            Case(devices=8, fsdp=4),
            Case(devices=8, mode="pmap"),
            Case(micro_batches=4),
        )
    ),
)


def run_case(case: Case, real_crops: bool = True) -> dict[str, dict[str, np.ndarray]]:
    """Trains; returns {quantity: {path: array}}. With several processes, called in each.

    Args:
      real_crops: the multi-crop of training; False: plain cuts, which compile quickly.
    """
    placement = make_placement(
        case.mode,
        BATCH,
        jax.devices()[: case.devices],
        fsdp=case.fsdp,
        micro_batches=case.micro_batches,
    )
    loss, tx = make_loss(TERMS[case.method]), sgd()
    backbone = VIT.clone(
        remat=case.remat,
        scan_blocks=case.scan,
        dtype=jnp.dtype(case.dtype),
        mask_token=loss.masks is not None,
    )
    step = make_train_step(
        backbone=backbone,
        loss=loss,
        make_crops=_make_crops(real_crops, in_loop=case.mode == "pmap" or case.devices == 1),
        tx=tx,
        schedules={k: lambda step, v=v: jnp.float32(v) for k, v in CONSTANTS.items()},
        seed=SEED,
        axis_name=placement.axis_name,
        micro_batches=case.micro_batches,
        gather=placement.gather,
    )
    state = placement.init(lambda: create_state(backbone, loss, tx, jax.random.key(1)))
    step = placement.compile(step, state)
    rng = np.random.default_rng(0)
    rows = np.array_split(np.arange(BATCH), case.processes)[jax.process_index()]
    for number in range(STEPS):
        batch = {
            "place": np.stack([np.full(BATCH, number), np.arange(BATCH)], axis=1),
            "image": rng.integers(0, 255, (BATCH, 24, 24, 3), np.uint8),
            "size": np.full((BATCH, 2), 24, np.int32),
        }
        batch = {name: array[rows] for name, array in batch.items()}
        state, metrics = step(state, placement.put_batch(batch))
    state = jax.device_get(placement.whole(state))
    return {
        "loss": {name: np.asarray(value) for name, value in metrics.items() if "loss" in name},
        "gradients": _arrays(state.opt_state),
        "center": _arrays(state.loss_state),
        "batch statistics": _arrays(state.batch_stats),
        "student": _arrays(state.params),
        "teacher": _arrays(state.teacher_params),
    }


def sgd() -> optax.GradientTransformationExtraArgs:
    """SGD, p <- p - lr * g, with the last gradients as its state."""

    def update(grads, state, params, *, lr, **_):
        del state, params
        return jax.tree.map(lambda g: -lr * g, grads), grads

    return optax.GradientTransformationExtraArgs(lambda p: jax.tree.map(jnp.zeros_like, p), update)


def _make_crops(real: bool, in_loop: bool):

    def cuts(image):
        image = image / 255.0 - 0.5
        views = jnp.stack([image[:, :16, :16], image[:, 8:, 8:, ::-1]], axis=1)
        return {"global_crops": views, "local_crops": image[:, None, 4:12, 4:12]}

    if not real:
        return lambda batch: cuts(batch["image"])
    sizes = {"global_size": 16, "local_size": 8, "num_local": 1}
    return seeded_multi_crop(SEED, **sizes, one_by_one=in_loop)


# Biases cancelled by a batch norm or the softmax; means that are zero.
_ROUNDING = re.compile(r"heads/dino/mlp_[01]/bias$|backbone/norm/bias$|byol_predictor/bn_0/mean$")


def _arrays(tree) -> dict[str, np.ndarray]:
    """{path: array} without arrays that are only rounding."""
    arrays = {}
    for name, leaf in paths(tree):
        if name.endswith("qkv/bias"):
            leaf = np.delete(leaf, np.s_[VIT.embed_dim : 2 * VIT.embed_dim])
        if not _ROUNDING.search(name):
            arrays[name] = np.asarray(leaf)
    return arrays


def difference(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray]) -> float:
    """The largest difference, as defined in the module docstring; NaN if there is one."""
    if ours.keys() != theirs.keys():
        raise ValueError(f"arrays differ: {sorted(ours.keys() ^ theirs.keys())}")
    errors = [
        float(np.max(np.abs(ours[name] - array))) / (float(np.max(np.abs(array))) or 1.0)
        for name, array in theirs.items()
    ]
    return float(np.max(errors, initial=0.0))


def free_port() -> int:
    """A free port of this machine."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def run_processes(case: Case, real_crops: bool = True) -> dict[str, dict[str, np.ndarray]]:
    """`run_case` in separate processes connected over loopback; returns process 0's result.

    Raises:
      ChildProcessError: a process failed; the message is its last line.
    """
    address = f"127.0.0.1:{free_port()}"
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={case.devices // case.processes}",
    }
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "found.pickle"
        commands = [
            [sys.executable, "-c", _WORKER, address, str(index), str(out), str(int(real_crops))]
            for index in range(case.processes)
        ]
        running = [
            subprocess.Popen(
                [*command, json.dumps(case._asdict())],
                env=environment,
                stderr=subprocess.PIPE,
                text=True,
            )
            for command in commands
        ]
        errors = [process.communicate(timeout=600)[1] for process in running]
        for process, error in zip(running, errors, strict=True):
            if process.returncode:
                raise ChildProcessError((error.strip().splitlines() or ["no message"])[-1])
        return pickle.loads(out.read_bytes())


_WORKER = "import sys; from experiments.invariance import worker; worker(*sys.argv[1:])"


def worker(address: str, index: str, out: str, real_crops: str, case: str) -> None:
    """One of the processes of `run_processes`."""
    of = Case(**json.loads(case))
    join("on", address, of.processes, int(index))
    found = run_case(of, bool(int(real_crops)))
    if jax.process_index() == 0:
        Path(out).write_bytes(pickle.dumps(found))


def differences(cases, real_crops: bool = True) -> dict[str, dict[str, float]]:
    """{title of a case: {quantity: difference to its reference}}."""
    references, found = {}, {}
    for case in cases:
        if case.reference not in references:
            references[case.reference] = run_case(case.reference, real_crops)
        run = run_case if case.processes == 1 else run_processes
        result = run(case, real_crops)
        found[case.title()] = {
            name: difference(result[name], arrays)
            for name, arrays in references[case.reference].items()
        }
        print(
            f"{case.title()}: {max(found[case.title()].values()):.1e}", file=sys.stderr, flush=True
        )
    return found


def table(found: dict[str, dict[str, float]]) -> str:
    """Markdown table, one line per case; quantities that a case lacks are empty."""
    columns = list(next(iter(found.values())))
    rows = [[title, *(f"{of[c]:.1e}" for c in columns)] for title, of in found.items()]
    worst = {c: max(of[c] for of in found.values()) for c in columns}
    return markdown([["", *columns], *rows, ["largest", *(f"{worst[c]:.1e}" for c in columns)]])


def main(argv) -> int:
    del argv
    logging.set_verbosity(logging.WARNING)
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", DEVICES)
    found = differences(CASES, flags.FLAGS.real_crops)
    print(table(found))
    too_far = [of for of in CASES if not max(found[of.title()].values()) <= of.limit]
    for of in too_far:
        print(f"error: {of.title()}: above {of.limit:g}", file=sys.stderr)
    return int(bool(too_far))


if __name__ == "__main__":
    flags.DEFINE_boolean("real_crops", False, "Use the multi-crop of training instead of cuts")
    app.run(main)
