"""What goes into the blocks of a network and what comes out, without editing the network.

One program runs the whole network and returns, for every group of alike blocks, the inputs
and the output of one of them, which is chosen by an argument: the program is compiled once
for a network, and its results take the memory of one block. What is wanted of the others is
computed again when their turn comes, so the memory that calibration needs is bounded by the
largest block, whatever the depth of the network.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from qjax.calibrate.blocks import Block
from qjax.core.typing import Array


def watched(
    forward: Callable[[], Any], groups: Sequence[Sequence[Block]], chosen: Sequence[Array]
) -> tuple[Any, list[tuple[Any, Any]]]:
    """The result of `forward`, and inputs and output of one block of every group.

    Args:
      forward: Runs the network, inside a function that is traced.
      groups: Groups of alike blocks, none of them the whole network.
      chosen: For every group the index of the block wanted, a scalar that may be traced.

    Returns:
      The result, and for every group `((args, kwargs), output)`, arrays alone; None stays.
    """
    places = {block.path: (g, i) for g, group in enumerate(groups) for i, block in enumerate(group)}
    kept: list[Any] = [None] * len(groups)

    def watch(next_fun: Callable[..., Any], args: tuple, kwargs: dict, context: Any) -> Any:
        output = next_fun(*args, **kwargs)
        place = places.get("/".join(context.module.path))
        if place is None or context.method_name != "__call__":
            return output
        group, index = place
        new = ((args, kwargs), output)
        if kept[group] is None:
            kept[group] = new
        else:
            pick = lambda a, b: jnp.where(chosen[group] == index, a, b)
            kept[group] = jax.tree.map(pick, new, kept[group])
        return output

    with nn.intercept_methods(watch):
        result = forward()
    return result, kept


def bytes_per_item(structure: tuple[Any, Any], items: int) -> int:
    """Bytes that inputs and output of a block take for one item of a batch of `items`."""
    leaves = jax.tree.leaves(structure)
    total = sum(leaf.size * jnp.dtype(leaf.dtype).itemsize for leaf in leaves)
    return -(-total // items)


def items_within(budget_gib: float, bytes_each: int, wanted: int, *, least: int) -> int:
    """How many items of `bytes_each` fit into a budget, at most `wanted`.

    Raises:
      ValueError: If not even `least` fit.
    """
    fitting = int(budget_gib * 2**30 // max(bytes_each, 1))
    if fitting < least:
        raise ValueError(
            f"a block's inputs and outputs need {bytes_each / 2**20:.1f} MiB an item, and a batch "
            f"has {least} items; got memory_gib={budget_gib}. Raise it, or make the batch smaller."
        )
    return min(wanted, fitting)


def row_of(tree: Mapping[str, Any], index: Array) -> Any:
    """The rows `index` of every leaf."""
    return jax.tree.map(lambda leaf: leaf[index], tree)
