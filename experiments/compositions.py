"""Effect of every choice that the paper's abstract leaves open in the hybrid, one at a time.

    python -m experiments.compositions --preset=demo --seeds=3
    python -m experiments.compositions --preset=cifar10_cpu --only="hybrid,all views" --seeds=1

Each row is configs/hybrid.py with the changes of `CHOICES`; the first two are its parts alone. All rows
start from the same backbone and see the same images in the same order for the same number of steps.
--config.key=value is for all rows. The same command continues after an interruption and prints the table
again when all is done. Results are in OUT/table.md and compositions.json, and for each run in
OUT/<row>-seed<k>/scores.json.
"""

import json
from pathlib import Path

from absl import flags, logging

from dinotwins_jax.cli import COMPILED, exit_code, fail
from dinotwins_jax.devices.compilation import remember_compilations
from dinotwins_jax.evals.table import markdown
from dinotwins_jax.files import replace_text
from experiments.comparison.command import run_with_overrides
from experiments.comparison.outcome import (
    collect,
    columns_of,
    failures,
    report_failures,
    spread_cell,
)
from experiments.comparison.plan import change, check_equal_steps, make_configs
from experiments.comparison.running import Planned, step_costs, train_missing
from experiments.comparison.statistics import paired

_PRESET = flags.DEFINE_string("preset", "demo", "as after the colon of configs/hybrid.py:demo")
_SEEDS = flags.DEFINE_integer("seeds", 3, "number of seeds; seed k is the config's seed", 1)
_ONLY = flags.DEFINE_list("only", [], "rows, separated by commas; empty: all")
_OUT = flags.DEFINE_string("out", None, "directory; default runs/compositions-<preset>")

BASE = "hybrid"
_WIDER = 4  # times the preset's projector
# row -> (method, what differs from configs/hybrid.py)
CHOICES = {
    "DINO alone": ("dino", {}),
    "Barlow Twins alone": ("barlow_twins", {}),
    BASE: ("hybrid", {}),
    "matched at 0.1": ("hybrid", {"loss.barlow_twins.weight": 0.1}),
    "matched at 1": ("hybrid", {"loss.barlow_twins.weight": 1.0}),
    "fixed weight 0.003": (
        "hybrid",
        {"match_gradients_to": "", "loss.barlow_twins.weight": 0.003},
    ),
    "fixed weight 0.024": (
        "hybrid",
        {"match_gradients_to": "", "loss.barlow_twins.weight": 0.024},
    ),
    "student with teacher": ("hybrid", {"loss.barlow_twins.pair": "student_teacher"}),
    "all views": ("hybrid", {"loss.barlow_twins.views": "all"}),
    "all views of both networks": (
        "hybrid",
        {"loss.barlow_twins.pair": "student_teacher", "loss.barlow_twins.views": "all"},
    ),
    "linear projector": ("hybrid", {"loss.barlow_twins.hidden_dims": lambda dims: dims[-1:]}),
    "projector 4 times as wide": (
        "hybrid",
        {"loss.barlow_twins.hidden_dims": lambda dims: tuple(_WIDER * width for width in dims)},
    ),
}
# The scores of the table: SGD and ridge probe with 10% of the labels, k-NN, few-shot, masks.
_TASKS = ("linear", "knn", "fewshot", "attention", "segmentation")
_FRACTION = 0.1


def config_of_row(row: str, preset: str, seed: int, overrides: dict):
    """The config of one row of `CHOICES`.

    Args: overrides: {"config": {key: text}}, for all rows.
    Raises: ValueError: unknown row or preset, or a bad override.
    """
    if row not in CHOICES:
        raise ValueError(f"unknown row '{row}': choose from {', '.join(CHOICES)}")
    method, changes = CHOICES[row]
    config = change(make_configs(preset, [method], seed, overrides)[method], changes)
    config.evals.tasks, config.evals.label_fractions = _TASKS, (_FRACTION,)
    config.evals.monitor_every_epochs, config.evals.pictures = 0.0, 0
    return config


def compositions(preset: str, rows: list[str], seeds: int, out: Path, overrides: dict) -> str:
    """Trains and evaluates the unfinished runs; returns the table as Markdown.

    Raises:
      EvaluationFailed: parts of an evaluation failed; the table without them is written.
    """
    configs = [
        {row: config_of_row(row, preset, seed, overrides) for row in rows} for seed in range(seeds)
    ]
    costs = step_costs(out, configs[0])
    steps, flops = ({row: of[i] for row, of in costs.items()} for i in (0, 1))
    check_equal_steps(steps, {row: config.batch_size for row, config in configs[0].items()})
    plan = [
        {
            row: Planned(
                f"{row}, seed {seed}",
                config,
                out / f"{row.replace(' ', '_')}-seed{seed}",
                steps[row],
                steps[row] * flops[row],
            )
            for row, config in of_seed.items()
        }
        for seed, of_seed in enumerate(configs)
    ]
    train_missing(plan, out / "features", equal_starts=True)
    workdirs = {row: [of_seed[row].workdir for of_seed in plan] for row in rows}
    failed = failures(workdirs)
    text = _report(out, collect(workdirs), flops, failed)
    report_failures(failed, "compositions.json")
    return text


def _report(out: Path, scores: dict, flops: dict[str, float], failed: dict | None = None) -> str:
    """Writes OUT/compositions.json and table.md; returns the table, a line a row of `flops`."""
    cheapest = min(flops.values())
    columns = columns_of({row: scores[row] for row in flops})
    differences = {
        row: {
            column: paired(scores[row][column], values)
            for column, values in scores[BASE].items()
            if len(values) > 1 and None not in [*values, *scores[row].get(column, [None])]
        }
        for row in flops
        if row != BASE and BASE in flops
    }
    lines = [["", *columns, "FLOPs of a step"]]
    for row in flops:
        cells = [_text(scores[row].get(c, ()), differences.get(row, {}).get(c)) for c in columns]
        lines.append([row, *cells, f"{flops[row] / cheapest:.2f}"])
    found = {"scores": scores, "differences": differences, "flops": flops, "failed": failed or {}}
    replace_text(out / "compositions.json", json.dumps(found, indent=2) + "\n")
    text = markdown(lines) + (
        f"\n\n* differs from {BASE} with 95% confidence (paired t-test over the seeds, no correction "
        "for the number of rows); FLOPs relative to the cheapest row, crops not counted\n"
    )
    replace_text(out / "table.md", text)
    return text


def _text(values: list[float | None], difference: dict | None) -> str:
    sure = "" if difference is None or difference["verdict"] == "level" else " *"
    return spread_cell(values) + sure


def main(argv, overrides: dict) -> int:
    """The command; returns the exit code, errors are one line on stderr."""
    if len(argv) > 1:
        return fail(f"unknown argument '{argv[1]}': options start with --")
    logging.set_verbosity(logging.WARNING)
    out = Path(_OUT.value or f"runs/compositions-{_PRESET.value}")

    def work():
        remember_compilations(out.parent / COMPILED)
        rows = _ONLY.value or list(CHOICES)
        print(compositions(_PRESET.value, rows, _SEEDS.value, out, overrides))

    return exit_code(work)


if __name__ == "__main__":
    run_with_overrides(main)
