"""Non-finite values: detection, the module they come from, and stopping the run."""

import contextlib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from dinotwins_jax.build import Run
from dinotwins_jax.checkpoint import Checkpoints
from dinotwins_jax.files import replacing
from dinotwins_jax.stopping import NonFiniteError
from dinotwins_jax.training.state import TrainState

SKIPPED_LIMIT = 3  # non-finite steps in a row after which the run stops


def check_row(run: Run, workdir: Path, state: TrainState, done, checkpoints: Checkpoints) -> None:
    """Stops a run after SKIPPED_LIMIT non-finite steps in a row; waits for the step checked."""
    step, batch, metrics = done
    if int(metrics["skipped/in_a_row"]) < SKIPPED_LIMIT:
        return
    name = f"nonfinite_step{step}"
    name += f"_process{jax.process_index()}" if jax.process_count() > 1 else ""
    path = workdir / f"{name}.npz"
    saved = f"its batch is in {path}"
    try:
        with replacing(path) as temporary, temporary.open("wb") as file:
            np.savez(file, **batch)
    except OSError as error:  # does not hide why the run stops
        saved = f"its batch is not saved: {error}"
    where = _first_bad_module(run, state.replace(step=jnp.int32(step - 1)), batch)
    raise NonFiniteError(
        f"stopped: the loss or a gradient was not finite in {SKIPPED_LIMIT} steps in a row, the last "
        f"one step {step}, which changed nothing; first not finite: {where}; {saved}; "
        f"{_kept(checkpoints)} in {workdir}; to try: a lower optim.lr or a longer optim.warmup_epochs, "
        "from there by --resume=force or in another workdir"
    )


def _first_bad_module(run: Run, state: TrainState, batch) -> str:
    if run.placement.axis_name is None:
        batch = run.placement.put_batch(batch)
    try:
        return run.diagnose(state, batch) or "nothing, when run again"
    except Exception as error:  # the undivided batch may not fit in memory
        return f"unknown ({str(error).strip().splitlines()[0][:200]})"


@jax.jit
def _all_finite(tree) -> jax.Array:
    leaves = [x for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.inexact)]
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(x)) for x in leaves]))


def check_finite(state: TrainState, step: int, workdir: Path, checkpoints: Checkpoints) -> None:
    """Stops the run if the state is not finite: an update can overflow with finite gradients."""
    if not _all_finite(state):
        raise NonFiniteError(
            f"stopped: the state is not finite after step {step}; {_kept(checkpoints)} in {workdir}; to "
            "try, in another workdir: a lower optim.lr"
        )


def _kept(checkpoints: Checkpoints) -> str:
    step = checkpoints.latest()
    return (
        "no checkpoint has been saved yet"
        if step is None
        else f"the checkpoint of step {step} is kept"
    )


@contextlib.contextmanager
def debugging_nans(on: bool):
    """With debug_nans, raises an error at the operation that produced the first NaN."""
    if not on:
        yield
        return
    try:
        with jax.debug_nans(True):
            yield
    except FloatingPointError as error:
        raise NonFiniteError(f"debug_nans: {str(error).strip().splitlines()[0]}") from error
