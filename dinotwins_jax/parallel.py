"""Where arrays live: one program over all devices, by jit on a mesh or by pmap.

Both give a global batch's numbers: jit because arrays are global and the partitioner adds the
collectives, pmap because losses and batch norms reduce over the axis that they are told.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

AXIS = "data"


class Placement(NamedTuple):
    """axis_name: what make_train_step needs to know; None under jit.
    compile: train_step -> the same function over all devices; under jit it consumes its state.
    put_state: pytree -> replicated on all devices.
    put_batch: numpy batch of this process -> split over devices.
    """

    axis_name: str | None
    compile: Callable[[Callable], Callable]
    put_state: Callable[[Any], Any]
    put_batch: Callable[[Any], Any]


def make_placement(
    mode: str, batch_size: int, devices: list[jax.Device] | None = None
) -> Placement:
    """The placement that config.parallel names.

    Args:
      mode: "jit" | "pmap".
      batch_size: global; every device gets an equal part.
      devices: all devices by default.
    Raises:
      ValueError: unknown mode, a batch that does not divide, pmap over several processes.
    """
    if mode not in ("jit", "pmap"):
        raise ValueError(f"config.parallel is '{mode}': choose jit or pmap")
    devices = jax.devices() if devices is None else devices
    if batch_size % len(devices):
        raise ValueError(
            f"config.batch_size {batch_size} does not divide by {len(devices)} devices"
        )
    if mode == "jit":
        return _jit_placement(devices)
    if jax.process_count() > 1:
        raise ValueError("config.parallel=pmap maps over the devices of one process: use jit")
    return _pmap_placement(devices)


def _jit_placement(devices) -> Placement:
    # Auto axes: with the explicit ones that make_mesh gives by default, z.T @ z over a sharded
    # batch is an error instead of a collective.
    mesh = jax.make_mesh((len(devices),), (AXIS,), axis_types=(AxisType.Auto,), devices=devices)
    replicated, split = (
        NamedSharding(mesh, PartitionSpec()),
        NamedSharding(mesh, PartitionSpec(AXIS)),
    )

    def compile(train_step):
        return jax.jit(
            train_step, in_shardings=(replicated, split), out_shardings=replicated, donate_argnums=0
        )

    def put_batch(batch):
        return jax.tree.map(
            lambda x: jax.make_array_from_process_local_data(split, np.asarray(x)), batch
        )

    return Placement(None, compile, lambda state: jax.device_put(state, replicated), put_batch)


def _pmap_placement(devices) -> Placement:
    def compile(train_step):
        # The state goes in and comes out unmapped: every device has it, and checkpoints and
        # evaluation see the same arrays as under jit.
        return jax.pmap(
            train_step, axis_name=AXIS, in_axes=(None, 0), out_axes=None, devices=devices
        )

    def put_batch(batch):
        n = len(devices)
        return jax.tree.map(lambda x: np.asarray(x).reshape(n, len(x) // n, *x.shape[1:]), batch)

    return Placement(AXIS, compile, lambda state: state, put_batch)
