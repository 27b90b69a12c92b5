"""The first minutes on an NVIDIA card or a TPU: agreement, speed, memory, input, a training.

    python -m experiments.gpu_check --minutes=8 --out=DIR
    python -m experiments.gpu_check --minutes=5 --out=DIR --parts=device,step,pytorch
    JAX_PLATFORMS=cpu python -m experiments.gpu_check --minutes=3 --out=DIR     # a dry run at toy size

In order of value, each part in a process of its own: device and versions; gradients of a step with flash
attention against plain attention; bfloat16 against float32; time, utilisation and memory of hybrid
ViT-S/16 and ViT-B/16; the same step in PyTorch; files to trained images; a training of ViT-T/4.
DIR/gpu_check.json has all figures and is whole after each of them; what fails or does not fit into the time
is in it with its reason. DIR/compiled keeps the compiled programs: a second start measures more. DIR/logs
has the output of each part.
"""

import contextlib
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

from absl import app, flags

from dinotwins_jax.cli import exit_code
from dinotwins_jax.stopping import Stopped
from experiments.gpu import plan, table
from experiments.gpu.budget import allotted
from experiments.gpu.reason import of_error
from experiments.gpu.report import Report, measured
from experiments.gpu.runner import run_part

_MARGIN = 3.0  # seconds for the table
_DEVICE = 20.0  # seconds at least: the size of all other parts depends on the device


def check(
    out: Path, minutes: float, *, size: str = "auto", data: str = "", parts=plan.NAMES
) -> dict:
    """Measures the parts and returns the report, as in OUT/gpu_check.json.

    Args:
      size: "full" | "toy" | "auto": toy on a CPU.
      data: folder with CIFAR-10, or with cifar10/ in it; "": the demo's scenes are trained on.
      parts: of plan.NAMES; the device is always measured.
    Raises:
      ValueError: no such part, or no time.
      Stopped: SIGTERM; what was measured is in the report.
    """
    if unknown := set(parts) - set(plan.NAMES):
        raise ValueError(f"--parts has '{min(unknown)}': choose from {', '.join(plan.NAMES)}")
    if minutes <= 0:
        raise ValueError(f"--minutes is {minutes:g}: it must be positive")
    start = time.monotonic()
    end = start + max(60 * minutes - _MARGIN, 1.0)
    report = Report(out, minutes)
    try:
        with stopping():
            _measure(report, end, size, data, parts)
    finally:
        report.set(ended=round(time.monotonic() - start, 1))
    return report.data


def _measure(report: Report, end: float, size: str, data: str, parts) -> None:
    options = {"data": data, "environment": environment(report.path.parent)}
    waiting = [part for part in plan.plan("full", "gpu") if part.name in parts]
    shares = [plan.DEVICE.share, *(part.share for part in waiting)]
    left = end - time.monotonic()
    seconds = min(left, max(allotted(shares, left), _DEVICE))
    run_part(plan.DEVICE, seconds, report, toy=size == "toy", **options)
    found = measured(report.data, "device").get("versions", {})
    platform = found.get("platform", "gpu")
    if size == "auto":
        size = "toy" if platform == "cpu" else "full"
    report.set(size=size)
    _tell(report, "device")
    if platform == "cpu" and found["nvidia_smi"]:
        cards = "; ".join(found["nvidia_smi"])
        print(f'JAX uses the CPU although there is {cards}: pip install "jax[cuda12]"', flush=True)
    waiting = [part for part in plan.plan(size, platform) if part.name in parts]
    while waiting:
        seconds = allotted([part.share for part in waiting], end - time.monotonic())
        part = waiting.pop(0)
        run_part(part, seconds, report, toy=size == "toy", **options)
        _tell(report, part.name)


def _tell(report: Report, name: str) -> None:
    try:
        text = table.part_text(name, report.data["parts"][name])
    except Exception as error:  # the figures are in the file, and the next parts must not be lost
        text = f"{name}: no table, {of_error(error)}"
    print(f"{text}\n", flush=True)


def environment(out: Path) -> dict[str, str]:
    """Environment of the parts: compiled programs are kept in OUT, and the card's memory is taken as it is
    needed. What the user has set stays."""
    chosen = {
        "JAX_COMPILATION_CACHE_DIR": str(out.absolute() / "compiled" / "jax"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.5",
        "TORCHINDUCTOR_CACHE_DIR": str(out.absolute() / "compiled" / "torch"),
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
        "TF_CPP_MIN_LOG_LEVEL": "1",
    }
    return {name: value for name, value in chosen.items() if name not in os.environ}


@contextlib.contextmanager
def stopping() -> Iterator[None]:
    """Turns SIGTERM into Stopped, so that the parts' processes are ended and the report closed."""

    def stop(*_):
        raise Stopped("SIGTERM: what was measured before is in the report")

    kept = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, kept)


def define_flags() -> None:
    """Defines the command's flags; other commands have flags of the same names."""
    flags.DEFINE_float("minutes", 8.0, "Time for everything, compilation included")
    flags.DEFINE_string("out", "runs/gpu_check", "Directory of the figures")
    flags.DEFINE_enum("size", "auto", ["auto", "full", "toy"], "auto: toy on a CPU")
    flags.DEFINE_list("parts", list(plan.NAMES), "Parts to measure")
    flags.DEFINE_string(
        "data",
        os.environ.get("DINOTWINS_DATA", ""),
        "Folder with CIFAR-10, or with cifar10/ in it; default: DINOTWINS_DATA",
    )


def main(argv) -> int:
    del argv
    given = flags.FLAGS

    def work():
        options = {"size": given.size, "data": given.data, "parts": given.parts}
        report = check(Path(given.out), given.minutes, **options)
        print(f"{table.text(report).splitlines()[-1]}; all figures: {given.out}/gpu_check.json")

    return exit_code(work)


if __name__ == "__main__":
    define_flags()
    app.run(main)
