"""Exports the teacher of a run for other code: python -m dinotwins_jax.export --workdir=RUN --to=timm

Writes into DIR the backbone for timm, for the official code of DINO, DINOv2 or DINOv3, for Hugging Face
transformers, or as a program for ONNX or StableHLO; its config.json; and its model card, README.md.
"""

import contextlib
import copy
import json
import os
import re
import shutil
import stat
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from absl import flags

from dinotwins_jax.cli import command, exit_code, fail
from dinotwins_jax.configuration import config_of
from dinotwins_jax.files import writing
from dinotwins_jax.workdir import with_known_values

# Names of files that exports write.
_FILES = re.compile(
    r"model(_\d+x\d+)?\.(safetensors|onnx|stablehlo)|(preprocessor_)?config\.json|README\.md"
)
_UNFINISHED = ".export-"  # start of the name of a directory that a killed export leaves


def export_run(
    workdir: Path,
    config,
    target: str,
    out: Path,
    checkpoint: str = "latest",
    overwrite: bool = False,
    image_sizes: Sequence[tuple[int, int]] = (),
) -> str:
    """Writes the teacher's backbone of a run for other code; the run's data is not needed.

    Args:
      config: the run's.
      target: timm | dino | hf | onnx | stablehlo, see targets.py.
      out: a directory, not a workdir; files of an earlier export in it are replaced, each as a whole.
      checkpoint: "latest", "best" or a step.
      overwrite: write into `out` although it holds something else than an earlier export.
      image_sizes: (height, width) in pixels, a file each for onnx and stablehlo; (): that of training.
    Returns:
      What was written, in a line.
    Raises:
      ValueError, OSError: no such run, or a model that the target cannot hold; nothing is written.
    """
    from dinotwins_jax.backbone import make_backbone
    from dinotwins_jax.exports.model_card import model_card
    from dinotwins_jax.exports.targets import files_of
    from dinotwins_jax.preprocessing import preprocessing_of
    from dinotwins_jax.weights import teacher_of

    _check_out(out, workdir, overwrite)
    config = copy.deepcopy(with_known_values(config, workdir))
    config.model.dtype, config.model.attention = "float32", "xla"  # of any machine
    with _of_this_version(workdir / "config.json"):
        backbone, pre = make_backbone(config), preprocessing_of(config)
    teacher, step = teacher_of(workdir, config, checkpoint)
    export = files_of(target, backbone, teacher, pre, image_sizes)
    weights = _weights(workdir, teacher, step)
    export.config["dinotwins_jax"] |= {"run": weights.run, "step": step, **pre._asdict()}
    export.config["dinotwins_jax"]["canvas"] = config.data.canvas_size
    described = json.dumps(export.config, indent=2) + "\n"
    with _of_this_version(workdir / "config.json"):
        card = model_card(target, backbone, config, pre, export, weights)
    write = export.write | {
        "config.json": lambda path: path.write_text(described),
        "README.md": lambda path: path.write_text(card, encoding="utf-8"),
    }
    size = _replace(out, write)
    numbers = f"{export.parameters:,} numbers, {size / 1e6:,.1f} MB in float32"
    return f"{out}: {', '.join(export.write)}, {numbers}, of step {step}, for {target}"


@contextlib.contextmanager
def _of_this_version(path: Path) -> Iterator[None]:
    """Turns the lack of a key of the config, or one of another type, into a ValueError of one line."""
    try:
        yield
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is of another version ({error!r})") from None


def _weights(workdir: Path, teacher, step: int):
    """What the model card says of the weights besides their config."""
    from dinotwins_jax.evals.features import checksum
    from dinotwins_jax.exports.model_card import Weights

    def read(path: Path) -> dict:
        try:
            found = json.loads(path.read_text())
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    images = read(workdir / "checkpoints" / str(step) / "data" / "metadata").get("num_records")
    report = read(workdir / "scores.json")
    known = report.get("step") == step and report.get("weights") == checksum(teacher)
    known = known and isinstance(report.get("scores"), dict)
    images = images if isinstance(images, int) else None
    return Weights(workdir.resolve().name, step, images, report if known else None)


def _replace(out: Path, write: dict[str, Callable[[Path], object]]) -> int:
    """Writes files into a directory, all or none, and removes those that only an earlier export had.

    Returns:
      Bytes of the largest file.
    """
    earlier = _exported(out)
    out.mkdir(parents=True, exist_ok=True)
    fresh = out / f"{_UNFINISHED}{os.getpid()}"  # beside: a rename is atomic there
    fresh.mkdir(exist_ok=True)
    try:
        with writing(out / next(iter(write))):
            for name, into in write.items():
                into(fresh / name)
        mode = stat.S_IMODE((fresh / "config.json").stat().st_mode)
        sizes = [(fresh / name).stat().st_size for name in write]
        for name in write:
            (fresh / name).chmod(mode)  # safetensors' is 0600, whatever the umask
            (fresh / name).replace(out / name)
    finally:
        shutil.rmtree(fresh)
    for name in earlier - write.keys():
        (out / name).unlink()
    return max(sizes)


def _check_out(out: Path, workdir: Path, overwrite: bool) -> None:
    """Raises ValueError if an export to `out` would mix with a run or with files of something else."""
    is_run = (out / "config.json").is_file() and (out / "checkpoints").is_dir()
    if is_run or out.resolve() == workdir.resolve():
        raise ValueError(
            f"--out={out} is the workdir of a run, whose config.json an export would replace: choose "
            "another directory"
        )
    if overwrite or not out.is_dir():
        return
    names = {path.name for path in out.glob("*") if not path.name.startswith(_UNFINISHED)}
    others = names - _exported(out)
    if others:
        raise ValueError(
            f"--out={out} holds something else ({min(others)}): choose another directory, or "
            "--overwrite replaces the files in it that an export has too"
        )


def _exported(out: Path) -> set[str]:
    """Names of the files in `out` that an earlier export wrote, without a model card that was edited."""
    from dinotwins_jax.exports.model_card import is_unchanged

    names = {path.name for path in out.glob("*") if _FILES.fullmatch(path.name)}
    if "config.json" in names and not _is_export(out):
        return set()
    card = out / "README.md"
    edited = card.is_file() and not is_unchanged(card.read_text(errors="surrogateescape"))
    return names - ({card.name} if edited else set())


def _is_export(out: Path) -> bool:
    try:
        return "dinotwins_jax" in json.loads((out / "config.json").read_text())
    except (OSError, ValueError, TypeError):
        return False


def _define(values: flags.FlagValues) -> None:
    options = {"flag_values": values}
    flags.DEFINE_string("workdir", None, "the run to export", **options)
    targets = ["timm", "dino", "hf", "onnx", "stablehlo"]
    flags.DEFINE_enum("to", None, targets, "the code to export for", **options)
    flags.DEFINE_string(
        "out", None, "directory to write; WORKDIR/export_TO if not given", **options
    )
    flags.DEFINE_string("checkpoint", "latest", "latest, best or a step", **options)
    flags.DEFINE_list(
        "image_size",
        [],
        "pixels, 448 or 320x448 (height x width), a file each, for onnx and stablehlo; the run's "
        "views.global_size if not given",
        **options,
    )
    flags.DEFINE_boolean(
        "overwrite", False, "write to --out although it holds other files too", **options
    )


def _size(text: str) -> tuple[int, int]:
    """(height, width) of "448" or "320x448"."""
    found = re.fullmatch(r"(\d+)(?:x(\d+))?", text.strip())
    if found is None:
        raise ValueError(f"--image_size is '{text}': give pixels, such as 448 or 320x448")
    return int(found[1]), int(found[2] or found[1])


def _export(values: flags.FlagValues) -> int:
    if values.workdir is None or values.to is None:
        return fail("--workdir and --to are required, such as --workdir=runs/hybrid --to=timm")
    workdir = Path(values.workdir)
    out = Path(values.out) if values.out else workdir / f"export_{values.to}"

    def work():
        sizes = [_size(text) for text in values.image_size]
        chosen = (values.to, out, values.checkpoint, values.overwrite, sizes)
        print(export_run(workdir, values.config or config_of(workdir), *chosen))

    return exit_code(work)


def run(argv=None, program="python -m dinotwins_jax.export") -> int:
    """The command; returns the exit code, errors are one line on stderr."""
    return command(program, __doc__, _define, _export, argv, config_required=False)


if __name__ == "__main__":
    sys.exit(run())
