"""Label efficiency: accuracy against the share of labels, for the runs of a finished comparison.

    python -m experiments.label_efficiency runs/compare-demo

Uses frozen features of every teacher and of random weights, the bank of ridge probes and five draws of
the labels; a band is the standard deviation over training seeds. Writes label_efficiency.png and .json.
"""

import json
import sys
from pathlib import Path

import numpy as np
from absl import app, flags, logging
from ml_collections import ConfigDict

from dinotwins_jax.cli import exit_code, fail
from dinotwins_jax.configuration import config_of
from dinotwins_jax.data import probe_section
from dinotwins_jax.files import replace_text
from experiments.comparison.plan import METHODS

_FRACTIONS = flags.DEFINE_list(
    "fractions", ["0.01", "0.02", "0.05", "0.1", "0.2", "0.5", "1"], "Shares of the labels"
)
RANDOM = "random weights"


def label_efficiency(out: Path, fractions: list[float]) -> dict:
    """{"metric", "fractions", "scores": {row: [[value per fraction] per seed]}} of the runs in OUT."""
    from dinotwins_jax.evals.bank import bank_probe_splits
    from dinotwins_jax.evals.probes import label_kinds

    runs = finished_runs(out)
    scores: dict[str, list] = {method: [] for method, _, _ in runs}
    of_random: dict[int, list] = {}
    for method, seed, workdir in runs:
        features, config = _features(workdir)
        for row in ("teacher", RANDOM):
            if row == RANDOM and seed in of_random:
                continue  # the methods of a seed start from the same weights
            (train, test), embed = features.labelled()[row], features.embeds[row]
            y, t = list(label_kinds(train, test).values())[-1]  # multi-label if available
            metric = "map" if y.ndim == 2 else "top1"
            sets = [{n: s.features[:, c] for n, c in embed.sets.items()} for s in (train, test)]
            values = [
                bank_probe_splits(
                    sets[0],
                    y,
                    sets[1],
                    t,
                    num_classes=config.num_classes,
                    fraction=fraction,
                    split_seeds=tuple(config.split_seeds),
                )[f"{metric}_mean"]
                for fraction in fractions
            ]
            if row == RANDOM:
                of_random[seed] = values
            else:
                scores[method].append(values)
            print(f"{workdir.name}, {row}: " + ", ".join(f"{v:.1f}" for v in values), flush=True)
    scores[RANDOM] = list(of_random.values())
    return {"metric": metric, "fractions": fractions, "scores": scores}


def finished_runs(out: Path) -> list[tuple[str, int, Path]]:
    """(method, seed, workdir) of the evaluated runs in OUT, in the order of METHODS and the seeds.

    Raises FileNotFoundError if there are none.
    """
    found = [
        (method, int(path.parent.name.removeprefix(f"{method}-seed")), path.parent)
        for method in METHODS
        for path in out.glob(f"{method}-seed*/scores.json")
    ]
    if not found:
        raise FileNotFoundError(f"no finished runs in {out}: python -m experiments.compare first")
    return sorted(found, key=lambda run: (METHODS.index(run[0]), run[1]))


def _features(workdir: Path):
    """The run's cached features, and the options that the probes need."""
    from dinotwins_jax.build import build_for_evaluation
    from dinotwins_jax.evals.features import source_checksum
    from dinotwins_jax.evaluation import frozen_features
    from dinotwins_jax.weights import from_checkpoint

    config = config_of(workdir, opens_data=True)
    try:
        run = build_for_evaluation(config)
    except AttributeError as error:  # a key that the run's version did not have
        raise ValueError(
            f"{workdir / 'config.json'} has another version ({error}); add the missing key to it"
        ) from None
    data = [
        source_checksum(source, probe_section(config.data.to_dict()))
        for source in run.probe_sources
    ]
    weights = from_checkpoint(run, config, workdir)
    features = frozen_features(run, config, weights, workdir.parent / "features", data)
    options = ConfigDict(
        {
            "num_classes": len(run.probe_sources[0].class_names),
            "split_seeds": config.evals.split_seeds,
        }
    )
    return features, options


def draw(path: Path, found: dict) -> None:
    """Draws one line per method, labelled at its end; the share of the labels is on a log axis."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from dinotwins_jax.evals.curves import COLOURS, INK, LINE, MUTED

    figure = Figure(figsize=(6.4, 4.2), facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0.1, 0.13, 0.68, 0.77))
    x = 100 * np.asarray(found["fractions"])
    ends = []
    for i, (row, seeds) in enumerate(found["scores"].items()):
        values = np.asarray(seeds)  # [seeds, fractions]
        mean, std = values.mean(axis=0), values.std(axis=0, ddof=1) if len(values) > 1 else 0.0
        colour = MUTED if row == RANDOM else COLOURS[i % len(COLOURS)]
        axes.plot(x, mean, "--" if row == RANDOM else "-o", color=colour, lw=1.6, ms=3.5)
        axes.fill_between(x, mean - std, mean + std, color=colour, alpha=0.15, lw=0)
        ends.append((float(mean[-1]), row, colour))
    low, high = axes.get_ylim()
    above = -np.inf
    for value, row, colour in sorted(ends):  # labels that would overlap are moved up
        above = max(value, above + 0.05 * (high - low))
        axes.annotate(row, (x[-1], above), (7, 0), textcoords="offset points", color=colour,
                      fontsize=9, va="center", annotation_clip=False)  # fmt: skip
    axes.set_xscale("log")
    axes.set_xticks(x, [f"{v:g}" for v in x])
    axes.minorticks_off()
    axes.grid(axis="y", color=LINE, lw=0.6)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(length=0, labelsize=8, labelcolor=MUTED)
    axes.set_xlabel("labels, % of the training images", fontsize=9, color=MUTED)
    name = {"map": "mAP", "top1": "top-1"}[found["metric"]]
    axes.set_title(f"Ridge probe, {name} in %", fontsize=10, color=INK, loc="left")
    figure.savefig(path, dpi=150, format="png")


def table(found: dict) -> str:
    """Markdown table: mean ± standard deviation over training seeds."""
    from dinotwins_jax.evals.table import cell, markdown
    from experiments.comparison.statistics import mean_std

    header = ["", *(f"{100 * f:g}%" for f in found["fractions"])]
    rows = [
        [row, *(cell(mean_std(list(values))) for values in zip(*seeds, strict=True))]
        for row, seeds in found["scores"].items()
    ]
    return markdown([header, *rows])


def main(argv) -> int:
    """The command; returns the exit code, errors are one line on stderr."""
    if len(argv) != 2:
        return fail(
            "give the directory of a comparison: python -m experiments.label_efficiency runs/compare-demo"
        )
    logging.set_verbosity(logging.WARNING)
    out = Path(argv[1])

    def work():
        fractions = [float(f) for f in _FRACTIONS.value]
        found = label_efficiency(out, fractions)
        replace_text(out / "label_efficiency.json", json.dumps(found, indent=2) + "\n")
        draw(out / "label_efficiency.png", found)
        print(table(found))

    return exit_code(work)


def _parse(argv):
    """Parses the arguments with absl; errors are one line."""
    try:
        return flags.FLAGS(argv)
    except flags.Error as error:
        sys.exit(fail(str(error)))


if __name__ == "__main__":
    app.run(main, flags_parser=_parse)
