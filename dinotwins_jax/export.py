"""Entry point: python -m dinotwins_jax.export --workdir=RUN --to=timm|dino|hf [--out=DIR]

Writes DIR/model.safetensors and DIR/config.json: the teacher's backbone for timm, for the official code of
DINO, DINOv2 or DINOv3, or for Hugging Face transformers.
"""

import json
import shutil
import tempfile
from pathlib import Path

from absl import app, flags, logging

from dinotwins_jax.cli import config_of, exit_code, fail, parse_flags

_WORKDIR = flags.DEFINE_string("workdir", None, "A run")
_TO = flags.DEFINE_enum("to", None, ["timm", "dino", "hf"], "Who shall load it")
_OUT = flags.DEFINE_string("out", None, "Directory to write; default WORKDIR/export_TO")
_CHECKPOINT = flags.DEFINE_string("checkpoint", "latest", "latest, best or a step")


def main(argv) -> int:
    """Exports what the flags describe; returns the exit code, errors are one line on stderr."""
    if len(argv) > 1:
        return fail(f"unknown argument '{argv[1]}': options start with --")
    if _WORKDIR.value is None or _TO.value is None:
        return fail("which run, for whom? e.g. --workdir=runs/hybrid --to=timm")
    logging.set_verbosity(logging.ERROR)  # Orbax warns that it only reads
    workdir = Path(_WORKDIR.value)
    out = Path(_OUT.value) if _OUT.value else workdir / f"export_{_TO.value}"
    return exit_code(lambda: export_run(workdir, _TO.value, out, _CHECKPOINT.value))


def export_run(workdir: Path, target: str, out: Path, checkpoint: str = "latest") -> None:
    """Writes the teacher's backbone of a run for another code; needs none of its data.

    Args:
      target: timm | dino | hf, see models/torch_export.py.
      out: a directory; files of an earlier export in it are replaced, each as a whole.
      checkpoint: "latest", "best" or a step.
    Raises:
      ValueError, OSError: no such run, or a model that the target cannot hold; nothing is written.
    """
    from safetensors.numpy import save_file

    from dinotwins_jax.augment import IMAGENET_MEAN, IMAGENET_STD
    from dinotwins_jax.build import make_backbone
    from dinotwins_jax.checkpoint import Checkpoints
    from dinotwins_jax.models.torch_export import exported
    from dinotwins_jax.subject import chosen_step

    config = config_of(workdir)
    config.model.dtype, config.model.attention = "float32", "xla"  # of any machine
    try:
        backbone = make_backbone(config)
        best = config.checkpoint.best_metric, config.checkpoint.best_mode
    except AttributeError as error:  # a key of the config that is not there
        raise ValueError(f"{workdir / 'config.json'} is of another version ({error})") from None
    if not (workdir / "checkpoints").is_dir():
        raise FileNotFoundError(f"no checkpoints in {workdir}: the run has not come so far yet")
    with Checkpoints(workdir, 1, *best, read_only=True) as checkpoints:
        step = chosen_step(checkpoints, checkpoint) or checkpoints.latest()
        if step is None:
            raise ValueError(f"{checkpoints.path} is empty: the run has not come so far yet")
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
    print(f"{out}: {len(tensors)} tensors, {count:,} numbers, of step {step}, for {target}")


def run() -> None:
    """Console entry."""
    app.run(main, flags_parser=lambda argv: parse_flags(argv, config_required=False))


if __name__ == "__main__":
    run()
