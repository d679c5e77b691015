"""GPTQ: the same integers as a plain reference, and less error than rounding to nearest."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qjax.calibrate.gptq import GPTQSettings, gptq, output_error
from qjax.core.config import WeightSpec
from qjax.core.quantizers import integer_range, quantize_weight

INPUTS, OUTPUTS = 48, 12


def problem(seed=0, inputs=INPUTS, outputs=OUTPUTS):
    """A kernel, and `X^T X / n` of correlated inputs, some much larger than others."""
    rng = np.random.default_rng(seed)
    mixing = rng.standard_normal((inputs, inputs)) * np.exp(rng.standard_normal(inputs))
    x = rng.standard_normal((400, inputs)) @ mixing / np.sqrt(inputs)
    w = rng.standard_normal((inputs, outputs)) / np.sqrt(inputs)
    return jnp.asarray(w, jnp.float32), jnp.asarray(x.T @ x / 400, jnp.float32)


def spec_of(symmetric=True, group_size=None, bits=4, method="minmax"):
    granularity = "per_channel" if group_size is None else "per_group"
    return WeightSpec(
        bits=bits,
        symmetric=symmetric,
        granularity=granularity,
        group_size=group_size,
        method=method,
    )


def floats(codes, inputs=INPUTS):
    spread = lambda a: np.repeat(np.asarray(a, np.float64), inputs // a.shape[0], axis=0)
    zero = 0 if codes.zero_point is None else spread(codes.zero_point)
    return (np.asarray(codes.codes, np.float64) - zero) * spread(codes.scale)


def reference(w, hessian, *, bits, symmetric, group_size, block, damping=0.01):
    """The algorithm as the paper prints it, in float64: one input after the other, no blocks
    but for the groups' scales, which are read at the last multiple of `block`."""
    w = np.asarray(w, np.float64).copy()
    hessian = np.asarray(hessian, np.float64)
    hessian = hessian + damping * np.mean(np.diag(hessian)) * np.eye(len(w))
    upper = np.linalg.cholesky(np.linalg.inv(hessian)).T
    qmin, qmax = integer_range(bits, symmetric=symmetric)
    # What the kernel was when the running block began.
    at_block, scale, zero = w.copy(), None, None
    result = np.zeros_like(w)
    for i in range(len(w)):
        if i % block == 0:
            at_block = w.copy()
        if i % (group_size or len(w)) == 0:
            rows = at_block[i : i + (group_size or len(w))]
            low, high = np.minimum(rows.min(0), 0), np.maximum(rows.max(0), 0)
            if symmetric:
                scale, zero = np.maximum(-low, high) / qmax, 0
            else:
                scale = (high - low) / (qmax - qmin)
                zero = np.clip(qmin - np.round(low / scale), qmin, qmax)
        codes = np.clip(np.round(w[i] / scale) + zero, qmin, qmax)
        result[i] = (codes - zero) * scale
        w[i:] -= np.outer(upper[i, i:], (w[i] - result[i]) / upper[i, i])
    return result


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(
    ("group_size", "settings", "block"),
    [
        (None, GPTQSettings(block=20), 20),
        (16, GPTQSettings(), 16),
        (12, GPTQSettings(refresh="stale", block=16), 16),
    ],
    ids=["per channel", "groups", "stale groups"],
)
def test_the_integers_are_those_of_a_plain_reference(symmetric, group_size, settings, block):
    w, hessian = problem()
    found = gptq(
        w,
        hessian,
        spec_of(symmetric, group_size),
        group_size=group_size,
        scale_dtype=jnp.float32,
        settings=settings,
    )
    expected = reference(
        w, hessian, bits=4, symmetric=symmetric, group_size=group_size, block=block
    )
    assert np.abs(floats(found) - expected).max() <= 1e-4 * np.abs(expected).max()


@pytest.mark.quick_cases("*-3")
@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [None, 16])
@pytest.mark.parametrize("act_order", [False, True])
def test_outputs_are_nearer_than_with_rounding_to_nearest(bits, symmetric, group_size, act_order):
    spec = spec_of(symmetric, group_size, bits)
    for seed in range(2):
        w, hessian = problem(seed)
        nearest = quantize_weight(w, spec, group_size=group_size)
        settings = GPTQSettings(act_order=act_order)
        found = gptq(w, hessian, spec, group_size=group_size, settings=settings)
        errors = [
            float(output_error(w, jnp.asarray(floats(codes), jnp.float32), hessian))
            for codes in (nearest, found)
        ]
        assert errors[1] < 0.9 * errors[0]


def test_the_error_is_that_of_the_outputs():
    rng = np.random.default_rng(1)
    x, w, w_hat = (rng.standard_normal(s).astype(np.float32) for s in ((30, 8), (8, 5), (8, 5)))
    expected = np.sum(np.square(x @ (w_hat - w)))
    assert float(output_error(w, w_hat, x.T @ x)) == pytest.approx(expected, rel=1e-5)


def test_uncorrelated_inputs_are_rounded_to_nearest():
    w, _ = problem()
    spec = spec_of()
    found = gptq(w, jnp.eye(INPUTS), spec)
    np.testing.assert_array_equal(found.codes, quantize_weight(w, spec).codes)


def test_inputs_that_are_always_0_get_weights_of_0_and_disturb_nothing():
    w, hessian = problem()
    alive = np.ones(INPUTS, bool)
    alive[[3, 17, 40]] = False
    dead = jnp.where(jnp.asarray(alive)[:, None] & alive, hessian, 0.0)
    found = floats(gptq(w, dead, spec_of(bits=8), scale_dtype=jnp.float32))
    assert not found[~alive].any()
    assert np.isfinite(found).all()
    assert np.abs(found[alive] - np.asarray(w)[alive]).max() < 0.1


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_groups_of_one_sign_lose_no_more_than_their_steps(sign):
    """A range that is not widened to 0 and a zero point that is cut would clip them."""
    w, _ = problem()
    w = sign * (jnp.abs(w) + 1.0)
    found = gptq(w, 1e6 * jnp.eye(INPUTS), spec_of(False, 16), group_size=16)
    # Half a step, and what the stored scale is rounded by (2**-8 of the range).
    step = np.repeat(np.asarray(found.scale, np.float64), 16, axis=0)
    assert (np.abs(floats(found) - w) <= 0.5 * step + 15 * step * 2**-8).all()


def test_layers_of_one_shape_run_together():
    ws, hessians = (jnp.stack(arrays) for arrays in zip(problem(0), problem(1), strict=True))
    spec = spec_of(False, 16)
    together = jax.vmap(lambda w, h: gptq(w, h, spec, group_size=16))(ws, hessians)
    for i in range(2):
        alone = gptq(ws[i], hessians[i], spec, group_size=16)
        same = np.mean(np.asarray(together.codes[i] == alone.codes))
        assert same > 0.99  # matmuls of another shape may round another way


def test_settings_out_of_range_are_refused():
    with pytest.raises(ValueError, match="damping must be positive; got 0"):
        GPTQSettings(damping=0)
    with pytest.raises(ValueError, match="refresh must be aligned or stale; got 'often'"):
        GPTQSettings(refresh="often")
    with pytest.raises(ValueError, match="block must be at least 1"):
        GPTQSettings(block=0)
