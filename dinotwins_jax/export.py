"""Exports the teacher of a run for other code: python -m dinotwins_jax.export --workdir=RUN --to=timm

Writes DIR/model.safetensors and DIR/config.json: the backbone for timm, for the official code of DINO,
DINOv2 or DINOv3, or for Hugging Face transformers.
"""

import copy
import json
import shutil
import sys
import tempfile
from pathlib import Path

from absl import flags

from dinotwins_jax.cli import command, config_of, exit_code, fail


def export_run(workdir: Path, config, target: str, out: Path, checkpoint: str = "latest") -> str:
    """Writes the teacher's backbone of a run for other code; the run's data is not needed.

    Args:
      config: the run's.
      target: timm | dino | hf, see models/torch_export.py.
      out: a directory; files of an earlier export in it are replaced, each as a whole.
      checkpoint: "latest", "best" or a step.
    Returns:
      What was written, in a line.
    Raises:
      ValueError, OSError: no such run, or a model that the target cannot hold; nothing is written.
    """
    from safetensors.numpy import save_file

    from dinotwins_jax.augment.multi_crop import IMAGENET_MEAN, IMAGENET_STD
    from dinotwins_jax.build import make_backbone
    from dinotwins_jax.checkpoint import Checkpoints, chosen_step
    from dinotwins_jax.models.torch_export import exported

    config = copy.deepcopy(config)
    config.model.dtype, config.model.attention = "float32", "xla"  # of any machine
    try:
        backbone = make_backbone(config)
        best = config.checkpoint.best_metric, config.checkpoint.best_mode
    except AttributeError as error:  # a key of the config that is not there
        raise ValueError(f"{workdir / 'config.json'} is of another version ({error})") from None
    if not (workdir / "checkpoints").is_dir():
        raise FileNotFoundError(f"no checkpoints in {workdir}: none has been saved yet")
    with Checkpoints(workdir, 1, *best, read_only=True) as checkpoints:
        step = chosen_step(checkpoints, checkpoint)
        step = checkpoints.latest() if step is None else step
        if step is None:
            raise ValueError(f"{checkpoints.path} is empty: no checkpoint has been saved yet")
        teacher = checkpoints.restore_teacher(step)
    tensors, described = exported(backbone, teacher, target)
    described["dinotwins_jax"] |= {"run": workdir.resolve().name, "step": step}
    described["dinotwins_jax"] |= {"mean": IMAGENET_MEAN, "std": IMAGENET_STD}
    if target == "timm":
        described["pretrained_cfg"] |= {"mean": IMAGENET_MEAN, "std": IMAGENET_STD}
    out.mkdir(parents=True, exist_ok=True)
    fresh = Path(tempfile.mkdtemp(prefix=".export-", dir=out))  # beside: a rename is atomic there
    try:
        save_file(tensors, fresh / "model.safetensors", metadata={"format": "pt"})
        (fresh / "config.json").write_text(json.dumps(described, indent=2) + "\n")
        for name in ("model.safetensors", "config.json"):
            (fresh / name).replace(out / name)
    finally:
        shutil.rmtree(fresh)
    count = sum(value.size for value in tensors.values())
    return f"{out}: {len(tensors)} tensors, {count:,} numbers, of step {step}, for {target}"


def _define(values: flags.FlagValues) -> None:
    options = {"flag_values": values}
    flags.DEFINE_string("workdir", None, "the run to export", **options)
    flags.DEFINE_enum("to", None, ["timm", "dino", "hf"], "the code to export for", **options)
    flags.DEFINE_string(
        "out", None, "directory to write; WORKDIR/export_TO if not given", **options
    )
    flags.DEFINE_string("checkpoint", "latest", "latest, best or a step", **options)


def _export(values: flags.FlagValues) -> int:
    if values.workdir is None or values.to is None:
        return fail("--workdir and --to are required, such as --workdir=runs/hybrid --to=timm")
    workdir = Path(values.workdir)
    out = Path(values.out) if values.out else workdir / f"export_{values.to}"

    def work():
        print(export_run(workdir, config_of(workdir), values.to, out, values.checkpoint))

    return exit_code(work)


def run(argv=None, program="python -m dinotwins_jax.export") -> int:
    """The command; returns the exit code, errors are one line on stderr."""
    return command(program, __doc__, _define, _export, argv, config_required=False)


if __name__ == "__main__":
    sys.exit(run())
