"""Placement of arrays: one program over all devices, with jit on a mesh or with pmap.

Both compute the results of the global batch: under jit arrays are global and the partitioner inserts the
collectives; under pmap losses and batch norms reduce over the named axis.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from dinotwins_jax.devices.compilation import compiler_options
from dinotwins_jax.devices.platforms import platform_of
from dinotwins_jax.devices.sharding import DATA, FSDP, shardings_of


class Placement(NamedTuple):
    """Functions that place and compile a run.

    axis_name: for make_train_step; None under jit.
    gather: for make_train_step, gathers sharded parameters; None when they are not sharded.
    num_devices: number of devices that share a batch.
    platform: that of the devices, see platform_of.
    abstract: shapes of a state -> the same with the shardings of the placed state.
    init: (() -> state) -> placed state.
    compile: (train_step, shapes of its state) -> the same function over all devices; under jit it
      donates its state, unless keep_state.
    put_batch: numpy batch of this process -> sharded over devices; abstract_batch: the same for shapes
      of the global batch.
    whole: pytree of placed arrays -> replicated over this process' devices, for evaluation.
    put_images: numpy array [B, …] of this process only -> sharded over its devices, if they divide B.
    """

    axis_name: str | None
    gather: Callable[[Any], Any] | None
    num_devices: int
    platform: str
    abstract: Callable[[Any], Any]
    init: Callable[[Callable[[], Any]], Any]
    compile: Callable[..., Callable]
    put_batch: Callable[[Any], Any]
    abstract_batch: Callable[[Any], Any]
    whole: Callable[[Any], Any]
    put_images: Callable[[np.ndarray], jax.Array]


def make_placement(
    mode: str,
    batch_size: int,
    devices: list[jax.Device] | None = None,
    *,
    data: int = 0,
    fsdp: int = 1,
    micro_batches: int = 1,
) -> Placement:
    """Builds the placement of config.parallel and config.mesh.

    Args:
      mode: "jit" | "pmap".
      batch_size: global; every device gets an equal part.
      devices: all devices by default.
      data: number of copies of the state; 0: as many as the devices allow.
      fsdp: devices that share one copy of the state; 1: every device has a whole copy.
      micro_batches: parts into which every device splits its part of the batch.
    Raises:
      ValueError: unknown mode, a mesh that does not fit the devices, a batch that does not divide,
        pmap over several processes or with a split state.
    """
    if mode not in ("jit", "pmap"):
        raise ValueError(f"config.parallel is '{mode}': choose jit or pmap")
    devices = _chosen(jax.devices() if devices is None else devices, data, fsdp)
    if micro_batches < 1:
        raise ValueError(f"config.micro_batches is {micro_batches}: it must be positive")
    if batch_size < 1 or batch_size % (len(devices) * micro_batches):
        among = f"{len(devices)} devices (config.mesh, data x fsdp)"
        if micro_batches > 1:
            among += f" times config.micro_batches {micro_batches}"
        raise ValueError(f"config.batch_size {batch_size} does not divide by {among}")
    if mode == "jit":
        return _jit_placement(devices, fsdp)
    if jax.process_count() > 1:
        raise ValueError("config.parallel=pmap maps over the devices of one process: use jit")
    if fsdp > 1:
        raise ValueError(
            f"config.mesh.fsdp is {fsdp}: config.parallel=pmap keeps whole states, use jit"
        )
    return _pmap_placement(devices)


def _chosen(devices: list[jax.Device], data: int, fsdp: int) -> list[jax.Device]:
    """Selects the devices of the mesh: the first ones if it is smaller than the machine."""
    if fsdp < 1 or data < 0:
        raise ValueError(
            f"config.mesh is data={data}, fsdp={fsdp}: fsdp must be positive, and data positive or 0 "
            "(all devices)"
        )
    if data == 0:
        if len(devices) % fsdp:
            raise ValueError(f"config.mesh.fsdp {fsdp} does not divide {len(devices)} devices")
        return devices
    if data * fsdp > len(devices):
        raise ValueError(
            f"config.mesh data={data} x fsdp={fsdp} needs {data * fsdp} devices: there are "
            f"{len(devices)}"
        )
    if data * fsdp < len(devices) and jax.process_count() > 1:
        raise ValueError(
            f"config.mesh data={data} x fsdp={fsdp} leaves devices unused: {jax.process_count()} processes "
            f"have {len(devices)}, and all must take part"
        )
    return devices[: data * fsdp]


def _jit_placement(devices, fsdp: int) -> Placement:
    mesh = _mesh(devices, (len(devices) // fsdp, fsdp), (DATA, FSDP))
    replicated = NamedSharding(mesh, PartitionSpec())
    split = NamedSharding(mesh, PartitionSpec((DATA, FSDP)))
    here = [d for d in mesh.devices.flat if d.process_index == jax.process_index()]

    def init(fresh_state):
        if fsdp == 1:
            return jax.device_put(fresh_state(), replicated)
        shardings = shardings_of(mesh, jax.eval_shape(fresh_state))  # never whole on one device
        return jax.jit(fresh_state, out_shardings=shardings)()

    def compile(train_step, state, keep_state=False):
        shardings = shardings_of(mesh, state)

        def over_mesh(*args):  # for losses, which split matrices over it
            with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
                return train_step(*args)

        return jax.jit(
            over_mesh,
            in_shardings=(shardings, split),
            out_shardings=(shardings, replicated),
            donate_argnums=() if keep_state else 0,
            compiler_options=compiler_options(devices),
        )

    def gather(tree):
        return jax.lax.with_sharding_constraint(tree, replicated)

    replicate = jax.jit(lambda tree: tree, out_shardings=replicated)

    def whole(tree):
        tree = replicate(tree)
        return jax.device_put(
            jax.tree.map(lambda x: x.addressable_data(0), tree), _over(here, PartitionSpec())
        )

    return Placement(
        axis_name=None,
        gather=gather if fsdp > 1 else None,
        num_devices=len(devices),
        platform=platform_of(devices),
        abstract=lambda state: _shapes(state, shardings_of(mesh, state)),
        init=init,
        compile=compile,
        put_batch=partial(
            jax.tree.map, lambda x: jax.make_array_from_process_local_data(split, np.asarray(x))
        ),
        abstract_batch=lambda batch: _shapes(batch, jax.tree.map(lambda _: split, batch)),
        whole=whole,
        put_images=partial(_put_images, here),
    )


def _pmap_placement(devices) -> Placement:
    n, first = len(devices), SingleDeviceSharding(devices[0])

    def compile(train_step, state, keep_state=False):
        del state, keep_state
        # The state is unmapped: every device holds it, and checkpoints and evaluation see the same
        # arrays as under jit.
        return jax.pmap(
            train_step, axis_name=DATA, in_axes=(None, 0), out_axes=None, devices=devices
        )

    def abstract_batch(batch):
        def mapped(x):
            return jax.ShapeDtypeStruct((n, x.shape[0] // n, *x.shape[1:]), x.dtype)

        return jax.tree.map(mapped, batch)

    return Placement(
        axis_name=DATA,
        gather=None,
        num_devices=n,
        platform=platform_of(devices),
        abstract=lambda state: _shapes(state, jax.tree.map(lambda _: first, state)),
        init=lambda fresh_state: fresh_state(),
        compile=compile,
        put_batch=partial(
            jax.tree.map, lambda x: np.asarray(x).reshape(n, len(x) // n, *x.shape[1:])
        ),
        abstract_batch=abstract_batch,
        whole=lambda tree: jax.device_put(jax.device_get(tree), _over(devices, PartitionSpec())),
        put_images=partial(_put_images, devices),
    )


def _shapes(tree, shardings):
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        tree,
        shardings,
    )


def _put_images(devices, array: np.ndarray) -> jax.Array:
    spec = PartitionSpec() if len(array) % len(devices) else PartitionSpec(DATA)
    return jax.device_put(array, _over(devices, spec))


def _over(devices, spec: PartitionSpec) -> NamedSharding:
    return NamedSharding(_mesh(devices, (len(devices),), (DATA,)), spec)


def _mesh(devices, shape, names) -> Mesh:
    # Auto axes: with explicit axes, the default of make_mesh, z.T @ z over a sharded
    # batch is an error instead of a collective.
    types = (AxisType.Auto,) * len(names)
    # An axis of ours may be part of one of the TPU slice's; make_mesh allows that on v5e alone.
    placed = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    return Mesh(placed, names, axis_types=types)
