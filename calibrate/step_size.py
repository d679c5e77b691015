"""Learned step sizes (LSQ), and the ranges that they start from.

    x_hat = (clip(round(x / scale) + zero_point, qmin, qmax) - zero_point) scale

The scale is learned by its logarithm, so that it stays positive, with the gradients of
`rounding.fake_quantize_ste`: `d x_hat / d log_scale = scale * d x_hat / d scale`, which is
`x_hat - x` inside the range and `x_hat` outside. Codes are float32 here and never stored, so
that 16 bits, `qmin = -32768` to `qmax = 32767`, leave a value of the range unchanged to within
half a step; what stores integers (`quantizers.round_to_codes`, the kernels) ends at 8 bits.

References:
  Esser et al., Learned Step Size Quantization, 2020, https://arxiv.org/abs/1902.08153;
  Bhalgat et al., LSQ+, 2020, https://arxiv.org/abs/2004.09576 (zero points).
"""

import functools
import math
from collections.abc import Sequence

import jax.numpy as jnp
from jax import lax

from qjax.calibrate.rounding import fake_quantize_ste
from qjax.core.quantizers import ERROR_POWER, SHRINK, SHRINK_STEPS
from qjax.core.typing import Array, Float, Int, Shaped

# Scales from 2e-35 to 6e34: none that is 0 or infinite in float32.
LOG_SCALE_LIMIT = 80.0


def fake_quantize_lsq(
    x: Float[Array, "..."],
    log_scale: Float[Array, "..."],
    zero_point: Shaped[Array, "..."] | None = None,
    *,
    qmin: int | Array,
    qmax: int | Array,
    gradient_scale: float | Array = 1.0,
) -> Float[Array, "..."]:
    """`fake_quantize_ste` of the scale `exp(log_scale)`, to learn it.

    Args:
      x: Weights or activations, any float dtype.
      log_scale: Natural logarithm of the scale, float32, broadcastable to `x`; held within
        `LOG_SCALE_LIMIT` of 0, without a gradient beyond.
      zero_point: As in `fake_quantize_ste`.
      qmin: Least code; may be traced.
      qmax: Greatest code; may be traced.
      gradient_scale: What the gradients to `log_scale` and `zero_point` are multiplied with:
        `lsq_gradient_scale` for optimizers that heed their size (Adam does not).

    Returns:
      In the dtype of `x`.
    """
    damp = functools.partial(_scale_gradient, factor=jnp.asarray(gradient_scale, jnp.float32))
    if zero_point is not None and jnp.issubdtype(zero_point.dtype, jnp.floating):
        zero_point = damp(zero_point.astype(jnp.float32))
    return fake_quantize_ste(x, scale_of(damp(log_scale)), zero_point, qmin=qmin, qmax=qmax)


def scale_of(log_scale: Float[Array, "..."]) -> Float[Array, "..."]:
    """The scale that `fake_quantize_lsq` uses, to be exported: the codes are the same."""
    return jnp.exp(jnp.clip(log_scale.astype(jnp.float32), -LOG_SCALE_LIMIT, LOG_SCALE_LIMIT))


def _scale_gradient(x, factor):
    """`x` as it is, to the bit; its gradient times `factor`."""
    scaled = x * factor
    return lax.stop_gradient(x) + (scaled - lax.stop_gradient(scaled))


def lsq_gradient_scale(
    shape: Sequence[int], scale_shape: Sequence[int], qmax: int | Array
) -> Float[Array, ""]:
    """`1 / sqrt(n * qmax)` for `n` values of an array of `shape` per scale (LSQ, section 2.2)."""
    shared = math.prod(shape) / math.prod(scale_shape)
    return 1.0 / jnp.sqrt(shared * jnp.asarray(qmax, jnp.float32))


def range_minmax(
    x: Float[Array, "..."], axes: tuple[int, ...] | None = None
) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
    """The least and the greatest value, float32.

    Args:
      x: Activations.
      axes: Over which values share a range; they stay with size 1. None: all, to scalars.
    """
    x, keep = x.astype(jnp.float32), axes is not None
    return jnp.min(x, axis=axes, keepdims=keep), jnp.max(x, axis=axes, keepdims=keep)


def ema(old: Array, new: Array, *, decay: float | Array = 0.95) -> Array:
    """`decay * old + (1 - decay) * new`, for each end of a range; 0.95 as in TFMQ-DM."""
    return decay * old + (1.0 - decay) * new


def scale_and_zero_point(
    low: Float[Array, "..."],
    high: Float[Array, "..."],
    *,
    qmin: int | Array,
    qmax: int | Array,
    symmetric: bool,
) -> tuple[Float[Array, "..."], Int[Array, "..."] | None]:
    """`quantizers.affine` for any, also traced, codes: float32 scale, int32 zero point.

    With `symmetric` the zero point is None, and `qmin` is not read.
    """
    bottom, top = jnp.asarray(qmin, jnp.float32), jnp.asarray(qmax, jnp.float32)
    low, high = jnp.minimum(low, 0.0), jnp.maximum(high, 0.0)
    width, levels = (jnp.maximum(-low, high), top) if symmetric else (high - low, top - bottom)
    tiny = float(jnp.finfo(jnp.float32).tiny)
    scale = jnp.where(width == 0, 1.0, jnp.maximum(width * (1.0 / levels), tiny))
    if symmetric:
        return scale, None
    zero_point = jnp.clip(bottom - jnp.round(low / scale), bottom, top)
    return scale, zero_point.astype(jnp.int32)


def range_mse(
    x: Float[Array, "..."],
    axes: tuple[int, ...] | None = None,
    *,
    qmin: int | Array,
    qmax: int | Array,
    symmetric: bool,
    within: tuple[Array, Array] | None = None,
) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
    """The range, shrunken from that of `range_minmax`, with the least mean `|x - x_hat|**2.4`.

    The search of `quantizers` for weights: 80 ranges, each 1 % of the full one shorter than
    the last, of equals the widest. They are tried one after the other, in the memory of one.

    Args:
      x: Activations.
      axes: As in `range_minmax`.
      qmin: Least code; may be traced.
      qmax: Greatest code; may be traced.
      symmetric: Whether the range is mirrored at 0.
      within: The range to shrink, where `x` is a sample of what it is of; None: that of `x`.
    """
    x = x.astype(jnp.float32)
    low, high = range_minmax(x, axes) if within is None else within

    def try_one(k, best):
        best_error, best_factor = best
        factor = 1.0 - SHRINK * k.astype(jnp.float32)
        scale, zero_point = scale_and_zero_point(
            low * factor, high * factor, qmin=qmin, qmax=qmax, symmetric=symmetric
        )
        squares = jnp.square(fake_quantize_ste(x, scale, zero_point, qmin=qmin, qmax=qmax) - x)
        # Four times faster on a CPU than a power, and 0 for 0 all the same.
        powers = jnp.exp(ERROR_POWER / 2 * jnp.log(squares))
        error = jnp.mean(powers, axis=axes, keepdims=axes is not None)
        better = error < best_error
        return jnp.where(better, error, best_error), jnp.where(better, factor, best_factor)

    start = (jnp.full_like(low, jnp.inf), jnp.ones_like(low))
    _, factor = lax.fori_loop(0, SHRINK_STEPS, try_one, start)
    return low * factor, high * factor
