"""Multi-process runs: start of jax.distributed, and output from process 0 only."""

import contextlib
import io
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import jax

MODES = ("auto", "on", "off")


def join(
    mode: str = "auto",
    address: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    environment: Mapping[str, str] = os.environ,
) -> None:
    """Starts jax.distributed if there are several processes; to be called before any other use of jax.

    Missing values are read from JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID, or
    detected by JAX on SLURM, Open MPI, Kubernetes and TPU pods.

    Args:
      mode: "auto" joins when an address or a number is given, or when SLURM, Open MPI or a TPU pod
        started more than one task; "on": always; "off": never.
      address: host:port of process 0; num_processes: total number; process_id: 0 .. num_processes - 1.
    Raises:
      ValueError: unknown mode, an incomplete or contradictory description.
      OSError: the others cannot be reached.
    """
    if mode not in MODES:
        raise ValueError(f"--distributed is '{mode}': choose {', '.join(MODES)}")
    address = address or environment.get("JAX_COORDINATOR_ADDRESS")
    num_processes = _number(num_processes, "JAX_NUM_PROCESSES", environment)
    process_id = _number(process_id, "JAX_PROCESS_ID", environment)
    given = (address, num_processes, process_id) != (None, None, None)
    if mode == "off" or (mode == "auto" and not given and not started_together(environment)):
        return
    if num_processes is not None and process_id is not None:
        if not 0 <= process_id < num_processes:
            raise ValueError(
                f"--process_id is {process_id}: it must lie in [0, --num_processes {num_processes})"
            )
        if address is None and num_processes == 1:
            return
    try:
        jax.distributed.initialize(address, num_processes, process_id)
    except ValueError as error:
        raise ValueError(
            f"{error} Give --coordinator_address=host:port, --num_processes and --process_id (now "
            f"{address}, {num_processes}, {process_id})"
        ) from None
    except jax.errors.JaxRuntimeError as error:
        raise OSError(
            f"process {process_id} could not join the others at {address}: "
            f"{str(error).strip().splitlines()[0]}"
        ) from None


def started_together(environment: Mapping[str, str]) -> bool:
    """Whether a launcher started this process as one of several tasks."""
    tasks = [
        environment.get(name, "1") for name in ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE")
    ]
    hosts = environment.get("TPU_WORKER_HOSTNAMES", "").split(",")
    return any(number.isdigit() and int(number) > 1 for number in tasks) or len(hosts) > 1


def _number(given: int | None, name: str, environment: Mapping[str, str]) -> int | None:
    if given is not None or name not in environment:
        return given
    try:
        return int(environment[name])
    except ValueError:
        raise ValueError(f"{name} is '{environment[name]}': it must be a number") from None


def warn(text: str) -> None:
    """Prints a warning on stderr, in process 0 only."""
    if jax.process_index() == 0:
        print(f"WARNING {text}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def only_first_writes(workdir: Path) -> Iterator[Path]:
    """Yields the folder for this process' log, scores and pictures: `workdir` in process 0; in the
    others, which do the same work on their share of the images, a temporary folder, and their output is
    discarded."""
    if jax.process_index() == 0:
        yield workdir
        return
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        yield Path(folder)
