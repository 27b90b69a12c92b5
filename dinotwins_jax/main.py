"""Entry point: python -m dinotwins_jax.main --config=configs/hybrid.py --workdir=runs/hybrid"""

import os
import sys
import traceback
from pathlib import Path

from absl import app, flags, logging

from dinotwins_jax.cli import (
    COMPILED,
    CONFIG,
    INTERRUPTED,
    USAGE_ERROR,
    exit_code,
    fail,
    parse_flags,
)
from dinotwins_jax.huge_pages import restart_with_huge_pages
from dinotwins_jax.timing import Phases

_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Where everything goes; default runs/<config>-<preset>"
)
_RESUME = flags.DEFINE_enum(
    "resume", "auto", ["auto", "force"], "force: go on in a workdir whose config was another one"
)
_DRY_RUN = flags.DEFINE_boolean(
    "dry_run",
    False,
    "Print recipe and memory on each device instead of training; on a CPU for any mesh",
)
_DISTRIBUTED = flags.DEFINE_enum(
    "distributed", "auto", ["auto", "on", "off"], "Several processes; on: JAX finds out which"
)
_ADDRESS = flags.DEFINE_string("coordinator_address", None, "host:port of process 0")
_NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "How many", lower_bound=1)
_PROCESS_ID = flags.DEFINE_integer("process_id", None, "Which one this is", lower_bound=0)


def main(argv) -> int:
    """Trains the run that the flags describe; returns the exit code, errors are one line on stderr."""
    if len(argv) > 1:
        return fail(f"unknown argument '{argv[1]}': options start with --")
    logging.set_verbosity(logging.WARNING)
    try:
        code = exit_code(_dry_run if _DRY_RUN.value else _train)
    except KeyboardInterrupt:
        code = fail("interrupted: the same command goes on from the last checkpoint", INTERRUPTED)
    except Exception:
        traceback.print_exc()
        code = 1
    return _leave(code)


def _leave(code: int) -> int:
    """Of several processes, one with an error of its own must not wait for the others: they wait for it."""
    alone = code in (1, USAGE_ERROR, INTERRUPTED) and "jax" in sys.modules
    if alone and sys.modules["jax"].distributed.is_initialized():
        sys.stdout.flush()
        os._exit(code)
    return code


def _train() -> None:
    phases = Phases()
    with phases("import"):
        from dinotwins_jax.compilation import remember_compilations
        from dinotwins_jax.processes import join
        from dinotwins_jax.train import train

    join(_DISTRIBUTED.value, _ADDRESS.value, _NUM_PROCESSES.value, _PROCESS_ID.value)
    workdir = Path(_WORKDIR.value or default_workdir(flags.FLAGS["config"].config_filename))
    remember_compilations(workdir.parent / COMPILED)
    train(CONFIG.value, workdir, resume=_RESUME.value, phases=phases)


def _dry_run() -> None:
    import jax

    from dinotwins_jax.build import build
    from dinotwins_jax.memory import memory_table, step_memory
    from dinotwins_jax.processes import say

    config = CONFIG.value
    wanted = max(config.mesh.data, 1) * config.mesh.fsdp
    if wanted > 1 and os.environ.get("JAX_PLATFORMS") == "cpu":
        jax.config.update("jax_num_cpu_devices", wanted)
    run = build(config)
    if run.trained_backbone is not None:
        run.trained_backbone()
    for line in run.advice:
        say(line)
    for line in run.recipe:
        print(line)
    print(memory_table(step_memory(run, config.batch_size), run))


def default_workdir(config_file: str) -> Path:
    """runs/hybrid-demo for configs/hybrid.py or configs/hybrid.py:demo."""
    path, _, preset = config_file.partition(":")
    return Path("runs") / f"{Path(path).stem}-{preset or 'demo'}"


def run() -> None:
    """Console entry."""
    app.run(main, flags_parser=parse_flags)


if __name__ == "__main__":
    restart_with_huge_pages()
    run()
