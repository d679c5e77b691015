"""Sums of features, Inception Score, precision and recall, and the bootstrap, by definition."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import linalg, stats

from qjax.core.metrics import feature_statistics, frechet_distance, kernel_distance
from qjax.core.moments import FeatureMoments
from qjax.core.resampling import (
    frechet_resamples,
    inception_score_resamples,
    kernel_resamples,
    resample_counts,
    standard_interval,
)
from qjax.core.set_metrics import inception_score, precision_recall

few = settings(max_examples=20, deadline=None)
seeds = st.integers(0, 2**32 - 1)


def features(seed, n=40, d=6, shift=0.0):
    rng = np.random.default_rng(seed)
    return shift + rng.normal(size=(n, d)) @ rng.normal(size=(d, d))


# --- Moments -----------------------------------------------------------------------------


@few
@given(seed=seeds, cut=st.integers(1, 39))
def test_moments_of_parts_add_up_to_those_of_the_whole(seed, cut):
    x = features(seed)
    parts = FeatureMoments.of(x[:cut]) + FeatureMoments.of(x[cut:])
    whole = feature_statistics(x)
    assert parts.n == len(x)
    np.testing.assert_allclose(parts.statistics().mean, whole.mean, atol=1e-12)
    np.testing.assert_allclose(parts.statistics().cov, whole.cov, atol=1e-10)


def test_sums_of_the_same_parts_are_equal_to_the_last_bit():
    parts = [features(i, n=7).astype(np.float32) for i in range(5)]
    sums = lambda: sum((FeatureMoments.of(p) for p in parts), FeatureMoments.zero(6))
    first, again = sums().statistics(), sums().statistics()
    np.testing.assert_array_equal(first.cov, again.cov)
    np.testing.assert_array_equal(first.mean, again.mean)


def test_float32_features_far_from_zero_keep_their_covariance():
    x = (1000 + features(0, n=500)).astype(np.float32)
    found = FeatureMoments.of(x).statistics().cov
    np.testing.assert_allclose(found, np.cov(x.astype(np.float64), rowvar=False), rtol=1e-7)


def test_a_picture_that_counts_twice_is_one_that_is_there_twice():
    x = features(0, n=5)
    counted = FeatureMoments.of(x, np.array([2, 0, 1, 1, 1])).statistics()
    np.testing.assert_allclose(counted.cov, np.cov(x[[0, 0, 2, 3, 4]], rowvar=False))


def test_moments_refuse_what_is_no_number_and_a_single_picture():
    with pytest.raises(ValueError, match="finite"):
        FeatureMoments.of(np.array([[1.0, np.nan]]))
    with pytest.raises(ValueError, match="two pictures"):
        FeatureMoments.of(np.ones((1, 3))).statistics()


def test_a_frechet_distance_of_moments_is_that_of_scipys_matrix_root():
    x, y = features(0, n=200), features(1, n=300, shift=0.5)
    a, b = (FeatureMoments.of(f).statistics() for f in (x, y))
    root = linalg.sqrtm(np.cov(x, rowvar=False) @ np.cov(y, rowvar=False)).real
    expected = np.sum((x.mean(0) - y.mean(0)) ** 2) + np.trace(
        np.cov(x, rowvar=False) + np.cov(y, rowvar=False) - 2 * root
    )
    assert frechet_distance(a, b).value == pytest.approx(expected, rel=1e-9)


# --- Inception Score ---------------------------------------------------------------------


def test_the_inception_score_is_the_definition_split_by_split():
    logits = features(3, n=30, d=7)
    scores = []
    for part in np.split(logits, 3):
        p = np.exp(part) / np.exp(part).sum(1, keepdims=True)
        divergences = [stats.entropy(row, p.mean(0)) for row in p]
        scores.append(np.exp(np.mean(divergences)))
    found = inception_score(logits, splits=3)
    assert found.mean == pytest.approx(np.mean(scores))
    assert found.std == pytest.approx(np.std(scores))


def test_sure_and_even_classes_score_their_number_and_equal_pictures_one():
    sure = 1000.0 * np.eye(5)[np.arange(20) % 5]
    assert inception_score(sure, splits=4).mean == pytest.approx(5)
    assert inception_score(np.tile(features(0, n=1), (8, 1)), splits=1).mean == pytest.approx(1)


@few
@given(seed=seeds)
def test_an_inception_score_lies_between_one_and_the_number_of_classes(seed):
    logits = 5 * features(seed, n=20, d=4)
    assert 1 - 1e-9 <= inception_score(logits, splits=1).mean <= 4 + 1e-9


def test_more_splits_than_pictures_are_refused():
    with pytest.raises(ValueError, match="splits=5"):
        inception_score(np.zeros((4, 3)), splits=5)


# --- Precision and recall ----------------------------------------------------------------


def manifold_by_loops(points, of, k):
    """Whether each point lies in the ball of one of `of`, ball by ball."""
    radius = [np.sort([np.linalg.norm(a - b) for b in of])[k] for a in of]
    return np.array(
        [any(np.linalg.norm(p - a) <= r for a, r in zip(of, radius, strict=True)) for p in points]
    )


@few
@given(seed=seeds, k=st.integers(1, 4))
def test_precision_and_recall_are_the_definition_ball_by_ball(seed, k):
    x, y = features(seed, n=17, d=3), features(seed, n=23, d=3, shift=0.7)
    found = precision_recall(x, y, k=k)
    np.testing.assert_array_equal(found.inside, manifold_by_loops(x, y, k))
    np.testing.assert_array_equal(found.covered, manifold_by_loops(y, x, k))


def test_equal_sets_have_full_and_distant_sets_no_precision_and_recall():
    x = features(0, n=2000, d=4)  # more than are compared at a time
    same, far = precision_recall(x, x), precision_recall(x, x + 1e4)
    assert (same.precision, same.recall) == (1, 1)
    assert (far.precision, far.recall) == (0, 0)


def test_a_set_that_has_collapsed_is_precise_and_recalls_little():
    real = features(0, n=300, d=2)
    found = precision_recall(real[:1] + 1e-3 * features(1, n=300, d=2), real)
    assert found.precision > 0.9 and found.recall < 0.2


def test_too_few_pictures_for_k_neighbours_are_refused():
    with pytest.raises(ValueError, match="more than k"):
        precision_recall(np.zeros((3, 2)), np.zeros((9, 2)))


# --- Resampling --------------------------------------------------------------------------


def test_counts_sum_to_the_number_of_pictures_and_depend_on_the_seed_alone():
    counts = resample_counts(30, resamples=8, seed=1)
    assert (counts.sum(axis=1) == 30).all() and counts.shape == (8, 30)
    np.testing.assert_array_equal(counts, resample_counts(30, resamples=8, seed=1))
    assert (counts != resample_counts(30, resamples=8, seed=2)).any()


def test_resamples_are_metrics_of_the_pictures_drawn_again():
    x, y = features(0, n=30), features(1, n=30, shift=0.3)
    counts = resample_counts(30, resamples=3)
    drawn = [np.repeat(np.arange(30), row) for row in counts]
    expected = [frechet_distance(x[i], y[i]).value for i in drawn]
    np.testing.assert_allclose(frechet_resamples(x, y, counts, counts), expected, rtol=1e-8)
    fixed = [frechet_distance(x[i], y).value for i in drawn]
    np.testing.assert_allclose(frechet_resamples(x, y, counts), fixed, rtol=1e-8)
    scores = [inception_score(x[i], splits=1).mean for i in drawn]
    np.testing.assert_allclose(inception_score_resamples(x, counts), scores, rtol=1e-10)


def mmd_by_loops(x, y, *, paired):
    k = lambda a, b: (a @ b / len(a) + 1) ** 3
    n, m = len(x), len(y)
    within = lambda f: np.mean(
        [k(f[i], f[j]) for i in range(len(f)) for j in range(len(f)) if i != j]
    )
    across = [k(x[i], y[j]) for i in range(n) for j in range(m) if not paired or i != j]
    return within(x) + within(y) - 2 * np.mean(across)


@pytest.mark.parametrize("paired", [False, True])
def test_kernel_distances_of_resamples_are_the_definition(paired):
    x, y = features(0, n=9, d=3), features(1, n=9, d=3)
    counts = resample_counts(9, resamples=4)
    drawn = [np.repeat(np.arange(9), row) for row in counts]
    expected = [mmd_by_loops(x[i], y[i], paired=paired) for i in drawn]
    found = kernel_resamples(x, y, counts, counts, paired=paired)
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-9)


def test_with_all_counts_one_it_is_the_kernel_distance_of_the_sets():
    x, y = features(0, n=25), features(1, n=25)
    once = np.ones((1, 25), int)
    whole = kernel_distance(x, y, subset_size=25, subsets=1).mean
    assert kernel_resamples(x, y, once, once)[0] == pytest.approx(whole)


def test_pairs_of_equal_pictures_are_at_no_distance_only_if_pairs_are_left_out():
    x, once = features(0, n=12), np.ones((1, 12), int)
    assert kernel_resamples(x, x, once, once, paired=True)[0] == pytest.approx(0, abs=1e-9)
    assert kernel_resamples(x, x, once, once)[0] < -1e-3


def test_pairs_with_counts_of_their_own_are_refused():
    x = features(0, n=6)
    a, b = (resample_counts(6, resamples=2, seed=seed) for seed in (0, 1))
    with pytest.raises(ValueError, match="drawn together"):
        kernel_resamples(x, x, a, b, paired=True)


def test_the_interval_of_a_mean_is_the_textbooks():
    x = np.random.default_rng(0).normal(3, 2, 400)
    counts = resample_counts(400, resamples=2000)
    found = standard_interval(float(x.mean()), counts @ x / 400, n=400)
    assert found.estimate == x.mean()
    half = 1.96 * x.std() / np.sqrt(400)
    assert (found.high - found.low) / 2 == pytest.approx(half, rel=0.06)


def test_pairing_narrows_the_interval_of_a_difference():
    """Two models whose pictures share most of what varies between them."""
    real, ours = features(0, n=300, shift=1.0), features(1, n=300)
    theirs = ours + 0.02 * features(2, n=300)
    counts, others = (resample_counts(300, resamples=40, seed=seed) for seed in (0, 1))
    a = frechet_resamples(ours, real, counts)
    paired = np.std(a - frechet_resamples(theirs, real, counts))
    assert paired < 0.2 * np.std(a - frechet_resamples(theirs, real, others))


def test_an_interval_covers_the_difference_between_two_draws():
    """Coverage: the standard deviation of resamples is that of fresh sets of pictures."""
    rng = np.random.default_rng(0)
    real = feature_statistics(rng.normal(size=(5000, 4)))
    fresh = [frechet_distance(0.5 + rng.normal(size=(200, 4)), real).value for _ in range(60)]
    x = 0.5 + rng.normal(size=(200, 4))
    resampled = frechet_resamples(x, real, resample_counts(200, resamples=60))
    assert np.std(resampled) == pytest.approx(np.std(fresh), rel=0.4)
