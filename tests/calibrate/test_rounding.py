"""AdaRound and the losses of blocks, on plain arrays."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from qjax.calibrate.rounding import (
    EXPONENTS,
    GAMMA,
    ZETA,
    block_loss,
    hard_codes,
    penalty_exponent,
    rectified_sigmoid,
    rounding_penalty,
    rounding_start,
    soft_round,
    straight_through_round,
)
from qjax.core.config import WeightSpec
from qjax.core.quantizers import Codes, affine, integer_range, quantize_weight, to_floats

pytestmark = pytest.mark.optimized  # some numbers must have equal bits

SHAPE = (6, 4)
weights = hnp.arrays(np.float32, SHAPE, elements=st.floats(-4.0, 4.0, width=32))
each = settings(max_examples=25, deadline=None)

start = jax.jit(rounding_start)
soft = jax.jit(soft_round)
hard = jax.jit(hard_codes)


def grid(w, bits, symmetric):
    """Scale and zero point per column, and the ends of the codes."""
    low, high = w.min(axis=0, keepdims=True), w.max(axis=0, keepdims=True)
    qmin, qmax = integer_range(bits, symmetric=symmetric)
    return *affine(low, high, bits=bits, symmetric=symmetric), qmin, qmax


def draw(seed=0, shape=SHAPE):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def slow_h(v):
    return np.clip((ZETA - GAMMA) / (1 + np.exp(-np.asarray(v, np.float64))) + GAMMA, 0, 1)


def slow_soft(w, v, scale, zero_point, qmin, qmax):
    """The definition in float64, a weight at a time."""
    w, scale = np.asarray(w, np.float64), np.broadcast_to(np.asarray(scale, np.float64), w.shape)
    zero = np.zeros(w.shape) if zero_point is None else np.broadcast_to(zero_point, w.shape)
    out = np.empty(w.shape)
    for at in np.ndindex(w.shape):
        code = np.floor(w[at] / scale[at]) + slow_h(v[at]) + zero[at]
        out[at] = scale[at] * (min(max(code, qmin), qmax) - zero[at])
    return out


@pytest.mark.parametrize("bits, symmetric", [(2, True), (4, True), (4, False), (8, False)])
def test_it_starts_at_the_float_weights(bits, symmetric):
    w = draw()
    scale, zero_point, qmin, qmax = grid(w, bits, symmetric)
    values = soft(w, start(w, scale), scale, zero_point, qmin=qmin, qmax=qmax)
    # The largest of an asymmetric range may lie half a step beyond it.
    room = 1e-5 if symmetric else 0.5
    assert np.max(np.abs(values - w) / scale) <= room
    inside = np.abs(values - w) / scale <= 1e-4
    assert np.mean(inside) >= 0.75


@given(weights)
@each
def test_it_starts_at_the_float_weights_whatever_they_are(w):
    scale, _, qmin, qmax = grid(w, 4, True)
    values = soft(w, start(w, scale), scale, qmin=qmin, qmax=qmax)
    assert np.all(np.abs(values - w) <= 1e-5 * np.asarray(scale))


def test_weights_beyond_the_range_start_at_its_end():
    w, scale = jnp.array([[3.3, -9.0]]), jnp.ones((1, 1))
    np.testing.assert_array_equal(soft(w, start(w, scale), scale, qmin=-2, qmax=2), [[2, -2]])


@given(weights, hnp.arrays(np.float32, SHAPE, elements=st.floats(-6.0, 6.0, width=32)))
@each
def test_soft_rounding_is_its_definition(w, v):
    scale, zero_point, qmin, qmax = grid(w, 4, False)
    # `floor` may differ where float32 puts a quotient on the other side of an integer.
    steps = np.asarray(w, np.float64) / np.asarray(scale, np.float64)
    clear = np.abs(steps - np.round(steps)) > 1e-5
    wanted = slow_soft(w, v, scale, zero_point, qmin, qmax)
    values = soft(w, v, scale, zero_point, qmin=qmin, qmax=qmax)
    error = np.abs(values - wanted) / np.asarray(scale)
    assert np.all(error[clear] <= 1e-5)


@pytest.mark.parametrize("symmetric", [True, False])
def test_hardened_at_once_it_rounds_to_nearest(symmetric):
    w = draw(1)
    spec = WeightSpec(bits=4, symmetric=symmetric, granularity="per_channel")
    codes, scale, zero_point = quantize_weight(w, spec, scale_dtype=jnp.float32)
    qmin, qmax = integer_range(4, symmetric=symmetric)
    ours = hard(w, start(w, scale), scale, zero_point, qmin=qmin, qmax=qmax)
    assert ours.dtype == jnp.int8
    np.testing.assert_array_equal(ours, codes)


def test_halves_go_up():
    w, scale = jnp.array([-1.5, -0.5, 0.5, 1.5, 2.5]), jnp.ones(())
    np.testing.assert_array_equal(start(w, scale), 0.0)
    np.testing.assert_array_equal(
        hard(w, start(w, scale), scale, qmin=-7, qmax=7), [-1, 0, 1, 2, 3]
    )


def test_hard_codes_flip_with_the_sign_of_v():
    w, scale = draw(2), jnp.full((1, 4), 0.4)
    down, up = (hard(w, jnp.full(SHAPE, v), scale, qmin=-7, qmax=7) for v in (-1e-3, 0.0))
    np.testing.assert_array_equal(up, np.minimum(down + 1, 7))
    np.testing.assert_array_equal(down, np.floor(w / scale))


@given(weights, hnp.arrays(np.bool_, SHAPE), st.booleans())
@each
def test_hard_and_soft_agree_once_every_h_is_0_or_1(w, up, symmetric):
    scale, zero_point, qmin, qmax = grid(w, 4, symmetric)
    v = np.where(up, 9.0, -9.0).astype(np.float32)
    codes = hard(w, v, scale, zero_point, qmin=qmin, qmax=qmax)
    values = soft(w, v, scale, zero_point, qmin=qmin, qmax=qmax)
    np.testing.assert_array_equal(to_floats(Codes(codes, scale, zero_point)), values)


def test_the_gradient_is_that_of_finite_differences():
    w, v = draw(3), draw(4)
    scale, zero_point, qmin, qmax = grid(w, 3, False)
    target = np.asarray(draw(5), np.float64)

    def loss(v):
        return jnp.sum((soft_round(w, v, scale, zero_point, qmin=qmin, qmax=qmax) - target32) ** 2)

    target32 = jnp.asarray(target, jnp.float32)
    gradient, eps = jax.grad(loss)(v), 1e-5
    for at in np.ndindex(SHAPE):
        pair = []
        for side in (eps, -eps):
            moved = np.asarray(v, np.float64).copy()
            moved[at] += side
            values = slow_soft(w, moved, scale, zero_point, qmin, qmax)
            pair.append(np.sum((values - target) ** 2))
        assert gradient[at] == pytest.approx((pair[0] - pair[1]) / (2 * eps), rel=1e-3, abs=1e-4)


def test_gradients_reach_v_alone_and_only_inside_the_range():
    w, scale = jnp.array([0.3, 9.0, -9.0]), jnp.ones(3)
    call = lambda w, v, scale: jnp.sum(soft_round(w, v, scale, qmin=-3, qmax=3))
    to_w, to_v, to_scale = jax.grad(call, argnums=(0, 1, 2))(w, jnp.zeros(3), scale)
    np.testing.assert_array_equal(to_w, 0)
    np.testing.assert_array_equal(to_scale, 0)
    np.testing.assert_allclose(to_v, [(ZETA - GAMMA) / 4, 0, 0], rtol=1e-6)


@pytest.mark.parametrize("beta", [20.0, 7.3, 2.0])
def test_the_penalty_is_its_definition_and_its_gradient_that_of_finite_differences(beta):
    v = jnp.linspace(-2.3, 2.3, 24)
    slow = lambda v: np.sum(1 - np.abs(2 * slow_h(v) - 1) ** beta)
    assert rounding_penalty(v, beta) == pytest.approx(slow(v), rel=1e-5)
    gradient, eps = jax.jit(jax.grad(rounding_penalty))(v, beta), 1e-6
    for k in range(v.size):
        step = np.zeros(v.size)
        step[k] = eps
        wide = np.asarray(v, np.float64)
        wanted = (slow(wide + step) - slow(wide - step)) / (2 * eps)
        assert gradient[k] == pytest.approx(wanted, rel=1e-3, abs=1e-5)


def test_the_penalty_is_its_size_in_the_middle_and_0_at_the_ends():
    assert rounding_penalty(jnp.zeros(7), 20.0) == 7
    assert rounding_penalty(jnp.array([-5.0, 5.0, 3.0]), 2.0) == 0


@pytest.mark.parametrize("beta", [20.0, 2.0, 1.0])
def test_gradients_are_finite_at_the_extremes(beta):
    least = jnp.log((0.0 - GAMMA) / ZETA)  # where h reaches 0
    v = jnp.array([0.0, 1e-30, -1e-30, least, -least, 90.0, -90.0, 3e38, -3e38])
    gradient = jax.jit(jax.grad(rounding_penalty))(v, beta)
    assert np.all(np.isfinite(gradient))
    np.testing.assert_array_equal(gradient[5:], 0)
    assert gradient[0] == 0
    loss = lambda v: jnp.sum(soft_round(jnp.full(9, 0.3), v, jnp.ones(()), qmin=-7, qmax=7))
    assert np.all(np.isfinite(jax.jit(jax.grad(loss))(v)))


def test_the_exponent_is_held_then_falls_linearly():
    at = jax.jit(penalty_exponent, static_argnames="warmup")
    first, last = EXPONENTS
    betas = np.asarray(at(jnp.arange(101), 100)[0])
    np.testing.assert_array_equal(betas[:21], first)
    np.testing.assert_allclose(np.diff(betas[20:]), (last - first) / 80, rtol=1e-4)
    assert betas[100] == last
    assert at(0, 10, warmup=0.0) == (first, True) and at(5, 10, warmup=0.0)[0] == 11


def test_the_penalty_counts_exactly_nothing_during_warm_up():
    _, on = penalty_exponent(jnp.arange(100), 100)
    np.testing.assert_array_equal(on, np.arange(100) >= 20)

    def term(v, step):
        beta, on = penalty_exponent(step, 100)
        return jnp.where(on, rounding_penalty(v, beta), 0.0)

    value, gradient = jax.value_and_grad(term)(draw(), 19)
    assert value == 0
    np.testing.assert_array_equal(gradient, 0)
    assert term(draw(), 20) > 0


def learn(x, w, scale, *, bits=3, steps=1000, rate=2e-2, weight=0.1):
    """AdaRound of one linear layer with Adam, on its own inputs; the `v` at the end."""
    qmin, qmax = integer_range(bits, symmetric=True)
    target = x @ w

    def loss(v, step):
        y = x @ soft_round(w, v, scale, qmin=qmin, qmax=qmax)
        beta, on = penalty_exponent(step, steps)
        return block_loss(y, target) + weight * jnp.where(on, rounding_penalty(v, beta), 0.0)

    def adam(step, state):
        v, mean, square = state
        g = jax.grad(loss)(v, step)
        mean, square = 0.9 * mean + 0.1 * g, 0.999 * square + 0.001 * g * g
        count = step.astype(jnp.float32) + 1.0
        change = (mean / (1 - 0.9**count)) / (jnp.sqrt(square / (1 - 0.999**count)) + 1e-8)
        return v - rate * change, mean, square

    v = rounding_start(w, scale)
    return jax.lax.fori_loop(0, steps, adam, (v, jnp.zeros_like(v), jnp.zeros_like(v)))[0]


def test_learned_rounding_beats_nearest_where_inputs_are_correlated():
    """The claim of AdaRound: the best of roundings is not the nearest one."""
    rng = np.random.default_rng(0)
    mixing = rng.standard_normal((16, 16)) + 2.0
    x = jnp.asarray(rng.standard_normal((256, 16)) @ mixing / 8, jnp.float32)
    fresh = jnp.asarray(rng.standard_normal((256, 16)) @ mixing / 8, jnp.float32)
    w = draw(6, (16, 8))
    scale, _, qmin, qmax = grid(w, 3, True)
    v = jax.jit(learn)(x, w, scale)

    h = rectified_sigmoid(v)
    assert np.mean((h < 0.01) | (h > 0.99)) >= 0.95

    def error(v, x):
        codes = hard(w, v, scale, qmin=qmin, qmax=qmax)
        return block_loss(x @ to_floats(Codes(codes, scale, None)), x @ w)

    nearest = start(w, scale)
    assert error(v, x) <= 0.5 * error(nearest, x)
    assert error(v, fresh) <= 0.5 * error(nearest, fresh)
    assert np.mean((v >= 0) != (nearest >= 0)) >= 0.05


def test_traced_bits_and_steps_compile_once():
    compiled = []

    @jax.jit
    def run(w, v, scale, qmin, qmax, step):
        compiled.append(1)
        values = soft_round(w, v, scale, qmin=qmin, qmax=qmax)
        codes = hard_codes(w, v, scale, qmin=qmin, qmax=qmax)
        beta, on = penalty_exponent(step, 100)
        return values, codes, jnp.where(on, rounding_penalty(v, beta), 0.0)

    w, v, scale = draw(), draw(1), jnp.full((1, 4), 0.3)
    for bits in (2, 4, 8):
        qmin, qmax = integer_range(bits, symmetric=True)
        values, codes, _ = run(w, v, scale, jnp.int32(qmin), jnp.int32(qmax), jnp.int32(bits))
        np.testing.assert_array_equal(codes, hard(w, v, scale, qmin=qmin, qmax=qmax))
        np.testing.assert_array_equal(values, soft(w, v, scale, qmin=qmin, qmax=qmax))
    assert len(compiled) == 1


def test_groups_and_vmap_are_the_same_as_one_at_a_time():
    ws, vs = draw(7, (3, *SHAPE)), draw(8, (3, *SHAPE))
    scale = jnp.abs(draw(9, (3, *SHAPE))) + 0.1
    call = functools.partial(soft_round, qmin=-7, qmax=7)
    one = jnp.stack([call(*args) for args in zip(ws, vs, scale, strict=True)])
    np.testing.assert_array_equal(jax.vmap(call)(ws, vs, scale), one)


def test_bfloat16_weights_stay_so_and_are_rounded_in_float32():
    w = draw().astype(jnp.bfloat16)
    v = rounding_start(w, jnp.bfloat16(0.25))
    assert v.dtype == jnp.float32
    values = soft_round(w, v, jnp.bfloat16(0.25), qmin=-31, qmax=31)
    assert values.dtype == jnp.bfloat16
    np.testing.assert_array_equal(values, w)


@given(weights)
@each
def test_straight_through_rounding_is_rounding_with_the_gradient_of_nothing(x):
    y, pull = jax.vjp(straight_through_round, jnp.asarray(x))
    np.testing.assert_array_equal(y, np.round(x))
    np.testing.assert_array_equal(pull(jnp.ones_like(y))[0], 1)
