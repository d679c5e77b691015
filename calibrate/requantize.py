"""Other float weights in the places of a quantized model's: its formats stay what they were.

Stages that move something between layers, or into a branch beside them, change the floats that
integers stand for. What a QTensor is (bits, groups, symmetry, dtype of its scales, how the
layer's input is quantized) is read from the QTensor itself, so that it does not matter which
stage has chosen it; only the range search (`WeightSpec.method`) is not in it and comes from the
rules.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp

from qjax.core.config import QuantConfig, WeightSpec
from qjax.core.plan import Axes, decide
from qjax.core.qtensor import QTensor, from_codes, spread
from qjax.core.quantizers import Codes, quantize_weight, to_floats
from qjax.core.typing import Array, Float, Params

Method = Literal["minmax", "mse"]

LAYER = Axes(-2, (-1,))
"""The axes of `[i, o]` and `[h, w, i, o]`."""


def method_of(config: QuantConfig | None, path: str, shape: tuple[int, ...]) -> Method:
    """How the rules find the range of the leaf at `path`; `"minmax"` where they say nothing."""
    if config is None:
        return "minmax"
    rules = dataclasses.replace(config, allow_unmatched=True)
    (entry,) = decide([(path, jax.ShapeDtypeStruct(shape, jnp.float32))], rules)
    return "minmax" if entry.weight is None else entry.weight.method


def spec_of(q: QTensor, method: Method, *, axes: Axes = LAYER) -> tuple[WeightSpec, int | None]:
    """The settings by which a QTensor was made, and its group size where it has groups.

    Args:
      q: A kernel.
      method: How its range was found.
      axes: Of the kernel; by default those of every layer of `qjax.core.layers`.
    """
    outputs = {q.ndim + axis for axis in axes.channels}
    inputs = [size for axis, size in enumerate(q.scale.shape) if axis not in outputs]
    settings: dict[str, Any] = {"bits": q.bits, "symmetric": q.zero_point is None, "method": method}
    if max(inputs, default=1) > 1:
        size = q.shape[axes.group] // q.scale.shape[axes.group]
        return WeightSpec(granularity="per_group", group_size=size, **settings), size
    whole = max(q.scale.shape) == 1
    granularity: Any = "per_tensor" if whole else "per_channel"
    return WeightSpec(granularity=granularity, **settings), None


@functools.partial(jax.jit, static_argnames=("spec", "group_size", "axes", "scale_dtype"))
def _codes(w, spec, group_size, axes, scale_dtype):
    return quantize_weight(
        w,
        spec,
        group_size=group_size,
        channel_axes=axes.channels,
        group_axis=axes.group,
        scale_dtype=jnp.dtype(scale_dtype),
    )


def requantized(
    w: Float[Array, "..."], like: QTensor, method: Method, *, axes: Axes = LAYER
) -> QTensor:
    """The kernel `w` in the format of `like`; pure, and traceable in `w`.

    Args:
      w: Float kernel of the logical shape of `like`.
      like: The QTensor that it takes the place of.
      method: How its range is found.
      axes: As for `spec_of`.
    """
    spec, group_size = spec_of(like, method, axes=axes)
    codes = _codes(w, spec, group_size, axes, jnp.dtype(like.scale.dtype).name)
    return from_codes(codes.codes, codes.scale, codes.zero_point, like=like, layout=like.layout)


def fake_quantized(
    w: Float[Array, "..."], like: QTensor, method: Method, *, axes: Axes = LAYER
) -> Float[Array, "..."]:
    """What `requantized` stands for, in float32.

    Within a program this is the one to use: packing and unpacking in one program that reduces
    what comes of it gives wrong sums on XLA:CPU (jax 0.10.2), and does nothing but cost time.
    """
    spec, group_size = spec_of(like, method, axes=axes)
    codes = _codes(w, spec, group_size, axes, jnp.dtype(like.scale.dtype).name)
    zero_point = None if codes.zero_point is None else spread(codes.zero_point, w.shape)
    return to_floats(Codes(codes.codes, spread(codes.scale, w.shape), zero_point))


def with_leaves(params: Params, leaves: Mapping[str, Any]) -> dict[str, Any]:
    """The params with other, or more, leaves; a tree is copied only along the way to them.

    Args:
      params: Nested mappings.
      leaves: By path, keys joined with `/`; what is in the tree already is replaced.
    """
    tree = dict(params)
    own = {id(tree)}  # the nodes that are copies, and may be changed
    for path, leaf in leaves.items():
        *nodes, last = path.split("/")
        node = tree
        for name in nodes:
            if id(node.get(name)) not in own:
                node[name] = dict(node.get(name, {}))
                own.add(id(node[name]))
            node = node[name]
        node[last] = leaf
    return tree
