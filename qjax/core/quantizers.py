"""From floats to integers: scales, zero points and rounding, on plain arrays.

Every quantizer here is affine: `code = clip(round(x / scale) + zero_point, qmin, qmax)` and
back `(code - zero_point) * scale`. Codes are signed; the symmetric range is
`[-(2**(bits-1) - 1), 2**(bits-1) - 1]`, so that it is mirrored at 0; the asymmetric one
`[-2**(bits-1), 2**(bits-1) - 1]`, and it always contains 0.0, which padding, ReLU and zeroed
weights need to be exact. Scales are computed in float32: in bfloat16 the rounding of
`x / scale` would reach three quarters of a step.

A NaN or an infinity makes the scale of its group NaN or infinite, and with it every value of
the group NaN: as in a float matmul, it is not lost. Codes alone do not show it.

References:
  Nagel et al., A White Paper on Neural Network Quantization, 2021,
  https://arxiv.org/abs/2106.08295, section 2.2; Li et al., BRECQ, 2021,
  https://arxiv.org/abs/2102.05426 (the range search).
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax

from qjax.core.config import ActSpec, WeightSpec
from qjax.core.typing import Array, Float, Int

# The range search of BRECQ, Q-Diffusion, TFMQ-DM and EfficientDM: 80 ranges, each 1 % of
# the full one shorter than the last, judged by the mean of |error|**2.4.
SHRINK_STEPS = 80
SHRINK = 0.01
ERROR_POWER = 2.4


class Codes(NamedTuple):
    """Integers with the scale and zero point that turn them back into floats.

    Attributes:
      codes: int8, in the shape of what was quantized.
      scale: float32 or the storage dtype, broadcastable by repetition.
      zero_point: int32, shaped as `scale`; None for a symmetric range.
    """

    codes: Int[Array, "..."]
    scale: Float[Array, "..."]
    zero_point: Int[Array, "..."] | None


def integer_range(bits: int, *, symmetric: bool) -> tuple[int, int]:
    """`qmin` and `qmax` of signed codes."""
    qmax = 2 ** (bits - 1) - 1
    return (-qmax if symmetric else -qmax - 1), qmax


def affine(
    low: Float[Array, "..."],
    high: Float[Array, "..."],
    *,
    bits: int,
    symmetric: bool,
    dtype: jnp.dtype = jnp.float32,
) -> tuple[Float[Array, "..."], Int[Array, "..."] | None]:
    """Scale, rounded to `dtype`, and zero point for values between `low` and `high`.

    The range is widened to contain 0. A range of one point, 0, gets scale 1; steps below the
    least normal number of `dtype` become that number.
    """
    qmin, qmax = integer_range(bits, symmetric=symmetric)
    low, high = jnp.minimum(low, 0.0), jnp.maximum(high, 0.0)
    if symmetric:
        width, levels = jnp.maximum(-low, high), qmax
    else:
        width, levels = high - low, qmax - qmin
    tiny = float(jnp.finfo(dtype).tiny)
    # By the reciprocal: XLA rewrites divisions by constants so, but not in every mode.
    scale = jnp.where(width == 0, 1.0, jnp.maximum(width * (1 / levels), tiny)).astype(dtype)
    if symmetric:
        return scale, None
    zero_point = qmin - jnp.round(low / scale.astype(jnp.float32))
    return scale, jnp.clip(zero_point, qmin, qmax).astype(jnp.int32)


def round_to_codes(
    x: Float[Array, "..."],
    scale: Float[Array, "..."],
    zero_point: Int[Array, "..."] | None,
    *,
    qmin: int | Array,
    qmax: int | Array,
) -> Int[Array, "..."]:
    """`clip(round(x / scale) + zero_point, qmin, qmax)` as int8, halves to even.

    `scale` and `zero_point` broadcast against `x`; `qmin` and `qmax` may be traced, which is
    how bits that change from step to step are given.
    """
    codes = jnp.round(x.astype(jnp.float32) / scale.astype(jnp.float32))
    if zero_point is not None:
        codes = codes + zero_point.astype(jnp.float32)
    low, high = (jnp.asarray(bound, jnp.float32) for bound in (qmin, qmax))
    return jnp.clip(codes, low, high).astype(jnp.int8)


def to_floats(codes: Codes) -> Float[Array, "..."]:
    """`(codes - zero_point) * scale` in float32, for scales that broadcast."""
    values = codes.codes.astype(jnp.float32)
    if codes.zero_point is not None:
        values = values - codes.zero_point.astype(jnp.float32)
    return values * codes.scale.astype(jnp.float32)


def _search_range(
    x: Float[Array, "..."],
    low: Float[Array, "..."],
    high: Float[Array, "..."],
    axes: tuple[int, ...],
    *,
    bits: int,
    symmetric: bool,
    dtype: jnp.dtype,
) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
    """The shrunken range, per scale, with the least mean of `|x - quantized|**2.4`."""
    qmin, qmax = integer_range(bits, symmetric=symmetric)

    def try_one(k, best):
        best_error, best_factor = best
        factor = 1.0 - SHRINK * k.astype(jnp.float32)
        scale, zero_point = affine(
            low * factor, high * factor, bits=bits, symmetric=symmetric, dtype=dtype
        )
        codes = round_to_codes(x, scale, zero_point, qmin=qmin, qmax=qmax)
        difference = jnp.abs(to_floats(Codes(codes, scale, zero_point)) - x)
        error = jnp.mean(difference**ERROR_POWER, axis=axes, keepdims=True)
        better = error < best_error
        return jnp.where(better, error, best_error), jnp.where(better, factor, best_factor)

    start = (jnp.full_like(low, jnp.inf), jnp.ones_like(low))
    _, factor = lax.fori_loop(0, SHRINK_STEPS, try_one, start)
    return low * factor, high * factor


def quantize_weight(
    w: Float[Array, "*taps i o"],
    spec: WeightSpec,
    *,
    group_size: int | None = None,
    channel_axes: tuple[int, ...] = (-1,),
    group_axis: int = -2,
    scale_dtype: jnp.dtype = jnp.bfloat16,
) -> Codes:
    """Codes of a kernel, one scale per tensor, output channel or group of input channels.

    The codes are computed with the scale as it is stored. With `method="minmax"` and a
    symmetric range no value is off by more than half a step; in an asymmetric range the
    largest values may be off by 2**-8 of the range more, which a scale rounded down to
    bfloat16 does not reach (2**-11 for float16; in float32 nothing to speak of).

    Args:
      w: Kernel `[i, o]` or `[h, w, i, o]`, any float dtype.
      spec: Bits, symmetry, granularity, method.
      group_size: Input channels that share a scale, already chosen to divide; None unless
        the granularity is `"per_group"`.
      channel_axes: Negative indices of the output-channel axes.
      group_axis: Negative index of the input-channel axis.
      scale_dtype: Dtype of the returned scale.

    Returns:
      Codes as int8 in the shape of `w`; scale and zero point of its rank.
    """
    w = w.astype(jnp.float32)
    ndim, axis = w.ndim, w.ndim + group_axis
    keep = {ndim + a for a in channel_axes} if spec.granularity != "per_tensor" else set()
    if spec.granularity == "per_group":
        assert group_size is not None
        groups = w.shape[axis] // group_size
        grouped = w.reshape(*w.shape[:axis], groups, group_size, *w.shape[axis + 1 :])
        axes: tuple[int, ...] = (axis + 1,)
    else:
        grouped, axes = w, tuple(a for a in range(ndim) if a not in keep)

    low = jnp.min(grouped, axis=axes, keepdims=True)
    high = jnp.max(grouped, axis=axes, keepdims=True)
    settings: dict[str, Any] = {"bits": spec.bits, "symmetric": spec.symmetric}
    settings["dtype"] = scale_dtype
    if spec.method == "mse":
        low, high = _search_range(grouped, low, high, axes, **settings)
    scale, zero_point = affine(low, high, **settings)
    qmin, qmax = integer_range(spec.bits, symmetric=spec.symmetric)
    codes = round_to_codes(grouped, scale, zero_point, qmin=qmin, qmax=qmax).reshape(w.shape)
    if spec.granularity == "per_group":
        scale = jnp.squeeze(scale, axis + 1)
        zero_point = None if zero_point is None else jnp.squeeze(zero_point, axis + 1)
    return Codes(codes, scale, zero_point)


def quantize_activation(
    x: Float[Array, "*b i"],
    spec: ActSpec,
    *,
    group_size: int | None = None,
    sample_axes: tuple[int, ...] = (-1,),
    row: Mapping[str, Array] | None = None,
) -> Codes:
    """Codes of a layer's input: dynamic from its own range, static from the step's row.

    Args:
      x: Input `[..., i]`.
      spec: Bits, mode, granularity, symmetry.
      group_size: Channels that share a scale with granularity `"per_group"`; must divide.
      sample_axes: Negative indices of the axes that share a scale with `"per_token"`: the
        last for a matmul, all but the batch for a convolution.
      row: The layer's entries of the step's row: `act_scale` and `act_zero_point`, scalars
        or one per group of channels `[g]`, for the static modes; `act_qmin` and `act_qmax`,
        which override the range that `spec.bits` gives, for any mode.

    Returns:
      Codes as int8 in the shape of `x`; scale of rank `x.ndim`, or with groups of the shape
      `[..., groups]` in place of `x`'s last axis.

    Raises:
      ValueError: If the mode needs `act_scale` and the row has none.
    """
    row = row or {}
    default_qmin, default_qmax = integer_range(spec.bits, symmetric=spec.symmetric)
    qmin, qmax = row.get("act_qmin", default_qmin), row.get("act_qmax", default_qmax)
    x = x.astype(jnp.float32)
    if spec.mode != "dynamic":
        if "act_scale" not in row:
            raise ValueError(
                f"Activations with mode={spec.mode!r} read act_scale from the step's row, and "
                "the row of this layer has none; calibrate first, or use mode='dynamic'."
            )
        return _static_codes(x, row["act_scale"], row.get("act_zero_point"), qmin, qmax)

    if spec.granularity == "per_group":
        assert group_size is not None
        grouped = x.reshape(*x.shape[:-1], x.shape[-1] // group_size, group_size)
        axes: tuple[int, ...] = (-1,)
    else:
        grouped = x
        axes = tuple(range(-x.ndim, 0)) if spec.granularity == "per_tensor" else sample_axes
    qmin, qmax = jnp.asarray(qmin, jnp.float32), jnp.asarray(qmax, jnp.float32)
    tiny = float(jnp.finfo(jnp.float32).tiny)
    zero_point = None
    if spec.symmetric:
        # The initial value is for an empty batch, which has one range `per_tensor`.
        width = jnp.max(jnp.abs(grouped), axis=axes, keepdims=True, initial=0.0)
        scale = jnp.maximum(width * (1.0 / qmax), tiny)
        # Nothing to clip: the largest magnitude is qmax steps.
        codes = _round_small(grouped * (1.0 / scale))
    else:
        low = jnp.min(grouped, axis=axes, keepdims=True, initial=0.0)
        high = jnp.max(grouped, axis=axes, keepdims=True, initial=0.0)
        scale = jnp.maximum((high - low) * (1.0 / (qmax - qmin)), tiny)
        zero_point = jnp.clip(qmin - jnp.round(low / scale), qmin, qmax).astype(jnp.int32)
        codes = round_to_codes(grouped, scale, zero_point, qmin=qmin, qmax=qmax)
    codes = codes.reshape(x.shape)
    if spec.granularity == "per_group":
        scale = scale.squeeze(-1)
        zero_point = None if zero_point is None else zero_point.squeeze(-1)
    return Codes(codes, scale, zero_point)


def _round_small(x: Float[Array, "..."]) -> Int[Array, "..."]:
    """Floats below 128 in magnitude as int8, halves to even.

    Added to 1.5 * 2**23 a float32 has no bits left for a fraction, so the addition rounds, and
    the lowest byte of the sum is the integer in two's complement. On a CPU the quantization
    of an input takes up to a fifth less than with `round` and a conversion.
    """
    return lax.bitcast_convert_type(x + 1.5 * 2**23, jnp.int32).astype(jnp.int8)


def _static_codes(x, scale, zero_point, qmin, qmax) -> Codes:
    scale = jnp.atleast_1d(jnp.asarray(scale, jnp.float32))
    groups = scale.shape[-1]
    if scale.ndim > 1 or x.shape[-1] % groups:
        raise ValueError(
            "act_scale must be a scalar or one value per group of input channels, of a number "
            f"that divides them; got shape {scale.shape} for {x.shape[-1]} channels."
        )
    if zero_point is not None:
        zero_point = jnp.broadcast_to(jnp.asarray(zero_point, jnp.int32), scale.shape)
    grouped = x.reshape(*x.shape[:-1], groups, x.shape[-1] // groups)
    lead = (1,) * (x.ndim - 1)
    scale = scale.reshape(*lead, groups)
    zero_point = None if zero_point is None else zero_point.reshape(*lead, groups)
    column = None if zero_point is None else zero_point[..., None]
    codes = round_to_codes(grouped, scale[..., None], column, qmin=qmin, qmax=qmax)
    return Codes(codes.reshape(x.shape), scale, zero_point)


def fake_quantize(
    x: Float[Array, "..."],
    scale: Float[Array, "..."],
    zero_point: Int[Array, "..."] | None = None,
    *,
    qmin: int | Array,
    qmax: int | Array,
) -> Float[Array, "..."]:
    """Quantize and dequantize in float: what `x` becomes, in its own dtype."""
    codes = round_to_codes(x, scale, zero_point, qmin=qmin, qmax=qmax)
    return to_floats(Codes(codes, scale, zero_point)).astype(x.dtype)
