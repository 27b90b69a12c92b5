"""Peak memory of a training step by model, batch size and memory-saving options, without running it.

    python -m experiments.benchmark.memory --dir=/data/coco --models=vit_small,vit_base --batches=64,256
    python -m experiments.benchmark.memory --dir=/data/coco --topology=v5e:2x2   # with libtpu installed

Compiles the step of configs/hybrid.py:coco for one device and reads XLA's memory analysis: for the local
device, or for a TPU that need not be present (pip install libtpu). A column is a way to train: "plain",
"remat", "micro4" (the batch in 4 parts), or several joined by "+".
"""

import json
import time
from pathlib import Path

import jax
from absl import app, flags, logging

from dinotwins_jax.build import build
from dinotwins_jax.cli import exit_code
from dinotwins_jax.evals.table import markdown
from dinotwins_jax.files import replace_text
from dinotwins_jax.memory import step_memory
from experiments.benchmark.settings import METHODS, config_of, settings_of
from experiments.benchmark.targets.absent import tpu_devices


def device_of(topology: str | None) -> jax.Device:
    """The first local device, or one of an absent TPU. Raises ValueError without libtpu."""
    return jax.devices()[0] if topology is None else tpu_devices(topology)[0]


def measure(device: jax.Device, config) -> dict[str, float]:
    """Bytes as in step_memory, and seconds of compilation."""
    start = time.perf_counter()
    found = step_memory(build(config, [device]), config.batch_size)
    return found | {"compile_s": round(time.perf_counter() - start, 1)}


def table(figures: dict[str, dict[str, dict]], ways: list[str]) -> str:
    """Table of peak GiB; one line per model and batch size, one column per way."""
    rows = [["peak, GiB", *ways]]
    for title, found in figures.items():
        cells = [f"{found[way]['peak'] / 2**30:.2f}" if way in found else "–" for way in ways]
        rows.append([title, *cells])
    return markdown(rows)


def define_flags() -> None:
    """Defines the command's flags; other commands have flags of the same names."""
    flags.DEFINE_string("dir", None, "COCO, or a sample of it; only its file names are read")
    flags.DEFINE_enum("method", "hybrid", list(METHODS), "Config")
    flags.DEFINE_list("models", ["vit_small", "vit_base"], "Names of models.create_vit")
    flags.DEFINE_list("batches", ["64", "256"], "Images")
    flags.DEFINE_list("ways", ["plain", "remat", "micro4", "remat+micro4"], "Columns")
    flags.DEFINE_string("dtype", "bfloat16", "Of compute")
    flags.DEFINE_string("topology", None, "TPU topology, such as v5e:2x2; one chip of it is used")
    flags.DEFINE_string("json", None, "File for all figures, written after each of them")


def main(argv) -> int:
    del argv
    logging.set_verbosity(logging.WARNING)
    given = flags.FLAGS

    def work():
        if given.dir is None:
            raise ValueError("--dir is required: the folder of COCO, or of a sample of it")
        device = device_of(given.topology)
        figures: dict[str, dict[str, dict]] = {}
        for model in given.models:
            for batch in map(int, given.batches):
                row = figures.setdefault(f"{model}, batch {batch}", {})
                for way in given.ways:
                    settings = settings_of(
                        given.method, model, batch_size=batch, dtype=given.dtype, way=way
                    )
                    row[way] = measure(device, config_of(settings, given.dir))
                    if given.json:
                        replace_text(Path(given.json), json.dumps(figures, indent=1) + "\n")
        kind = f"{device.device_kind}, {given.method}, {given.dtype}, jax {jax.__version__}"
        print(
            f"{table(figures, given.ways)}\n{kind}, by XLA's memory analysis of the compiled step"
        )

    return exit_code(work)


if __name__ == "__main__":
    define_flags()
    app.run(main)
