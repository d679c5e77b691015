"""Work over the devices of a mesh, of one process or of several that run the same program.

Images are drawn by every device for itself: it has all parameters and its own part of the batch,
and runs the program of a device alone, low-bit kernels included. Nothing is exchanged until the
images are there.
"""

import math
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

Number = TypeVar("Number", bool, int)

DATA = "data"
"""Axis of the meshes that are made here."""


def start(
    *, coordinator: str | None = None, processes: int | None = None, process: int | None = None
) -> None:
    """Join the processes of a job; before anything else is computed.

    Args:
      coordinator: `host:port` of the first process; None: found out, as on TPU pods.
      processes: How many there are; None likewise.
      process: Which one this is, from 0; None likewise.

    Raises:
      ValueError: If one of the three is given and another is not.
    """
    given = (coordinator, processes, process)
    if any(one is not None for one in given) and any(one is None for one in given):
        raise ValueError(
            "mesh.coordinator, mesh.processes and mesh.process go together; got "
            f"{coordinator}, {processes} and {process}. On TPU pods leave all three out."
        )
    jax.distributed.initialize(coordinator, processes, process)


def data_mesh(data: int | None = None) -> Mesh:
    """The mesh of all devices of all processes, along one axis `data`.

    Args:
      data: How many devices there are; None for as many as there are.

    Raises:
      ValueError: If there are not so many.
    """
    count = jax.device_count()
    if data not in (None, count):
        raise ValueError(
            f"mesh.data must be the number of devices, {count}; got {data}. Which devices a "
            "process sees is set outside, by CUDA_VISIBLE_DEVICES for example."
        )
    return jax.make_mesh((count,), (DATA,), axis_types=(AxisType.Auto,))


def check_mesh(mesh: Any) -> None:
    """That work can be spread over `mesh`.

    Raises:
      TypeError: If it is no mesh of devices.
      ValueError: If it leaves out some of the processes, and is not this one's alone.
    """
    if not isinstance(mesh, Mesh):
        raise TypeError(
            f"mesh must be a jax.sharding.Mesh; got {type(mesh).__name__}. Use "
            "jax.make_mesh((jax.device_count(),), ('data',))."
        )
    found = sorted({device.process_index for device in mesh.devices.flat})
    if found not in ([jax.process_index()], list(range(jax.process_count()))):
        raise ValueError(
            f"mesh must have devices of all {jax.process_count()} processes, or of this one alone; "
            f"got those of {found} in process {jax.process_index()}. Use jax.devices() or "
            "jax.local_devices()."
        )


def processes_of(mesh: Mesh) -> int:
    """How many processes have devices in `mesh`."""
    return len({device.process_index for device in mesh.devices.flat})


def put(tree: Any, sharding: NamedSharding) -> Any:
    """Arrays that every process has whole, on the devices; what lies there already stays.

    Args:
      tree: Equal in all processes; keys may be among its arrays.
      sharding: Where they lie.
    """
    mesh: Any = sharding.mesh  # never an abstract one here
    if processes_of(mesh) == 1:
        return jax.device_put(tree, sharding)

    def one(leaf: Any) -> jax.Array:
        if isinstance(leaf, jax.Array):
            if leaf.sharding.is_equivalent_to(sharding, leaf.ndim):
                return leaf
            if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
                data = one(jax.random.key_data(leaf))
                return jax.random.wrap_key_data(data, impl=jax.random.key_impl(leaf))
        host = np.asarray(leaf)
        return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])

    return jax.tree.map(one, tree)


def get(tree: Any, mesh: Mesh) -> Any:
    """Arrays of the devices as every process's own, whole."""
    if processes_of(mesh) == 1:
        return jax.tree.map(np.asarray, jax.device_get(tree))
    whole = _everywhere(tree, NamedSharding(mesh, PartitionSpec()))
    return jax.tree.map(lambda a: np.asarray(a.addressable_data(0)), whole)


def agree(value: Number, mesh: Mesh | None) -> Number:
    """What the first process says, in all of them."""
    if mesh is None or processes_of(mesh) == 1:
        return value
    return type(value)(multihost_utils.broadcast_one_to_all(np.int32(value)))


def writes(mesh: Mesh | None) -> bool:
    """Whether this process writes the files of work that is spread over `mesh`."""
    return mesh is None or processes_of(mesh) == 1 or jax.process_index() == 0


def wait(name: str, mesh: Mesh | None) -> None:
    """Until all processes have come here."""
    if mesh is not None and processes_of(mesh) > 1:
        multihost_utils.sync_global_devices(name)


def _everywhere(tree: Any, sharding: NamedSharding) -> Any:
    return jax.jit(lambda tree: tree, out_shardings=sharding)(tree)


def batch_of(count: int, batch_size: int, mesh: Mesh | None) -> int:
    """How many images one run draws: as many on every device, `batch_size` at most."""
    devices = 1 if mesh is None else mesh.size
    return devices * min(batch_size, math.ceil(count / devices))


def put_whole(tree: Any, mesh: Mesh | None) -> Any:
    """Arrays on every device of a mesh; as they are without one."""
    return tree if mesh is None else put(tree, NamedSharding(mesh, PartitionSpec()))


def put_split(tree: Any, mesh: Mesh | None) -> Any:
    """Arrays with the batch first, cut over all axes of a mesh; as they are without one."""
    return tree if mesh is None else put(tree, NamedSharding(mesh, along_batch(mesh)))


def along_batch(mesh: Mesh, axis: int = 0) -> PartitionSpec:
    """How arrays lie whose batch is cut over all axes of `mesh`.

    Args:
      mesh: Of devices.
      axis: Where the batch is.
    """
    return PartitionSpec(*[None] * axis, mesh.axis_names)


def on_each_device(
    mesh: Mesh | None,
    function: Callable[[Any, Any], Any],
    whole: Any,
    split: Any,
    *,
    axes: Any = 0,
) -> Any:
    """`function(whole, split)`, on every device for its part of the batch; within a `jax.jit`.

    Args:
      mesh: None is one device: the function is called as it is.
      function: Its results have the batch at `axes`.
      whole: Tree of arrays that every device has.
      split: Tree of arrays with the batch first, a multiple of the number of devices.
      axes: Where results have their batch; one number, or a tree as the results begin.
    """
    if mesh is None:
        return function(whole, split)
    return jax.shard_map(
        function,
        mesh=mesh,
        in_specs=(PartitionSpec(), along_batch(mesh)),
        out_specs=jax.tree.map(lambda axis: along_batch(mesh, axis), axes),
        check_vma=False,  # Pallas kernels do not say over what their results vary
    )(whole, split)
