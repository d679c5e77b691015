"""Metrics against closed forms, their invariances, and loops that follow the definitions."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest

from qjax.core import metrics
from qjax.core.metrics import (
    FeatureStatistics,
    bootstrap_interval,
    class_agreement,
    feature_statistics,
    frechet_distance,
    kernel_distance,
    psnr,
    relative_l2,
    share_interval,
    sqnr,
    ssim,
)

few = settings(max_examples=20, deadline=None)
seeds = st.integers(0, 2**32 - 1)


def pictures(seed, b=3, h=28, w=30, c=2):
    return np.random.default_rng(seed).random((b, h, w, c))


def features(seed, n=40, d=6, scale=1.0, shift=0.0):
    rng = np.random.default_rng(seed)
    return shift + scale * rng.normal(size=(n, d)) @ rng.normal(size=(d, d))


# --- Pairs of arrays ---------------------------------------------------------------------


def test_relative_l2_of_a_scaled_reference_is_the_scale_minus_one():
    reference = np.arange(1.0, 7.0).reshape(2, 3)
    assert relative_l2(1.25 * reference, reference) == pytest.approx(0.25)
    np.testing.assert_allclose(
        relative_l2(reference * [[2.0], [3.0]], reference, axis=1), [1.0, 2.0]
    )


def test_relative_l2_is_zero_when_equal_and_infinite_over_a_zero_reference():
    reference = np.array([[0.0, 0.0], [0.0, 0.0], [1.0, 2.0]])
    x = np.array([[0.0, 0.0], [1.0, 0.0], [1.0, 2.0]])
    np.testing.assert_array_equal(relative_l2(x, reference, axis=1), [0.0, np.inf, 0.0])


@few
@given(seed=seeds, gain=st.floats(1e-3, 1e3))
def test_sqnr_is_scale_invariant_and_minus_20_log10_of_relative_l2(seed, gain):
    reference, x = pictures(seed), pictures(seed + 1)
    assert sqnr(gain * x, gain * reference) == pytest.approx(sqnr(x, reference))
    power = np.sum(reference**2) / np.sum((x - reference) ** 2)
    assert sqnr(x, reference) == pytest.approx(10 * np.log10(power))


def test_sqnr_gains_six_decibels_a_bit():
    x = np.random.default_rng(0).uniform(-1, 1, 100_000)
    rounded = lambda bits: np.round(x * 2 ** (bits - 1)) / 2 ** (bits - 1)
    assert sqnr(rounded(9), x) - sqnr(rounded(8), x) == pytest.approx(6.02, abs=0.05)


def test_sqnr_is_infinite_when_exact():
    assert sqnr(np.ones(3), np.ones(3)) == np.inf
    assert sqnr(np.ones(3), np.zeros(3)) == -np.inf


# --- Pairs of pictures -------------------------------------------------------------------


@pytest.mark.parametrize("data_range", [1.0, 2.0, 255.0])
def test_psnr_of_a_constant_offset_is_the_closed_form(data_range):
    x = np.zeros((2, 4, 5, 3))
    y = x + data_range * np.array([0.1, 0.01]).reshape(2, 1, 1, 1)
    np.testing.assert_allclose(psnr(x, y, data_range=data_range), [20.0, 40.0])


def test_psnr_of_equal_pictures_is_infinite():
    x = pictures(0)
    assert np.isposinf(psnr(x, x, data_range=1.0)).all()


def test_psnr_of_uint8_does_not_wrap_around():
    x = np.zeros((1, 12, 12, 1), np.uint8)
    y = np.full_like(x, 255)
    assert psnr(x, y, data_range=255)[0] == pytest.approx(0.0)


def ssim_by_loops(x, y, data_range):
    """One picture `[h, w, c]`, window by window, as the paper writes it."""
    size, sigma = 11, 1.5
    i, j = np.mgrid[:size, :size] - size // 2
    weight = np.exp(-(i**2 + j**2) / (2 * sigma**2))
    weight /= weight.sum()
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    scores = []
    for channel in range(x.shape[2]):
        for top in range(x.shape[0] - size + 1):
            for left in range(x.shape[1] - size + 1):
                a = x[top : top + size, left : left + size, channel]
                b = y[top : top + size, left : left + size, channel]
                ma, mb = (weight * a).sum(), (weight * b).sum()
                va, vb = (weight * (a - ma) ** 2).sum(), (weight * (b - mb) ** 2).sum()
                cov = (weight * (a - ma) * (b - mb)).sum()
                scores.append(
                    (2 * ma * mb + c1) * (2 * cov + c2) / ((ma**2 + mb**2 + c1) * (va + vb + c2))
                )
    return np.mean(scores)


@pytest.mark.parametrize("shape", [(28, 28, 1), (32, 17, 3), (11, 11, 2)])
@pytest.mark.parametrize("data_range", [1.0, 255.0])
def test_ssim_equals_the_definition_window_by_window(shape, data_range):
    x, noise = pictures(1, 2, *shape), pictures(2, 2, *shape)
    x, y = data_range * x, data_range * (0.8 * x + 0.2 * noise)
    expected = [ssim_by_loops(a, b, data_range) for a, b in zip(x, y, strict=True)]
    np.testing.assert_allclose(ssim(x, y, data_range=data_range), expected, atol=1e-10)


@few
@given(seed=seeds, amount=st.floats(0, 2))
def test_ssim_is_symmetric_bounded_and_one_on_itself(seed, amount):
    x, y = pictures(seed), pictures(seed) - amount * pictures(seed + 1)
    forward = ssim(x, y, data_range=1.0)
    np.testing.assert_allclose(forward, ssim(y, x, data_range=1.0))
    assert (np.abs(forward) <= 1 + 1e-12).all()
    np.testing.assert_allclose(ssim(x, x, data_range=1.0), 1.0)


def test_ssim_falls_as_noise_grows():
    x = np.broadcast_to(np.linspace(0, 1, 32)[None, :, None, None], (1, 32, 32, 1))
    noise = pictures(3, 1, 32, 32, 1) - 0.5
    scores = [ssim(x, x + a * noise, data_range=1.0)[0] for a in (0.0, 0.1, 0.3, 1.0)]
    assert scores == sorted(scores, reverse=True)


def test_picture_metrics_do_not_depend_on_the_batch():
    x, y = pictures(4, b=5), pictures(5, b=5)
    for metric in (psnr, ssim):
        alone = [metric(x[i : i + 1], y[i : i + 1], data_range=1.0)[0] for i in range(5)]
        np.testing.assert_array_equal(metric(x, y, data_range=1.0), alone)


def test_jax_arrays_of_low_precision_are_taken():
    x = jnp.zeros((1, 12, 12, 1), jnp.bfloat16)
    y = jnp.full((1, 12, 12, 1), 0.5, jnp.float32)
    assert psnr(x, y, data_range=1.0)[0] == pytest.approx(6.0206, abs=1e-4)
    assert relative_l2(x, y) == 1.0
    assert ssim(x, y, data_range=1.0).shape == (1,)


def test_wrong_pictures_raise_with_a_way_out():
    x = pictures(0)
    with pytest.raises(ValueError, match=r"\[b, h, w, c\].*x\[None\]"):
        psnr(x[0], x[0], data_range=1.0)
    with pytest.raises(ValueError, match="one shape"):
        psnr(x, x[:1], data_range=1.0)
    with pytest.raises(ValueError, match="2 for"):
        ssim(x, x, data_range=0.0)
    with pytest.raises(ValueError, match="at least 11 x 11.*Use psnr"):
        ssim(x[:, :10], x[:, :10], data_range=1.0)


# --- Sets of pictures --------------------------------------------------------------------


@few
@given(seed=seeds, n=st.integers(2, 60))
def test_frechet_distance_to_itself_is_zero_also_where_n_is_below_d(seed, n):
    x = features(seed, n=n, d=12)
    distance = frechet_distance(x, x)
    assert 0 <= distance.value <= 1e-10 * np.trace(feature_statistics(x).cov)
    assert distance.n == (n, n) and distance.d == 12


@few
@given(seed=seeds)
def test_frechet_distance_is_symmetric_and_invariant_under_rotation_and_shift(seed):
    x, y = features(seed, n=30), features(seed + 1, n=50, scale=2.0, shift=0.3)
    value = frechet_distance(x, y).value
    rotation, _ = np.linalg.qr(np.random.default_rng(seed).normal(size=(6, 6)))
    assert frechet_distance(y, x).value == pytest.approx(value)
    assert frechet_distance(x @ rotation, y @ rotation).value == pytest.approx(value)
    assert frechet_distance(x + 7.0, y + 7.0).value == pytest.approx(value)


@few
@given(seed=seeds)
def test_frechet_distance_of_diagonal_gaussians_is_the_closed_form(seed):
    rng = np.random.default_rng(seed)
    mean_x, mean_y = rng.normal(size=(2, 5))
    sigma_x, sigma_y = rng.uniform(0, 2, size=(2, 5))
    sigma_x[0] = sigma_y[1] = 0.0  # singular
    x = FeatureStatistics(mean=mean_x, cov=np.diag(sigma_x**2))
    y = FeatureStatistics(mean=mean_y, cov=np.diag(sigma_y**2))
    expected = np.sum((mean_x - mean_y) ** 2) + np.sum((sigma_x - sigma_y) ** 2)
    distance = frechet_distance(x, y)
    assert distance.value == pytest.approx(expected)
    assert distance.mean_term == pytest.approx(np.sum((mean_x - mean_y) ** 2))
    assert distance.n == (None, None)


def test_frechet_distance_of_singular_covariances_agrees_with_their_factors():
    # With S1 = A'A and S2 = B'B the cross term is the nuclear norm of A B', whose
    # singular values need no matrix square root at all.
    x, y = features(0, n=9, d=20), features(1, n=7, d=20)
    a, b = x - x.mean(0), y - y.mean(0)
    a, b = a / np.sqrt(len(x) - 1), b / np.sqrt(len(y) - 1)
    cross = np.linalg.svd(a @ b.T, compute_uv=False).sum()
    expected = np.sum((x.mean(0) - y.mean(0)) ** 2) + np.sum(a**2) + np.sum(b**2) - 2 * cross
    assert frechet_distance(x, y).value == pytest.approx(expected, rel=1e-6)


def test_frechet_distance_of_features_and_of_their_statistics_agree():
    x, y = features(0), features(1)
    mixed = frechet_distance(feature_statistics(x), y)
    assert mixed == frechet_distance(x, y)
    np.testing.assert_allclose(feature_statistics(x).cov, np.cov(x, rowvar=False))


def test_frechet_distance_is_computed_in_float64():
    # Around a mean of 1e4, float32 covariances would be noise.
    x = (features(0, n=500) + 1e4).astype(np.float32)
    y = (2 * features(0, n=500) + 1e4).astype(np.float32)
    centred = features(0, n=500)
    expected = frechet_distance(centred, 2 * centred).value
    assert frechet_distance(x, y).value == pytest.approx(expected, rel=1e-2)


def test_wrong_features_raise_with_a_way_out():
    x = features(0)
    with pytest.raises(ValueError, match="one width; got 6 and 4.*one layer"):
        frechet_distance(x, x[:, :4])
    with pytest.raises(ValueError, match="one width; got 6 and 4"):
        kernel_distance(x, x[:, :4])
    with pytest.raises(ValueError, match="n >= 2"):
        feature_statistics(x[:1])
    with pytest.raises(ValueError, match="1 of 40 rows"):
        frechet_distance(np.where(np.arange(40)[:, None] == 3, np.nan, x), x)
    with pytest.raises(ValueError, match="symmetric"):
        FeatureStatistics(mean=np.zeros(2), cov=np.array([[1.0, 0.5], [0.0, 1.0]]))
    with pytest.raises(ValueError, match=r"\[d, d\]"):
        FeatureStatistics(mean=np.zeros(2), cov=np.eye(3))
    with pytest.raises(ValueError, match="at least 2"):
        kernel_distance(x, x, subset_size=1)


def mmd2_by_loops(x, y):
    kernel = lambda a, b: (a @ b / len(a) + 1) ** 3
    m = len(x)
    within = sum(kernel(z[i], z[j]) for z in (x, y) for i in range(m) for j in range(m) if i != j)
    between = sum(kernel(a, b) for a in x for b in y)
    return within / (m * (m - 1)) - 2 * between / m**2


def test_kernel_distance_of_one_full_subset_equals_the_definition():
    x, y = features(0, n=12), features(1, n=12, shift=0.5)
    distance = kernel_distance(x, y, subset_size=12, subsets=1)
    assert distance.mean == pytest.approx(mmd2_by_loops(x, y))
    assert np.isnan(distance.std)


def test_kernel_distance_is_unbiased_for_one_distribution():
    # 400 independent draws of two sets of 8: the mean of the scores lies within four
    # standard errors of 0, although each alone is far from it.
    rng = np.random.default_rng(0)
    scores = [
        kernel_distance(*rng.normal(size=(2, 8, 3)), subset_size=8, subsets=1).mean
        for _ in range(400)
    ]
    assert abs(np.mean(scores)) < 4 * np.std(scores) / np.sqrt(len(scores))
    assert np.std(scores) > 0.05 and min(scores) < 0


def test_kernel_distance_grows_with_the_shift_and_shrinks_to_the_smaller_set():
    x = np.random.default_rng(0).normal(size=(60, 4))
    y = np.random.default_rng(1).normal(size=(50, 4))
    distances = [kernel_distance(x, y + a, subset_size=999, subsets=5) for a in (0, 1, 2)]
    means = [d.mean for d in distances]
    assert means == sorted(means) and means[2] > 10 * abs(means[0])
    assert distances[0].subset_size == 50 and distances[0].n == (60, 50)


def test_kernel_distance_repeats_for_a_seed_and_varies_between_seeds():
    x, y = features(0, n=50), features(1, n=50)
    run = lambda seed: kernel_distance(x, y, subset_size=20, subsets=4, seed=seed)
    assert run(3) == run(3)
    assert run(3).mean != run(4).mean


def test_class_agreement_is_the_share_of_equal_labels():
    assert class_agreement(np.array([1, 2, 3, 4]), jnp.array([1, 2, 0, 0])) == 0.5


def test_class_agreement_refuses_logits_and_unequal_lengths():
    with pytest.raises(TypeError, match="argmax"):
        class_agreement(np.zeros((4, 10)), np.zeros(4, int))
    with pytest.raises(ValueError, match="4 and 3"):
        class_agreement(np.zeros(4, int), np.zeros(3, int))


# --- Intervals ---------------------------------------------------------------------------


def test_bootstrap_interval_holds_the_mean_and_matches_the_normal_one():
    values = np.random.default_rng(0).normal(3.0, 2.0, size=400)
    interval = bootstrap_interval(values, seed=1)
    half = 1.96 * values.std(ddof=1) / 20
    assert interval.estimate == pytest.approx(values.mean())
    assert interval.low == pytest.approx(values.mean() - half, abs=0.03)
    assert interval.high == pytest.approx(values.mean() + half, abs=0.03)
    assert interval.n == 400 and interval.level == 0.95


def test_pairing_narrows_the_interval():
    rng = np.random.default_rng(0)
    baseline = rng.normal(30, 5, size=64)
    values = baseline + 0.5 + rng.normal(0, 0.1, size=64)
    paired = bootstrap_interval(values, baseline=baseline)
    alone = bootstrap_interval(values)
    assert 0 < paired.low < 0.5 < paired.high + 0.1
    assert paired.high - paired.low < (alone.high - alone.low) / 10


def test_bootstrap_interval_repeats_and_widens_with_its_level():
    values = np.random.default_rng(0).normal(size=30)
    run = lambda level: bootstrap_interval(values, level=level, resamples=2000)
    assert run(0.9) == run(0.9)
    assert run(0.99).high - run(0.99).low > run(0.9).high - run(0.9).low


def test_bootstrap_interval_takes_many_values_in_little_memory():
    values = np.random.default_rng(0).normal(size=100_000)
    interval = bootstrap_interval(values, resamples=25)  # three chunks, the last one short
    standard_error = values.std() / np.sqrt(values.size)
    assert interval.low < interval.estimate < interval.high
    assert interval.high - interval.low < 6 * standard_error


def test_bootstrap_interval_refuses_infinities_and_unpaired_values():
    with pytest.raises(ValueError, match="1 not finite.*say so"):
        bootstrap_interval(np.array([1.0, np.inf]))
    with pytest.raises(ValueError, match="paired"):
        bootstrap_interval(np.ones(3), baseline=np.ones(2))
    with pytest.raises(ValueError, match="level"):
        bootstrap_interval(np.ones(3), level=95)


@given(seeds, st.integers(1, 60), st.sampled_from([0.5, 0.9, 0.95, 0.99]))
@few
def test_share_interval_is_wilsons(seed, n, level):
    holds = np.random.default_rng(seed).random(n) < 0.8
    found = share_interval(holds, level=level)
    theirs = binomtest(int(holds.sum()), n).proportion_ci(level, method="wilson")
    assert found.estimate == holds.mean() and found.n == n
    assert (found.low, found.high) == pytest.approx((theirs.low, theirs.high), abs=1e-12)


def test_share_interval_refuses_what_is_no_claim():
    with pytest.raises(TypeError, match="booleans; got int64"):
        share_interval(np.ones(3, np.int64))
    with pytest.raises(ValueError, match="non-empty"):
        share_interval(np.zeros(0, bool))
    with pytest.raises(ValueError, match="level=95"):
        share_interval(np.ones(3, bool), level=95)


def test_every_public_name_is_exported_and_exists():
    assert sorted(metrics.__all__) == metrics.__all__
    assert all(hasattr(metrics, name) for name in metrics.__all__)
