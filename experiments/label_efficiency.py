"""Label efficiency: accuracy against the share of labels, for the runs of a finished comparison.

    python -m experiments.label_efficiency runs/compare-demo

Uses frozen features of every teacher and of random weights, the bank of ridge probes and five draws of
the labels, and the scores of networks trained from scratch where the runs have them (the task "scratch");
a band is the standard deviation over training seeds. Writes label_efficiency.png and .json.
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
from dinotwins_jax.evals.names import SCRATCH
from dinotwins_jax.files import replace_text
from experiments.comparison.plan import METHODS

_FRACTIONS = flags.DEFINE_list(
    "fractions", ["0.01", "0.02", "0.05", "0.1", "0.2", "0.5", "1"], "Shares of the labels"
)
RANDOM = "random weights"


def label_efficiency(out: Path, fractions: list[float]) -> dict:
    """{"metric", "fractions", "scores": {row: [[value per fraction] per seed]}, "from scratch": as
    `from_scratch`} of the runs in OUT."""
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
    found = {"metric": metric, "fractions": fractions, "scores": scores}
    return found | {SCRATCH: from_scratch(runs, metric)}


def from_scratch(runs: list[tuple[str, int, Path]], metric: str) -> dict:
    """{"fractions": those of all seeds that have the baseline, "scores": [[value per one] per seed]}."""
    seeds: dict[int, dict[float, float]] = {}
    for _, seed, workdir in runs:
        scores = json.loads((workdir / "scores.json").read_text())["scores"]
        for of in scores.get(SCRATCH, {}).get("whole", {}).values():
            if (value := of.get(f"{metric}_mean")) is not None:
                seeds.setdefault(seed, {})[of["fraction"]] = value
    shared = sorted(set.intersection(*map(set, seeds.values()))) if seeds else []
    return {"fractions": shared, "scores": [[of[f] for f in shared] for of in seeds.values()]}


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
    from experiments.comparison.lines import Panel, draw_lines

    shares = 100 * np.asarray(found["fractions"])
    name = {"map": "mAP", "top1": "top-1"}[found["metric"]]
    rows = {row: (shares, np.asarray(seeds)) for row, seeds in found["scores"].items()}
    if (scratch := found[SCRATCH])["fractions"]:
        rows[SCRATCH] = 100 * np.asarray(scratch["fractions"]), np.asarray(scratch["scores"])
    panel = Panel(
        f"Ridge probe, {name} in %",
        "labels, % of the training images",
        rows,
        ticks=(shares.tolist(), [f"{share:g}" for share in shares]),
        muted=(RANDOM, SCRATCH),
    )
    draw_lines(path, [panel])


def table(found: dict) -> str:
    """Markdown table: mean ± standard deviation over training seeds."""
    from dinotwins_jax.evals.table import cell, markdown
    from experiments.comparison.statistics import mean_std

    header = ["", *(f"{100 * f:g}%" for f in found["fractions"])]
    rows = [
        [row, *(cell(mean_std(list(values))) for values in zip(*seeds, strict=True))]
        for row, seeds in found["scores"].items()
    ]
    fractions, seeds = found[SCRATCH]["fractions"], found[SCRATCH]["scores"]
    if fractions:
        cells = dict(
            zip(fractions, (cell(mean_std(list(v))) for v in zip(*seeds, strict=True)), strict=True)
        )
        rows.append([SCRATCH, *(cells.get(f, "–") for f in found["fractions"])])
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
