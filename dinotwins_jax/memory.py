"""Memory use of a run: bytes per device for each part of its state and its compiled step."""

import math

import jax
import jax.numpy as jnp

from dinotwins_jax.build import Run
from dinotwins_jax.evals.table import markdown


def step_memory(run: Run, batch_size: int) -> dict[str, int]:
    """Memory in bytes on one device, computed without allocating arrays.

    Returns:
      part -> bytes: the parts of the state; "batch"; "temporaries" of the compiled step (activations and
      gradients); "peak", their sum (the new state replaces the old one in place). From XLA's memory
      analysis of the step for the devices of this process; other devices give other figures.
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
    """Compiles the step for a state and a batch, arrays or shapes, for XLA's analyses."""
    return run.placement.compile(run.train_step, state).lower(state, batch).compile()


def abstract_batch(run: Run, batch_size: int) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes of the batch that the compiled step takes."""
    image = (batch_size, run.canvas_size, run.canvas_size, run.backbone.in_channels)
    shapes = {
        "image": (image, jnp.uint8),
        "size": ((batch_size, 2), jnp.int32),
        "place": ((batch_size, 2), jnp.int32),
    }
    return run.placement.abstract_batch(
        {name: jax.ShapeDtypeStruct(*of) for name, of in shapes.items()}
    )


def _bytes_here(leaf) -> int:
    return math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize


def memory_table(found: dict[str, int], run: Run) -> str:
    """Formats the figures of `step_memory` as a table."""
    rows = [["on each device", "MiB"]]
    rows += [[name, f"{size / 2**20:,.1f}"] for name, size in found.items()]
    devices = f"{run.placement.num_devices} x {jax.devices()[0].device_kind}"
    return f"{markdown(rows)}\n{devices}, by XLA's memory analysis of the compiled step"
