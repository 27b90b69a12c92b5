"""Trains and evaluates a run: python -m dinotwins_jax.main --config=configs/hybrid.py --workdir=runs/hybrid

A second start of the same command goes on from the last checkpoint.
"""

import os
import sys
import traceback
from pathlib import Path

from absl import flags

from dinotwins_jax.cli import INTERRUPTED, USAGE_ERROR, command, compiled_beside, exit_code
from dinotwins_jax.devices.huge_pages import restart_with_huge_pages
from dinotwins_jax.logs.timing import Phases


def default_workdir(config_file: str) -> Path:
    """runs/hybrid-demo for configs/hybrid.py or configs/hybrid.py:demo."""
    path, _, preset = config_file.partition(":")
    return Path("runs") / f"{Path(path).stem}-{preset or 'demo'}"


def _define(values: flags.FlagValues) -> None:
    options = {"flag_values": values}
    flags.DEFINE_string(
        "workdir",
        None,
        "where the run is kept, a directory or gs://BUCKET/RUN; runs/<config>-<preset> if not given",
        **options,
    )
    flags.DEFINE_enum(
        "resume",
        "auto",
        ["auto", "force"],
        "force: continue in a workdir that holds a run of another config",
        **options,
    )
    flags.DEFINE_boolean(
        "dry_run",
        False,
        "print the recipe and the memory on each device, and do not train; a CPU can print it for any "
        "mesh",
        **options,
    )
    flags.DEFINE_enum(
        "distributed",
        "auto",
        ["auto", "on", "off"],
        "several processes; on: JAX detects the cluster",
        **options,
    )
    flags.DEFINE_string("coordinator_address", None, "host:port of process 0", **options)
    flags.DEFINE_integer("num_processes", None, "processes in all", lower_bound=1, **options)
    flags.DEFINE_integer("process_id", None, "number of this process", lower_bound=0, **options)


def _main(values: flags.FlagValues) -> int:
    work = _dry_run if values.dry_run else _train
    try:
        code = exit_code(
            lambda: work(values), "interrupted: the same command goes on from the last checkpoint"
        )
    except Exception:
        traceback.print_exc()
        code = 1
    return _leave(code)


def _leave(code: int) -> int:
    """Exits at once if one of several processes failed alone: the others wait for it, so it must not
    wait for them."""
    alone = code in (1, USAGE_ERROR, INTERRUPTED) and "jax" in sys.modules
    if alone and sys.modules["jax"].distributed.is_initialized():
        sys.stdout.flush()
        os._exit(code)
    return code


def _train(values: flags.FlagValues) -> None:
    phases = Phases()
    with phases("import"):
        from dinotwins_jax.devices.compilation import remember_compilations
        from dinotwins_jax.devices.processes import join
        from dinotwins_jax.train import train

    join(values.distributed, values.coordinator_address, values.num_processes, values.process_id)
    workdir = values.workdir or default_workdir(values["config"].config_filename)
    remember_compilations(compiled_beside(workdir))
    train(values.config, workdir, resume=values.resume, phases=phases)


def _dry_run(values: flags.FlagValues) -> None:
    import jax

    from dinotwins_jax.build import build
    from dinotwins_jax.data import has_probe_data
    from dinotwins_jax.data.describe import describe_run
    from dinotwins_jax.devices.processes import warn
    from dinotwins_jax.evaluation import what_is_served
    from dinotwins_jax.memory import memory_table, step_memory

    config = values.config
    wanted = max(config.mesh.data, 1) * config.mesh.fsdp
    if wanted > 1 and os.environ.get("JAX_PLATFORMS") == "cpu":
        jax.config.update("jax_num_cpu_devices", wanted)
    run = build(config)
    if run.trained_backbone is not None:
        run.trained_backbone()
    for line in run.advice:
        warn(line)
    apart = has_probe_data(config.data)
    found = describe_run(run.source, run.probe_sources, apart, run.look)
    for line in found + what_is_served(run, config, config.evals.tasks).lines + run.recipe:
        print(line)
    print(memory_table(step_memory(run, config.batch_size), run))


def run(argv=None, program="python -m dinotwins_jax.main") -> int:
    """The command; returns the exit code, errors are one line on stderr."""
    return command(program, __doc__, _define, _main, argv)


if __name__ == "__main__":
    restart_with_huge_pages()
    sys.exit(run())
