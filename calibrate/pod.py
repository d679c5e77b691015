"""The devices and processes of a calibration: a mesh of blocks and data.

A pod has one process for every host, all running the same program. Its devices form a mesh of two
axes: blocks of equal structure are fitted at once along `block`, and the items they are fitted
on lie along `data`. Every process computes what is not sharded for itself, to the same bits, and
the first alone writes files, which the others read: the output folder must be one that all
hosts see.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from qjax.models import mesh as meshes
from qjax.models.mesh import start as start

BLOCK, DATA = "block", "data"
"""Axes of the mesh."""

Weights = Literal["whole", "sharded"]
"""What a device has of the networks."""

SHARDS = 8
"""Logical shards of the data unless a stage says otherwise."""


@dataclasses.dataclass(frozen=True)
class Pod:
    """A mesh, and what processes tell each other.

    Attributes:
      mesh: Devices along the axes `block` and `data`.
      weights: Whether every device has the networks whole, or a part of them (`spread.py`).
    """

    mesh: Mesh
    weights: Weights = "whole"

    @classmethod
    def of(
        cls,
        *,
        data: int | None = None,
        block: int = 1,
        devices: Sequence[jax.Device] | None = None,
        weights: Weights = "whole",
    ) -> "Pod":
        """The pod of some devices.

        Args:
          data: Devices along the axis of data; None: all that `block` leaves.
          block: Devices along the axis of blocks.
          devices: Which; None for all of all processes. A topology's are as good, for programs
            that are only compiled.
          weights: `"whole"`, or `"sharded"` for networks that do not fit into a device's memory:
            they stay in the host's, every device has a part, and layers are gathered as they
            are used.

        Raises:
          ValueError: If `data` times `block` is not the number of devices, or `weights` neither.
        """
        if weights not in get_args(Weights):
            raise ValueError(f"mesh.weights must be whole or sharded; got {weights!r}.")
        devices = jax.devices() if devices is None else list(devices)
        count = len(devices)
        if block < 1 or (data is not None and data < 1):
            raise ValueError(f"mesh.data and mesh.block must be at least 1; got {data}, {block}.")
        if data is None:
            data = count // block
        if data * block != count:
            raise ValueError(
                f"mesh.data times mesh.block must be the number of devices, {count}; got {data} "
                f"times {block}."
            )
        mesh = jax.make_mesh(
            (block, data),
            (BLOCK, DATA),
            axis_types=(AxisType.Auto, AxisType.Auto),
            devices=devices,
        )
        return cls(mesh, weights)

    @classmethod
    def single(cls) -> "Pod":
        """The pod of this process's default device alone."""
        return cls.of(data=1, devices=jax.local_devices()[:1])

    @property
    def data(self) -> int:
        """Devices along the axis of data."""
        return self.mesh.shape[DATA]

    @property
    def block(self) -> int:
        """Devices along the axis of blocks."""
        return self.mesh.shape[BLOCK]

    @property
    def processes(self) -> int:
        """Processes whose devices the mesh has."""
        return meshes.processes_of(self.mesh)

    @property
    def writes(self) -> bool:
        """Whether this process writes files and logs."""
        return jax.process_index() == 0

    def check(self, shards: int) -> None:
        """That logical shards can be spread over the axis of data.

        Raises:
          ValueError: If they cannot.
        """
        if shards % self.data:
            raise ValueError(
                f"the {shards} logical shards of the data must be a multiple of mesh.data; got "
                f"mesh.data={self.data}. Use a divisor, and mesh.block for the other devices."
            )

    def sharding(self, *axes: str | tuple[str, ...] | None) -> NamedSharding:
        """The sharding of arrays whose first axes lie along these of the mesh."""
        return NamedSharding(self.mesh, PartitionSpec(*axes))

    def put(self, tree: Any, *axes: str | tuple[str, ...] | None) -> Any:
        """Arrays that every process has whole, on the devices.

        Args:
          tree: Equal in all processes.
          *axes: As for `sharding`; none: every device has all.
        """
        return meshes.put(tree, self.sharding(*axes))

    def get(self, tree: Any) -> Any:
        """Arrays of the devices as every process's own, whole."""
        return meshes.get(tree, self.mesh)

    def agree(self, value: meshes.Number) -> meshes.Number:
        """What the first process says, in all of them."""
        return meshes.agree(value, self.mesh)

    def any(self, value: bool) -> bool:
        """Whether any process says so."""
        if self.processes == 1:
            return value
        return bool(np.any(multihost_utils.process_allgather(np.int32(value))))

    def wait(self, name: str) -> None:
        """Until all processes have come here."""
        meshes.wait(name, self.mesh)


def each(count: jax.Array, function: Callable[..., Any], *mapped: Any) -> Any:
    """`function` of every slice along the first axis, one after another; within a `shard_map`.

    Args:
      count: How many slices, `[]` int32. It has to be an argument of the program: a loop
        whose length the compiler does not know has the same body whatever the length, so that
        its results have the same bits on any number of devices.
      function: Gives arrays of equal shapes for all slices.
      *mapped: Trees of arrays with the axis first.

    Returns:
      Its results, stacked.
    """
    length = jax.tree.leaves(mapped)[0].shape[0]
    function = jax.jit(function)  # traced once, for its shapes and for the loop
    take = lambda i: jax.tree.map(
        lambda a: jax.lax.dynamic_index_in_dim(a, i, keepdims=False), mapped
    )
    shapes = jax.eval_shape(lambda: function(*take(jnp.int32(0))))
    results = jax.tree.map(lambda s: jnp.zeros((length, *s.shape), s.dtype), shapes)

    def body(i: jax.Array, results: Any) -> Any:
        put = lambda all, one: jax.lax.dynamic_update_index_in_dim(all, one, i, 0)
        # What is around must not be merged into it: a slice of one is no slice to the compiler.
        here, i = jax.lax.optimization_barrier((take(i), i))
        return jax.tree.map(put, results, function(*here))

    return jax.lax.fori_loop(0, count, body, results)


def ordered_mean(count: jax.Array, stacked: Any) -> Any:
    """The mean over the first axis, summed from the first to the last; the order is kept.

    Args:
      count: Its length, an argument of the program as for `each`.
      stacked: Tree of arrays.
    """
    length = jax.tree.leaves(stacked)[0].shape[0]
    begin = jax.tree.map(lambda a: jnp.zeros(a.shape[1:], a.dtype), stacked)

    def body(i: jax.Array, total: Any) -> Any:
        add = lambda t, a: t + jax.lax.dynamic_index_in_dim(a, i, keepdims=False)
        return jax.tree.map(add, total, stacked)

    total = jax.lax.fori_loop(0, count, body, begin)
    return jax.tree.map(lambda t: t / length, total)


def mean_over_shards(count: jax.Array, stacked: Any, *, ordered: bool, devices: int) -> Any:
    """The mean over all shards of the axis `data`; within a `shard_map`.

    Ordered, every device gets a part of all shards' sums (`all_to_all`), adds them up in the
    order of the shards and gives the others the result: twice the size of one result goes over
    the wire, as with a ring, and the bits do not depend on how many devices there are.

    Args:
      count: All shards, an argument of the program as for `each`.
      stacked: Tree of float arrays with the shards of this device first.
      ordered: Else shards are added up as they come: sums of this device, then of all.
      devices: Along `data`.
    """
    if not ordered:
        local = jax.tree.map(lambda a: jnp.mean(a, axis=0), stacked)
        return jax.lax.pmean(local, DATA)
    leaves, treedef = jax.tree.flatten(stacked)
    here = leaves[0].shape[0]
    flat = jnp.concatenate([a.reshape(here, -1).astype(jnp.float32) for a in leaves], axis=1)
    size = flat.shape[1]
    flat = jnp.pad(flat, ((0, 0), (0, -size % devices)))
    parts = jax.lax.all_to_all(flat, DATA, split_axis=1, concat_axis=0, tiled=True)
    mean = jax.lax.all_gather(ordered_mean(count, parts), DATA, tiled=True)[:size]
    found, start = [], 0
    for leaf in leaves:
        length = math.prod(leaf.shape[1:])
        found.append(mean[start : start + length].reshape(leaf.shape[1:]).astype(leaf.dtype))
        start += length
    return behind_loop(count, jax.tree.unflatten(treedef, found))


def behind_loop(count: jax.Array, tree: Any) -> Any:
    """The same arrays, from a loop that the compiler cannot look through.

    What is computed of them is compiled alike whatever they come from; merged with what is
    before, as with collectives that a single device does not need, the same formula may round
    otherwise.

    Args:
      count: At least 1, an argument of the program as for `each`.
      tree: Arrays.
    """
    zeros = jax.tree.map(jnp.zeros_like, tree)
    return jax.lax.fori_loop(0, count, lambda i, _: tree, zeros)
