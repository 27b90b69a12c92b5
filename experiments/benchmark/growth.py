"""Time and memory of a training step per image, against model, image, batch and device numbers.

    python -m experiments.benchmark.growth --plot=growth.png --json=growth.json

One setting is varied at a time around DINO's ViT-S/16 with 2 x 224 + 8 x 96 crops, K = 65,536, batch 4;
"devices" are virtual ones on one CPU, so they show the overhead of splitting, not its gain.
"""

import json
import os
from pathlib import Path

from absl import app, flags, logging

from dinotwins_jax.cli import exit_code
from dinotwins_jax.evals.table import markdown
from dinotwins_jax.files import replace_text
from experiments.benchmark.settings import Settings, settings_of
from experiments.benchmark.train_step import OURS, environment, measure

# title -> (field, values); the field "way" takes devices
SWEEPS = {
    "batch size": ("batch_size", (1, 2, 4, 8, 16)),
    "local crops": ("num_local", (0, 2, 4, 8, 12)),
    "prototypes K": ("prototypes", (1024, 16384, 65536, 131072)),
    "image size (pixels)": ("global_size", (96, 160, 224, 320)),
    "virtual devices": ("way", (1, 2, 4)),
}


def sweep(base: Settings, sweeps: dict, rounds: int, report=lambda *_: None) -> dict:
    """{title: {value: {"ms_per_image", "peak_mib_per_image", "temporary_mib_per_image", "tflop_per_s",
    "compile_s"}}}; report(title, value, figures) is called after each."""
    found: dict[str, dict] = {}
    for title, (field, values) in sweeps.items():
        for value in values:
            settings = base._replace(**{field: f"data{value}" if field == "way" else value})
            figures = _per_image(measure(settings, rounds=rounds), settings.batch_size)
            found.setdefault(title, {})[value] = figures
            report(title, value, figures)
    return found


def _per_image(figures: dict, images: int) -> dict:
    ours = figures["contestants"][OURS]
    return {
        "ms_per_image": ours["ms"]["min"] / images,  # minimum: least affected by other load
        "peak_mib_per_image": ours["peak_bytes"] / images / 2**20,
        "temporary_mib_per_image": ours["temporary_bytes"] * ours["devices"] / images / 2**20,
        "tflop_per_s": ours["tflop_per_s"],
        "compile_s": ours["compile_s"],
    }


def table(found: dict) -> str:
    """Formats a table with one line per setting."""
    rows = [["", "", "ms/image", "peak MiB/image", "temporaries MiB/image", "GFLOP/s", "compile s"]]
    for title, points in found.items():
        for value, of in points.items():
            numbers = (of["ms_per_image"], of["peak_mib_per_image"], of["temporary_mib_per_image"])
            cells = [f"{x:,.0f}" for x in (*numbers, 1000 * of["tflop_per_s"], of["compile_s"])]
            rows.append([title, f"{value:,}", *cells])
            title = ""  # printed once
    return markdown(rows)


def draw(found: dict, path: Path) -> None:
    """Draws two rows of panels, time above memory, with one column per sweep."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(2.6 * len(found), 4.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, len(found), squeeze=False, sharey="row")
    for column, (title, points) in zip(axes.T, found.items(), strict=True):
        values = list(points)
        places = range(len(values))
        labels = [f"{v // 1024}k" if v >= 1024 else str(v) for v in values]
        for axis, names in zip(
            column,
            (("ms_per_image",), ("peak_mib_per_image", "temporary_mib_per_image")),
            strict=True,
        ):
            for name, style in zip(names, ("o-", "o--"), strict=False):
                axis.plot(places, [points[v][name] for v in values], style, color="#1f5a7a", ms=4)
            axis.set_xticks(places, labels)
            axis.grid(axis="y", color="#dddddd", linewidth=0.6)
            axis.spines[["top", "right"]].set_visible(False)
        column[1].set_xlabel(title)
    for row in axes:
        row[0].set_ylim(bottom=0)  # after all panels, which share it
    axes[0, 0].set_ylabel("ms an image")
    axes[1, 0].set_ylabel("MiB per image\n(dashed: temporaries)")
    figure.savefig(path, dpi=130)


def define_flags() -> None:
    """Defines the command's flags; other commands have flags of the same names."""
    flags.DEFINE_enum("method", "dino", ["dino", "hybrid", "barlow_twins"], "Config")
    flags.DEFINE_string("model", "vit_small", "A name of models.create_vit")
    flags.DEFINE_list("sweeps", list(SWEEPS), "Sweeps to run")
    flags.DEFINE_integer("rounds", 3, "Rounds of at least a second each", lower_bound=1)
    flags.DEFINE_string("plot", None, "File for the picture")
    flags.DEFINE_string("json", None, "File for all figures, written after each of them")


def main(argv) -> int:
    del argv
    logging.set_verbosity(logging.WARNING)
    given = flags.FLAGS
    os.environ["JAX_NUM_CPU_DEVICES"] = str(max(SWEEPS["virtual devices"][1]))

    def work():
        if unknown := set(given.sweeps) - set(SWEEPS):
            raise ValueError(f"--sweeps has {', '.join(unknown)}: choose from {', '.join(SWEEPS)}")
        base = settings_of(given.method, given.model, way="data1")
        figures: dict = {"environment": environment(), "base": base.text(), "sweeps": {}}

        def report(title, value, found):
            figures["sweeps"].setdefault(title, {})[value] = found
            if given.json:
                replace_text(Path(given.json), json.dumps(figures, indent=1) + "\n")

        chosen = {title: SWEEPS[title] for title in given.sweeps}
        found = sweep(base, chosen, given.rounds, report)
        print(f"{table(found)}\n{base.text()}; {', '.join(figures['environment'].values())}")
        if given.plot:
            draw(found, Path(given.plot))

    return exit_code(work)


if __name__ == "__main__":
    define_flags()
    app.run(main)
