"""UNet2DModel: the convolutional UNet of DDPM, and of latent diffusion without text.

    conv_in -> down blocks -> mid block -> up blocks -> norm, silu, conv_out

A down block is `layers_per_block` ResNet blocks, each followed by self-attention where its
type says so, then a halving; every output on the way down is kept and joined, last first,
to the input of a ResNet block on the way up. All ResNet blocks read one time vector

    e = MLP(time_proj(t)) + class embedding

or, where there is the row of a time table, what that has in its place (`time_rows.py`).

The function is that of diffusers' `UNet2DModel`, with its names for settings and parameters
(`down_blocks.0.resnets.1.conv1` is `down_blocks_0/resnets_1/conv1` here).

References:
  Ho et al., Denoising Diffusion Probabilistic Models, 2020, https://arxiv.org/abs/2006.11239.
  Rombach et al., High-Resolution Image Synthesis with Latent Diffusion Models, 2022,
  https://arxiv.org/abs/2112.10752.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from qjax.core.layers import Conv
from qjax.core.typing import Array, Float, Params
from qjax.models.attention import AttentionBlock
from qjax.models.embeddings import TimestepEmbedding, timestep_embedding
from qjax.models.resnet import (
    SAME_3X3,
    Downsample,
    GroupNorm,
    ResnetBlock,
    Upsample,
    projections,
)
from qjax.models.time_rows import (
    PROJECTION,
    VECTOR,
    at_paths,
    has_projection_rows,
    time_row,
)
from qjax.models.unet2d_config import UNet2DConfig


def _resnet(config: UNet2DConfig, features: int, name: str, **settings) -> ResnetBlock:
    return ResnetBlock(
        features,
        groups=config.norm_num_groups,
        eps=config.norm_eps,
        act=config.act_fn,
        time_scale_shift=config.resnet_time_scale_shift,
        timed=True,
        name=name,
        **settings,
    )


def _attention(
    config: UNet2DConfig, features: int, groups: int | None, name: str, **settings
) -> AttentionBlock:
    head_dim = config.attention_head_dim or features
    return AttentionBlock(
        heads=features // head_dim,
        head_dim=head_dim,
        groups=groups,
        eps=config.norm_eps,
        name=name,
        **settings,
    )


class TimeProjection(nn.Module):
    """Features `[b, d]` of `t`, fixed or a table, before the MLP that makes the time vector.

    | time_embedding_type | features |
    |---|---|
    | positional | sines and cosines of t; no parameters |
    | fourier | sines and cosines of `2 pi w log t`, for noise levels t > 0; `w` is not trained |
    | learned | row t of a table |
    """

    config: UNet2DConfig

    @nn.compact
    def __call__(self, t: Array) -> Float[Array, "b d"]:
        config, c = self.config, self.config.block_out_channels[0]
        if config.time_embedding_type == "positional":
            return timestep_embedding(
                t,
                c,
                flip_sin_to_cos=config.flip_sin_to_cos,
                downscale_freq_shift=config.freq_shift,
            )
        if config.time_embedding_type == "learned":
            table = self.param(
                "weight", nn.initializers.normal(1.0), (config.num_train_timesteps, c)
            )
            return jnp.take(jnp.asarray(table), t.astype(jnp.int32), axis=0)
        weight = self.param("weight", nn.initializers.normal(16.0), (c,))
        frequencies = jax.lax.stop_gradient(weight)
        angle = jnp.log(t.astype(jnp.float32))[:, None] * frequencies * 2 * math.pi
        return jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], axis=-1)


class DownBlock(nn.Module):
    """ResNet blocks, attention after each where `attention`, then a halving.

    Attributes:
      config: The model's settings.
      features: Output channels.
      attention: Whether self-attention follows every ResNet block.
      downsample: Halving by a `conv` of stride 2 or by a `resnet` block; None keeps the size.
    """

    config: UNet2DConfig
    features: int
    attention: bool
    downsample: str | None

    @nn.compact
    def __call__(self, h: Float[Array, "b h w c"], time: Float[Array, "b d"] | None) -> list[Array]:
        """All outputs, each kept for the way up; the last one goes on to the next block."""
        config, outputs = self.config, []
        for i in range(config.layers_per_block):
            h = _resnet(config, self.features, f"resnets_{i}")(h, time)
            if self.attention:
                groups = config.norm_num_groups
                h = _attention(config, self.features, groups, f"attentions_{i}")(h)
            outputs.append(h)
        if self.downsample == "conv":
            outputs.append(Downsample(config.downsample_padding, name="downsamplers_0")(h))
        elif self.downsample == "resnet":
            block = _resnet(config, self.features, "downsamplers_0", resample="down")
            outputs.append(block(h, time))
        return outputs


class MidBlock(nn.Module):
    """ResNet block, attention if `config.add_attention`, ResNet block, at the lowest size."""

    config: UNet2DConfig

    @nn.compact
    def __call__(
        self, h: Float[Array, "b h w c"], time: Float[Array, "b d"] | None
    ) -> Float[Array, "b h w c"]:
        config, features = self.config, h.shape[-1]
        divisor = {"output_scale": config.mid_block_scale_factor}
        h = _resnet(config, features, "resnets_0", **divisor)(h, time)
        if config.add_attention:
            groups = config.mid_attn_groups
            h = _attention(config, features, groups, "attentions_0", **divisor)(h)
        return _resnet(config, features, "resnets_1", **divisor)(h, time)


class UpBlock(nn.Module):
    """ResNet blocks on the joined input and skip, attention after each, then a doubling.

    Attributes:
      config: The model's settings.
      features: Output channels.
      attention: Whether self-attention follows every ResNet block.
      upsample: Doubling by nearest and `conv` or by a `resnet` block; None keeps the size.
    """

    config: UNet2DConfig
    features: int
    attention: bool
    upsample: str | None

    @nn.compact
    def __call__(
        self, h: Float[Array, "b h w c"], skips: list[Array], time: Float[Array, "b d"] | None
    ) -> Float[Array, "b h2 w2 o"]:
        """`skips` in the order in which they are used, one for each ResNet block."""
        config = self.config
        for i, skip in enumerate(skips):
            h = jnp.concatenate([h, skip], axis=-1)
            h = _resnet(config, self.features, f"resnets_{i}")(h, time)
            if self.attention:
                groups = config.norm_num_groups
                h = _attention(config, self.features, groups, f"attentions_{i}")(h)
        if self.upsample == "conv":
            return Upsample(name="upsamplers_0")(h)
        if self.upsample == "resnet":
            return _resnet(config, self.features, "upsamplers_0", resample="up")(h, time)
        return h


class UNet2DModel(nn.Module):
    """Prediction `[b, h, w, out_channels]` for noisy images, timesteps and labels.

    Attributes:
      config: Settings.
      dtype: Float dtype of the computation; None computes in the input's dtype.
    """

    config: UNet2DConfig
    dtype: jnp.dtype | None = None

    @nn.compact
    def __call__(
        self, x_t: Float[Array, "b h w c"], t: Array, labels: Array | None = None
    ) -> Float[Array, "b h w o"]:
        """The network's answer.

        Args:
          x_t: Noisy images; height and width multiples of `config.size_multiple`.
          t: Timesteps `[b]`, or one for all; for the fourier embedding noise levels > 0.
          labels: Classes `[b]` where the config has class embeddings, else None. With
            `class_embed_type="identity"` they are vectors `[b, time_dim]`.

        Raises:
          ValueError: If the size does not divide, or labels are missing or not expected.
        """
        config = self.config
        self._check(x_t, labels)
        x_t = x_t if self.dtype is None else x_t.astype(self.dtype)
        t = jnp.broadcast_to(jnp.asarray(t), x_t.shape[:1])

        time_proj = TimeProjection(config, name="time_proj")
        time = None
        if config.has_labels or not has_projection_rows(self):
            time = time_row(self, VECTOR, x_t.dtype)
            if time is None:
                mlp = TimestepEmbedding(config.time_dim, name=VECTOR)
                time = mlp(time_proj(t).astype(x_t.dtype))
        if labels is not None:
            assert time is not None  # it has no rows of projections
            if config.class_embed_type == "identity":
                vector = labels
            elif config.class_embed_type == "timestep":
                mlp = TimestepEmbedding(config.time_dim, name="class_embedding")
                vector = mlp(time_proj(labels).astype(time.dtype))
            else:
                rows = config.num_class_embeds
                assert rows is not None  # or the labels were refused above
                vector = nn.Embed(rows, config.time_dim, name="class_embedding")(labels)
            time = time + vector.astype(time.dtype)

        h = 2 * x_t - 1 if config.center_input_sample else x_t
        channels = config.block_out_channels
        h = Conv(channels[0], padding=SAME_3X3, name="conv_in")(h)

        skips = [h]
        for i, (attention, downsample) in enumerate(config.down_plan):
            down = DownBlock(config, channels[i], attention, downsample, name=f"down_blocks_{i}")
            skips += down(h, time)
            h = skips[-1]
        if config.mid_block_type is not None:
            h = MidBlock(config, name="mid_block")(h, time)
        for i, (attention, upsample) in enumerate(config.up_plan):
            up = UpBlock(config, channels[-1 - i], attention, upsample, name=f"up_blocks_{i}")
            h = up(h, [skips.pop() for _ in range(config.layers_per_block + 1)], time)

        h = nn.silu(GroupNorm(config.norm_num_groups, config.norm_eps, name="conv_norm_out")(h))
        zeros = nn.initializers.zeros_init()
        conv_out = Conv(config.out_channels, padding=SAME_3X3, kernel_init=zeros, name="conv_out")
        prediction = conv_out(h)
        if config.time_embedding_type == "fourier":
            prediction = prediction / t.astype(prediction.dtype)[:, None, None, None]
        return prediction

    @nn.nowrap
    def time_layers(self) -> tuple[str, ...]:
        """Paths of the layers that are of t alone; the projections only without labels."""
        config = self.config
        layers: tuple[str, ...] = (VECTOR,)
        # Labels of the type "timestep" go through the same features.
        if config.time_embedding_type != "positional" and config.class_embed_type != "timestep":
            layers = ("time_proj", VECTOR)
        if config.has_labels:
            return layers
        return layers + tuple(f"{block}/{PROJECTION}" for block in _resnet_names(config))

    @nn.nowrap
    def time_table(self, params: Params, t: Float[Array, " s"]) -> dict[str, Any]:
        """The rows of timesteps `t`, computed in float32."""
        config = self.config
        features = TimeProjection(config).apply({"params": params.get("time_proj", {})}, t)
        time: Any = TimestepEmbedding(config.time_dim).apply({"params": params[VECTOR]}, features)
        if config.has_labels:
            return at_paths([(VECTOR, time)])
        return projections(params, _resnet_names(config), time, act=config.act_fn)

    @nn.nowrap
    def _check(self, x_t: Array, labels: Array | None) -> None:
        config, multiple = self.config, self.config.size_multiple
        if x_t.shape[1] % multiple or x_t.shape[2] % multiple:
            raise ValueError(
                f"height and width must be multiples of {multiple}, one halving for every down "
                f"block but the last; got {x_t.shape=}."
            )
        if config.has_labels and labels is None:
            raise ValueError(
                "this UNet is class-conditional and needs labels; got labels=None with "
                f"class_embed_type={config.class_embed_type!r}, "
                f"num_class_embeds={config.num_class_embeds}."
            )
        if not config.has_labels and labels is not None:
            raise ValueError(
                "this UNet is unconditional (class_embed_type and num_class_embeds are None); "
                "call it with labels=None."
            )


def _resnet_names(config: UNet2DConfig) -> tuple[str, ...]:
    """Paths of all ResNet blocks."""
    names: list[str] = []
    for i, (_, downsample) in enumerate(config.down_plan):
        names += [f"down_blocks_{i}/resnets_{j}" for j in range(config.layers_per_block)]
        names += [f"down_blocks_{i}/downsamplers_0"] if downsample == "resnet" else []
    if config.mid_block_type is not None:
        names += ["mid_block/resnets_0", "mid_block/resnets_1"]
    for i, (_, upsample) in enumerate(config.up_plan):
        names += [f"up_blocks_{i}/resnets_{j}" for j in range(config.layers_per_block + 1)]
        names += [f"up_blocks_{i}/upsamplers_0"] if upsample == "resnet" else []
    return tuple(names)
