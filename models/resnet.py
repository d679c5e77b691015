"""The ResNet block, and the two ways of halving and doubling an image, that the UNets share.

A block adds to its input what two convolutions make of it, each after a group
normalisation and an activation, and takes in the time vector `e` between the two:

    a = conv1(act(norm1(x)))
    a = norm2(a + W e)                          time_scale_shift="default"
    a = norm2(a) * (1 + W_1 e) + W_2 e          time_scale_shift="scale_shift"
    y = (shortcut(x) + conv2(act(a))) / output_scale

with `e` passed through the activation first. Parameters carry the names that diffusers'
`ResnetBlock2D` gives them. Where the row of a time table has a block's `W e`, the block reads
it there (`time_rows.py`).
"""

from collections.abc import Callable, Iterable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import linen as nn

from qjax.core.layers import Conv, Dense
from qjax.core.typing import Array, Float, Params
from qjax.models.time_rows import PROJECTION, at_paths, subtree, time_row

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "silu": nn.silu,
    "swish": nn.silu,
    "mish": jax.nn.mish,
    "gelu": lambda x: nn.gelu(x, approximate=False),
    "relu": nn.relu,
}
"""The activations of diffusers' configs, by their names there."""

SAME_3X3 = ((1, 1), (1, 1))


class GroupNorm(nn.Module):
    """Group normalisation over `[b, ..., c]`, statistics in float32, result in `x.dtype`.

    Means and variances are taken per channel and merged into those of a group, which keeps
    the channels contiguous: forward and gradient are several times faster on a CPU than
    with `flax.linen.GroupNorm`, which splits the channel axis first. The parameters are the
    same.

    Attributes:
      groups: Number of groups; must divide the channels.
      eps: Added to the variance.

    References:
      Chan et al., Algorithms for Computing the Sample Variance, 1983, for the merging.
    """

    groups: int
    eps: float

    @nn.compact
    def __call__(self, x: Float[Array, "b *s c"]) -> Float[Array, "b *s c"]:
        b, c = x.shape[0], x.shape[-1]
        if c % self.groups:
            raise ValueError(
                f"groups must divide the channels; got groups={self.groups}, {x.shape=} at "
                f"{'/'.join(self.path)}. Use a divisor of {c}."
            )
        scale = self.param("scale", nn.initializers.ones_init(), (c,))
        bias = self.param("bias", nn.initializers.zeros_init(), (c,))
        scale, bias = (p.astype(jnp.float32).reshape(self.groups, -1) for p in (scale, bias))

        pixels = x.astype(jnp.float32).reshape(b, -1, c)
        channel_mean = jnp.mean(pixels, axis=1, keepdims=True)
        centered = pixels - channel_mean
        channel_variance = jnp.mean(jnp.square(centered), axis=1)

        channel_mean = channel_mean.reshape(b, self.groups, -1)
        offset = channel_mean - jnp.mean(channel_mean, axis=2, keepdims=True)
        within = channel_variance.reshape(b, self.groups, -1)
        variance = jnp.mean(within + jnp.square(offset), axis=2, keepdims=True)
        gain = scale * jax.lax.rsqrt(variance + self.eps)
        shift = offset * gain + bias
        y = centered * gain.reshape(b, 1, c) + shift.reshape(b, 1, c)
        return y.reshape(x.shape).astype(x.dtype)


def upsample_nearest(x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c"]:
    """Every pixel four times: `[b, h, w, c]` to `[b, 2h, 2w, c]`."""
    b, h, w, c = x.shape
    doubled = jnp.broadcast_to(x[:, :, None, :, None, :], (b, h, 2, w, 2, c))
    return doubled.reshape(b, 2 * h, 2 * w, c)


def downsample_mean(x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c"]:
    """The mean of every 2x2 pixels: `[b, h, w, c]` to `[b, h/2, w/2, c]`, h and w even."""
    b, h, w, c = x.shape
    return jnp.mean(x.reshape(b, h // 2, 2, w // 2, 2, c), axis=(2, 4))


class Downsample(nn.Module):
    """A 3x3 convolution of stride 2 that keeps the channels.

    Attributes:
      padding: 1 pads all four sides by one pixel; 0 pads only the bottom and the right.
    """

    padding: int = 1

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c"]:
        side = (self.padding, self.padding) if self.padding else (0, 1)
        return Conv(x.shape[-1], strides=2, padding=(side, side), name="conv")(x)


class Upsample(nn.Module):
    """`upsample_nearest` and a 3x3 convolution that keeps the channels."""

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c"]:
        return Conv(x.shape[-1], padding=SAME_3X3, name="conv")(upsample_nearest(x))


class ResnetBlock(nn.Module):
    """Residual block of two 3x3 convolutions, conditioned on a time vector if there is one.

    Where the channels change, the shortcut is a 1x1 convolution. With `resample`, input
    and residual are halved (2x2 mean) or doubled (nearest) after the first activation.

    Attributes:
      features: Output channels.
      groups: Groups of both normalisations; must divide input and output channels.
      eps: Epsilon of both normalisations.
      act: A key of `ACTIVATIONS`.
      time_scale_shift: How the time vector enters; the formulas head this file.
      output_scale: The sum is divided by it.
      resample: Whether the block also halves or doubles the image.
      timed: Whether the block must be told the time; then neither a vector nor a row is an error.
    """

    features: int
    groups: int = 32
    eps: float = 1e-6
    act: str = "silu"
    time_scale_shift: Literal["default", "scale_shift"] = "default"
    output_scale: float = 1.0
    resample: Literal["up", "down"] | None = None
    timed: bool = False

    @nn.compact
    def __call__(
        self, x: Float[Array, "b h w c"], time: Float[Array, "b d"] | None = None
    ) -> Float[Array, "b h2 w2 o"]:
        act = ACTIVATIONS[self.act]
        h = act(GroupNorm(self.groups, self.eps, name="norm1")(x))
        if self.resample is not None:
            resize = upsample_nearest if self.resample == "up" else downsample_mean
            x, h = resize(x), resize(h)
        h = Conv(self.features, padding=SAME_3X3, name="conv1")(h)

        vectors = None
        if time is not None or self.timed:
            vectors = time_row(self, PROJECTION, h.dtype, computable=time is not None)
        if vectors is None and time is not None:
            width = self.features if self.time_scale_shift == "default" else 2 * self.features
            vectors = Dense(width, name=PROJECTION)(act(time))
        norm2 = GroupNorm(self.groups, self.eps, name="norm2")
        if vectors is None:
            h = norm2(h)
        elif self.time_scale_shift == "default":
            h = norm2(h + vectors[:, None, None, :])
        else:
            scale, shift = jnp.split(vectors[:, None, None, :], 2, axis=-1)
            h = norm2(h) * (1 + scale) + shift

        h = Conv(self.features, padding=SAME_3X3, name="conv2")(act(h))
        if x.shape[-1] != self.features:
            x = Conv(self.features, (1, 1), padding="VALID", name="conv_shortcut")(x)
        return (x + h) / self.output_scale


def projections(
    params: Params, blocks: Iterable[str], time: Float[Array, "s d"], *, act: str
) -> dict[str, Any]:
    """What the blocks at these paths read of the time vectors: rows of a time table, `[s, c]`."""
    activated = ACTIVATIONS[act](time)

    def project(layer: Params) -> Any:
        width = layer["kernel"].shape[-1]
        return Dense(width, use_bias="bias" in layer).apply({"params": layer}, activated)

    paths = [f"{block}/{PROJECTION}" for block in blocks]
    return at_paths((path, project(subtree(params, path))) for path in paths)
