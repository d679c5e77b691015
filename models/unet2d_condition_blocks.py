"""The blocks of `qjax.models.unet2d_condition`: ResNet blocks, attention, halving and doubling.

A block is built by its `BlockPlan`. After each of its ResNet blocks stands a spatial
transformer that looks at a text, self-attention among the pixels, or nothing. Names of
parameters are those of diffusers' blocks.
"""

import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from qjax.core.layers import Conv
from qjax.core.typing import Array, Float, Shaped
from qjax.models.attention import AttentionBlock
from qjax.models.resnet import SAME_3X3, Downsample, ResnetBlock, upsample_nearest
from qjax.models.transformer_2d import Transformer2DModel
from qjax.models.unet2d_condition_config import UNet2DConditionConfig
from qjax.models.unet2d_condition_plan import BlockPlan


def resize_nearest(x: Float[Array, "b h w c"], size: tuple[int, int]) -> Float[Array, "b h2 w2 c"]:
    """`x` at height and width `size`, each pixel that of `x` at `floor(i * old / new)`."""
    h, w = x.shape[1:3]
    if size == (2 * h, 2 * w):
        return upsample_nearest(x)
    rows, columns = (np.arange(new) * old // new for new, old in zip(size, (h, w), strict=True))
    return jnp.take(jnp.take(x, rows, axis=1), columns, axis=2)


class Upsample(nn.Module):
    """`resize_nearest` and a 3x3 convolution that keeps the channels."""

    @nn.compact
    def __call__(
        self, x: Float[Array, "b h w c"], size: tuple[int, int]
    ) -> Float[Array, "b h2 w2 c"]:
        return Conv(x.shape[-1], padding=SAME_3X3, name="conv")(resize_nearest(x, size))


def _resnet(config: UNet2DConditionConfig, plan: BlockPlan, name: str, **settings) -> ResnetBlock:
    return ResnetBlock(
        plan.features,
        groups=config.norm_num_groups,
        eps=config.norm_eps,
        act=config.act_fn,
        time_scale_shift=config.resnet_time_scale_shift,
        output_scale=plan.output_scale,
        timed=True,
        name=name,
        **settings,
    )


def _attend(
    config: UNet2DConditionConfig,
    plan: BlockPlan,
    i: int,
    h: Array,
    text: Array | None,
    mask: Array | None,
) -> Array:
    """`h` after the attention that follows ResNet block `i`, if any does."""
    groups, name = config.norm_num_groups, f"attentions_{i}"
    if plan.attention is None:
        return h
    if plan.attention == "self":
        block = AttentionBlock(plan.heads, plan.head_dim, groups, config.norm_eps, name=name)
        return block(h)
    transformer = Transformer2DModel(
        plan.heads,
        plan.head_dim,
        plan.depths[i],
        groups,
        linear=config.use_linear_projection,
        only_cross_attention=plan.only_cross_attention,
        upcast=config.upcast_attention,
        name=name,
    )
    assert text is not None  # or its absence was refused at the door
    return transformer(h, text, mask)


class DownBlock(nn.Module):
    """ResNet blocks, attention after each where the plan has it, then a halving."""

    config: UNet2DConditionConfig
    plan: BlockPlan

    @nn.compact
    def __call__(
        self,
        h: Float[Array, "b h w c"],
        time: Float[Array, "b d"] | None,
        text: Float[Array, "b t d2"] | None = None,
        mask: Shaped[Array, "b t"] | None = None,
    ) -> list[Array]:
        """All outputs, each kept for the way up; the last one goes on to the next block."""
        config, plan, outputs = self.config, self.plan, []
        for i in range(len(plan.depths)):
            h = _resnet(config, plan, f"resnets_{i}")(h, time)
            h = _attend(config, plan, i, h, text, mask)
            outputs.append(h)
        if plan.resample == "conv":
            outputs.append(Downsample(config.downsample_padding, name="downsamplers_0")(h))
        elif plan.resample == "resnet":
            block = _resnet(config, plan, "downsamplers_0", resample="down")
            outputs.append(block(h, time))
        return outputs


class MidBlock(nn.Module):
    """A ResNet block at the lowest size, and after each transformer of the plan another."""

    config: UNet2DConditionConfig
    plan: BlockPlan

    @nn.compact
    def __call__(
        self,
        h: Float[Array, "b h w c"],
        time: Float[Array, "b d"] | None,
        text: Float[Array, "b t d2"] | None = None,
        mask: Shaped[Array, "b t"] | None = None,
    ) -> Float[Array, "b h w c"]:
        config, plan = self.config, self.plan
        h = _resnet(config, plan, "resnets_0")(h, time)
        for i in range(len(plan.depths)):
            h = _attend(config, plan, i, h, text, mask)
            h = _resnet(config, plan, f"resnets_{i + 1}")(h, time)
        return h


class UpBlock(nn.Module):
    """ResNet blocks on the joined input and skip, attention after each, then a doubling."""

    config: UNet2DConditionConfig
    plan: BlockPlan

    @nn.compact
    def __call__(
        self,
        h: Float[Array, "b h w c"],
        skips: list[Array],
        time: Float[Array, "b d"] | None,
        text: Float[Array, "b t d2"] | None = None,
        mask: Shaped[Array, "b t"] | None = None,
        *,
        size: tuple[int, int] | None = None,
    ) -> Float[Array, "b h2 w2 o"]:
        """`skips` in the order in which they are used; `size` is that of the next block's."""
        config, plan = self.config, self.plan
        for i, skip in enumerate(skips):
            h = jnp.concatenate([h, skip], axis=-1)
            h = _resnet(config, plan, f"resnets_{i}")(h, time)
            h = _attend(config, plan, i, h, text, mask)
        if plan.resample == "conv":
            return Upsample(name="upsamplers_0")(h, size or (2 * h.shape[1], 2 * h.shape[2]))
        if plan.resample == "resnet":
            return _resnet(config, plan, "upsamplers_0", resample="up")(h, time)
        return h
