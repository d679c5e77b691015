"""Ranges of the layers' inputs, fitted layer by layer while a quantized network runs.

A layer's range is taken from the input that it is given by layers that are quantized already,
with ranges from the same run: one forward pass fits all layers in the order of execution.
Over several batches a range is the moving average of theirs (decay 0.95); over several sampler
steps that share it, the union.

A range is `(low, high)`: scalars, or one for each group of channels. Rows of the step table
come of it as for any quantizer (`quantizers.affine`).
"""

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from qjax.calibrate.fitted import LayerFormat
from qjax.calibrate.simulate import Hook, fake_quantize_dynamic
from qjax.calibrate.step_size import ema, range_minmax, range_mse, scale_of
from qjax.core.config import ActSpec
from qjax.core.ops import choose_group_size
from qjax.core.quantizers import affine, fake_quantize, integer_range
from qjax.core.typing import Array, Float

Method = Literal["minmax", "mse"]

DECAY = 0.95
"""Of the moving average over batches (TFMQ-DM, Q-Diffusion)."""

SEARCHED = 1 << 16
"""Values of an input, evenly spread over it, that a range search looks at."""


class Range(NamedTuple):
    """The ends of a layer's input, `[]` or `[g]`, float32."""

    low: Array
    high: Array


def groups_of(act: ActSpec, channels: int) -> int:
    """How many scales an input of `channels` channels has."""
    if act.granularity != "per_group":
        return 1
    return channels // (choose_group_size(act.group_size, channels) or channels)


def empty(formats: Mapping[str, LayerFormat]) -> dict[str, Range]:
    """Zeros for every layer whose range is fitted."""
    ranges = {}
    for path, fmt in formats.items():
        if fmt.reads_rows:
            assert fmt.act is not None
            groups = groups_of(fmt.act, fmt.shape[-2])
            zero = jnp.zeros((groups,) if groups > 1 else (), jnp.float32)
            ranges[path] = Range(zero, zero)
    return ranges


def observe(x: Float[Array, "b *s i"], act: ActSpec, *, method: Method) -> Range:
    """The range of one input: its extremes, or the best of 80 ranges within."""
    groups = groups_of(act, x.shape[-1])
    values = x.astype(jnp.float32).reshape(-1, groups, x.shape[-1] // groups)
    low, high = range_minmax(values, (0, 2))
    low, high = jnp.minimum(low, 0.0), jnp.maximum(high, 0.0)
    if method == "mse":
        stride = max(values.shape[0] * values.shape[2] // SEARCHED, 1)
        qmin, qmax = integer_range(act.bits, symmetric=act.symmetric)
        low, high = range_mse(
            values[::stride],
            (0, 2),
            qmin=qmin,
            qmax=qmax,
            symmetric=act.symmetric,
            within=(low, high),
        )
    low, high = low.reshape(-1), high.reshape(-1)
    return Range(low, high) if groups > 1 else Range(low[0], high[0])


def observing(
    formats: Mapping[str, LayerFormat],
    prior: Mapping[str, Range],
    decay: Array,
    method: Method,
    found: dict[str, Range],
) -> Hook:
    """A hook for `simulated` that fits ranges and quantizes with them at once.

    Args:
      formats: Of the quantized layers.
      prior: Ranges so far.
      decay: Their weight, traced: 0 takes this batch's alone, 1 leaves the prior as it is.
      method: How a range is found.
      found: Filled with every layer's new range, as the network is traced.
    """

    def hook(path: str, module: nn.Module, x: Array) -> Array:
        fmt = formats.get(path)
        if fmt is None or fmt.act is None:
            return x
        act = fmt.act
        if act.mode == "dynamic":
            return fake_quantize_dynamic(x, act, module)
        new = observe(x, act, method=method)
        found[path] = jax.tree.map(lambda old, now: ema(old, now, decay=decay), prior[path], new)
        return quantize_with(x, act, found[path])

    return hook


def quantize_with(x: Float[Array, "b *s i"], act: ActSpec, found: Range) -> Float[Array, "b *s i"]:
    """The input as the integers of a range have it."""
    scale, zero_point = affine(found.low, found.high, bits=act.bits, symmetric=act.symmetric)
    if scale.ndim:
        repeats = x.shape[-1] // scale.shape[0]
        scale = jnp.repeat(scale, repeats)
        zero_point = None if zero_point is None else jnp.repeat(zero_point, repeats)
    qmin, qmax = integer_range(act.bits, symmetric=act.symmetric)
    return fake_quantize(x, scale, zero_point, qmin=qmin, qmax=qmax)


def union(a: Mapping[str, Range], b: Mapping[str, Range]) -> dict[str, Range]:
    """For every layer the range that holds both."""
    return {
        path: Range(jnp.minimum(one.low, b[path].low), jnp.maximum(one.high, b[path].high))
        for path, one in a.items()
    }


def to_fitted(
    ranges: list[dict[str, Range]], formats: Mapping[str, LayerFormat]
) -> dict[str, dict[str, Array]]:
    """The tables that are fitted further (`fitted.py`), one row for each of the ranges."""
    tables = {}
    for path in ranges[0] if ranges else ():
        act = formats[path].act
        assert act is not None
        low = jnp.stack([one[path].low for one in ranges])
        high = jnp.stack([one[path].high for one in ranges])
        scale, zero_point = affine(low, high, bits=act.bits, symmetric=act.symmetric)
        tables[path] = {"log_scale": jnp.log(scale)}
        if zero_point is not None:
            tables[path]["zero_point"] = zero_point.astype(jnp.float32)
    return tables


def to_rows(
    tables: Mapping[str, Mapping[str, Array]],
    formats: Mapping[str, LayerFormat],
    group: Array,
) -> dict[str, Any]:
    """The step table's entry `"quant"`: nested by module, one row for each sampler step.

    Args:
      tables: What `to_fitted` gives, perhaps fitted further.
      formats: Of the layers.
      group: For every step the row of the tables, int32 `[s]`.
    """
    tree: dict[str, Any] = {}
    for path, table in tables.items():
        act = formats[path].act
        assert act is not None
        qmin, qmax = integer_range(act.bits, symmetric=act.symmetric)
        node = tree
        for name in path.split("/"):
            node = node.setdefault(name, {})
        node["act_scale"] = scale_of(table["log_scale"])[group]
        if "zero_point" in table:
            zero_point = jnp.clip(jnp.round(table["zero_point"]), qmin, qmax)[group]
            node["act_zero_point"] = zero_point.astype(jnp.int32)
        node["act_qmin"] = jnp.full(group.shape, qmin, jnp.int32)
        node["act_qmax"] = jnp.full(group.shape, qmax, jnp.int32)
    return tree
