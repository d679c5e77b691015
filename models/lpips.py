"""LPIPS, version 0.1: how far apart two pictures look, by the features of AlexNet or VGG16.

With `f_l` the activations of layer `l`, each pixel's divided by its length over the channels,

    LPIPS(x, y) = sum over l of mean over pixels of sum over c of w_lc (f_lc(x) - f_lc(y))**2,

`w_l` the published linear heads. Pictures come in [-1, 1] and are shifted and scaled for the
network as in the published code. 0 for equal pictures; not bounded above; symmetric.

Weights come as two state dicts that anybody may download: torchvision's classification network
(`features.0.weight`, ...) and the heads (`lin0.model.1.weight`, ...), in one file or in two.

| net | activations after | smallest side |
|---|---|---|
| `alex` | each of five convolutions, ReLU | 31 |
| `vgg` | the last convolution of each of five blocks, ReLU | 16 |

References:
  Zhang et al., The Unreasonable Effectiveness of Deep Features as a Perceptual Metric, 2018,
  https://arxiv.org/abs/1801.03924.
"""

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from qjax.core.layers import Conv
from qjax.core.safetensors_io import ArrayLike
from qjax.core.typing import Array, Float, Params
from qjax.models.convert import Target, conv, convert, same

__all__ = ["LPIPS", "NETS", "Net", "checkpoint_keys", "convert_lpips", "lpips"]

# Mean and deviation of ImageNet, for pictures in [-1, 1].
SHIFT = (-0.030, -0.088, -0.188)
SCALE = (0.458, 0.448, 0.450)
EPS = 1e-10


class Layer(NamedTuple):
    """A convolution with ReLU.

    Attributes:
      place: Its number among torchvision's `features`.
      channels: Output channels.
      kernel: Side of the kernel.
      strides: Step between output pixels.
      padding: Zeros on every side.
      pool: Side of a maximum pool of stride 2 before it; 0 for none.
      tap: Whether its activations are compared.
    """

    place: int
    channels: int
    kernel: int = 3
    strides: int = 1
    padding: int = 1
    pool: int = 0
    tap: bool = True


class Net(NamedTuple):
    """A backbone: its convolutions, and the smallest side of a picture that it can see."""

    layers: tuple[Layer, ...]
    smallest: int


def _vgg16() -> tuple[Layer, ...]:
    layers, place = [], 0
    for block, (channels, count) in enumerate(((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))):
        for i in range(count):
            pool = 2 if block and not i else 0
            layers.append(Layer(place, channels, pool=pool, tap=i == count - 1))
            place += 2
        place += 1
    return tuple(layers)


NETS = {
    "alex": Net(
        (
            Layer(0, 64, kernel=11, strides=4, padding=2),
            Layer(3, 192, kernel=5, padding=2, pool=3),
            Layer(6, 384, pool=3),
            Layer(8, 256),
            Layer(10, 256),
        ),
        31,
    ),
    "vgg": Net(_vgg16(), 16),
}
"""The two backbones, by the names that the published code has for them."""


class LPIPS(nn.Module):
    """Distances of pairs of pictures in [-1, 1].

    Attributes:
      net: A key of `NETS`.
    """

    net: str

    @nn.compact
    def __call__(
        self, x: Float[Array, "b h w 3"], y: Float[Array, "b h w 3"]
    ) -> Float[Array, " b"]:
        h = (jnp.concatenate([x, y]) - jnp.asarray(SHIFT)) / jnp.asarray(SCALE)
        total, taps = jnp.zeros(x.shape[0]), 0
        for layer in NETS[self.net].layers:
            if layer.pool:
                h = nn.max_pool(h, (layer.pool, layer.pool), (2, 2))
            p, name = layer.padding, f"features_{layer.place}"
            kernel = (layer.kernel, layer.kernel)
            padding = ((p, p), (p, p))
            h = nn.relu(Conv(layer.channels, kernel, layer.strides, padding, name=name)(h))
            if layer.tap:
                head = self.param(f"lin{taps}", nn.initializers.ones_init(), (layer.channels,))
                a, b = jnp.split(h / (jnp.linalg.norm(h, axis=-1, keepdims=True) + EPS), 2)
                total += jnp.mean(jnp.sum(head * (a - b) ** 2, axis=-1), axis=(1, 2))
                taps += 1
        return total


def checkpoint_keys(net: str) -> dict[str, Target]:
    """For every key of the two state dicts of `net`: path, shape there, transform.

    The heads come first.
    """
    tail: dict[str, Target] = {}
    heads: dict[str, Target] = {}
    i = 3
    for layer in NETS[net].layers:
        o, side, name = layer.channels, layer.kernel, f"features_{layer.place}"
        prefix = f"features.{layer.place}"
        tail[f"{prefix}.weight"] = Target((name, "kernel"), (o, i, side, side), conv)
        tail[f"{prefix}.bias"] = Target((name, "bias"), (o,), same)
        if layer.tap:
            n = len(heads)
            heads[f"lin{n}.model.1.weight"] = Target((f"lin{n}",), (1, o, 1, 1), conv)
        i = o
    return heads | tail


def convert_lpips(net: str, tensors: Mapping[str, ArrayLike]) -> dict[str, Any]:
    """Float32 params of the tensors of the heads and of the backbone together.

    The backbone's classifier has no use and is left out, as are the second copies of the heads
    (`lins.0.model.1.weight`) that a saved `LPIPS` module of PyTorch has.

    Raises:
      ValueError: If keys are missing or unexpected, or of another shape; all are named.
    """
    return convert(
        tensors,
        checkpoint_keys(net),
        dtype=np.float32,
        finish=lambda path, leaf: leaf.reshape(-1) if path[0].startswith("lin") else leaf,
        require_finite=True,
        allow_unexpected=(r"classifier\..*", r"lins\..*"),
    )


@functools.partial(jax.jit, static_argnames="net")
def _lpips(params: Params, x: Array, y: Array, *, net: str) -> Float[Array, " b"]:
    def scaled(images: Array) -> Array:
        colour = jnp.broadcast_to(images.astype(jnp.float32), (*images.shape[:3], 3))
        return colour * 2.0 - 1.0

    distances: Any = LPIPS(net).apply({"params": params}, scaled(x), scaled(y))
    return distances


def lpips(
    net: str, params: Params, x: Float[Array, "b h w c"], y: Float[Array, "b h w c"]
) -> Float[Array, " b"]:
    """LPIPS of each pair of pictures in [0, 1]; grey ones count as colour.

    Computed in float32 whatever the device's default precision; compiled once for a shape.

    Args:
      net: A key of `NETS`.
      params: As `convert_lpips` makes them.
      x: Pictures of one channel or three.
      y: The pictures to compare with; the order does not matter.

    Raises:
      ValueError: If the shapes differ or are no pictures, or a side is too short for `net`.
    """
    if x.shape != y.shape or x.ndim != 4 or x.shape[-1] not in (1, 3):
        raise ValueError(
            f"pictures must be [b, h, w, 1] or [b, h, w, 3]; got {x.shape}, {y.shape}."
        )
    smallest = NETS[net].smallest
    if min(x.shape[1:3]) < smallest:
        raise ValueError(
            f"LPIPS with {net!r} needs pictures of at least {smallest} pixels a side; got {x.shape}."
        )
    with jax.default_matmul_precision("float32"):
        return _lpips(params, x, y, net=net)
