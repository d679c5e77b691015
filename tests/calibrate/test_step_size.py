"""Learned step sizes and the ranges they start from, on plain arrays."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from qjax.calibrate.rounding import fake_quantize_ste
from qjax.calibrate.step_size import (
    LOG_SCALE_LIMIT,
    ema,
    fake_quantize_lsq,
    lsq_gradient_scale,
    range_minmax,
    range_mse,
    scale_and_zero_point,
    scale_of,
)
from qjax.core.config import BITS, WeightSpec
from qjax.core.quantizers import affine, fake_quantize, integer_range, quantize_weight

SHAPE = (6, 8)
values = hnp.arrays(np.float32, SHAPE, elements=st.floats(-8.0, 8.0, width=32))
each = settings(max_examples=25, deadline=None)
# log_scale and zero_point may have any shape that broadcasts to x.
SMALL = [(), (1, 1), (1, 8), (6, 1), (8,), SHAPE]


def draw(seed=0, shape=SHAPE, wide=2.0):
    return jnp.asarray(wide * np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def slow(x, scale, zero_point, qmin, qmax):
    """Values, and what the surrogate holds: the amount each was rounded by, who was clipped."""
    x, scale = (np.asarray(array, np.float64) for array in (x, scale))
    zero = np.round(np.asarray(zero_point, np.float64))
    steps = x / scale
    code = np.round(steps) + zero
    values = (np.clip(code, qmin, qmax) - zero) * scale
    return values, np.round(steps) - steps, (code >= qmin) & (code <= qmax)


def surrogate(x, scale, zero, held, bounds):
    """`x_hat` as a smooth function: rounding offsets and clipped codes are held."""
    offset, inside = held
    return np.where(inside, (x / scale + offset) * scale, (bounds - zero) * scale)


@given(values, st.sampled_from(BITS), st.booleans())
@each
def test_the_value_is_that_of_the_quantizer_to_the_bit(x, bits, symmetric):
    qmin, qmax = integer_range(bits, symmetric=symmetric)
    scale, zero_point = affine(x.min(), x.max(), bits=bits, symmetric=symmetric)
    ours = fake_quantize_ste(x, scale, zero_point, qmin=qmin, qmax=qmax)
    np.testing.assert_array_equal(ours, fake_quantize(x, scale, zero_point, qmin=qmin, qmax=qmax))


@pytest.mark.parametrize("symmetric", [True, False])
def test_the_value_is_that_of_a_float64_reference(symmetric):
    x, log_scale = draw(), jnp.asarray(np.linspace(-2, 0, 8).reshape(1, 8), jnp.float32)
    zero_point = None if symmetric else jnp.full((1, 1), 1.3)
    ours = fake_quantize_lsq(x, log_scale, zero_point, qmin=-8, qmax=7)
    zero = 0.0 if symmetric else 1.3
    wanted, _, _ = slow(x, scale_of(log_scale), zero, -8, 7)
    np.testing.assert_allclose(ours, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", SMALL)
def test_gradients_are_those_of_finite_differences_with_the_rounding_held(shape):
    x = draw(1)
    log_scale, zero_point = draw(2, shape, 0.2) - 1.0, draw(3, shape, 2.0)
    upstream = np.asarray(draw(4), np.float64)
    qmin, qmax = -8, 7

    def loss(x, log_scale, zero_point):
        x_hat = fake_quantize_lsq(x, log_scale, zero_point, qmin=qmin, qmax=qmax)
        return jnp.sum(x_hat * jnp.asarray(upstream, jnp.float32))

    gradients = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(x, log_scale, zero_point)
    start = [np.asarray(array, np.float64) for array in (x, log_scale, zero_point)]
    start[2] = np.round(start[2])
    _, *held = slow(start[0], np.exp(start[1]), start[2], qmin, qmax)
    assert 0.05 < np.mean(held[1]) < 0.95  # some are clipped, and some are not
    code = np.round(start[0] / np.exp(start[1])) + start[2]
    bounds = np.where(code < qmin, qmin, qmax)

    def held_loss(x, log_scale, zero):
        return np.sum(surrogate(x, np.exp(log_scale), zero, held, bounds) * upstream)

    eps = 1e-6
    for which, gradient in enumerate(gradients):
        assert gradient.shape == start[which].shape
        for at in np.ndindex(gradient.shape):
            moved = [[np.array(array) for array in start] for _ in range(2)]
            moved[0][which][at] += eps
            moved[1][which][at] -= eps
            wanted = (held_loss(*moved[0]) - held_loss(*moved[1])) / (2 * eps)
            assert gradient[at] == pytest.approx(wanted, rel=2e-3, abs=2e-4)


def test_the_gradient_to_the_scale_is_the_chain_rule_of_that_to_its_logarithm():
    x, scale = draw(), jnp.full((1, 8), 0.3)
    codes = {"qmin": -3, "qmax": 3}
    to_scale = jax.grad(lambda s: jnp.sum(fake_quantize_ste(x, s, **codes)))(scale)
    to_log = jax.grad(lambda s: jnp.sum(fake_quantize_lsq(x, s, **codes)))(jnp.log(scale))
    np.testing.assert_allclose(to_log, scale * to_scale, rtol=1e-5)


def test_the_gradient_to_the_logarithm_is_the_error_inside_and_the_value_outside():
    x = jnp.array([0.3, 0.7, 1.4, 9.0, -9.0])
    x_hat, pull = jax.vjp(
        lambda s: fake_quantize_lsq(x, jnp.broadcast_to(s, (5,)), qmin=-2, qmax=2), jnp.zeros(5)
    )
    np.testing.assert_allclose(pull(jnp.ones(5))[0], [-0.3, 0.3, -0.4, 2, -2], atol=1e-6)
    np.testing.assert_array_equal(x_hat, [0, 1, 1, 2, -2])


def test_gradients_to_the_input_pass_inside_the_range_alone():
    x = jnp.array([2.4, 2.6, -2.4, -2.6, 0.0])  # a step past the end begins at 2.5
    gradient = jax.grad(lambda x: jnp.sum(fake_quantize_ste(x, jnp.ones(()), qmin=-2, qmax=2)))(x)
    np.testing.assert_array_equal(gradient, [1, 0, 1, 0, 1])


def test_integer_zero_points_are_constants():
    x, zero_point = draw(), jnp.full((1, 8), 3, jnp.int32)
    call = lambda s: jnp.sum(fake_quantize_lsq(x, s, zero_point, qmin=-8, qmax=7))
    same = lambda s: jnp.sum(
        fake_quantize_lsq(x, s, zero_point.astype(jnp.float32), qmin=-8, qmax=7)
    )
    log_scale = jnp.full((1, 8), -1.0)
    np.testing.assert_array_equal(jax.grad(call)(log_scale), jax.grad(same)(log_scale))


@given(values)
@each
def test_sixteen_bits_leave_values_unchanged_to_half_a_step(x):
    codes = {"qmin": -32768, "qmax": 32767}
    scale, zero_point = scale_and_zero_point(*range_minmax(x), symmetric=False, **codes)
    x_hat = fake_quantize_lsq(x, jnp.log(scale), zero_point, **codes)
    # The largest values may be off by the rounding of the zero point, and of exp(log(scale)).
    assert np.max(np.abs(x_hat - x)) <= (0.5 + 0.5 + 65535 * 1e-6) * float(scale) + 1e-30
    inside = np.abs(x) <= 0.99 * np.abs(x).max()
    assert np.all(np.abs(x_hat - x)[inside] <= 0.51 * float(scale) + 4e-7 * np.abs(x)[inside])


def test_traced_bits_compile_once_and_may_differ_from_sample_to_sample():
    compiled = []

    @jax.jit
    def run(x, log_scale, qmin, qmax):
        compiled.append(1)
        call = lambda s: jnp.sum(fake_quantize_lsq(x, s, qmin=qmin, qmax=qmax))
        return fake_quantize_lsq(x, log_scale, qmin=qmin, qmax=qmax), jax.grad(call)(log_scale)

    x, log_scale = draw(), jnp.full((1, 8), -1.0)
    for bits in (2, 4, 8, 16):
        qmin, qmax = integer_range(bits, symmetric=True)
        ours, _ = run(x, log_scale, jnp.int32(qmin), jnp.int32(qmax))
        np.testing.assert_array_equal(ours, fake_quantize_lsq(x, log_scale, qmin=qmin, qmax=qmax))
    assert len(compiled) == 1
    qmax = jnp.array([[1], [1], [1], [7], [7], [7]])
    mixed = fake_quantize_lsq(x, log_scale, qmin=-qmax, qmax=qmax)
    np.testing.assert_array_equal(mixed[:3], fake_quantize_lsq(x[:3], log_scale, qmin=-1, qmax=1))
    np.testing.assert_array_equal(mixed[3:], fake_quantize_lsq(x[3:], log_scale, qmin=-7, qmax=7))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_short_floats_keep_their_dtype_and_scales_float32(dtype):
    x, log_scale = draw().astype(dtype), jnp.full((1, 8), -1.0)
    x_hat, pull = jax.vjp(functools.partial(fake_quantize_lsq, qmin=-7, qmax=7), x, log_scale)
    to_x, to_scale = pull(jnp.ones_like(x_hat))
    assert x_hat.dtype == to_x.dtype == dtype
    assert to_scale.dtype == jnp.float32 and to_scale.shape == (1, 8)


def test_extremes_give_no_nan():
    x = jnp.array([0.0, 1e-38, -1e-38, 3e38, -3e38, jnp.inf, -jnp.inf])
    for log_scale in (-1e4, -LOG_SCALE_LIMIT, 0.0, LOG_SCALE_LIMIT, 1e4):
        call = lambda x, s, z: fake_quantize_lsq(x, s, z, qmin=-8, qmax=7)
        x_hat, pull = jax.vjp(call, x, jnp.float32(log_scale), jnp.float32(2.0))
        assert np.all(np.isfinite(x_hat))
        for gradient in pull(jnp.ones_like(x) * 1e-3):
            assert np.all(np.isfinite(gradient))


def test_nan_is_not_lost():
    assert np.isnan(fake_quantize_ste(jnp.array([jnp.nan]), jnp.ones(()), qmin=-8, qmax=7)[0])


def test_the_gradient_scale_changes_gradients_and_not_a_bit_of_the_value():
    x, log_scale, zero_point = draw(), draw(1, (1, 8)), draw(2, (1, 8))
    scale = lsq_gradient_scale(x.shape, log_scale.shape, 7)
    assert scale == pytest.approx(1 / np.sqrt(6 * 7))

    def call(log_scale, zero_point, **rest):
        return fake_quantize_lsq(x, log_scale, zero_point, qmin=-8, qmax=7, **rest)

    plain, pull = jax.vjp(call, log_scale, zero_point)
    damped, pull_less = jax.vjp(
        functools.partial(call, gradient_scale=scale), log_scale, zero_point
    )
    np.testing.assert_array_equal(plain, damped)
    for more, less in zip(pull(plain), pull_less(plain), strict=True):
        np.testing.assert_allclose(less, scale * more, rtol=1e-5)


def test_learned_scales_beat_the_full_range():
    """By gradient descent on |x - x_hat|**2, for values with a long tail, at 3 bits."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((4096, 2)) ** 3, jnp.float32)
    qmin, qmax = integer_range(3, symmetric=True)
    scale, _ = scale_and_zero_point(*range_minmax(x, (0,)), qmin=qmin, qmax=qmax, symmetric=True)
    loss = lambda s: jnp.mean(jnp.square(fake_quantize_lsq(x, s, qmin=qmin, qmax=qmax) - x))
    step = lambda _, s: s - 0.02 * jnp.sign(jax.grad(loss)(s))
    learned = jax.lax.fori_loop(0, 200, step, jnp.log(scale))
    assert loss(learned) <= 0.6 * loss(jnp.log(scale))


@given(values, st.sampled_from(BITS), st.booleans())
@each
def test_scale_and_zero_point_are_those_of_the_quantizers_for_traced_codes(x, bits, symmetric):
    low, high = range_minmax(x, (0,))
    qmin, qmax = integer_range(bits, symmetric=symmetric)
    run = jax.jit(scale_and_zero_point, static_argnames="symmetric")
    ours = run(low, high, qmin=jnp.int32(qmin), qmax=jnp.int32(qmax), symmetric=symmetric)
    wanted = affine(low, high, bits=bits, symmetric=symmetric)
    for mine, theirs in zip(jax.tree.leaves(ours), jax.tree.leaves(wanted), strict=True):
        assert mine.dtype == theirs.dtype
        np.testing.assert_array_equal(mine, theirs)


def test_ranges_keep_reduced_axes_with_size_1_or_are_scalars():
    x = draw(shape=(2, 3, 4)).astype(jnp.bfloat16)
    for find in (range_minmax, functools.partial(range_mse, qmin=-8, qmax=7, symmetric=False)):
        for axes, shape in ((None, ()), ((0, 1), (1, 1, 4)), ((-1,), (2, 3, 1))):
            low, high = find(x, axes)
            assert low.shape == high.shape == shape and low.dtype == jnp.float32
            assert np.all(low <= high)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [3, 8])
def test_the_searched_range_is_that_of_the_search_for_weights(bits, symmetric):
    x = draw(shape=(64, 5)) ** 3
    spec = WeightSpec(bits=bits, symmetric=symmetric, granularity="per_channel", method="mse")
    wanted = quantize_weight(x, spec, scale_dtype=jnp.float32)
    qmin, qmax = integer_range(bits, symmetric=symmetric)
    codes = {"qmin": jnp.int32(qmin), "qmax": jnp.int32(qmax), "symmetric": symmetric}
    scale, zero_point = scale_and_zero_point(*range_mse(x, (0,), **codes), **codes)
    np.testing.assert_allclose(scale, wanted.scale, rtol=1e-6)
    if not symmetric:
        np.testing.assert_array_equal(zero_point, wanted.zero_point)


@given(values, st.sampled_from([2, 4, 8]), st.booleans())
@each
def test_the_searched_range_is_inside_the_full_one_and_no_worse(x, bits, symmetric):
    qmin, qmax = integer_range(bits, symmetric=symmetric)
    codes = {"qmin": jnp.int32(qmin), "qmax": jnp.int32(qmax)}
    search = jax.jit(range_mse, static_argnames=("axes", "symmetric"))
    full, found = range_minmax(x), search(x, symmetric=symmetric, **codes)
    assert np.abs(found[0]) <= np.abs(full[0]) and np.abs(found[1]) <= np.abs(full[1])

    def error(ends):
        grid = scale_and_zero_point(*ends, symmetric=symmetric, **codes)
        wide = np.asarray(fake_quantize_ste(x, *grid, **codes), np.float64)
        return np.mean(np.abs(wide - x) ** 2.4)

    assert error(found) <= error(full) * (1 + 1e-4) + 1e-30


def test_the_search_holds_one_candidate_at_a_time():
    """A few arrays of the size of the input, where 80 candidates would be 80."""
    x = jax.ShapeDtypeStruct((1024, 256), jnp.float32)
    find = jax.jit(functools.partial(range_mse, qmin=-8, qmax=7, symmetric=False))
    memory = find.lower(x).compile().memory_analysis()
    assert memory.temp_size_in_bytes <= 4 * 4 * 1024 * 256


def test_the_moving_average_forgets_by_its_decay():
    average = jnp.zeros(2)
    for _ in range(20):
        average = ema(average, jnp.array([1.0, -2.0]))
    np.testing.assert_allclose(average, (1 - 0.95**20) * np.array([1, -2]), rtol=1e-5)
    np.testing.assert_array_equal(ema(average, average, decay=1.0), average)
