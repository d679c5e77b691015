"""The Inception network of FID, sFID and the Inception Score.

This is the network of TensorFlow's graph of 2015-12-05 as it was ported to PyTorch for
pytorch-fid, and not the one of torchvision: average pools leave padding out of their mean, the
last block pools the maximum, the logits are 1008, and pictures are resized and scaled as the
graph itself does. Names are those of the published state dict, so the key table is read off the
params:

    Mixed_6b/branch7x7_2/conv/kernel  <->  Mixed_6b.branch7x7_2.conv.weight
    Mixed_6b/branch7x7_2/bn/mean      <->  Mixed_6b.branch7x7_2.bn.running_mean

| output | what of | used by |
|---|---|---|
| `pool` | the mean of `Mixed_7c`, 2048 | FID, KID, precision and recall |
| `spatial` | channels 0 to 6 of `Mixed_6d`, 17 x 17 x 7 = 2023 | sFID, as in ADM's evaluator |
| `logits` | `pool` times the last kernel, without its bias, 1008 | IS, as its authors have it |

Pictures are resized to 299 x 299 by the bilinear rule of TensorFlow 1, output pixel `i` at input
place `i * h / 299` and no smoothing before shrinking, as the original code and ADM's evaluator do;
pytorch-fid puts it at `(i + 0.5) * h / 299 - 0.5`, clean-fid smooths first, and both give other
numbers. Convert pictures to 8 bits before: values are 0 to 255.

References:
  Szegedy et al., Rethinking the Inception Architecture, 2015, https://arxiv.org/abs/1512.00567.
  Heusel et al., GANs Trained by a Two Time-Scale Update Rule, 2017,
  https://arxiv.org/abs/1706.08500 (FID).
  Nash et al., Generating Images with Sparse Representations, 2021,
  https://arxiv.org/abs/2103.03841 (sFID); Dhariwal and Nichol, 2021,
  https://arxiv.org/abs/2105.05233, whose evaluator is followed here.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import traverse_util

from qjax.core.layers import Conv, Dense
from qjax.core.safetensors_io import ArrayLike
from qjax.core.typing import Array, Float, Params, UInt8
from qjax.models.convert import Target, conv, convert, linear, same

__all__ = [
    "POOL_FEATURES",
    "SHA256",
    "SPATIAL_FEATURES",
    "InceptionFeatures",
    "InceptionV3",
    "checkpoint_keys",
    "convert_inception",
    "inception_features",
    "resize_as_tensorflow_1",
]

SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
"""Of `pt_inception-2015-12-05-6726825d.pth`, which pytorch-fid and torch-fidelity publish."""

POOL_FEATURES = 2048
SPATIAL_FEATURES = 17 * 17 * 7
SIDE = 299
SPATIAL_CHANNELS = 7
LOGITS = 1008
BATCH_NORM_EPS = 1e-3


class InceptionFeatures(NamedTuple):
    """What the metrics read, float32.

    Attributes:
      pool: `[b, 2048]`.
      spatial: `[b, 2023]`.
      logits: `[b, 1008]`, without the bias.
    """

    pool: Float[Array, "b d"]
    spatial: Float[Array, "b d"]
    logits: Float[Array, "b d"]


class BatchNorm(nn.Module):
    """Normalisation with the stored mean and variance of each channel."""

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        zeros, ones, shape = nn.initializers.zeros_init(), nn.initializers.ones_init(), x.shape[-1:]
        mean, bias = (self.param(name, zeros, shape) for name in ("mean", "bias"))
        var, scale = (self.param(name, ones, shape) for name in ("var", "scale"))
        return (x - mean) * (scale * jax.lax.rsqrt(var + BATCH_NORM_EPS)) + bias


class ConvUnit(nn.Module):
    """Convolution without a bias, normalisation, ReLU.

    Attributes:
      features: Output channels.
      kernel_size: Height and width of the kernel.
      strides: Step between output pixels.
      padding: Zeros above and below, left and right.
    """

    features: int
    kernel_size: tuple[int, int] = (1, 1)
    strides: int = 1
    padding: tuple[int, int] = (0, 0)

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c2"]:
        top, left = self.padding
        x = Conv(
            self.features,
            self.kernel_size,
            strides=self.strides,
            padding=((top, top), (left, left)),
            use_bias=False,
            name="conv",
        )(x)
        return nn.relu(BatchNorm(name="bn")(x))


def _chain(x: Array, name: str, *units: tuple[int, tuple[int, int], int, tuple[int, int]]) -> Array:
    """Units one after the other, called `name_1`, `name_2`, ...; a single one just `name`."""
    for i, (features, kernel, strides, padding) in enumerate(units):
        own = name if len(units) == 1 else f"{name}_{i + 1}"
        x = ConvUnit(features, kernel, strides, padding, name=own)(x)
    return x


def _one(features: int) -> tuple[int, tuple[int, int], int, tuple[int, int]]:
    return features, (1, 1), 1, (0, 0)


def _same(features: int, height: int, width: int | None = None):
    width = height if width is None else width
    return features, (height, width), 1, (height // 2, width // 2)


def _half(features: int) -> tuple[int, tuple[int, int], int, tuple[int, int]]:
    return features, (3, 3), 2, (0, 0)


def _average(x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
    """Mean of 3 x 3 pixels, of fewer at the edge."""
    return nn.avg_pool(x, (3, 3), (1, 1), ((1, 1), (1, 1)), count_include_pad=False)


def _largest(x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c"]:
    return nn.max_pool(x, (3, 3), (2, 2))


class BlockA(nn.Module):
    """35 x 35: branches of 1 x 1, 5 x 5 and twice 3 x 3, and a pool."""

    pool_features: int

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c2"]:
        parts = (
            _chain(x, "branch1x1", _one(64)),
            _chain(x, "branch5x5", _one(48), _same(64, 5)),
            _chain(x, "branch3x3dbl", _one(64), _same(96, 3), _same(96, 3)),
            _chain(_average(x), "branch_pool", _one(self.pool_features)),
        )
        return jnp.concatenate(parts, axis=-1)


class BlockB(nn.Module):
    """35 x 35 to 17 x 17."""

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c2"]:
        parts = (
            _chain(x, "branch3x3", _half(384)),
            _chain(x, "branch3x3dbl", _one(64), _same(96, 3), _half(96)),
            _largest(x),
        )
        return jnp.concatenate(parts, axis=-1)


class BlockC(nn.Module):
    """17 x 17: branches of 7 x 7 in rows and columns.

    Attributes:
      inner: Channels inside the branches.
    """

    inner: int

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c2"]:
        n, row, column = self.inner, (1, 7), (7, 1)
        parts = (
            _chain(x, "branch1x1", _one(192)),
            _chain(x, "branch7x7", _one(n), _same(n, *row), _same(192, *column)),
            _chain(
                x,
                "branch7x7dbl",
                _one(n),
                _same(n, *column),
                _same(n, *row),
                _same(n, *column),
                _same(192, *row),
            ),
            _chain(_average(x), "branch_pool", _one(192)),
        )
        return jnp.concatenate(parts, axis=-1)


class BlockD(nn.Module):
    """17 x 17 to 8 x 8."""

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c2"]:
        parts = (
            _chain(x, "branch3x3", _one(192), _half(320)),
            _chain(x, "branch7x7x3", _one(192), _same(192, 1, 7), _same(192, 7, 1), _half(192)),
            _largest(x),
        )
        return jnp.concatenate(parts, axis=-1)


class BlockE(nn.Module):
    """8 x 8: branches that end in a row and a column side by side.

    Attributes:
      pool: What the last branch does before its convolution: the average, or in the last block
        of all the maximum, of 3 x 3 pixels.
    """

    pool: str

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c2"]:
        def ends(h: Array, name: str) -> list[Array]:
            return [
                _chain(h, f"{name}{letter}", _same(384, *size))
                for letter, size in (("a", (1, 3)), ("b", (3, 1)))
            ]

        h = _chain(x, "branch3x3_1", _one(384))
        double = _chain(x, "branch3x3dbl", _one(448), _same(384, 3))
        if self.pool == "average":
            pooled = _average(x)
        else:
            pooled = nn.max_pool(x, (3, 3), (1, 1), ((1, 1), (1, 1)))
        parts = (
            _chain(x, "branch1x1", _one(320)),
            *ends(h, "branch3x3_2"),
            *ends(double, "branch3x3dbl_3"),
            _chain(pooled, "branch_pool", _one(192)),
        )
        return jnp.concatenate(parts, axis=-1)


class InceptionV3(nn.Module):
    """Features of pictures of 299 x 299 that are scaled already: `(pixel - 128) / 128`."""

    @nn.compact
    def __call__(self, x: Float[Array, "b 299 299 3"]) -> InceptionFeatures:
        x = _chain(x, "Conv2d_1a_3x3", _half(32))
        x = _chain(x, "Conv2d_2a_3x3", (32, (3, 3), 1, (0, 0)))
        x = _largest(_chain(x, "Conv2d_2b_3x3", _same(64, 3)))
        x = _chain(x, "Conv2d_3b_1x1", _one(80))
        x = _largest(_chain(x, "Conv2d_4a_3x3", (192, (3, 3), 1, (0, 0))))
        for name, pool_features in (("Mixed_5b", 32), ("Mixed_5c", 64), ("Mixed_5d", 64)):
            x = BlockA(pool_features, name=name)(x)
        x = BlockB(name="Mixed_6a")(x)
        x = BlockC(128, name="Mixed_6b")(x)
        x = BlockC(160, name="Mixed_6c")(x)
        x = BlockC(160, name="Mixed_6d")(x)
        spatial = x[..., :SPATIAL_CHANNELS].reshape(x.shape[0], -1)
        x = BlockC(192, name="Mixed_6e")(x)
        x = BlockD(name="Mixed_7a")(x)
        x = BlockE("average", name="Mixed_7b")(x)
        x = BlockE("maximum", name="Mixed_7c")(x)
        pool = x.mean(axis=(1, 2))
        head = Dense(LOGITS, name="fc")
        biased = head(pool)
        logits = biased - head.variables["params"]["bias"].astype(biased.dtype)
        return InceptionFeatures(pool, spatial, logits)


def checkpoint_keys() -> dict[str, Target]:
    """For every key of the published state dict: path, shape there, transform."""
    example = jax.ShapeDtypeStruct((1, SIDE, SIDE, 3), jnp.float32)
    shapes = jax.eval_shape(InceptionV3().init, jax.random.key(0), example)["params"]
    return dict(
        _entry(path, leaf.shape) for path, leaf in traverse_util.flatten_dict(shapes).items()
    )


_LEAVES = {"kernel": "weight", "scale": "weight", "mean": "running_mean", "var": "running_var"}


def _entry(path: tuple[str, ...], shape: tuple[int, ...]) -> tuple[str, Target]:
    key = ".".join((*path[:-1], _LEAVES.get(path[-1], path[-1])))
    if len(shape) == 4:
        height, width, i, o = shape
        return key, Target(path, (o, i, height, width), conv)
    if path[-1] == "kernel":
        return key, Target(path, shape[::-1], linear)
    return key, Target(path, shape, same)


def convert_inception(tensors: Mapping[str, ArrayLike]) -> dict[str, Any]:
    """Float32 params of the published state dict.

    Counters of training (`num_batches_tracked`) have no use and are left out.

    Raises:
      ValueError: If keys are missing or unexpected, or of another shape; all are named.
    """
    return convert(
        tensors,
        checkpoint_keys(),
        dtype=np.float32,
        require_finite=True,
        allow_unexpected=(r".*\.num_batches_tracked",),
    )


def resize_as_tensorflow_1(x: Float[Array, "b h w c"], side: int = SIDE) -> Float[Array, "b s s c"]:
    """Pictures at `side` x `side`, as TensorFlow 1 has resized them without aligned corners."""
    for axis in (1, 2):
        low, high, weight = _places(x.shape[axis], side)
        shape = [1, 1, 1, 1]
        shape[axis] = side
        a, b = jnp.take(x, low, axis=axis), jnp.take(x, high, axis=axis)
        x = a + (b - a) * weight.reshape(shape)
    return x


def _places(size: int, side: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The two input pixels of each output pixel, and the weight of the second."""
    place = np.arange(side, dtype=np.float32) * (np.float32(size) / np.float32(side))
    low = np.floor(place).astype(np.int32)
    return low, np.minimum(low + 1, size - 1), place - low.astype(np.float32)


@jax.jit
def _features(params: Params, images: UInt8[Array, "b h w c"]) -> InceptionFeatures:
    x = images.astype(jnp.float32)
    if x.shape[-1] == 1:
        x = jnp.repeat(x, 3, axis=-1)
    x = (resize_as_tensorflow_1(x) - 128.0) / 128.0
    features: Any = InceptionV3().apply({"params": params}, x)
    return features


def inception_features(
    params: Params, images: UInt8[Array | np.ndarray, "b h w c"]
) -> InceptionFeatures:
    """Features of pictures with 8 bits a channel, of any size; grey ones count as colour.

    Computed in float32 whatever the device's default precision; compiled once for a shape.

    Args:
      params: As `convert_inception` makes them.
      images: 0 to 255, one channel or three.

    Raises:
      TypeError: If the pictures are not uint8.
      ValueError: If they have neither one channel nor three.
    """
    if images.dtype != jnp.uint8:
        raise TypeError(
            f"images must be uint8, as FID is defined; got {images.dtype}. Round 255 times the "
            "picture."
        )
    if images.ndim != 4 or images.shape[-1] not in (1, 3):
        raise ValueError(f"images must be [b, h, w, 1] or [b, h, w, 3]; got {images.shape}.")
    with jax.default_matmul_precision("float32"):
        return _features(params, jnp.asarray(images))
