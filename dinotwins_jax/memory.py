"""What a run would need: bytes of every part of its state on a device, and of its compiled step."""

import math

import jax
import jax.numpy as jnp

from dinotwins_jax.build import Run
from dinotwins_jax.evals.table import markdown


def step_memory(run: Run, batch_size: int) -> dict[str, int]:
    """Bytes on one device, without making any array.

    Returns:
      a part of the state -> bytes; "batch"; "temporaries" of the compiled step, which hold activations
      and gradients; "peak", all together (the new state takes the place of the old one). From XLA's
      own analysis of the step for the devices that this process sees: for others it differs.
    """
    state = run.placement.abstract(jax.eval_shape(run.fresh_state))
    batch = abstract_batch(run, batch_size)
    analysis = compiled_step(run, state, batch).memory_analysis()
    parts = {
        name: sum(map(_bytes_here, jax.tree.leaves(getattr(state, name))))
        for name in (
            "params",
            "teacher_params",
            "anchor_params",
            "opt_state",
            "loss_state",
            "batch_stats",
        )
    }
    temporaries = analysis.temp_size_in_bytes
    kept = analysis.argument_size_in_bytes + analysis.output_size_in_bytes
    return parts | {
        "batch": sum(x.size * x.dtype.itemsize for x in batch.values())
        // run.placement.num_devices,
        "temporaries": temporaries,
        "peak": kept - analysis.alias_size_in_bytes + temporaries,
    }


def compiled_step(run: Run, state, batch) -> jax.stages.Compiled:
    """The step of a run for a state and a batch, arrays or their shapes, for XLA's analyses of it."""
    return run.placement.compile(run.train_step, state).lower(state, batch).compile()


def abstract_batch(run: Run, batch_size: int) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes of the batch that the compiled step takes."""
    shapes = {
        "image": ((batch_size, run.canvas_size, run.canvas_size, 3), jnp.uint8),
        "size": ((batch_size, 2), jnp.int32),
        "place": ((batch_size, 2), jnp.int32),
    }
    return run.placement.abstract_batch(
        {name: jax.ShapeDtypeStruct(*of) for name, of in shapes.items()}
    )


def _bytes_here(leaf) -> int:
    return math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize


def memory_table(found: dict[str, int], run: Run) -> str:
    """The figures as text."""
    rows = [["on each device", "MiB"]]
    rows += [[name, f"{size / 2**20:,.1f}"] for name, size in found.items()]
    devices = f"{run.placement.num_devices} x {jax.devices()[0].device_kind}"
    return f"{markdown(rows)}\n{devices}, by XLA's memory analysis of the compiled step"
