"""Speed of a training step, from crops to the updated state, compared with PyTorch in the same run.

    python -m experiments.benchmark.train_step --methods=dino,hybrid --batch_size=4
    python -m experiments.benchmark.train_step --against=torch --json=step.json
    python -m experiments.benchmark.train_step --methods=hybrid --models=vit_small,vit_base \\
        --batch_size=64 --dtype=bfloat16 --attention=cudnn --against=torch --cache=/tmp/compiled   # a GPU

Every contestant is a separate process; their rounds alternate, and tables show the median. The first step
of a round is not counted: memory freed by a process may have gone to others while it waited, which does
not happen between the steps of a training. Ours uses huge pages, as main.py does; PyTorch has its own
defaults (with huge pages its step took longer, not shorter). Utilisation is the step's FLOPs by formula
(flops.py) over its time, as a share of the rate of a large square matrix product of the same dtype in the
same run. Memory is the device's peak; on a CPU the largest resident size of the process while it trains,
framework included.
"""

import json
import platform
import statistics
from contextlib import ExitStack
from datetime import date
from pathlib import Path

from absl import app, flags, logging

from dinotwins_jax.cli import exit_code
from dinotwins_jax.devices import huge_pages
from dinotwins_jax.evals.table import markdown
from dinotwins_jax.files import replace_text
from experiments.benchmark.flops import step_flops
from experiments.benchmark.settings import Settings, architecture, config_of, settings_of
from experiments.benchmark.worker import Contestant

OURS = "dinotwins_jax"


def measure(
    settings: Settings,
    *,
    against: tuple[str, ...] = (),
    rounds: int = 5,
    seconds: float = 1.0,
    python: str | None = None,
    cache: str | None = None,
) -> dict:
    """Measures all figures of one setting.

    Args:
      against: of "torch" and "torch.compile".
      rounds: of all contestants in turn; seconds: of each contestant in a round, at least one step.
      python: interpreter with PyTorch, if it is not installed beside JAX.
      cache: folder of compiled programs for JAX and PyTorch; None: compile everything.
    Returns:
      {"settings", "flops", "ceiling": FLOP/s, "contestants": {name: {"ms": {"median", "min", "max"},
      "images_per_s", "compile_s", "peak_bytes", "utilisation", …}}, "ratio": {name: images/s of ours over
      its}}.
    """
    config_of(settings)  # raises for invalid settings
    with ExitStack() as stack:
        runners = {OURS: stack.enter_context(_ours(settings, cache))}
        for name in against:
            runners[name] = stack.enter_context(_torch(settings, name, python, cache))
        counts = {name: _count(runner, seconds) for name, runner in runners.items()}
        times: dict[str, list[float]] = {name: [] for name in runners}
        ceilings = []
        for number in range(rounds):
            order = list(runners) if number % 2 == 0 else list(runners)[::-1]
            for name in order:
                runners[name].ask("steps", count=1)
                taken = runners[name].ask("steps", count=counts[name])["seconds"]
                times[name].append(taken / counts[name])
            ceilings.append(runners[OURS].ask("ceiling")["flop_per_s"])
        for runner in runners.values():
            runner.facts |= runner.ask("peak")
        facts = {name: runner.facts for name, runner in runners.items()}
    flops, ceiling = step_flops(settings), max(ceilings)
    found = {
        name: _row(times[name], flops, ceiling, settings.batch_size) | facts[name] for name in facts
    }
    ours = found[OURS]["images_per_s"]
    ratio = {name: ours / found[name]["images_per_s"] for name in against}
    return {
        "settings": settings._asdict(),
        "flops": flops,
        "ceiling": ceiling,
        "contestants": found,
        "ratio": ratio,
    }


def _ours(settings: Settings, cache: str | None) -> Contestant:
    # A GPU's memory is shared with the other contestants, and its peak counts.
    environment = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"} | huge_pages.environment()
    if cache:
        environment |= {
            "JAX_COMPILATION_CACHE_DIR": str(Path(cache) / "jax"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }
    return Contestant("experiments.benchmark.jax_step", settings._asdict(), **environment)


def _torch(settings: Settings, name: str, python: str | None, cache: str | None) -> Contestant:
    values = settings._asdict() | architecture(settings) | {"compile": name == "torch.compile"}
    if settings.way != "plain":
        raise ValueError(f"--against needs --way=plain, not '{settings.way}'")
    arguments = {} if python is None else {"python": python}
    if cache:
        arguments["TORCHINDUCTOR_CACHE_DIR"] = str(Path(cache) / "torch")
    return Contestant("experiments.benchmark.torch_step", values, **arguments)


def _count(runner: Contestant, seconds: float) -> int:
    """Number of steps that take about `seconds`, from the first step after the warm-up."""
    return max(1, round(seconds / runner.ask("steps", count=1)["seconds"]))


def _row(times: list[float], flops: float, ceiling: float, images: int) -> dict:
    ms = [1000 * t for t in times]
    median = statistics.median(ms)
    return {
        "ms": {"median": median, "min": min(ms), "max": max(ms)},
        "images_per_s": 1000 * images / median,
        "tflop_per_s": flops / median / 1e9,
        "utilisation": flops / median * 1000 / ceiling,
    }


def table(figures: dict) -> str:
    """Formats the figures of one setting as text."""
    head = ["", "images/s", "ms/step (min, max)", "compile s", "peak GiB", "TFLOP/s", "utilisation"]
    rows = [[*head, "ours is faster by"]]
    for name, row in figures["contestants"].items():
        ms, ratio = row["ms"], figures["ratio"].get(name)
        rows.append(
            [
                f"{name} ({row['version']})",
                f"{row['images_per_s']:.2f}",
                f"{ms['median']:.1f} ({ms['min']:.1f}, {ms['max']:.1f})",
                f"{row['compile_s']:.1f}" if "compile_s" in row else "",  # eager PyTorch
                f"{row['peak_bytes'] / 2**30:.2f}",
                f"{row['tflop_per_s']:.2f}",
                f"{row['utilisation']:.0%}",
                "" if ratio is None else f"{ratio:.2f}x",
            ]
        )
    ours = figures["contestants"][OURS]
    xla = f", {ours['xla_flops'] / 1e9:,.1f} by XLA" if ours["xla_flops"] else ""
    return (
        f"{Settings(**figures['settings']).text()}, {ours['devices']} x {ours['device']}\n"
        f"{figures['flops'] / 1e9:,.1f} GFLOP a step by formula{xla}; a matrix product reaches "
        f"{figures['ceiling'] / 1e12:.2f} TFLOP/s\n\n{markdown(rows)}\n"
    )


def environment() -> dict[str, str]:
    """Versions, machine and date of the measurement."""
    cpu = Path("/proc/cpuinfo")
    names = [x for x in cpu.read_text().splitlines() if "model name" in x] if cpu.exists() else []
    name = names[0].partition(": ")[2] if names else platform.processor()
    return {
        "date": f"{date.today()}",
        "cpu": f"{len(names)} x {name}",
        "python": platform.python_version(),
    }


def define_flags() -> None:
    """Defines the command's flags; other commands have flags of the same names."""
    given = Settings()
    flags.DEFINE_list("methods", ["dino", "hybrid"], "From dino, barlow_twins, hybrid")
    flags.DEFINE_list("models", [given.model], "Names of models.create_vit")
    for name in ("patch_size", "global_size", "local_size", "num_local", "batch_size"):
        flags.DEFINE_integer(name, getattr(given, name), f"As {name} of the config")
    flags.DEFINE_integer("depth", given.depth, "Blocks, instead of the model's", 1)
    flags.DEFINE_integer("prototypes", given.prototypes, "K of DINO")
    flags.DEFINE_integer("projector", given.projector, "D of Barlow Twins")
    flags.DEFINE_string("dtype", given.dtype, "Compute dtype: float32 | bfloat16")
    flags.DEFINE_float("drop_path", given.drop_path, "Rate of the last block")
    flags.DEFINE_string("attention", given.attention, "xla | cudnn: bfloat16 on a GPU")
    flags.DEFINE_string("way", given.way, "plain, remat, micro4, data2, fsdp2, or several with +")
    flags.DEFINE_enum("against", "", ["", "torch"], "Also measure PyTorch, eager and compiled")
    flags.DEFINE_list("torch", ["torch", "torch.compile"], "PyTorch variants to measure")
    flags.DEFINE_string("torch_python", None, "Interpreter that has PyTorch; default: this one")
    flags.DEFINE_integer("rounds", 5, "Rounds of all contestants in turn", lower_bound=1)
    flags.DEFINE_float("seconds", 1.0, "Seconds of each contestant in a round; at least one step")
    flags.DEFINE_string("cache", None, "Folder for compiled programs; default: compile everything")
    flags.DEFINE_string("json", None, "File for all figures, written after each setting")


def main(argv) -> int:
    del argv
    logging.set_verbosity(logging.WARNING)
    given = flags.FLAGS
    names = [name for name in Settings._fields if name not in ("method", "model")]

    def work():
        if unknown := set(given.torch) - {"torch", "torch.compile"}:
            raise ValueError(
                f"--torch has {', '.join(unknown)}: choose torch, torch.compile or both"
            )
        figures = {"environment": environment(), "settings": []}
        for model in given.models:
            for method in given.methods:
                found = measure(
                    settings_of(method, model, **{name: given[name].value for name in names}),
                    against=tuple(given.torch) if given.against else (),
                    rounds=given.rounds,
                    seconds=given.seconds,
                    python=given.torch_python,
                    cache=given.cache,
                )
                figures["settings"].append(found)
                print(table(found), flush=True)
                if given.json:
                    replace_text(Path(given.json), json.dumps(figures, indent=1) + "\n")
        print(", ".join(figures["environment"].values()))

    return exit_code(work)


if __name__ == "__main__":
    define_flags()
    app.run(main)
