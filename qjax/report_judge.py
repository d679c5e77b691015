"""What the zoo's classifier adds to a comparison: distances to real pictures, and classes.

A Frechet distance of few pictures is large whatever they show, because a covariance of few
features is poor; so its value is given beside the one that as many draws from the real
pictures' own statistics have.
"""

from collections.abc import Sequence

import numpy as np

from qjax.core import metrics
from qjax.core.typing import Float
from qjax.report_data import ClassAgreement, FeatureDistance
from qjax.zoo import judge

NET = "fashion-features"
FLOOR_DRAWS = 10


def feature_distances(
    images: Float[np.ndarray, "n h w c"], reference: Float[np.ndarray, "n h w c"]
) -> tuple[FeatureDistance, ...]:
    """FD of quantized and float pictures to the real test set.

    Empty for a single picture, which has no covariance, and for pictures that are not finite.
    """
    if len(images) < 2 or not (np.isfinite(images).all() and np.isfinite(reference).all()):
        return ()
    real = judge.real_statistics()
    theirs, ours = (judge.judge(pictures).features for pictures in (images, reference))
    distance = FeatureDistance(
        name="FD",
        value=metrics.frechet_distance(theirs, real).value,
        value_float=metrics.frechet_distance(ours, real).value,
        net=f"{NET}, {ours.shape[1]} penultimate features",
        reference="the real test set",
        n=len(images),
    )
    return (distance,)


def agreement(
    images: Float[np.ndarray, "n h w c"],
    reference: Float[np.ndarray, "n h w c"],
    labels: Sequence[int],
) -> ClassAgreement:
    """How often the classifier sees the class that was asked for, in either set."""
    theirs, ours = (judge.judge(pictures).classes for pictures in (images, reference))
    asked = np.asarray(labels)
    return ClassAgreement(
        value=metrics.class_agreement(theirs, asked),
        value_float=metrics.class_agreement(ours, asked),
        net=NET,
        n=len(images),
    )


def distance_of_real_draws(n: int) -> float:
    """Mean FD to the real test set of `n` draws from its own mean and covariance."""
    real, rng = judge.real_statistics(), np.random.default_rng(0)
    values, vectors = np.linalg.eigh(real.cov)
    root = vectors * np.sqrt(np.maximum(values, 0))
    draws = [rng.standard_normal((n, len(real.mean))) @ root.T for _ in range(FLOOR_DRAWS)]
    distances = [metrics.frechet_distance(real.mean + draw, real).value for draw in draws]
    return float(np.mean(distances))


def notes(n: int) -> tuple[str, ...]:
    """What puts a distance of `n` pictures into proportion, and how good the classifier is."""
    known = judge.record()
    halves = (
        f"FD between two halves of the real test set is {known['fd_between_real_halves']:.2f} "
        f"(n = {known['fd_between_real_halves_n']:,} each)"
    )
    if n < 2:
        return (f"{halves}.",)
    halves += (
        f"; {n:,} draws from the real pictures' own statistics are at "
        f"{distance_of_real_draws(n):.2f}, which is what so small a number costs by itself."
    )
    classifier = (
        f"The classifier {NET} is right for {100 * known['test_accuracy']:.1f} % of the real "
        "test set."
    )
    return halves, classifier
