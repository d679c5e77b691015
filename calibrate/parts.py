"""Roll-outs, fits and optimizer states as flat dicts of arrays, for `Work.part`."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from flax import traverse_util

from qjax.calibrate.ranges import Range
from qjax.calibrate.reconstruction import Fitted
from qjax.calibrate.rollout import Buffer
from qjax.core.typing import Array


def pack_tree(tree: Any) -> dict[str, Array]:
    """The leaves of a pytree, by number."""
    return {str(i): leaf for i, leaf in enumerate(jax.tree.leaves(tree))}


def unpack_tree(arrays: Mapping[str, Array], like: Any) -> Any:
    """The inverse of `pack_tree`, for a pytree of the structure of `like`."""
    treedef: Any = jax.tree.structure(like)
    return jax.tree.unflatten(treedef, [arrays[str(i)] for i in range(treedef.num_leaves)])


def pack_buffer(buffer: Buffer) -> dict[str, Array]:
    """A roll-out as a flat dict."""
    arrays: dict[str, Any] = {"x_t": buffer.x_t, "x_0": buffer.x_0}
    arrays["forwards"] = np.int64(buffer.forwards).reshape(1)
    for g, ranges in enumerate(buffer.ranges):
        for path, found in ranges.items():
            arrays[f"{g}:{path}:low"], arrays[f"{g}:{path}:high"] = found
    return arrays


def unpack_buffer(arrays: Mapping[str, Array]) -> Buffer:
    """The inverse of `pack_buffer`."""
    ranges: list[dict[str, Range]] = []
    for key, value in arrays.items():
        if key.count(":") != 2:
            continue
        number, path, end = key.split(":")
        while len(ranges) <= int(number):
            ranges.append({})
        old = ranges[int(number)].get(path, Range(value, value))
        ranges[int(number)][path] = old._replace(**{end: value})
    return Buffer(
        np.asarray(arrays["x_t"]),
        np.asarray(arrays["x_0"]),
        ranges,
        int(np.asarray(arrays["forwards"])[0]),
    )


def pack_fitted(fitted: Fitted) -> dict[str, Array]:
    """What was fitted of a block as a flat dict."""
    flat = traverse_util.flatten_dict({"weights": fitted.weights, "acts": fitted.acts})
    return {":".join(path): leaf for path, leaf in flat.items()}


def unpack_fitted(arrays: Mapping[str, Array], layers: tuple[str, ...]) -> Fitted:
    """The inverse of `pack_fitted`, for a block of these layers."""
    weights: dict[str, dict[str, Array]] = {layer: {} for layer in layers}
    acts: dict[str, dict[str, Array]] = {}
    for key, value in arrays.items():
        kind, layer, name = key.split(":")
        (weights if kind == "weights" else acts).setdefault(layer, {})[name] = value
    return Fitted(weights, acts)
