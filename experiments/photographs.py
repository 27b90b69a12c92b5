"""Results on photographs that two CPU cores can give: settings, tables, batch sizes. One command a study.

    python -m experiments.photographs --study=settings --config.data.dir=/data/cifar10 --minutes=180
    python -m experiments.photographs --study=cifar10 --seeds=1 --config.data.dir=/data/cifar10
    python -m experiments.photographs --study=long_tail --config.data.dir=/data/cifar10
    python -m experiments.photographs --study=small --config.data.dir=/data/cifar10
    python -m experiments.photographs --study=coco --config.data.source=array_record \\
        --config.data.dir=/data/coco160
    python -m experiments.photographs --study=batch_size --config.data.dir=/data/cifar10 \\
        --config.total_steps=390

settings: short runs with one change each, judged on held-out training images (--only=ROW,ROW for some of
them, --preset for another preset than cifar10_cpu); settings.md is the log of what was tried. cifar10,
coco, long_tail and small: the tables of experiments.compare, with the network trained from scratch on the
same labels and the pretrained one fine-tuned. batch_size: the methods at --batches, with equal images;
total_steps is for the preset's batch.
--config.key=value and --<method>.key=value are as in experiments.compare.

Each command goes on where it stopped: --minutes=120 stops it after two hours, in a training at a
checkpoint, with exit code 75. Where a part of an evaluation fails, the others go on, the exit code is 4,
and the same command tries it again. Results are in --out, by default runs/photographs-<study>.
"""

from pathlib import Path

from absl import flags, logging

from dinotwins_jax.cli import COMPILED, exit_code, fail
from dinotwins_jax.devices.compilation import remember_compilations
from experiments.comparison.batch_sizes import batch_sizes
from experiments.comparison.command import limited, run_with_overrides
from experiments.comparison.outcome import report_failures
from experiments.comparison.plan import METHODS
from experiments.comparison.settings import SETTINGS, settings_study
from experiments.comparison.table import compare

LABELLED = ("linear", "knn", "fewshot", "clusters", "finetune_all", "scratch")
# study -> (preset, tasks) of the studies that are comparisons
TABLES = {
    "cifar10": ("cifar10_cpu", LABELLED),
    "long_tail": ("cifar10_lt", LABELLED),
    "small": ("cifar10_small", LABELLED),
    "coco": ("coco_cpu", (*LABELLED, "attention", "segmentation", "pca")),
}
RESULTS = {"settings": "settings.json", "batch_size": "batch_sizes.json"}  # files of the others
STUDIES = ("settings", *TABLES, "batch_size")


def run_study(
    study: str, preset: str, seeds: int, out: Path, overrides: dict, **chosen
) -> tuple[str, dict[str, dict[str, str]]]:
    """Runs what is missing of a study.

    Args:
      preset: "": the study's own; seeds: 0: the study's own number.
      chosen: "methods", "only" (rows of settings) and "batches".
    Returns:
      its table, and {run or picture: {task: why it failed}}.
    """
    if study == "settings":
        rows = chosen["only"] or list(SETTINGS)
        return settings_study(preset or "cifar10_cpu", rows, seeds or 1, out, overrides)
    if study == "batch_size":
        return batch_sizes(
            preset or "cifar10_cpu",
            chosen["methods"],
            chosen["batches"],
            seeds or 3,
            out,
            overrides,
        )
    own, tasks = TABLES[study]
    given = overrides | {"config": {"evals.tasks": repr(tasks)} | overrides.get("config", {})}
    return compare(preset or own, seeds or 3, chosen["methods"], "steps", out, given)


def main(argv, overrides: dict) -> int:
    """The command; returns the exit code, errors are one line on stderr."""
    if len(argv) > 1:
        return fail(f"unknown argument '{argv[1]}': options start with --")
    given = flags.FLAGS
    if not given.study:
        return fail(f"give --study, one of {', '.join(STUDIES)}")
    if not all(batch.isdigit() and int(batch) for batch in given.batches):
        return fail(f"--batches={','.join(given.batches)}: give whole numbers, such as 16,64,256")
    logging.set_verbosity(logging.WARNING)
    out = Path(given.out or f"runs/photographs-{given.study}")

    def work():
        remember_compilations(out.parent / COMPILED)
        chosen = {"methods": given.methods, "only": given.only}
        chosen["batches"] = [int(batch) for batch in given.batches]
        with limited(given.minutes):
            text, failed = run_study(
                given.study, given.preset, given.seeds, out, overrides, **chosen
            )
        print(text)
        report_failures(failed, RESULTS.get(given.study, "comparison.json"))

    return exit_code(work)


if __name__ == "__main__":
    flags.DEFINE_enum("study", None, STUDIES, "What to run")
    flags.DEFINE_string("preset", "", "Another preset than the study's own")
    flags.DEFINE_integer("seeds", 0, "Of runs; 0: one for settings, three for the others", 0)
    flags.DEFINE_list("methods", list(METHODS[:3]), "Files in configs/, for the tables")
    flags.DEFINE_list("only", [], "Rows of the settings, separated by commas; empty: all")
    flags.DEFINE_list("batches", ["16", "64", "256"], "Batch sizes of batch_size")
    flags.DEFINE_float("minutes", 0.0, "Stop after so long; 0: never", 0.0)
    flags.DEFINE_string("out", None, "Directory; default runs/photographs-<study>")
    run_with_overrides(main, METHODS)
