"""Other people's layers, said in the operations of `qjax.core.ops`.

Flax's layers contract any axes with kernels of any rank and convolve in any number of
dimensions; ours multiply matrices and convolve images. What `linen.py` and `nnx.py` share is
here: how the one becomes the other, and the reason where it does not.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp

from qjax.core import ops
from qjax.core.qtensor import QTensor, spread
from qjax.core.typing import Array, Float, Shaped

# How a layer ran, as the logs of linen.py and nnx.py say it.
LOW_BIT = "low-bit"
WEIGHTS_ONLY = "low-bit weights, float arithmetic"


def as_matrix(q: QTensor, num_input_axes: int = 1) -> QTensor:
    """`q` read as `[i, o]`: its first axes are the input's, in C order, the others the output's.

    A projection to heads `[i, n, k]` has one input axis; a projection from heads `[n, k, o]`
    has two, of which the first behaves like the taps of a convolution. Bytes stay packed
    where packed runs stay runs: along the last input axis, without padding.
    """
    shape, n = q.shape, num_input_axes
    inputs, outputs = shape[:n], shape[n:]
    if len(inputs) == len(outputs) == 1 and q.axis == -2:
        return q

    def matrix(small: Shaped[Array, "..."]) -> Shaped[Array, "g o"]:
        lead, trail = small.shape[:n], small.shape[n:]
        shared_rows, shared_columns = set(lead) == {1}, set(trail) == {1}
        rows = lead if shared_rows else (*inputs[:-1], lead[-1])
        columns = trail if shared_columns else outputs
        return spread(small, (*rows, *columns)).reshape(math.prod(rows), math.prod(columns))

    scale = matrix(q.scale)
    changes: dict[str, Any] = {"axis": -2, "scale": scale}
    if q.zero_point is not None:
        changes["zero_point"] = matrix(q.zero_point)
    if q.layout == "native" or (q.ndim + q.axis == n - 1 and not q.pad):
        changes["qvalue"] = q.qvalue.reshape(-1, math.prod(outputs))
    else:
        changes["qvalue"] = q.codes().reshape(-1, math.prod(outputs))
        changes |= {"layout": "native", "block": 1, "pad": 0}
    if q.act is not None and q.act.granularity == "per_group" and scale.shape[0] > 1:
        # The group size was chosen for one axis; more of a tuple may divide their product.
        group_size = math.prod(inputs) // scale.shape[0]
        changes["act"] = dataclasses.replace(q.act, group_size=group_size)
    return q.replace(**changes)


def contract(
    x: Float[Array, "..."],
    q: QTensor,
    *,
    axes: Sequence[int] = (-1,),
    row: Mapping[str, Array] | None = None,
) -> Float[Array, "..."]:
    """`x` contracted over `axes` with the first axes of `q`, one for one.

    The result has the other axes of `x`, then those of the kernel, as `lax.dot_general`.
    """
    n = len(axes)
    x = jnp.moveaxis(x, tuple(axes), tuple(range(-n, 0)))
    lead = x.shape[: x.ndim - n]
    y = ops.matmul(x.reshape(*lead, math.prod(x.shape[-n:])), as_matrix(q, n), row=row)
    return y.reshape(*lead, *q.shape[n:])


def convolve(
    x: Float[Array, "*b h w i"],
    q: QTensor,
    *,
    strides: int,
    padding: Any,
    row: Mapping[str, Array] | None = None,
) -> Float[Array, "*b h2 w2 o"]:
    """A 2-D convolution with any number of batch axes, none included."""
    images = x.reshape(-1, *x.shape[-3:])
    y = ops.conv(images, q, strides=strides, padding=explicit(padding), row=row)
    return y.reshape(*x.shape[:-3], *y.shape[1:])


def explicit(padding: Any) -> Any:
    """Flax's ways to write the padding of an image, as `ops.conv` takes them."""
    if isinstance(padding, str):
        return padding.upper()
    if isinstance(padding, int):
        return ((padding, padding), (padding, padding))
    return tuple((p, p) if isinstance(p, int) else tuple(p) for p in padding)


def per_axis(setting: int | Sequence[int] | None) -> tuple[int, ...]:
    """A setting of Flax's convolutions, one value for each axis of the image; None is 1."""
    if setting is None or isinstance(setting, int):
        return (setting or 1,) * 2
    return tuple(setting)


def why_no_conv(
    q: QTensor,
    *,
    strides: int | Sequence[int] | None,
    padding: Any,
    input_dilation: int | Sequence[int] | None,
    kernel_dilation: int | Sequence[int] | None,
    groups: int,
) -> str | None:
    """Why `convolve` cannot do this convolution; None if it can."""
    if q.ndim != 4 or q.axis != -2:
        return f"a kernel with {q.ndim} axes; low-bit convolutions are 2-D"
    if len(set(per_axis(strides))) > 1:
        return f"{strides=} differ"
    if set(per_axis(input_dilation)) | set(per_axis(kernel_dilation)) != {1}:
        return f"dilation ({input_dilation=}, {kernel_dilation=})"
    if groups != 1:
        return f"feature_group_count={groups}"
    pads = explicit(padding)
    if isinstance(pads, str):
        return None if pads in ("SAME", "VALID") else f"{padding=}"
    return f"negative {padding=}" if min(min(pair) for pair in pads) < 0 else None
