"""Exports the teacher of a run for other code: python -m dinotwins_jax.export --workdir=RUN --to=timm

Writes DIR/model.safetensors and DIR/config.json: the backbone for timm, for the official code of DINO,
DINOv2 or DINOv3, or for Hugging Face transformers.
"""

import copy
import json
import os
import shutil
import stat
import sys
from pathlib import Path

from absl import flags

from dinotwins_jax.cli import command, config_of, exit_code, fail

FILES = ("model.safetensors", "config.json")
_UNFINISHED = ".export-"  # start of the name of a directory that a killed export leaves


def export_run(
    workdir: Path,
    config,
    target: str,
    out: Path,
    checkpoint: str = "latest",
    overwrite: bool = False,
) -> str:
    """Writes the teacher's backbone of a run for other code; the run's data is not needed.

    Args:
      config: the run's.
      target: timm | dino | hf, see models/torch_export.py.
      out: a directory, not a workdir; files of an earlier export in it are replaced, each as a whole.
      checkpoint: "latest", "best" or a step.
      overwrite: write into `out` although it holds something else than an earlier export.
    Returns:
      What was written, in a line.
    Raises:
      ValueError, OSError: no such run, or a model that the target cannot hold; nothing is written.
    """
    from safetensors.numpy import save_file

    from dinotwins_jax.augment.multi_crop import IMAGENET_MEAN, IMAGENET_STD
    from dinotwins_jax.build import make_backbone
    from dinotwins_jax.models.torch_export import exported
    from dinotwins_jax.models.vit import as_pair
    from dinotwins_jax.weights import teacher_of

    _check_out(out, workdir, overwrite)
    config = copy.deepcopy(config)
    config.model.dtype, config.model.attention = "float32", "xla"  # of any machine
    try:
        backbone = make_backbone(config)
    except (
        AttributeError,
        KeyError,
        TypeError,
    ) as error:  # a key that is not there, or of another type
        raise ValueError(f"{workdir / 'config.json'} is of another version ({error!r})") from None
    teacher, step = teacher_of(workdir, config, checkpoint)
    tensors, described = exported(backbone, teacher, target)
    described["dinotwins_jax"] |= {"run": workdir.resolve().name, "step": step}
    described["dinotwins_jax"] |= {"mean": IMAGENET_MEAN, "std": IMAGENET_STD}
    crop = config.views.global_size
    resize = max(config.evals.resize, *as_pair(crop))
    described["dinotwins_jax"] |= {
        "resize": resize,
        "crop": crop,
        "canvas": config.data.canvas_size,
    }
    if target == "timm":
        described["pretrained_cfg"] |= {"mean": IMAGENET_MEAN, "std": IMAGENET_STD}
    out.mkdir(parents=True, exist_ok=True)
    fresh = out / f"{_UNFINISHED}{os.getpid()}"  # beside: a rename is atomic there
    fresh.mkdir(exist_ok=True)
    weights, text = (fresh / name for name in FILES)
    try:
        save_file(tensors, weights, metadata={"format": "pt"})
        text.write_text(json.dumps(described, indent=2) + "\n")
        weights.chmod(stat.S_IMODE(text.stat().st_mode))  # safetensors' is 0600, whatever the umask
        for file in (weights, text):
            file.replace(out / file.name)
    finally:
        shutil.rmtree(fresh)
    count = sum(value.size for value in tensors.values())
    return f"{out}: {len(tensors)} tensors, {count:,} numbers, of step {step}, for {target}"


def _check_out(out: Path, workdir: Path, overwrite: bool) -> None:
    """Raises ValueError if an export to `out` would mix with a run or with files of something else."""
    is_run = (out / "config.json").is_file() and (out / "checkpoints").is_dir()
    if is_run or out.resolve() == workdir.resolve():
        raise ValueError(
            f"--out={out} is the workdir of a run, whose config.json an export would replace: choose "
            "another directory"
        )
    names = {path.name for path in out.glob("*")} if out.is_dir() else set()
    others = {name for name in names - set(FILES) if not name.startswith(_UNFINISHED)}
    if not overwrite and (others or ("config.json" in names and not _is_export(out))):
        raise ValueError(
            f"--out={out} holds something else ({min(others or names)}): choose another directory, or "
            "--overwrite replaces model.safetensors and config.json in it"
        )


def _is_export(out: Path) -> bool:
    try:
        return "dinotwins_jax" in json.loads((out / "config.json").read_text())
    except (OSError, ValueError, TypeError):
        return False


def _define(values: flags.FlagValues) -> None:
    options = {"flag_values": values}
    flags.DEFINE_string("workdir", None, "the run to export", **options)
    flags.DEFINE_enum("to", None, ["timm", "dino", "hf"], "the code to export for", **options)
    flags.DEFINE_string(
        "out", None, "directory to write; WORKDIR/export_TO if not given", **options
    )
    flags.DEFINE_string("checkpoint", "latest", "latest, best or a step", **options)
    flags.DEFINE_boolean(
        "overwrite", False, "write to --out although it holds other files too", **options
    )


def _export(values: flags.FlagValues) -> int:
    if values.workdir is None or values.to is None:
        return fail("--workdir and --to are required, such as --workdir=runs/hybrid --to=timm")
    workdir = Path(values.workdir)
    out = Path(values.out) if values.out else workdir / f"export_{values.to}"

    def work():
        chosen = (values.to, out, values.checkpoint, values.overwrite)
        print(export_run(workdir, config_of(workdir), *chosen))

    return exit_code(work)


def run(argv=None, program="python -m dinotwins_jax.export") -> int:
    """The command; returns the exit code, errors are one line on stderr."""
    return command(program, __doc__, _define, _export, argv, config_required=False)


if __name__ == "__main__":
    sys.exit(run())
