"""How far pictures are from other pictures of the same noise: small is alike.

A score takes pictures and those they should be, both `[b, h, w, c]` in [0, 1], and gives one
number, 0 where they are equal:

- `ssim_distance`: 1 - SSIM, which looks at structure in windows of 11 pixels;
- `squared_error`: the mean of squared differences, for pictures of any size;
- `feature_distance`: what a net that was trained to tell pictures apart sees of the difference,
  in the manner of LPIPS, but without its learned weights and with the net that is given: every
  convolution's features are scaled to length 1 at every pixel, and squared differences are
  summed over channels, and averaged over pixels, layers and pictures.

References:
  Wang et al., https://doi.org/10.1109/TIP.2003.819861; Zhang et al., The Unreasonable
  Effectiveness of Deep Features as a Perceptual Metric, 2018, https://arxiv.org/abs/1801.03924.
"""

import functools
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import traverse_util

from qjax.core import metrics
from qjax.core.layers import Conv
from qjax.core.places import local_path
from qjax.core.plain_json import read_json
from qjax.core.safetensors_io import open_tensors
from qjax.core.typing import Array, Float, Params
from qjax.models.features import FeatureNet, FeatureNetConfig

__all__ = [
    "Score",
    "feature_distance",
    "load_feature_net",
    "squared_error",
    "ssim_distance",
]

Score = Callable[[np.ndarray, np.ndarray], float]
"""`score(images, reference)`: 0 where they are equal, and larger the less alike they are."""

_EPSILON = 1e-10


def ssim_distance(
    images: Float[np.ndarray, "b h w c"], reference: Float[np.ndarray, "b h w c"]
) -> float:
    """1 - SSIM, averaged over the pictures: 0 to 2.

    Raises:
      ValueError: If the pictures are smaller than 11 x 11 pixels.
    """
    return float(np.mean(1.0 - metrics.ssim(images, reference, data_range=1.0)))


def squared_error(
    images: Float[np.ndarray, "b h w c"], reference: Float[np.ndarray, "b h w c"]
) -> float:
    """Mean squared difference."""
    difference = np.asarray(images, np.float64) - np.asarray(reference, np.float64)
    return float(np.mean(difference**2))


def feature_distance(params: Params, config: FeatureNetConfig, *, batch: int = 64) -> Score:
    """The score that a net's convolutions give: 0 to 4.

    Args:
      params: Of a `FeatureNet`.
      config: Its config.
      batch: Pictures that it sees at once.

    Returns:
      The score; it raises a ValueError for pictures of another size or number of channels than
      the net's.
    """
    sides = params["conv_0"]["kernel"].shape[2], params["hidden"]["kernel"].shape[0]

    def score(images: np.ndarray, reference: np.ndarray) -> float:
        _check_suits(images.shape, sides, config)
        total = 0.0
        for start in range(0, len(images), batch):
            x, y = (jnp.asarray(a[start : start + batch], jnp.float32) for a in (images, reference))
            total += float(_distance(params, x, y, config=config)) * len(x)
        return total / len(images)

    return score


def load_feature_net(folder: Path | str) -> tuple[Params, FeatureNetConfig]:
    """Params, float32, and config of a feature net.

    Args:
      folder: Holds `config.json` and `features.safetensors`, as the zoo's classifier does.

    Raises:
      FileNotFoundError: If it lacks one of them.
      ValueError: If one is not what it should be.
    """
    folder = local_path(folder)
    config = FeatureNetConfig.from_dict(read_json(folder / "config.json"))
    tensors = open_tensors(folder / "features.safetensors")
    flat = {key: jnp.asarray(tensor.read(), jnp.float32) for key, tensor in tensors.items()}
    return traverse_util.unflatten_dict(flat, sep="/"), config


@functools.partial(jax.jit, static_argnames=("config",))
def _distance(params: Params, x: Array, y: Array, *, config: FeatureNetConfig) -> Array:
    features = [_unit_features(params, images, config) for images in (x, y)]
    terms = [jnp.mean(jnp.sum((a - b) ** 2, axis=-1)) for a, b in zip(*features, strict=True)]
    return jnp.mean(jnp.stack(terms))


def _unit_features(params: Params, images: Array, config: FeatureNetConfig) -> list[Array]:
    """Features of every convolution after its ReLU, of length 1 at every pixel."""
    _, kept = FeatureNet(config).apply(
        {"params": params},
        images,
        capture_intermediates=lambda module, _: isinstance(module, Conv),
        mutable=["intermediates"],
    )
    found = []
    for i in range(len(config.channels)):
        (x,) = kept["intermediates"][f"conv_{i}"]["__call__"]
        x = nn.relu(x)
        length = jnp.sqrt(jnp.sum(x**2, axis=-1, keepdims=True))
        found.append(x / (length + _EPSILON))
    return found


def _check_suits(shape: tuple[int, ...], sides: tuple[int, int], config: FeatureNetConfig) -> None:
    """That pictures have the channels, and the pixels, that the net was made for."""
    channels, flat = sides
    h, w = (-(-side // 2) for side in shape[1:3])
    for _ in config.channels[1:]:
        h, w = h // 2, w // 2
    if shape[-1] != channels or h * w * config.channels[-1] != flat:
        raise ValueError(
            f"the feature net sees pictures of {channels} channels whose last map has {flat} "
            f"values; pictures of shape {shape} have {shape[-1]} channels and give "
            f"{h * w * config.channels[-1]}. Use a net made for them, or none."
        )
