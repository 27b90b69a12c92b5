"""Entry point: python -m dinotwins_jax.evaluate --workdir=RUN [--tasks=linear,knn,…]

Scores the teacher of a run as the run's own config says. Weights in PyTorch names are scored with

    python -m dinotwins_jax.evaluate --workdir=OUT --config=configs/dino.py:coco \\
        --config.data.dir=/data/coco --torch_weights=dino_deitsmall16_pretrain.pth
"""

from pathlib import Path

from absl import app, flags, logging
from ml_collections import ConfigDict

from dinotwins_jax.cli import COMPILED, CONFIG, config_of, exit_code, fail, parse_flags

_WORKDIR = flags.DEFINE_string("workdir", None, "A run, or with --torch_weights where to write")
_TASKS = flags.DEFINE_list("tasks", None, "Default: all that the data can serve")
_CHECKPOINT = flags.DEFINE_string("checkpoint", "latest", "latest, best or a step")
_TORCH_WEIGHTS = flags.DEFINE_string(
    "torch_weights",
    None,
    "File of a ViT with DINO's, timm's or HF's names: .safetensors, .npz, .pth",
)


def main(argv) -> int:
    """Evaluates what the flags describe; returns the exit code, errors are one line on stderr."""
    if len(argv) > 1:
        return fail(f"unknown argument '{argv[1]}': options start with --")
    if _WORKDIR.value is None:
        return fail("which run? e.g. --workdir=runs/hybrid")
    logging.set_verbosity(logging.WARNING)
    from dinotwins_jax.compilation import remember_compilations

    remember_compilations(Path(_WORKDIR.value).parent / COMPILED)
    chosen = (CONFIG.value, _TASKS.value, _TORCH_WEIGHTS.value, _CHECKPOINT.value)
    return exit_code(lambda: evaluate_run(Path(_WORKDIR.value), *chosen))


def evaluate_run(
    workdir: Path,
    config: ConfigDict | None = None,
    tasks: list[str] | None = None,
    torch_weights: str | None = None,
    checkpoint: str = "latest",
) -> dict[str, dict]:
    """Scores the teacher in WORKDIR/checkpoints, or the weights of a file.

    Args:
      config: None: the run's own, WORKDIR/config.json.
      tasks: None: all.
      torch_weights: a file; its own sizes of the model replace the config's.
      checkpoint: "latest", "best" or a step.
    Returns:
      {row: {task: scores}}, as in WORKDIR/scores.json.
    Raises:
      ValueError, OSError: no such run, bad config, data or weights; the message is one line.
    """
    from dinotwins_jax.build import build, for_evaluation
    from dinotwins_jax.evals.table import summary
    from dinotwins_jax.evals.tasks import TASKS, check_tasks
    from dinotwins_jax.scoring import evaluate
    from dinotwins_jax.subject import from_checkpoint

    check_tasks(tasks or ())
    config = config or config_of(workdir, "; --config=… says what to do without one")
    try:
        run = build(for_evaluation(config))
    except AttributeError as error:  # a key of the config that is not there
        raise ValueError(
            f"{workdir / 'config.json'} is of another version ({error}); give the run's --config=…"
        ) from None
    if torch_weights:
        run, subject = _from_torch(run, config, torch_weights)
    else:
        subject = from_checkpoint(run, config, workdir, checkpoint)
    workdir.mkdir(parents=True, exist_ok=True)
    scores = evaluate(run, config, subject, workdir, tasks or TASKS)
    print(summary(scores))
    print(
        f"in {workdir}: report.html shows curves, scores and pictures; scores.json has all scores"
    )
    return scores


def _from_torch(run, config, path: str):
    """The run with the backbone that the file holds, and its weights."""
    import jax

    from dinotwins_jax.evals.features import check_last_blocks
    from dinotwins_jax.models.torch_files import load_vit
    from dinotwins_jax.state import init_backbone
    from dinotwins_jax.subject import Subject

    backbone, params = load_vit(path, like=run.backbone)
    backbone = backbone.clone(dtype=run.backbone.dtype)
    if backbone.positions == "rope":  # no weight of it says a size: that of the images to come
        backbone = backbone.clone(image_size=run.backbone.image_size)
    check_last_blocks(backbone, config.evals.n_last_blocks)
    random = init_backbone(backbone, jax.random.key(config.seed))
    return run._replace(backbone=backbone), Subject(params, random, step=0)


def run() -> None:
    """Console entry."""
    app.run(main, flags_parser=lambda argv: parse_flags(argv, config_required=False))


if __name__ == "__main__":
    run()
