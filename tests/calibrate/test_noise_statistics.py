"""Tests for the split of quantization noise, with values known in closed form."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qjax.calibrate.noise_statistics import (
    Correction,
    Moments,
    fit_correction,
    residual_test,
)

SHAPE = (200, 8, 8, 3)
BIAS = np.array([0.2, -0.1, 0.05])


def synthetic(k=0.1, std=0.3, seed=0):
    """A standard normal answer, and noise of which k, mu and the variance are known."""
    rng = np.random.default_rng(seed)
    e = rng.normal(size=SHAPE)
    return e, k * e + BIAS + std * rng.normal(size=SHAPE)


def test_synthetic_noise_gives_back_k_mu_and_variance():
    found = fit_correction(Moments.of(*synthetic()))
    assert found.k == pytest.approx(0.1, abs=0.01)
    np.testing.assert_allclose(found.mu, BIAS, atol=0.01)
    assert found.variance == pytest.approx(0.09, rel=0.02)


def test_the_corrected_error_has_the_variance_of_the_rest_over_1_21():
    e, d = synthetic()
    moments = Moments.of(e, d)
    found = fit_correction(moments)
    left = (e + d - found.mu) / (1 + found.k) - e
    assert np.var(left) == pytest.approx(0.09 / 1.21, rel=0.03)
    assert moments.error(found) == pytest.approx(np.mean(left**2), rel=1e-10)
    assert moments.error() == pytest.approx(np.mean(d**2), rel=1e-10)


def test_the_slope_is_that_of_a_line_through_all_values():
    e, d = synthetic()
    slope = np.polyfit(e.ravel(), d.ravel(), 1)[0]
    moments = Moments.of(e, d)
    assert moments.slope == pytest.approx(slope, rel=1e-10)
    expected = np.corrcoef(e.ravel(), d.ravel())[0, 1]
    assert moments.correlation == pytest.approx(expected, rel=1e-10)


def test_noise_against_the_answer_is_not_divided_and_stays_in_the_rest():
    found = fit_correction(Moments.of(*synthetic(k=-0.2)))
    assert found.k == 0
    # Its own variance and that of the part that follows the answer.
    assert found.variance == pytest.approx(0.09 + 0.04, rel=0.02)


def test_biases_of_channels_are_mistaken_for_a_slope_unless_it_is_taken_within_them():
    e, d = synthetic()
    e = e + 5 * BIAS  # channels whose noise is large have large answers, too
    moments = Moments.of(e, d)
    assert fit_correction(moments, slope="within").k == pytest.approx(0.1, abs=0.01)
    assert fit_correction(moments, slope="pooled").k > 0.12


@pytest.mark.parametrize("k", [-0.3, 0.0, 0.3])
def test_the_least_squares_gain_is_at_least_as_good_for_either_sign(k):
    moments = Moments.of(*synthetic(k=k, std=0.5))
    errors = {
        slope: moments.error(fit_correction(moments, slope=slope)) for slope in ("pooled", "mmse")
    }
    assert errors["mmse"] < errors["pooled"]
    # (1 + k) / ((1 + k)^2 + variance) of the quantized answer is the best there is.
    found = fit_correction(moments, slope="mmse")
    assert 1 / (1 + found.k) == pytest.approx((1 + k) / ((1 + k) ** 2 + 0.25), rel=0.02)


def test_the_total_mean_leaves_a_bias_where_the_answer_has_a_mean():
    e, d = synthetic()
    e, d = e + 1.0, d + 0.1  # the noise follows the answer
    moments = Moments.of(e, d)
    left = {
        bias: np.abs(np.mean((e + d - found.mu) / (1 + found.k) - e, axis=(0, 1, 2))).max()
        for bias in ("residual", "total")
        for found in [fit_correction(moments, bias=bias)]
    }
    assert left["residual"] < 1e-12
    assert left["total"] == pytest.approx(0.1 / 1.1, rel=0.05)


def test_each_correction_can_be_left_out():
    moments = Moments.of(*synthetic())
    plain = fit_correction(moments, correlated=False, bias="none")
    assert plain.k == 0
    assert not plain.mu.any()
    assert moments.error(plain) == pytest.approx(moments.error(), rel=1e-12)
    biased = fit_correction(moments, correlated=False)
    assert moments.error(biased) == pytest.approx(moments.error() - np.mean(moments.bias**2))


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 199), st.integers(0, 100))
def test_moments_of_parts_add_up_to_those_of_the_whole(cut, seed):
    e, d = synthetic(seed=seed)
    whole, parts = Moments.of(e, d), Moments.of(e[:cut], d[:cut]) + Moments.of(e[cut:], d[cut:])
    assert whole.count == parts.count
    np.testing.assert_allclose(parts.ed, whole.ed, rtol=1e-12)
    assert fit_correction(parts).k == pytest.approx(fit_correction(whole).k, rel=1e-9)


@settings(max_examples=30, deadline=None)
@given(st.floats(-0.5, 0.5), st.floats(0.01, 1.0), st.sampled_from(["pooled", "within", "mmse"]))
def test_no_correction_makes_the_error_of_its_own_samples_larger(k, std, slope):
    moments = Moments.of(*synthetic(k=k, std=std))
    corrected = moments.error(fit_correction(moments, slope=slope))
    assert corrected <= moments.error() * (1 + 1e-9)


def test_a_constant_answer_and_no_noise_correct_nothing():
    e = np.ones(SHAPE)
    assert fit_correction(Moments.of(e, 0 * e)) == Correction(0.0, pytest.approx(np.zeros(3)), 0.0)
    assert Moments.of(e, 0 * e).correlation == 0


def test_answers_that_are_not_finite_raise():
    e, d = synthetic()
    d[0, 0, 0, 0] = np.nan
    with pytest.raises(ValueError, match="must be finite"):
        Moments.of(e, d)


def test_normal_noise_passes_the_test_and_uniform_noise_does_not():
    rng = np.random.default_rng(0)
    e = rng.normal(size=1000)
    channel = rng.integers(0, 2, 1000)
    # Of biases of its own in every channel, which the correction takes off.
    correction = Correction(0.3, np.array([0.0, 5.0]), 1.0)
    d = 0.3 * e + correction.mu[channel] + rng.normal(size=1000)
    assert residual_test(e, d, channel, correction).p_value > 0.01
    plain, first = Correction(0.0, np.zeros(1), 1.0), np.zeros(1000, int)
    assert residual_test(e, d, first, plain).p_value < 0.01
    uniform = residual_test(e, rng.uniform(size=1000), first, plain)
    assert uniform.p_value < 0.01
    assert uniform.kurtosis == pytest.approx(-1.2, abs=0.1)
    assert residual_test(e, np.zeros(1000), first, plain).p_value == 0
