"""The teacher of a run as files that other codes load.

Between the config and models/, which do not see it.
"""

import copy
import json
import shutil
import tempfile
from pathlib import Path

from safetensors.numpy import save_file

from dinotwins_jax.augment import IMAGENET_MEAN, IMAGENET_STD
from dinotwins_jax.build import make_backbone
from dinotwins_jax.checkpoint import Checkpoints
from dinotwins_jax.models.torch_export import exported
from dinotwins_jax.subject import chosen_step


def export_run(workdir: Path, config, target: str, out: Path, checkpoint: str = "latest") -> str:
    """Writes the teacher's backbone of a run for another code; needs none of its data.

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
    config = copy.deepcopy(config)
    config.model.dtype, config.model.attention = "float32", "xla"  # of any machine
    try:
        backbone = make_backbone(config)
        best = config.checkpoint.best_metric, config.checkpoint.best_mode
    except AttributeError as error:  # a key of the config that is not there
        raise ValueError(f"{workdir / 'config.json'} is of another version ({error})") from None
    if not (workdir / "checkpoints").is_dir():
        raise FileNotFoundError(f"no checkpoints in {workdir}: the run has not come so far yet")
    with Checkpoints(workdir, 1, *best, read_only=True) as checkpoints:
        step = chosen_step(checkpoints, checkpoint)
        step = checkpoints.latest() if step is None else step
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
    return f"{out}: {len(tensors)} tensors, {count:,} numbers, of step {step}, for {target}"
