"""UNet2DConditionModel: the UNet of Stable Diffusion 1, 2 and XL, and of latent diffusion.

    conv_in -> down blocks -> mid block -> up blocks -> norm, silu, conv_out

As in `qjax.models.unet2d`, but with spatial transformers after the ResNet blocks, which look
at a text. All ResNet blocks read one time vector

    e = MLP(sinusoids(t) + W guidance) + class vector + MLP([pooled, sinusoids(time_ids)])

whose later terms exist where the config has them. It is computed in a method of its own,
`time_vector`, and the rest of the network in another, `denoise`; calling the model is one
after the other. In SD 1 and 2 and in LDM (`config.time_vector_is_of_t_alone`) a sampler can
compute the vectors of all its steps in advance:

    rows = model.apply(variables, timesteps, method="time_vector")                  # [s, d]
    prediction = model.apply(variables, x_t, rows[i : i + 1], conditioning, method="denoise")

and what every ResNet block makes of them too: `time_table` does, and a row of it, given as the
collection `"time"`, takes the place of the layers that it was made of (`time_rows.py`).

The function is that of diffusers' `UNet2DConditionModel`, with its names for settings and
parameters (`down_blocks.0.attentions.1.norm` is `down_blocks_0/attentions_1/norm` here).
Heights and widths need not divide by the number of halvings: an up block resizes to the size
of what it is joined with next.

References:
  Rombach et al., High-Resolution Image Synthesis with Latent Diffusion Models, 2022,
  https://arxiv.org/abs/2112.10752.
  Podell et al., SDXL, 2023, https://arxiv.org/abs/2307.01952, for `pooled` and `time_ids`.
  Luo et al., Latent Consistency Models, 2023, https://arxiv.org/abs/2310.04378, for `guidance`.
"""

import functools
from typing import Any

import jax.numpy as jnp
from flax import linen as nn

from qjax.core.layers import Conv, Dense
from qjax.core.typing import Array, Float, Params
from qjax.models.embeddings import timestep_embedding
from qjax.models.resnet import ACTIVATIONS, GroupNorm, projections
from qjax.models.time_rows import (
    PROJECTION,
    VECTOR,
    at_paths,
    has_projection_rows,
    time_row,
)
from qjax.models.unet2d_condition_blocks import DownBlock, MidBlock, UpBlock
from qjax.models.unet2d_condition_config import UNet2DConditionConfig
from qjax.models.unet2d_condition_inputs import (
    OF_TEXT,
    OF_TIME,
    Conditioning,
    check_conditioning,
)
from qjax.models.unet2d_condition_plan import down_plan, mid_plan, resnet_names, up_plan


class TimeEmbedding(nn.Module):
    """Two-layer MLP to the width of the time vector, of `embedding + W condition`.

    Attributes:
      features: Output width.
      act: A key of `qjax.models.resnet.ACTIVATIONS`.
    """

    features: int
    act: str = "silu"

    @nn.compact
    def __call__(
        self, embedding: Float[Array, "b d"], condition: Float[Array, "b c"] | None = None
    ) -> Float[Array, "b o"]:
        if condition is not None:
            cond_proj = Dense(embedding.shape[-1], use_bias=False, name="cond_proj")
            embedding = embedding + cond_proj(condition)
        h = Dense(self.features, name="linear_1")(embedding)
        return Dense(self.features, name="linear_2")(ACTIVATIONS[self.act](h))


def _class_embedding(config: UNet2DConditionConfig) -> nn.Module | None:
    if config.class_embed_type == "timestep":
        return TimeEmbedding(config.time_dim, config.act_fn)
    if config.class_embed_type == "projection":
        return TimeEmbedding(config.time_dim)
    if config.class_embed_type is None and config.num_class_embeds is not None:
        return nn.Embed(config.num_class_embeds, config.time_dim)
    return None


class UNet2DConditionModel(nn.Module):
    """Prediction `[b, h, w, out_channels]` for noisy images, timesteps and a conditioning.

    Attributes:
      config: Settings.
      dtype: Float dtype of the computation; None computes in the input's dtype.
    """

    config: UNet2DConditionConfig
    dtype: jnp.dtype | None = None

    def setup(self):
        config = self.config
        self.time_embedding = TimeEmbedding(config.time_dim, config.act_fn)
        self.class_embedding: Any = _class_embedding(config)
        if config.addition_embed_type == "text_time":
            self.add_embedding = TimeEmbedding(config.time_dim)

        k_in, k_out = config.conv_in_kernel, config.conv_out_kernel
        zeros = nn.initializers.zeros_init()
        self.conv_in = Conv(config.block_out_channels[0], (k_in, k_in), padding=_same(k_in))
        self.down_blocks = [DownBlock(config, plan) for plan in down_plan(config)]
        mid = mid_plan(config)
        if mid is not None:
            self.mid_block = MidBlock(config, mid)
        self.up_blocks = [UpBlock(config, plan) for plan in up_plan(config)]
        self.conv_norm_out = GroupNorm(config.norm_num_groups, config.norm_eps)
        self.conv_out = Conv(
            config.out_channels, (k_out, k_out), padding=_same(k_out), kernel_init=zeros
        )

    def __call__(
        self, x_t: Float[Array, "b h w c"], t: Array, conditioning: Conditioning | None = None
    ) -> Float[Array, "b h w o"]:
        """The network's answer.

        Args:
          x_t: Noisy images of any size (multiples of `config.size_multiple` where ResNet
            blocks halve or double).
          t: Timesteps `[b]`, or one for all.
          conditioning: Text and whatever else the config says; None where it needs nothing.

        Raises:
          TypeError: If `conditioning` is something else.
          ValueError: If the size does not suit, or fields of `conditioning` are missing, not
            expected or of another shape: all are named.
        """
        check_conditioning(self.config, conditioning, OF_TIME + OF_TEXT, batch=x_t.shape[0])
        time = None
        if not (self.config.time_vector_is_of_t_alone and has_projection_rows(self)):
            t = jnp.broadcast_to(jnp.asarray(t), x_t.shape[:1])
            time = self.time_vector(t, conditioning, dtype=self.dtype or x_t.dtype)
        return self.denoise(x_t, time, conditioning)

    def time_vector(
        self,
        t: Array,
        conditioning: Conditioning | None = None,
        *,
        dtype: jnp.dtype | None = None,
    ) -> Float[Array, "b d"]:
        """The vector that all ResNet blocks read, of t and of what is added to it.

        Args:
          t: Timesteps `[b]` or a scalar; those of a whole sampler where nothing is added.
          conditioning: `pooled`, `time_ids`, `labels` and `guidance`, as the config needs them;
            the text is not read.
          dtype: Float dtype of the computation; None for the model's, or float32.
        """
        config, dtype = self.config, dtype or self.dtype or jnp.float32
        check_conditioning(config, conditioning, OF_TIME)
        given = conditioning or Conditioning()
        waves = functools.partial(self._waves, dtype=dtype)
        time = None if given.guidance is not None else time_row(self, VECTOR, dtype)
        if time is None:
            guidance = None if given.guidance is None else given.guidance.astype(dtype)
            time = self.time_embedding(waves(t, config.block_out_channels[0]), guidance)
        if given.labels is not None:
            labels = given.labels
            if config.class_embed_type == "timestep":
                labels = waves(labels, config.block_out_channels[0])
            elif config.class_embed_type is not None:
                labels = labels.astype(dtype)
            vector = labels if self.class_embedding is None else self.class_embedding(labels)
            time = time + vector.astype(dtype)
        if given.time_ids is not None:
            assert given.pooled is not None  # or the two were refused above
            assert config.addition_time_embed_dim is not None
            sizes = waves(given.time_ids.reshape(-1), config.addition_time_embed_dim)
            sizes = sizes.reshape(given.time_ids.shape[0], -1)
            added = jnp.concatenate([given.pooled.astype(dtype), sizes], axis=-1)
            time = time + self.add_embedding(added)
        return time

    @nn.nowrap
    def _waves(self, t: Array, width: int, *, dtype: jnp.dtype) -> Float[Array, "b d"]:
        return timestep_embedding(
            t,
            width,
            flip_sin_to_cos=self.config.flip_sin_to_cos,
            downscale_freq_shift=self.config.freq_shift,
        ).astype(dtype)

    @nn.nowrap
    def time_layers(self) -> tuple[str, ...]:
        """Paths of the layers that are of t alone; none where a guidance scale is embedded."""
        if "guidance" in self.config.conditioning:
            return ()
        if not self.config.time_vector_is_of_t_alone:
            return (VECTOR,)
        blocks = resnet_names(self.config)
        return (VECTOR, *(f"{block}/{PROJECTION}" for block in blocks))

    @nn.nowrap
    def time_table(self, params: Params, t: Float[Array, " s"]) -> dict[str, Any]:
        """The rows of timesteps `t`, computed in float32."""
        config = self.config
        waves = self._waves(t, config.block_out_channels[0], dtype=jnp.dtype(jnp.float32))
        mlp = TimeEmbedding(config.time_dim, config.act_fn)
        time: Any = mlp.apply({"params": params[VECTOR]}, waves)
        if not config.time_vector_is_of_t_alone:
            return at_paths([(VECTOR, time)])
        return projections(params, resnet_names(config), time, act=config.act_fn)

    def denoise(
        self,
        x_t: Float[Array, "b h w c"],
        time: Float[Array, "b d"] | None,
        conditioning: Conditioning | None = None,
    ) -> Float[Array, "b h w o"]:
        """The network's answer, given the time vector (`[b, d]`, or `[1, d]` for all images).

        The vector may be None where the collection `"time"` has every ResNet block's row. Of
        `conditioning` only `text` and `mask` are read.
        """
        config = self.config
        check_conditioning(config, conditioning, OF_TEXT, batch=x_t.shape[0])
        ups = up_plan(config)
        if any(plan.resample == "resnet" for plan in (*down_plan(config), *ups)):
            _check_size(config, x_t)
        x_t = x_t if self.dtype is None else x_t.astype(self.dtype)
        time = None if time is None else time.astype(x_t.dtype)
        given = conditioning or Conditioning()
        text = None if given.text is None else given.text.astype(x_t.dtype)

        h = self.conv_in(2 * x_t - 1 if config.center_input_sample else x_t)
        skips = [h]
        for down in self.down_blocks:
            skips += down(h, time, text, given.mask)
            h = skips[-1]
        if config.mid_block_type is not None:
            h = self.mid_block(h, time, text, given.mask)
        for up, plan in zip(self.up_blocks, ups, strict=True):
            joined = [skips.pop() for _ in plan.depths]
            size = (skips[-1].shape[1], skips[-1].shape[2]) if skips else None
            h = up(h, joined, time, text, given.mask, size=size)
        return self.conv_out(ACTIVATIONS[config.act_fn](self.conv_norm_out(h)))


def _same(kernel: int) -> tuple[tuple[int, int], tuple[int, int]]:
    side = (kernel // 2, kernel // 2)
    return side, side


def _check_size(config: UNet2DConditionConfig, x_t: Array) -> None:
    multiple = config.size_multiple
    if x_t.shape[1] % multiple or x_t.shape[2] % multiple:
        raise ValueError(
            f"height and width must be multiples of {multiple} where ResNet blocks halve or double "
            f"(ResnetDownsampleBlock2D, ResnetUpsampleBlock2D); got {x_t.shape=}."
        )
