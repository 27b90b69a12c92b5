"""Choice of settings by short runs that are judged on held-out training images, never on the test split.

Each row is a method with some changes of a preset. All rows have the floating-point operations of the
preset's hybrid, crops not counted, so a cheaper step is repeated more often. Judges are the k-NN and the
ridge probe of the monitor: of `JUDGES` training images a third is held out. No task is evaluated.
"""

import json
import math
from collections.abc import Sequence
from pathlib import Path

from ml_collections import ConfigDict

from dinotwins_jax.backbone import make_backbone
from dinotwins_jax.build import build
from dinotwins_jax.data import open_source, split_section
from dinotwins_jax.evals.monitor import HELD_OUT
from dinotwins_jax.evals.table import markdown
from dinotwins_jax.files import replace_text
from dinotwins_jax.settings.keys import value_at
from experiments.comparison.learning import METRICS
from experiments.comparison.outcome import failure_lines, failures, read_log, spread_cell
from experiments.comparison.plan import METHODS, change, make_configs
from experiments.comparison.running import Planned, costs_of, step_costs, train_missing
from experiments.comparison.statistics import mean_std

BASE, JUDGES = "hybrid", 6000
SHARE = 0.1  # of the preset's length
CURVE = 4  # times that a run is judged, the last time at its end


def _times(factor: float):
    return lambda value: type(value)(factor * value)


def _one_more(number: int) -> int:
    return number + 1


def _slower(momentum: float) -> float:
    return 1.0 - (1.0 - momentum) / 2.5


_ALL = {
    "rate halved": {"optim.lr": _times(0.5)},
    "rate doubled": {"optim.lr": _times(2.0)},
    "teacher slower": {"teacher.momentum": _slower, "teacher.final_momentum": _slower},
    "larger crops": {"views.global_scale": (0.6, 1.0)},
    "smaller crops": {"views.global_scale": (0.2, 1.0)},
}
# row -> (method, what differs from the preset)
SETTINGS: dict[str, tuple[str, dict]] = {
    BASE: ("hybrid", {}),
    "width x 3/4": ("hybrid", {"model.embed_dim": _times(0.75), "model.num_heads": _times(0.75)}),
    "width x 3/2": ("hybrid", {"model.embed_dim": _times(1.5), "model.num_heads": _times(1.5)}),
    "a block more": ("hybrid", {"model.depth": _one_more}),
    "linear stem": ("hybrid", {"model.stem": "linear"}),
    "linear stem, a block more": ("hybrid", {"model.stem": "linear", "model.depth": _one_more}),
    "patch doubled": ("hybrid", {"model.patch_size": _times(2)}),
    "no local crops": ("hybrid", {"views.num_local": 0, "views.global_scale": (0.14, 1.0)}),
    "local crops doubled": ("hybrid", {"views.num_local": _times(2)}),
    "batch halved": ("hybrid", {"batch_size": _times(0.5)}),
    "batch doubled": ("hybrid", {"batch_size": _times(2)}),
    "prototypes x 4": ("hybrid", {"loss.dino.out_dim": _times(4)}),
    "Barlow Twins matched at 0.3": ("hybrid", {"loss.barlow_twins.weight": 0.3}),
    "Barlow Twins matched at 3": ("hybrid", {"loss.barlow_twins.weight": 3.0}),
    "weak colours": ("hybrid", {"views.jitter_prob": 0.4, "views.grayscale_prob": 0.1}),
    "no solarisation": ("hybrid", {"views.solarize_prob": (0.0, 0.0, 0.0)}),
    "weight decay x 4": ("hybrid", {"optim.final_weight_decay": _times(4.0)}),
    **{f"hybrid: {name}": ("hybrid", changes) for name, changes in _ALL.items()},
    "dino": ("dino", {}),
    **{f"dino: {name}": ("dino", changes) for name, changes in _ALL.items()},
    "barlow twins": ("barlow_twins", {}),
    **{f"barlow twins: {name}": ("barlow_twins", changes) for name, changes in _ALL.items()},
}


def config_of_row(row: str, preset: str, seed: int, overrides: dict) -> ConfigDict:
    """The config of one row of SETTINGS, of SHARE of the preset's length unless the overrides say how
    long, monitored CURVE times and not evaluated.

    Raises ValueError for an unknown row or preset, a bad override, or a row that changes by a factor what
    the preset leaves open.
    """
    if row not in SETTINGS:
        raise ValueError(f"unknown row '{row}': choose from {', '.join(SETTINGS)}")
    method, changes = SETTINGS[row]
    config = make_configs(preset, METHODS[:3], seed, overrides)[method]
    _fill(config, changes, row, preset)
    change(config, changes)
    evals, given = config.evals, overrides.get("config", {})
    if not {"total_steps", "total_epochs"} & given.keys():
        config.total_steps = round(SHARE * build(config).total_steps)
    config.checkpoint.every_epochs = evals.monitor_every_epochs = config.total_epochs / CURVE
    if "evals.monitor_images" not in given:
        evals.monitor_images = JUDGES
    evals.tasks, evals.pictures = (), 0
    return config


def _fill(config: ConfigDict, changes: dict, row: str, preset: str) -> None:
    """Gives the sizes that follow from model.name their values, where a row changes them by a factor."""
    for key in (key for key, value in changes.items() if callable(value)):
        if value_at(config, key) is not None:
            continue
        name = key.removeprefix("model.")
        if name not in ("embed_dim", "depth", "num_heads"):
            raise ValueError(
                f"row '{row}' changes config.{key} by a factor, and --preset={preset} leaves it open: give "
                f"--config.{key}=…"
            )
        config.model[name] = getattr(make_backbone(config), name)


def _check_labels(config: ConfigDict) -> None:
    """Raises ValueError if there is nothing to judge by."""
    section = split_section(config, "train")
    if open_source(section, "train").labels is None:
        raise ValueError(
            f"--study=settings judges by labels, and the training data ({section['source']}, "
            f"{section['dir'] or 'no directory'}) have none: give labelled ones, config.data.probe"
        )


def settings_study(
    preset: str, rows: Sequence[str], seeds: int, out: Path, overrides: dict
) -> tuple[str, dict[str, dict[str, str]]]:
    """Trains the unfinished rows; writes OUT/settings.json and settings.md.

    Returns:
      the latter, and {run: {part of its evaluation: why it failed}}.
    Raises:
      ValueError: as `config_of_row`, or data without labels.
    """
    every = {row: config_of_row(row, preset, 0, overrides) for row in dict.fromkeys([BASE, *rows])}
    _check_labels(every[BASE])
    costs = step_costs(out, every)
    budget = costs[BASE][0] * costs[BASE][1]
    plan = []
    for seed in range(seeds):
        group = {}
        for row in rows:
            config, flops = config_of_row(row, preset, seed, overrides), costs[row][1]
            steps = config.total_steps = max(CURVE, round(budget / flops))
            name = "".join(c if c.isalnum() else "_" for c in row)
            workdir = out / f"{name}-seed{seed}"
            group[row] = Planned(f"{row}, seed {seed}", config, workdir, steps, steps * flops)
        plan.append(group)
    train_missing(plan, out / "features", equal_starts=False)
    failed = failures({row: [group[row].workdir for group in plan] for row in rows})
    return _report(out, preset, overrides, [entry(row, plan) for row in rows], failed), failed


def entry(row: str, plan: list[dict[str, Planned]]) -> dict:
    """What was tried in a row, on what it was judged, and the judgement, one value a seed."""
    method, changes = SETTINGS[row]
    runs = [group[row] for group in plan]
    logs = [read_log(run.workdir) for run in runs]
    config = runs[0].config
    judged = [metric for metric in METRICS if any(metric in log[-1] for log in logs)]
    images = config.evals.monitor_images
    return {
        "row": row,
        "method": method,
        "changes": {key: value_at(config, key) for key in changes},
        "judged on": f"{round(HELD_OUT * images)} held out of at most {images} training images",
        "runs": [costs_of(run) for run in runs],
        "scores": {metric: [_finite(log[-1].get(metric)) for log in logs] for metric in judged},
        "curves": {
            metric: [
                [[line["step"] * config.batch_size, line[metric]] for line in log if metric in line]
                for log in logs
            ]
            for metric in judged
        },
    }


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _report(out: Path, preset: str, overrides: dict, entries: list[dict], failed: dict) -> str:
    found = {"preset": preset, "overrides": overrides, "rows": entries, "failed": failed}
    replace_text(out / "settings.json", json.dumps(found, indent=2) + "\n")
    metrics = list(dict.fromkeys(metric for of in entries for metric in of["scores"]))
    names = [metric.removeprefix("monitor/").replace("_", " ") for metric in metrics]
    lines = [["", *names, "images", "minutes", "differs in"]]

    def first(of: dict) -> float:
        known = [v for v in of["scores"].get(metrics[0], ()) if v is not None] if metrics else []
        return mean_std(known)[0] if known else -math.inf

    for of in sorted(entries, key=first, reverse=True):
        cells = [spread_cell(of["scores"].get(metric, ())) for metric in metrics]
        seconds = sum(run["seconds"] or 0.0 for run in of["runs"]) / len(of["runs"])
        differs = ", ".join(f"`{key}={value}`" for key, value in of["changes"].items())
        images = f"{of['runs'][0]['images']:,}"
        lines.append([of["row"], *cells, images, f"{seconds / 60:.1f}", differs])
    given = [
        f"`{name}.{key}={value}`" for name, of in overrides.items() for key, value in of.items()
    ]
    text = (
        f"{markdown(lines)}\n\nPreset `{preset}`{' with ' * bool(given)}{', '.join(given)}; equal FLOPs, "
        f"crops not counted. In %, judged on {entries[0]['judged on']}; not on the test split.\n"
    )
    text += "".join(f"\n{line}\n" for line in failure_lines(failed))
    replace_text(out / "settings.md", text)
    return text
