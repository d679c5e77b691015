"""Rounding that learns, AdaRound and straight-through; and the losses that it learns from.

AdaRound learns whether each weight goes up or down. A weight `w` on a grid of step `scale`
becomes

    w_hat = scale (clip(floor(w / scale) + h(v) + zero_point, qmin, qmax) - zero_point)
    h(v) = clip((ZETA - GAMMA) sigmoid(v) + GAMMA, 0, 1)

with one learned number `v` per weight. `v` starts where `h` is the exact fraction that `floor`
cuts off, so the first network is the float one, up to clipping. The loss of a block is that of
its outputs plus `weight * sum(1 - |2 h - 1|**beta)`, which pulls every `h` to 0 or 1, the more
steeply the smaller `beta`; at the end `h` becomes 1 where `v >= 0` and else 0. A fraction of
one half then goes up, where `quantizers.round_to_codes` goes to the even neighbour.

Codes are signed, as in `qjax.core.quantizers`. Scales and zero points broadcast against the
weights; `qtensor.spread` makes them do so for groups. `qmin` and `qmax` may be traced.

Constants and schedules are those of BRECQ, Q-Diffusion and TFMQ-DM, which agree.

References:
  Nagel et al., Up or Down? Adaptive Rounding for Post-Training Quantization, 2020,
  https://arxiv.org/abs/2004.10568; Li et al., BRECQ, 2021, https://arxiv.org/abs/2102.05426
  (outputs of blocks, the losses); Wei et al., QDrop, 2022, https://arxiv.org/abs/2203.05740.
"""

import jax
import jax.numpy as jnp
from jax import lax

from qjax.core.typing import Array, Bool, Float, Int, PRNGKeyArray, Shaped

# The ends that the sigmoid is stretched to before it is cut to [0, 1], which it thus reaches.
ZETA = 1.1
GAMMA = -0.1

# The share of steps without the penalty; its exponent from there to the end.
WARMUP = 0.2
EXPONENTS = (20.0, 2.0)


def rectified_sigmoid(v: Float[Array, "..."]) -> Float[Array, "..."]:
    """`h(v)`, in [0, 1]; 0 and 1 from `v = -2.4` and `2.4` on, where its slope is 0."""
    return jnp.clip(jax.nn.sigmoid(v) * (ZETA - GAMMA) + GAMMA, 0.0, 1.0)


def rounding_start(w: Float[Array, "..."], scale: Float[Array, "..."]) -> Float[Array, "..."]:
    """The `v` whose `h` is the fraction of `w / scale`, in float32; 0 for one half.

    Hardened at once it rounds to nearest.
    """
    steps = _steps(w, scale)
    fraction = steps - jnp.floor(steps)
    return jnp.log((fraction - GAMMA) / (ZETA - fraction))


def soft_round(
    w: Float[Array, "..."],
    v: Float[Array, "..."],
    scale: Float[Array, "..."],
    zero_point: Int[Array, "..."] | None = None,
    *,
    qmin: int | Array,
    qmax: int | Array,
) -> Float[Array, "..."]:
    """The weights while they are learned: `floor(w / scale) + h(v)` steps, within the range.

    The gradient is to `v` alone, `scale * h'(v)` inside the range and 0 outside: weights,
    scales and zero points are constants here, as the papers have them.

    Args:
      w: Float weights.
      v: Shaped as `w`, float32.
      scale: Step, broadcastable to `w`.
      zero_point: Integers shaped as `scale`; None for a symmetric range.
      qmin: Least code.
      qmax: Greatest code.

    Returns:
      In the shape and dtype of `w`.
    """
    w, scale = lax.stop_gradient((w, scale))
    codes, zero = _within(
        jnp.floor(_steps(w, scale)) + rectified_sigmoid(v), zero_point, qmin, qmax
    )
    return ((codes - zero) * scale.astype(jnp.float32)).astype(w.dtype)


def hard_codes(
    w: Float[Array, "..."],
    v: Float[Array, "..."],
    scale: Float[Array, "..."],
    zero_point: Int[Array, "..."] | None = None,
    *,
    qmin: int | Array,
    qmax: int | Array,
) -> Int[Array, "..."]:
    """The codes that were learned, int8: up where `v >= 0`; arguments as in `soft_round`.

    `qmin` and `qmax` must be those of at most 8 bits.
    """
    up = (v >= 0).astype(jnp.float32)
    return _within(jnp.floor(_steps(w, scale)) + up, zero_point, qmin, qmax)[0].astype(jnp.int8)


def _steps(w, scale) -> Array:
    return w.astype(jnp.float32) / scale.astype(jnp.float32)


def _within(steps, zero_point, qmin, qmax) -> tuple[Array, Array]:
    """Codes, still float32, cut to the range, and the zero point as float32."""
    low, high = (jnp.asarray(bound, jnp.float32) for bound in (qmin, qmax))
    zero = jnp.zeros((), jnp.float32)
    if zero_point is not None:
        zero = lax.stop_gradient(zero_point).astype(jnp.float32)
    return jnp.clip(steps + zero, low, high), zero


@jax.custom_vjp
def rounding_penalty(v: Float[Array, "..."], beta: float | Array) -> Float[Array, ""]:
    """`sum(1 - |2 h(v) - 1|**beta)`: 0 when every `h` is 0 or 1, `v.size` when all are 1/2.

    The gradient is to `v` alone. It is 0 at `h = 1/2` and where `h` has reached 0 or 1, and
    finite for every `v` and every `beta >= 1`; a power's own rule would take logarithms of 0.

    Args:
      v: The learned numbers, float32.
      beta: Exponent, at least 1; may be traced.
    """
    return jnp.sum(1.0 - jnp.abs(2.0 * rectified_sigmoid(v) - 1.0) ** jnp.asarray(beta, v.dtype))


def _penalty_forward(v, beta):
    return rounding_penalty(v, beta), (v, jnp.asarray(beta, v.dtype))


def _penalty_backward(saved, g):
    v, beta = saved
    sigmoid = jax.nn.sigmoid(v)
    h = sigmoid * (ZETA - GAMMA) + GAMMA
    from_middle = 2.0 * jnp.clip(h, 0.0, 1.0) - 1.0
    slope = (ZETA - GAMMA) * sigmoid * (1.0 - sigmoid)
    pull = -2.0 * beta * jnp.abs(from_middle) ** (beta - 1.0) * jnp.sign(from_middle) * slope
    return g * jnp.where((h > 0.0) & (h < 1.0), pull, 0.0), None


rounding_penalty.defvjp(_penalty_forward, _penalty_backward)


def penalty_exponent(
    step: int | Array,
    steps: int | Array,
    *,
    warmup: float = WARMUP,
    start: float = EXPONENTS[0],
    end: float = EXPONENTS[1],
) -> tuple[Float[Array, ""], Bool[Array, ""]]:
    """`beta` of step number `step`, counted from 0, and whether the penalty counts yet.

    It does not during warm-up, where `beta` is `start`; from there `beta` falls linearly to
    `end` at number `steps`, as in the code of all sources (some of which say cosine). The loss
    takes `jnp.where(on, penalty, 0.0)`, whose gradient is exactly 0 while it is off.
    """
    done, total = jnp.asarray(step, jnp.float32), jnp.asarray(steps, jnp.float32)
    share = (done - warmup * total) / ((1.0 - warmup) * total)
    return start + (end - start) * jnp.clip(share, 0.0, 1.0), done >= warmup * total


def straight_through_round(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """`round(x)`, halves to even, with the gradient of `x`."""
    return x + lax.stop_gradient(jnp.round(x) - x)


def fake_quantize_ste(
    x: Float[Array, "..."],
    scale: Float[Array, "..."],
    zero_point: Shaped[Array, "..."] | None = None,
    *,
    qmin: int | Array,
    qmax: int | Array,
) -> Float[Array, "..."]:
    """`quantizers.fake_quantize`, the same to the bit, with gradients that pass through it.

    With the amount by which each value is rounded held constant, and the zero point rounded:
    inside the range `x` has gradient 1, the scale `code - zero_point - x / scale` and the zero
    point 0; outside, `x` has 0, the scale `bound - zero_point` and the zero point `-scale`.
    Inside means that the rounded code needs no clipping. A gradient sums over the values that
    share the scale or zero point (LSQ, LSQ+; `qjax.calibrate.step_size`).

    Args:
      x: Weights or activations, any float dtype.
      scale: Positive, float32, broadcastable to `x`.
      zero_point: Broadcastable to `x`: integers, or floats that are learned, and rounded
        before use; None for 0.
      qmin: Least code; may be traced, and broadcast against `x`: bits are data.
      qmax: Greatest code; likewise.

    Returns:
      In the dtype of `x`, as is its gradient; those of `scale` and of a float `zero_point` have
      their own shapes and dtypes. There is none to `qmin` and `qmax`.
    """
    low, high = (jnp.asarray(bound, jnp.float32) for bound in (qmin, qmax))
    zero = jnp.zeros((), jnp.float32) if zero_point is None else zero_point.astype(jnp.float32)
    return _fake_quantize(x, scale.astype(jnp.float32), zero, low, high)


def _grid(x, scale, zero, low, high) -> tuple[Array, Array, Array]:
    """`x` in steps; its code less the zero point, in float32; whether that is unclipped."""
    steps, zero = x.astype(jnp.float32) / scale, jnp.round(zero)
    code = jnp.round(steps) + zero
    return steps, jnp.clip(code, low, high) - zero, (code >= low) & (code <= high)


@jax.custom_vjp
def _fake_quantize(x, scale, zero, low, high):
    return (_grid(x, scale, zero, low, high)[1] * scale).astype(x.dtype)


def _forward(x, scale, zero, low, high):
    return _fake_quantize(x, scale, zero, low, high), (x, scale, zero, low, high)


def _backward(saved, g):
    # Computed again from the arguments, which keeps nothing of the size of `x` but `x`.
    _, scale, zero, _, _ = saved
    steps, code, inside = _grid(*saved)
    wide = g.astype(jnp.float32)
    to_scale = _sum_to(wide * (code - jnp.where(inside, steps, 0.0)), scale.shape)
    to_zero = _sum_to(jnp.where(inside, 0.0, -wide * scale), zero.shape)
    return jnp.where(inside, g, jnp.zeros_like(g)), to_scale, to_zero, None, None


_fake_quantize.defvjp(_forward, _backward)


def _sum_to(wide: Array, shape: tuple[int, ...]) -> Array:
    """The sum over the axes along which `shape` was broadcast."""
    lead = wide.ndim - len(shape)
    axes = [lead + axis for axis, size in enumerate(shape) if size == 1]
    return jnp.sum(wide, axis=(*range(lead), *axes), keepdims=True).reshape(shape)


def mix(
    key: PRNGKeyArray, x: Float[Array, "..."], x_hat: Float[Array, "..."], *, probability=0.5
) -> Float[Array, "..."]:
    """QDrop: `x_hat`, each element of which is `x` again with the given probability.

    Args:
      key: Of the draw.
      x: Float activations.
      x_hat: The same after quantization, in the same shape and dtype.
      probability: Of an element to stay float, in [0, 1], to 16 bits; may be traced.
    """
    # 16 random bits are half the work of the 32 that `jax.random.bernoulli` draws.
    draws = jax.random.bits(key, x.shape, jnp.uint16).astype(jnp.float32)
    return jnp.where(draws < jnp.asarray(probability, jnp.float32) * 2.0**16, x, x_hat)


def block_loss(
    y: Float[Array, "*b c"], target: Float[Array, "*b c"], *, power: float = 2.0
) -> Float[Array, ""]:
    """The mean over samples and positions of the sum over channels of `|y - target|**power`.

    Channels are the last axis: of images `[b, h, w, c]`, tokens `[b, t, c]` and vectors
    `[b, c]` alike. The sources sum over axis 1, which is channels for their images and vectors
    but tokens for their sequences; their weight of the rounding penalty, 0.01, is meant for this
    scale. In float32.

    Args:
      y: Output of the quantized block.
      target: Output of the float block.
      power: 2.0 for rounding; 2.4 is what the sources use for scales of activations.
    """
    return jnp.mean(jnp.sum(_errors(y, target, power), axis=-1))


def relative_loss(
    y: Float[Array, "..."], target: Float[Array, "..."], *, power: float = 2.0
) -> Float[Array, ""]:
    """`sum |y - target|**power / sum |target|**power` over all axes; blocks compare in it.

    A target of zeros counts as one of the least normal float32.
    """
    size = jnp.sum(_errors(target, jnp.zeros_like(target), power))
    tiny = float(jnp.finfo(jnp.float32).tiny)
    return jnp.sum(_errors(y, target, power)) / jnp.maximum(size, tiny)


def _errors(y, target, power: float) -> Array:
    difference = y.astype(jnp.float32) - target.astype(jnp.float32)
    return jnp.square(difference) if power == 2.0 else jnp.abs(difference) ** power
