"""Scores the teacher of a run: python -m dinotwins_jax.evaluate --workdir=RUN [--tasks=linear,knn,…]

Data and options are those of the run's own config, WORKDIR/config.json; --config.KEY=VALUE changes one,
such as --config.data.dir where the data have moved. Code that it names, such as a loss, is not run.
Results on other data than the run's go to WORKDIR/evals/NAME. Weights with the names of PyTorch code are
scored with

    python -m dinotwins_jax.evaluate --workdir=OUT --config=dino:coco --config.data.dir=/data/coco \\
        --torch_weights=dino_deitsmall16_pretrain.pth
"""

import contextlib
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import ConfigDict

from dinotwins_jax.buckets import at_hand, download, shown
from dinotwins_jax.cli import command, compiled_beside, exit_code, fail, overrides_of_run
from dinotwins_jax.configuration import SHIPPED, config_of, load_config


def evaluate_run(
    workdir: str | os.PathLike,
    config: ConfigDict | None = None,
    tasks: list[str] | None = None,
    torch_weights: str | None = None,
    checkpoint: str = "latest",
    *,
    overrides: Mapping[str, Any] | None = None,
    name: str = "",
) -> dict[str, dict]:
    """Scores the teacher in WORKDIR/checkpoints, or the weights of a file.

    Results on other data than the run's, or of other weights, go to WORKDIR/evals/NAME.

    Args:
      workdir: a directory, or gs://BUCKET/RUN.
      config: None: the run's own, WORKDIR/config.json.
      tasks: None: all but evals.LONG_TASKS, which take up to hours.
      torch_weights: a file, or a folder with one; its own sizes of the model replace the config's.
      checkpoint: "latest", "best" or a step.
      overrides: key -> value, of keys of the run's own config.
      name: folder in WORKDIR/evals for the results; "": the workdir for the run's own data and weights,
        else a name made of the source, its directory and the file of weights.
    Returns:
      {row: {task: scores}}, as in scores.json.
    Raises:
      ValueError, OSError: no such run, bad config, data or weights; the message is one line.
      EvaluationFailed: tasks or pictures failed; all others are written.
    """
    with at_hand(workdir, writes=True) as folder:
        found = _evaluate_run(
            folder, config, tasks, torch_weights, checkpoint, dict(overrides or {}), name
        )
    found.check()
    return found.scores


def _evaluate_run(
    workdir: Path,
    config: ConfigDict | None,
    tasks: list[str] | None,
    torch_weights: str | None,
    checkpoint: str,
    overrides: dict[str, Any],
    name: str,
):
    """Scores the weights in a workdir of this machine, or a mirror."""
    from dinotwins_jax.build import build_for_evaluation
    from dinotwins_jax.data import probe_section
    from dinotwins_jax.evals import LONG_TASKS, TASKS, check_tasks
    from dinotwins_jax.evals.outputs import EVALUATION, listing
    from dinotwins_jax.evals.table import terminal_table
    from dinotwins_jax.evaluation import evaluate
    from dinotwins_jax.results import results_folder
    from dinotwins_jax.weights import from_checkpoint

    check_tasks(tasks or ())
    given = config is not None
    own = None
    with contextlib.suppress(ValueError, OSError):  # raised below if it is needed
        own = config_of(workdir).to_dict()
    if not given:
        without = "; to score weights of a file give --config too"
        names_source = "data.source" in overrides
        config = config_of(workdir, without, opens_data=not names_source)
        _check_keys(config, workdir)
        config.update_from_flattened_dict(overrides)
    try:
        run = build_for_evaluation(config)
    except (
        AttributeError,
        KeyError,
        TypeError,
    ) as error:  # a key that is not there, or of another type
        if given:
            raise
        raise ValueError(
            f"{workdir / 'config.json'} is of another version ({error!r}); give the run's --config=…"
        ) from None
    if torch_weights:
        rule = config.model.get("position_interpolation") if given else None
        run, weights = _from_torch(run, config, torch_weights, rule)
    else:
        weights = from_checkpoint(run, config, workdir, checkpoint)
    data = probe_section(config.data.to_dict())
    chosen = {"weights": torch_weights or "", "name": name}
    download(workdir / "evals")
    out = results_folder(workdir, own, data, run.probe_sources, **chosen)
    out.mkdir(parents=True, exist_ok=True)
    other = "" if name else ", on other data"  # a chosen name may be of the run's own
    length = "" if out == workdir else f"{weights.step:,} steps{other}"
    length = f"weights of {Path(torch_weights).name}" if torch_weights else length
    tasks = tasks or [task for task in TASKS if task not in LONG_TASKS]
    found = evaluate(run, config, weights, out, tasks, cache=workdir / "features", length=length)
    if table := terminal_table(found.scores, balanced=found.unbalanced):
        print(table)
    print(shown(listing(out, EVALUATION)))
    return found


def _check_keys(config: ConfigDict, workdir: Path) -> None:
    """Raises ValueError if a received config lacks a key that is read only when much is computed."""
    known = load_config(f"{SHIPPED / 'hybrid.py'}:demo")
    missing = [f"evals.{key}" for key in known.evals if key not in config.evals]
    missing += [key for key in ("seed", "batch_size", "total_epochs") if key not in config]
    if missing:
        raise ValueError(
            f"{workdir / 'config.json'} is of another version (it has no {missing[0]}); give the run's "
            "--config=…"
        )


def _from_torch(run, config, path: str, rule: str | None = None):
    """The run with the backbone that the file holds, and its weights; rule: of interpolation, instead of
    the file's."""
    import jax

    from dinotwins_jax.devices.processes import warn
    from dinotwins_jax.evals.features import check_last_blocks
    from dinotwins_jax.models.channels import CONVERTED, with_channels
    from dinotwins_jax.models.torch_files import load_vit
    from dinotwins_jax.training.state import init_backbone
    from dinotwins_jax.weights import EvalWeights

    backbone, params = load_vit(path, like=run.backbone)
    backbone = backbone.clone(position_interpolation=rule) if rule else backbone
    there, wanted = backbone.in_channels, run.backbone.in_channels
    if there != wanted:
        warn(f"{path} has {there} channels, the data are read as {wanted}: {CONVERTED}")
        backbone, params = backbone.clone(in_channels=wanted), with_channels(params, wanted)
    backbone = backbone.clone(dtype=run.backbone.dtype)
    if backbone.positions == "rope":  # no tensor holds the image size: views.global_size is used
        backbone = backbone.clone(image_size=run.backbone.image_size)
    check_last_blocks(backbone, config.evals.n_last_blocks)
    random = init_backbone(backbone, jax.random.key(config.seed))
    return run._replace(backbone=backbone), EvalWeights(params, random, step=0)


def _define(values: flags.FlagValues) -> None:
    options = {"flag_values": values}
    flags.DEFINE_string("workdir", None, "a run, or with --torch_weights where to write", **options)
    flags.DEFINE_list(
        "tasks",
        None,
        "default: all that the data allows, but scratch and finetune_all",
        **options,
    )
    flags.DEFINE_string("checkpoint", "latest", "latest, best or a step", **options)
    flags.DEFINE_string(
        "name",
        "",
        "folder in WORKDIR/evals for the results; not given: named after the data or weights that are not "
        "the run's",
        **options,
    )
    flags.DEFINE_string(
        "torch_weights",
        None,
        "ViT with the names of DINO, timm or transformers: .safetensors, .npz, .pth, or a folder with one",
        **options,
    )


def _evaluate(values: flags.FlagValues) -> int:
    if values.workdir is None:
        return fail("--workdir is required, such as --workdir=runs/hybrid")

    def work():
        from dinotwins_jax.devices.compilation import remember_compilations

        remember_compilations(compiled_beside(values.workdir))
        overrides = overrides_of_run(values)
        config = None if overrides is not None else values.config
        chosen = (config, values.tasks, values.torch_weights, values.checkpoint)
        evaluate_run(values.workdir, *chosen, overrides=overrides, name=values["name"].value)

    return exit_code(work)


def run(argv=None, program="python -m dinotwins_jax.evaluate") -> int:
    """The command; returns the exit code, errors are one line on stderr."""
    return command(program, __doc__, _define, _evaluate, argv, config_required=False)


if __name__ == "__main__":
    sys.exit(run())
