"""Comparison of DINO, Barlow Twins and the hybrid under equal training and evaluation, with error bars.

    python -m experiments.compare --preset=demo --seeds=3
    python -m experiments.compare --preset=coco --seeds=3 --config.data.dir=/data/coco --out=runs/compare

Every run starts from the same backbone, sees the same images in the same order, and has the same
number of steps (--budget=steps) or of floating-point operations (--budget=flops). --config.key=value
is for all methods that have the key, --dino.key=value for one. The same command continues after an
interruption, and prints the tables again when all is done. Where a task of a run fails, the others go on,
the tables show what is missing, and the exit code is 4; the same command tries it again. --minutes=120
stops after two hours, in a training at a checkpoint, with exit code 75. Results are in OUT/table.md,
comparison.json, curves.png (against steps), learning.png (against images seen) and attention.png, and for
each run in OUT/<method>-seed<k>/report.html.
"""

from pathlib import Path

from absl import flags, logging

from dinotwins_jax.cli import COMPILED, exit_code, fail
from dinotwins_jax.devices.compilation import remember_compilations
from experiments.comparison.command import limited, run_with_overrides
from experiments.comparison.outcome import report_failures
from experiments.comparison.plan import METHODS
from experiments.comparison.table import PICTURES, compare

_PRESET = flags.DEFINE_string(
    "preset", "demo", "Preset, as after the colon of configs/hybrid.py:demo"
)
_SEEDS = flags.DEFINE_integer(
    "seeds", 3, "Number of seeds; seed k is the config's seed", lower_bound=1
)
_METHODS = flags.DEFINE_list("methods", list(METHODS[:3]), "Files in configs/")
_BUDGET = flags.DEFINE_enum("budget", "steps", ["steps", "flops"], "What is equal between methods")
_MINUTES = flags.DEFINE_float(
    "minutes", 0.0, "Stop after so long, with exit code 75; 0: never", lower_bound=0.0
)
_OUT = flags.DEFINE_string(
    "out", None, "Directory; default runs/compare-<preset>, with the suffix -flops for equal FLOPs"
)


def main(argv, overrides: dict) -> int:
    """The command; returns the exit code, errors are one line on stderr."""
    if len(argv) > 1:
        return fail(f"unknown argument '{argv[1]}': options start with --")
    logging.set_verbosity(logging.WARNING)
    suffix = "-flops" if _BUDGET.value == "flops" else ""
    out = Path(_OUT.value or f"runs/compare-{_PRESET.value}{suffix}")
    chosen = (_PRESET.value, _SEEDS.value, _METHODS.value, _BUDGET.value)

    def work():
        remember_compilations(out.parent / COMPILED)
        with limited(_MINUTES.value):
            text, failed = compare(*chosen, out, overrides)
        print(text)
        print(f"in {out}: table.md, comparison.json, {', '.join(PICTURES)}; a report.html a run")
        report_failures(failed, "comparison.json")

    return exit_code(work)


if __name__ == "__main__":
    run_with_overrides(main, METHODS)
