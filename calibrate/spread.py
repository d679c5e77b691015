"""Weights that no device holds whole: every device has a part, and gathers what it computes with.

An array is cut along one of its axes into as many parts as the mesh has devices, or as one of the
mesh's axes has, whichever is more and comes out even; arrays that nothing divides, which are small
ones, are whole everywhere. A program gathers an array where it is used, so that of a network only
the layers at work lie whole on a device. The numbers are those of weights that lie there whole.
"""

from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import PartitionSpec

from qjax.calibrate.pod import BLOCK, DATA, Pod


class Cut(NamedTuple):
    """Where an array is cut.

    Attributes:
      axis: Of the array.
      along: Axes of the mesh that its parts lie along, the slowest first.
    """

    axis: int
    along: tuple[str, ...]

    @property
    def axes(self) -> tuple[tuple[str, ...] | None, ...]:
        """The same as the axes of a sharding."""
        return (*[None] * self.axis, self.along)


@jax.tree_util.register_pytree_node_class
class Spread:
    """A tree of arrays in parts.

    Attributes:
      leaves: The arrays, or what stands for them.
      treedef: Their tree.
      cuts: Where every array is cut; None for those that are whole everywhere.
    """

    def __init__(self, leaves: tuple[Any, ...], treedef: Any, cuts: tuple[Cut | None, ...]):
        self.leaves, self.treedef, self.cuts = leaves, treedef, cuts

    def tree_flatten(self) -> tuple[tuple[Any, ...], Any]:
        """Arrays, and what is static."""
        return self.leaves, (self.treedef, self.cuts)

    @classmethod
    def tree_unflatten(cls, static: Any, leaves: Any) -> "Spread":
        """Back from the two."""
        return cls(tuple(leaves), *static)


def cut_for(pod: Pod, shape: tuple[int, ...]) -> Cut | None:
    """Where an array is cut: into the most parts that come out even, along its last such axis."""
    ways = {(BLOCK, DATA): pod.block * pod.data, (DATA,): pod.data, (BLOCK,): pod.block}
    for along, parts in sorted(ways.items(), key=lambda way: -way[1]):
        even = [axis for axis, n in enumerate(shape) if n and parts > 1 and n % parts == 0]
        if even:
            return Cut(even[-1], along)
    return None


def place(pod: Pod, tree: Any) -> Any:
    """The params of a network on the devices: whole on each, or a `Spread`.

    Args:
      pod: The devices; its `weights` decides.
      tree: Equal in all processes; arrays on the host are best for parts.
    """
    if pod.weights == "whole":
        return pod.put(tree)
    return _spread(pod, tree, pod.put)


def placed_shapes(pod: Pod, tree: Any) -> Any:
    """As `place`, of shapes with shardings, for programs that are only compiled."""

    def one(leaf: Any, *axes: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=pod.sharding(*axes))

    return jax.tree.map(one, tree) if pod.weights == "whole" else _spread(pod, tree, one)


def _spread(pod: Pod, tree: Any, put: Any) -> Spread:
    leaves, treedef = jax.tree.flatten(tree)
    cuts = tuple(cut_for(pod, np.shape(leaf)) for leaf in leaves)
    parts = (
        put(leaf, *(() if cut is None else cut.axes))
        for leaf, cut in zip(leaves, cuts, strict=True)
    )
    return Spread(tuple(parts), treedef, cuts)


def _is_spread(tree: Any) -> bool:
    return isinstance(tree, Spread)


def specs(tree: Any) -> Any:
    """Where a program's arguments lie, as `shard_map` takes it: whole but for a `Spread`'s."""
    every = PartitionSpec()

    def one(node: Any) -> Any:
        if not _is_spread(node):
            return every
        found = tuple(every if cut is None else PartitionSpec(*cut.axes) for cut in node.cuts)
        return Spread(found, node.treedef, node.cuts)

    return jax.tree.map(one, tree, is_leaf=_is_spread)


def gathered(tree: Any) -> Any:
    """Weights whole, within a `shard_map`; what is no `Spread` is as it was."""

    def one(node: Any) -> Any:
        if not _is_spread(node):
            return node
        whole = [
            leaf if cut is None else jax.lax.all_gather(leaf, cut.along, axis=cut.axis, tiled=True)
            for leaf, cut in zip(node.leaves, node.cuts, strict=True)
        ]
        return jax.tree.unflatten(node.treedef, whole)

    return jax.tree.map(one, tree, is_leaf=_is_spread)


def on_host(tree: Any) -> Any:
    """The arrays in the host's memory."""
    return jax.tree.map(np.asarray, tree)
