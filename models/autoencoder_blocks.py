"""The encoder and the decoder that the autoencoders share.

    encoder:  conv_in -> down blocks -> mid block -> norm, silu, conv_out
    decoder:  conv_in -> mid block -> up blocks -> norm, silu, conv_out

A down block is `layers_per_block` ResNet blocks and a halving by a convolution of stride 2;
an up block has one ResNet block more, and doubles. No skip leads from one half to the other:
all that the decoder knows is in the latents. The mid block is ResNet, attention, ResNet at
the smallest size, the attention with one head over all pixels. Nothing depends on a time.

Parameters carry diffusers' names (`down_blocks.0.resnets.1` is `down_blocks_0/resnets_1`).

References:
  Esser et al., Taming Transformers for High-Resolution Image Synthesis, 2021,
  https://arxiv.org/abs/2012.09841, table 7, for the architecture.
  Rombach et al., High-Resolution Image Synthesis with Latent Diffusion Models, 2022,
  https://arxiv.org/abs/2112.10752, for the two autoencoders made of it.
"""

import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike

from qjax.core.layers import Conv
from qjax.core.typing import Array, Float
from qjax.models.attention import AttentionBlock
from qjax.models.autoencoder_config import DOWN_BLOCKS, UP_BLOCKS, AutoencoderConfig
from qjax.models.resnet import SAME_3X3, Downsample, GroupNorm, ResnetBlock, Upsample

EPS = 1e-6
"""Epsilon of every normalisation, whatever the config."""


def dtypes(
    config: AutoencoderConfig, dtype: DTypeLike | None, x: Float[Array, "b h w c"]
) -> tuple[jnp.dtype, jnp.dtype]:
    """The dtype to compute in, and that of the result; a `dtype` of None means that of `x`.

    Where the config has `force_upcast`, float16 is computed in float32. bfloat16 is left as it
    is: it has the range of float32.
    """
    result = jnp.dtype(x.dtype if dtype is None else dtype)
    upcast = config.force_upcast and result == jnp.float16
    return jnp.dtype(jnp.float32) if upcast else result, result


def check_image(image: Float[Array, "b h w c"], config: AutoencoderConfig) -> None:
    """Refuse an image that the encoder would cut off at the bottom or the right.

    Raises:
      ValueError: If height or width is no multiple of `config.size_multiple`.
    """
    multiple = config.size_multiple
    if image.shape[1] % multiple or image.shape[2] % multiple:
        raise ValueError(
            f"height and width must be multiples of {multiple}, one halving for every down "
            f"block but the last; got {image.shape=}. Resize or pad the image."
        )


class DownEncoderBlock(nn.Module):
    """ResNet blocks, attention after each where `attention`, then a halving.

    Attributes:
      config: The model's settings.
      features: Output channels.
      attention: Whether self-attention follows every ResNet block.
      downsample: Whether the size is halved.
    """

    config: AutoencoderConfig
    features: int
    attention: bool
    downsample: bool

    @nn.compact
    def __call__(self, h: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 o"]:
        for i in range(self.config.layers_per_block):
            h = _resnet(self.config, self.features, f"resnets_{i}")(h)
            if self.attention:
                h = _attention(self.config, self.features, f"attentions_{i}")(h)
        return Downsample(padding=0, name="downsamplers_0")(h) if self.downsample else h


class MidBlock(nn.Module):
    """ResNet block, attention if `config.mid_block_add_attention`, ResNet block."""

    config: AutoencoderConfig

    @nn.compact
    def __call__(self, h: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        features = h.shape[-1]
        h = _resnet(self.config, features, "resnets_0")(h)
        if self.config.mid_block_add_attention:
            h = _attention(self.config, features, "attentions_0")(h)
        return _resnet(self.config, features, "resnets_1")(h)


class UpDecoderBlock(nn.Module):
    """ResNet blocks, attention after each where `attention`, then a doubling.

    Attributes:
      config: The model's settings.
      features: Output channels.
      attention: Whether self-attention follows every ResNet block.
      upsample: Whether the size is doubled.
    """

    config: AutoencoderConfig
    features: int
    attention: bool
    upsample: bool

    @nn.compact
    def __call__(self, h: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 o"]:
        for i in range(self.config.layers_per_block + 1):
            h = _resnet(self.config, self.features, f"resnets_{i}")(h)
            if self.attention:
                h = _attention(self.config, self.features, f"attentions_{i}")(h)
        return Upsample(name="upsamplers_0")(h) if self.upsample else h


class Encoder(nn.Module):
    """From an image `[b, h, w, c]` to `[b, h/f, w/f, out_channels]`, f the `size_multiple`.

    Attributes:
      config: The model's settings.
      out_channels: Channels of the result: for a mean and a log-variance twice those of the
        latents.
    """

    config: AutoencoderConfig
    out_channels: int

    @nn.compact
    def __call__(self, image: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 o"]:
        config, channels = self.config, self.config.block_out_channels
        h = Conv(channels[0], padding=SAME_3X3, name="conv_in")(image)
        for i, name in enumerate(config.down_block_types):
            halve = i < len(channels) - 1
            attention = DOWN_BLOCKS[name]
            h = DownEncoderBlock(config, channels[i], attention, halve, name=f"down_blocks_{i}")(h)
        h = MidBlock(config, name="mid_block")(h)
        return _conv_out(config, self.out_channels, h)


class Decoder(nn.Module):
    """From `[b, h, w, latent_channels]` to an image `[b, f h, f w, out_channels]`.

    Attributes:
      config: The model's settings.
    """

    config: AutoencoderConfig

    @nn.compact
    def __call__(self, latents: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 o"]:
        config, channels = self.config, self.config.block_out_channels[::-1]
        h = Conv(channels[0], padding=SAME_3X3, name="conv_in")(latents)
        h = MidBlock(config, name="mid_block")(h)
        for i, name in enumerate(config.up_block_types):
            double = i < len(channels) - 1
            attention = UP_BLOCKS[name]
            h = UpDecoderBlock(config, channels[i], attention, double, name=f"up_blocks_{i}")(h)
        return _conv_out(config, config.out_channels, h)


def _resnet(config: AutoencoderConfig, features: int, name: str) -> ResnetBlock:
    return ResnetBlock(
        features, groups=config.norm_num_groups, eps=EPS, act=config.act_fn, name=name
    )


def _attention(config: AutoencoderConfig, features: int, name: str) -> AttentionBlock:
    return AttentionBlock(
        heads=1, head_dim=features, groups=config.norm_num_groups, eps=EPS, name=name
    )


def _conv_out(config: AutoencoderConfig, features: int, h: Array) -> Array:
    """The end of either half, in the scope of the caller."""
    h = nn.silu(GroupNorm(config.norm_num_groups, EPS, name="conv_norm_out")(h))
    return Conv(features, padding=SAME_3X3, name="conv_out")(h)
