"""From floats to integers: what holds for any weights, and for any activations."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from qjax.core.config import BITS, ActSpec, WeightSpec
from qjax.core.quantizers import (
    ERROR_POWER,
    Codes,
    fake_quantize,
    integer_range,
    quantize_activation,
    quantize_weight,
    round_to_codes,
    to_floats,
)

SHAPE = (12, 3)
GROUP = 4

# One shape throughout, so that every setting is compiled once.
# Zeros and 24 decades; what is smaller has a test of its own.
magnitudes = st.floats(2.0**-66, 2.0**14, width=32)
finite = st.one_of(st.just(0.0), magnitudes, magnitudes.map(lambda value: -value))
weights = hnp.arrays(np.float32, SHAPE, elements=finite)
each = settings(max_examples=25, deadline=None)

quantize = functools.partial(
    jax.jit(quantize_weight, static_argnames=("spec", "group_size", "scale_dtype")),
    group_size=GROUP,
    scale_dtype=jnp.bfloat16,
)
activate = jax.jit(quantize_activation, static_argnames=("spec", "group_size", "sample_axes"))


def grouped(bits, symmetric=True, **rest):
    rest = {"granularity": "per_group", "group_size": GROUP} | rest
    return WeightSpec(bits=bits, symmetric=symmetric, **rest)


def wide(small, shape, axis=0):
    """What every value of `shape` has of the scales or zero points, in float64."""
    small = np.asarray(small, np.float64)
    return np.broadcast_to(np.repeat(small, shape[axis] // small.shape[axis], axis), shape)


def floats(codes: Codes, axis=0):
    """The dequantized values in float64; groups run along `axis`."""
    shape = codes.codes.shape
    zero_point = 0 if codes.zero_point is None else wide(codes.zero_point, shape, axis)
    with np.errstate(invalid="ignore"):  # a step may be infinite
        return (np.asarray(codes.codes, np.float64) - zero_point) * wide(codes.scale, shape, axis)


def normal(*shape):
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


SYMMETRIES = pytest.mark.parametrize("symmetric", (True, False), ids=("symmetric", "asymmetric"))

# How much of its range an asymmetric group may lose to a scale that was rounded down.
CLIPPED = {"bfloat16": 2**-8, "float32": 2**-22}


@pytest.mark.parametrize("bits", (2, 4, 8))
@pytest.mark.parametrize("scale_dtype", CLIPPED)
@SYMMETRIES
@each
@given(w=weights)
def test_error_is_at_most_half_a_step(bits, symmetric, scale_dtype, w):
    codes = quantize(w, grouped(bits, symmetric), scale_dtype=jnp.dtype(scale_dtype))
    by_group = w.astype(np.float64).reshape(-1, GROUP, 3)
    width = np.maximum(by_group.max(1), 0) - np.minimum(by_group.min(1), 0)
    clipped = 0 if symmetric else wide(width, SHAPE) * CLIPPED[scale_dtype]
    # 1e-6: the quotient that is rounded is a float32 itself.
    half = wide(codes.scale, SHAPE) * 0.5 * (1 + 1e-6 * 2**bits)
    assert (np.abs(floats(codes) - w) <= half + clipped).all()


@pytest.mark.parametrize("bits", (2, 4, 8))
@SYMMETRIES
@each
@given(data=st.data())
def test_values_on_the_grid_are_exact(bits, symmetric, data):
    """Steps of 8 significant bits, which bfloat16 holds; groups that use the whole range."""
    qmin, qmax = integer_range(bits, symmetric=symmetric)
    codes = data.draw(hnp.arrays(np.int64, (3, GROUP, 3), elements=st.integers(qmin, qmax)))
    codes[:, 0], codes[:, 1] = qmin, qmax
    zero = 0 if symmetric else data.draw(st.integers(qmin, qmax))
    step = data.draw(st.integers(128, 255)) * 2.0 ** data.draw(st.integers(-30, 20))
    w = ((codes - zero) * step).reshape(SHAPE)
    quantized = quantize(w.astype(np.float32), grouped(bits, symmetric))
    np.testing.assert_array_equal(quantized.codes, codes.reshape(SHAPE))
    np.testing.assert_array_equal(floats(quantized), w)


@pytest.mark.parametrize("bits", (2, 8))
@pytest.mark.parametrize("method", ("minmax", "mse"))
@each
@given(w=weights)
def test_the_symmetric_range_is_mirrored(bits, method, w):
    spec = grouped(bits, method=method)
    there, mirrored = quantize(w, spec), quantize(-w, spec)
    np.testing.assert_array_equal(there.codes, -mirrored.codes)
    np.testing.assert_array_equal(there.scale, mirrored.scale)
    assert there.codes.min() > -(2 ** (bits - 1))


@pytest.mark.parametrize("sign", (1, -1))
@SYMMETRIES
@each
@given(w=weights)
def test_zero_is_exact_in_groups_of_one_sign(symmetric, sign, w):
    """Padding, and weights that were pruned, must stay zeros."""
    w = sign * np.abs(w)
    w[::GROUP] = 0.0
    quantized = quantize(w, grouped(4, symmetric))
    np.testing.assert_array_equal(floats(quantized)[::GROUP], 0.0)
    if not symmetric:
        used = np.abs(w).reshape(-1, GROUP, 3).max(1) > 0
        end = -8 if sign > 0 else 7
        np.testing.assert_array_equal(np.asarray(quantized.zero_point)[used], end)


@SYMMETRIES
@pytest.mark.parametrize("method", ("minmax", "mse"))
def test_a_group_of_zeros_has_scale_one(symmetric, method):
    quantized = quantize(np.zeros(SHAPE, np.float32), grouped(4, symmetric, method=method))
    np.testing.assert_array_equal(quantized.scale, 1.0)
    np.testing.assert_array_equal(floats(quantized), 0.0)


@pytest.mark.parametrize("bits", (2, 8))
@SYMMETRIES
@each
@given(w=weights)
def test_a_value_alone_in_its_group_keeps_eight_significant_bits(bits, symmetric, w):
    """All that is lost is the rounding of its scale to bfloat16."""
    spec = grouped(bits, symmetric, group_size=1)
    quantized = quantize(w, spec, group_size=1)
    assert quantized.scale.shape == SHAPE
    assert (np.abs(floats(quantized) - w) <= 2.0**-8 * np.abs(w)).all()


@pytest.mark.parametrize("bits", (2, 4))
@SYMMETRIES
@each
@given(w=weights)
def test_the_search_never_does_worse_than_the_whole_range(bits, symmetric, w):
    errors = [
        (np.abs(floats(quantize(w, grouped(bits, symmetric, method=method))) - w) ** ERROR_POWER)
        for method in ("minmax", "mse")
    ]
    whole, searched = (error.reshape(-1, GROUP, 3).mean(1) for error in errors)
    # The search compares float32 errors: near a tie either may win.
    assert (searched <= whole * (1 + 1e-4) + 1e-30).all()


def test_the_search_does_better_on_weights_with_outliers():
    w = normal(256, 3)
    w[0] = 6.0
    errors = []
    for method in ("minmax", "mse"):
        spec = WeightSpec(bits=3, method=method)
        codes = quantize(w, spec, group_size=None)
        errors.append(np.mean(np.abs(floats(codes) - w) ** ERROR_POWER))
    assert errors[1] < 0.8 * errors[0]


@SYMMETRIES
@each
@given(w=weights, exponent=st.integers(-20, 20))
def test_scaling_by_a_power_of_two_scales_the_steps(symmetric, w, exponent):
    once, scaled = (
        quantize((w * factor).astype(np.float32), grouped(4, symmetric))
        for factor in (1.0, 2.0**exponent)
    )
    np.testing.assert_array_equal(once.codes, scaled.codes)
    used = np.abs(w).reshape(-1, GROUP, 3).max(1) > 0
    wanted = np.where(used, np.asarray(once.scale, np.float64) * 2.0**exponent, 1.0)
    np.testing.assert_array_equal(np.asarray(scaled.scale, np.float64), wanted)


@pytest.mark.quick_cases("per_tensor-symmetric", "per_channel-asymmetric")
@SYMMETRIES
@pytest.mark.parametrize("granularity", ("per_tensor", "per_channel"))
def test_more_bits_mean_less_error(symmetric, granularity):
    w = normal(64, 8)
    errors = []
    for bits in BITS:
        spec = WeightSpec(bits=bits, symmetric=symmetric, granularity=granularity)
        errors.append(np.mean((floats(quantize(w, spec, group_size=None)) - w) ** 2))
    assert errors == sorted(errors, reverse=True)
    # A bit halves the step: a quarter of the square, but for what clipping changes.
    assert errors[2] / errors[3] == pytest.approx(4, rel=0.35)


def test_finer_groups_mean_less_error():
    w = normal(64, 8) * np.exp(normal(64, 1))
    errors = []
    for granularity in ("per_tensor", "per_channel", "per_group"):
        group_size = GROUP if granularity == "per_group" else None
        spec = WeightSpec(bits=4, granularity=granularity, group_size=group_size)
        errors.append(np.mean((floats(quantize(w, spec, group_size=group_size)) - w) ** 2))
    assert errors == sorted(errors, reverse=True)


@SYMMETRIES
@pytest.mark.parametrize("method", ("minmax", "mse"))
def test_jit_gives_the_same_bits_as_op_by_op(symmetric, method):
    w = normal(*SHAPE)
    spec = grouped(4, symmetric, method=method)
    eager = quantize_weight(w, spec, group_size=GROUP)
    jax.tree.map(np.testing.assert_array_equal, quantize(w, spec), eager)


@SYMMETRIES
def test_vmap_is_the_loop(symmetric):
    w = normal(4, *SHAPE)
    spec = grouped(4, symmetric)
    loop = jax.tree.map(lambda *leaves: np.stack(leaves), *(quantize(one, spec) for one in w))
    together = jax.jit(jax.vmap(lambda w: quantize_weight(w, spec, group_size=GROUP)))(w)
    jax.tree.map(np.testing.assert_array_equal, together, loop)


def test_the_groups_of_a_convolution_run_within_one_tap():
    w = normal(3, 3, *SHAPE)
    quantized = quantize(w, grouped(4))
    assert quantized.codes.shape == w.shape
    assert quantized.scale.shape == (3, 3, 3, 3)
    tap = quantize(w[1, 2], grouped(4))
    np.testing.assert_array_equal(np.asarray(quantized.codes)[1, 2], tap.codes)
    np.testing.assert_array_equal(np.asarray(quantized.scale)[1, 2], tap.scale)


@pytest.mark.parametrize("bad", (np.nan, np.inf, -np.inf))
@SYMMETRIES
@pytest.mark.parametrize("method", ("minmax", "mse"))
def test_a_number_that_is_none_is_not_lost(bad, symmetric, method):
    """Its group becomes NaN, as a float matmul would make its results; others do not notice."""
    w = np.linspace(-1, 1, 36, dtype=np.float32).reshape(SHAPE)
    clean = floats(quantize(w, grouped(4, symmetric, method=method)))
    w[GROUP + 1, 2] = bad
    values = floats(quantize(w, grouped(4, symmetric, method=method)))
    np.testing.assert_array_equal(np.isfinite(values[GROUP : 2 * GROUP, 2]), False)
    values[GROUP : 2 * GROUP, 2] = clean[GROUP : 2 * GROUP, 2]
    np.testing.assert_array_equal(values, clean)


# Activations.

ACT_SHAPE = (2, 3, 8)
activations = hnp.arrays(np.float32, ACT_SHAPE, elements=finite)


@pytest.mark.parametrize("granularity", ("per_tensor", "per_token", "per_group"))
@pytest.mark.parametrize("bits", (4, 8))
@SYMMETRIES
@each
@given(x=activations)
def test_a_dynamic_range_leaves_half_a_step(granularity, bits, symmetric, x):
    group_size = GROUP if granularity == "per_group" else None
    spec = ActSpec(bits=bits, granularity=granularity, group_size=group_size, symmetric=symmetric)
    p = activate(x, spec, group_size=group_size)
    lead = {"per_tensor": (1, 1, 1), "per_token": (2, 3, 1), "per_group": (2, 3, 2)}
    assert p.scale.shape == lead[granularity]
    half = wide(p.scale, ACT_SHAPE, -1) * 0.5 * (1 + 1e-6 * 2**bits)
    assert (np.abs(floats(p, axis=-1) - x) <= half).all()
    qmin, qmax = integer_range(bits, symmetric=symmetric)
    assert p.codes.min() >= qmin
    assert p.codes.max() <= qmax


@pytest.mark.parametrize("mode", ("static", "per_step"))
@pytest.mark.parametrize("groups", (1, 2))
@SYMMETRIES
def test_a_static_range_is_read_from_the_row(mode, groups, symmetric):
    x = normal(*ACT_SHAPE) * 3
    scale = np.linspace(0.02, 0.03, groups, dtype=np.float32)
    zero = np.arange(5, 5 + groups).astype(np.int32)
    row = {"act_scale": scale} | ({} if symmetric else {"act_zero_point": zero})
    p = activate(x, ActSpec(mode=mode, symmetric=symmetric), row=row)
    repeat = lambda array: np.repeat(array, 8 // groups)
    codes = np.round(x / repeat(scale)) + (0 if symmetric else repeat(zero))
    low, high = integer_range(8, symmetric=symmetric)
    np.testing.assert_array_equal(p.codes, np.clip(codes, low, high))
    assert p.scale.shape == (1, 1, groups)


@pytest.mark.parametrize("mode", ("dynamic", "static"))
@SYMMETRIES
@pytest.mark.parametrize("bits", (3, 6))
def test_bits_may_be_data(mode, symmetric, bits):
    """Eight-bit settings with the range of fewer bits in the row are those bits."""
    x = normal(*ACT_SHAPE)
    qmin, qmax = integer_range(bits, symmetric=symmetric)
    row = {} if mode == "dynamic" else {"act_scale": jnp.float32(0.25)}
    bounds = {"act_qmin": jnp.int32(qmin), "act_qmax": jnp.int32(qmax)}
    data = activate(x, ActSpec(bits=8, mode=mode, symmetric=symmetric), row=row | bounds)
    fixed = activate(x, ActSpec(bits=bits, mode=mode, symmetric=symmetric), row=row)
    jax.tree.map(np.testing.assert_array_equal, data, fixed)


@SYMMETRIES
def test_zeros_and_tiny_inputs_stay_finite(symmetric):
    for value in (0.0, 1e-38, -1e-45):
        x = np.full(ACT_SHAPE, value, np.float32)
        p = activate(x, ActSpec(symmetric=symmetric))
        assert np.isfinite(p.scale).all()
        assert (np.abs(floats(p) - x) <= 2e-38).all()


@SYMMETRIES
@pytest.mark.parametrize("bad", (np.nan, np.inf))
def test_a_token_that_holds_no_number_stays_so(symmetric, bad):
    x = np.ones(ACT_SHAPE, np.float32)
    x[1, 2, 3] = bad
    finite = np.isfinite(floats(activate(x, ActSpec(symmetric=symmetric))))
    wanted = np.ones(ACT_SHAPE, bool)
    wanted[1, 2] = False
    np.testing.assert_array_equal(finite, wanted)


@pytest.mark.parametrize("mode", ("static", "per_step"))
def test_a_row_without_a_scale_raises(mode):
    with pytest.raises(ValueError, match=f"mode='{mode}' read act_scale .* calibrate first"):
        quantize_activation(jnp.ones(ACT_SHAPE), ActSpec(mode=mode), row={"time": jnp.ones(1)})


@pytest.mark.parametrize("shape", ((3,), (2, 2)))
def test_a_static_scale_of_the_wrong_shape_raises(shape):
    row = {"act_scale": jnp.ones(shape)}
    with pytest.raises(ValueError, match="a scalar or one value per group"):
        quantize_activation(jnp.ones(ACT_SHAPE), ActSpec(mode="static"), row=row)


@pytest.mark.parametrize("dtype", (jnp.float32, jnp.bfloat16))
def test_fake_quantize_is_there_and_back_in_the_dtype_of_x(dtype):
    x = jnp.asarray(normal(4, 5), dtype)
    scale, zero = jnp.float32(0.1), jnp.int32(3)
    y = fake_quantize(x, scale, zero, qmin=-8, qmax=7)
    codes = Codes(round_to_codes(x, scale, zero, qmin=-8, qmax=7), scale, zero)
    assert y.dtype == dtype
    np.testing.assert_array_equal(y, to_floats(codes).astype(dtype))
    np.testing.assert_array_equal(y, fake_quantize(y, scale, zero, qmin=-8, qmax=7))
