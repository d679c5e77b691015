"""matmul and conv over float arrays or QTensors: the one caller of the kernels.

A float weight means the plain float operation. A QTensor without `act` is dequantized in
pieces and multiplied in float; with `act` the input is quantized too, as `act` says, and the
arithmetic is int8 with int32 sums.

Gradients reach the input only, and pass through the rounding as if it were not there (the
straight-through estimator): `d matmul(x, w) = dx @ w.dequantize()`.
"""

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
from jax import lax

from qjax.core.config import ActSpec
from qjax.core.qtensor import QTensor
from qjax.core.quantizers import Codes, quantize_activation
from qjax.core.typing import Array, Float
from qjax.kernels.packing import Format
from qjax.kernels.quant_conv import Kernel, quant_conv
from qjax.kernels.quant_conv_xla import (
    IMAGE,
    Padding,
    explicit_padding,
    pad_image,
    taps,
    weight_conv_xla,
)
from qjax.kernels.quant_matmul import quant_matmul, weight_matmul
from qjax.kernels.quant_matmul_xla import PIECE_VALUES
from qjax.kernels.target import by_platform

Row = Mapping[str, Array]


def choose_group_size(group_size: int | tuple[int | None, ...] | None, size: int) -> int | None:
    """The group size for `size` input channels; None means that all share a scale.

    Of a tuple the first that divides `size` (None always does).

    Raises:
      ValueError: If none divides.
    """
    candidates = group_size if isinstance(group_size, tuple) else (group_size,)
    for candidate in candidates:
        if candidate is None or (candidate <= size and size % candidate == 0):
            return None if candidate == size else candidate
    divisors = [n for n in (512, 256, 192, 128, 96, 64, 48, 32, 16, 8) if size % n == 0]
    raise ValueError(
        f"group_size must divide the {size} input channels; got {group_size}. Use "
        f"{' or '.join(map(str, divisors[:3])) or 'None'}, or a tuple that ends with None "
        "for one scale per output channel where nothing else divides."
    )


def matmul(
    x: Float[Array, "*b i"], w: Float[Array, "i o"] | QTensor, *, row: Row | None = None
) -> Float[Array, "*b o"]:
    """`x @ w` in the dtype of `x`.

    Args:
      x: Input; its last axis is contracted.
      w: Kernel `[i, o]`, float or quantized.
      row: This layer's entries of the step's row (`act_scale`, `act_zero_point`, `act_qmin`,
        `act_qmax`), for activations whose range does not come from `x` itself.

    Raises:
      ValueError: If the shapes do not match, or the row lacks what `w.act` needs.
      TypeError: If `x` is not of a float dtype.
    """
    _require_float(x)
    if not isinstance(w, QTensor):
        return jnp.matmul(x, w.astype(x.dtype))
    if w.ndim != 2 or w.axis != -2 or w.shape[0] != x.shape[-1]:
        raise ValueError(
            "matmul needs a kernel [i, o] whose i is the last axis of x; got "
            f"w.shape={w.shape}, w.axis={w.axis}, x.shape={x.shape}."
        )
    rows = x.reshape(-1, x.shape[-1])
    return _matmul(rows, w, dict(row or {})).reshape(*x.shape[:-1], w.shape[1])


@jax.custom_jvp
def _matmul(x: Float[Array, "m i"], w: QTensor, row: dict[str, Array]) -> Float[Array, "m o"]:
    fmt, scale, zero_point = _format(w), w.scale, w.zero_point
    if w.act is None:
        return weight_matmul(x, w.qvalue, scale, zero_point, fmt=fmt)
    p = _activation_codes(x, w.act, row, (-1,))
    parts = (p.codes, p.scale, p.zero_point, w.qvalue, scale, zero_point)
    return quant_matmul(*parts, fmt=fmt, dtype=x.dtype)


@_matmul.defjvp
def _matmul_jvp(primals, tangents):
    x, w, row = primals
    return _matmul(x, w, row), jnp.matmul(tangents[0], w.dequantize(x.dtype))


def conv(
    x: Float[Array, "b h w i"],
    w: Float[Array, "kh kw i o"] | QTensor,
    *,
    strides: int = 1,
    padding: str | Sequence[tuple[int, int]] = "SAME",
    row: Row | None = None,
) -> Float[Array, "b h2 w2 o"]:
    """2-D convolution in the dtype of `x`.

    Args:
      x: Images.
      w: Kernel `[h, w, i, o]`, float or quantized.
      strides: Step between output pixels, the same on both axes.
      padding: `((top, bottom), (left, right))`, `"SAME"` or `"VALID"`.
      row: This layer's entries of the step's row, as for `matmul`; `act_scale` is a scalar, or
        with granularity `"per_group"` one for each group of input channels, the same in every
        tap. (Dynamic groups have ranges of their own for every pixel.)

    Raises:
      ValueError: If the kernel does not fit the image, or the row lacks what `w.act` needs.
      TypeError: If `x` is not of a float dtype.
    """
    _require_float(x)
    if x.ndim != 4 or w.ndim != 4 or w.shape[2] != x.shape[3] or getattr(w, "axis", -2) != -2:
        raise ValueError(
            "conv needs images [b, h, w, i] and a kernel [h, w, i, o] of the same i, packed "
            f"along it if at all; got x.shape={x.shape}, w.shape={w.shape}."
        )
    pads = explicit_padding(padding, x.shape[1:3], w.shape[:2], strides)
    if not isinstance(w, QTensor):
        return _float_conv(x, w.astype(x.dtype), strides, pads)
    return _conv(strides, pads, x, w, dict(row or {}))


def _require_float(x: Array) -> None:
    # In the dtype of integers the weights would be rounded to integers, mostly to 0.
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"x must be of a float dtype; got {x.dtype}. Use x.astype(jnp.float32).")


def _float_conv(x, w, strides, pads):
    return lax.conv_general_dilated(x, w, (strides, strides), pads, dimension_numbers=IMAGE)


def _low_bit_conv(strides, pads, x, w: QTensor, row):
    if w.act is None:
        return _weight_conv(strides, pads, x, w)
    p = _activation_codes(x, w.act, row, (-3, -2, -1))
    return quant_conv(*p, _kernel(w), strides=strides, padding=pads, dtype=x.dtype)


def _weight_conv(strides: int, pads: Padding, x: Array, w: QTensor) -> Array:
    """The float convolution with the dequantized kernel; a CPU dequantizes large ones by taps."""
    kh, kw, i, o = w.shape

    def whole(x, w):
        return _float_conv(x, w.dequantize(x.dtype), strides, pads)

    def by_taps(x, w):
        image = pad_image(x, pads, None)
        parts = (w.qvalue, w.scale, w.zero_point)
        return weight_conv_xla(image, *parts, strides=strides, fmt=_format(w))

    if kh * kw == 1:
        (view,) = taps(pad_image(x, pads, None), (1, 1), strides)
        matrix = _kernel(w).matrix(i)
        parts = (matrix.q, matrix.scale, matrix.zero)
        y = weight_matmul(view.reshape(-1, i), *parts, fmt=matrix.fmt)
        return y.reshape(*view.shape[:3], o)
    if w.size <= PIECE_VALUES:
        return whole(x, w)
    return by_platform(x, w, cpu=by_taps, default=whole)


_conv = jax.custom_jvp(_low_bit_conv, nondiff_argnums=(0, 1))


@_conv.defjvp
def _conv_jvp(strides, pads, primals, tangents):
    x, w, row = primals
    y = _conv(strides, pads, x, w, row)
    return y, _float_conv(tangents[0], w.dequantize(x.dtype), strides, pads)


def _activation_codes(x: Array, act: ActSpec, row: Row, sample_axes: tuple[int, ...]) -> Codes:
    group_size = None
    if act.granularity == "per_group" and act.mode == "dynamic":
        group_size = choose_group_size(act.group_size, x.shape[-1]) or x.shape[-1]
    codes = quantize_activation(x, act, group_size=group_size, sample_axes=sample_axes, row=row)
    groups = codes.scale.shape[-1]
    if len(sample_axes) > 1 and act.granularity != "per_group" and groups != 1:
        raise ValueError(
            f"A convolution's act_scale must be a scalar; got {groups} groups of input channels. "
            "Give it an act with granularity='per_group'."
        )
    return codes


def _format(w: QTensor) -> Format:
    packed = w.layout == "packed"
    return Format(bits=w.bits, block=w.block, pad=w.pad, packed=packed)


def _kernel(w: QTensor) -> Kernel:
    return Kernel(w.qvalue, w.scale, w.zero_point, _format(w))
