"""What the zoo's classifier says of pictures: their classes, their features, the real ones'."""

import functools
import json
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from qjax.core.metrics import FeatureStatistics
from qjax.core.safetensors_io import open_tensors
from qjax.core.typing import Float, Int
from qjax.models.features import FeatureNetConfig, penultimate

FOLDER = Path(__file__).parent / "fashion-features"
BATCH = 256


class Judgement(NamedTuple):
    """The classifier's view of some pictures.

    Attributes:
      classes: Predicted class of each.
      features: Penultimate activations of each.
    """

    classes: Int[np.ndarray, " n"]
    features: Float[np.ndarray, "n d"]


@functools.cache
def _net():
    config = FeatureNetConfig.from_dict(json.loads((FOLDER / "config.json").read_text()))
    tensors = open_tensors(FOLDER / "features.safetensors")
    flat = {key: jnp.asarray(tensor.read(), jnp.float32) for key, tensor in tensors.items()}
    params = traverse_util.unflatten_dict(flat, sep="/")
    return jax.jit(lambda images: penultimate(params, config, images))


def judge(images: Float[np.ndarray, "n 32 32 1"]) -> Judgement:
    """Classes and features of grey 32x32 pictures in [0, 1]."""
    parts = []
    for start in range(0, len(images), BATCH):
        batch = np.asarray(images[start : start + BATCH], np.float32)
        padded = np.pad(batch, ((0, BATCH - len(batch)), (0, 0), (0, 0), (0, 0)))
        parts.append([np.asarray(out)[: len(batch)] for out in _net()(padded)])
    classes, features = (np.concatenate(column) for column in zip(*parts, strict=True))
    return Judgement(classes, features.astype(np.float64))


def real_statistics(label: int | None = None) -> FeatureStatistics:
    """Mean and covariance of the features of the real test set, or of one class of it."""
    name = "test" if label is None else f"test_class_{label}"
    tensors = open_tensors(FOLDER / "reference.safetensors")
    mean, cov, n = (tensors[f"{name}/{part}"].read() for part in ("mean", "cov", "n"))
    cov = cov.astype(np.float64)
    return FeatureStatistics(mean=mean.astype(np.float64), cov=(cov + cov.T) / 2, n=int(n[0]))


def record() -> dict:
    """What is known of the classifier: test accuracy, distance between two real halves."""
    return json.loads((FOLDER / "zoo.json").read_text())
