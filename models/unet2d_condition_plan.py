"""What each block of a `UNet2DConditionModel` is made of, read out of the config's lists."""

import dataclasses
from typing import Literal

from qjax.models.unet2d_condition_config import (
    DOWN_BLOCKS,
    UP_BLOCKS,
    BlockKind,
    UNet2DConditionConfig,
    per_level,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockPlan:
    """What one block is made of.

    Attributes:
      features: Channels.
      attention: What follows its ResNet blocks: a transformer (`"cross"`), self-attention
        (`"self"`) or nothing (None).
      heads: Heads of an attention.
      head_dim: Width of a head.
      depths: Transformer blocks after each ResNet block; 0 where there is no transformer. In
        the mid block they stand between ResNet blocks, of which there is one more.
      only_cross_attention: Whether the self-attention of a transformer looks at the text too.
      resample: Halving or doubling by a `conv` or by a `resnet` block; None keeps the size.
      output_scale: The sums of the ResNet blocks are divided by it.
    """

    features: int
    attention: Literal["cross", "self"] | None
    heads: int
    head_dim: int
    depths: tuple[int, ...]
    only_cross_attention: bool = False
    resample: Literal["conv", "resnet"] | None = None
    output_scale: float = 1.0


def down_plan(config: UNet2DConditionConfig) -> tuple[BlockPlan, ...]:
    """The down blocks, from the largest size to the smallest."""
    n = len(config.block_out_channels)
    layers = per_level(config.layers_per_block, n)
    depths = per_level(config.transformer_layers_per_block, n)
    return tuple(
        _plan(config, i, i, DOWN_BLOCKS[name], depths[i], layers[i])
        for i, name in enumerate(config.down_block_types)
    )


def mid_plan(config: UNet2DConditionConfig) -> BlockPlan | None:
    """The mid block, or None if there is none."""
    if config.mid_block_type is None:
        return None
    n, features = len(config.block_out_channels), config.block_out_channels[-1]
    heads = per_level(config.attention_head_dim, n)[-1]
    depth = per_level(per_level(config.transformer_layers_per_block, n)[-1], 1)[0]
    crosses = config.mid_block_type == "UNetMidBlock2DCrossAttn"
    return BlockPlan(
        features=features,
        attention="cross" if crosses else None,
        heads=heads,
        head_dim=features // heads,
        depths=(depth,) if crosses else (),
        output_scale=config.mid_block_scale_factor,
    )


def up_plan(config: UNet2DConditionConfig) -> tuple[BlockPlan, ...]:
    """The up blocks, from the smallest size to the largest."""
    n = len(config.block_out_channels)
    layers = per_level(config.layers_per_block, n)[::-1]
    depths = config.reverse_transformer_layers_per_block
    if depths is None:
        depths = per_level(config.transformer_layers_per_block, n)[::-1]
    return tuple(
        _plan(config, i, n - 1 - i, UP_BLOCKS[name], depths[i], layers[i] + 1)
        for i, name in enumerate(config.up_block_types)
    )


def resnet_names(config: UNet2DConditionConfig) -> tuple[str, ...]:
    """Paths of all ResNet blocks, those that halve and double among them."""
    names: list[str] = []
    for way, sampler, plans in (
        ("down", "downsamplers_0", down_plan(config)),
        ("up", "upsamplers_0", up_plan(config)),
    ):
        for i, plan in enumerate(plans):
            block = f"{way}_blocks_{i}"
            names += [f"{block}/resnets_{j}" for j in range(len(plan.depths))]
            names += [f"{block}/{sampler}"] if plan.resample == "resnet" else []
    mid = mid_plan(config)
    if mid is not None:
        names += [f"mid_block/resnets_{j}" for j in range(len(mid.depths) + 1)]
    return tuple(names)


def _plan(
    config: UNet2DConditionConfig,
    i: int,
    level: int,
    kind: BlockKind,
    depth: int | tuple[int, ...],
    layers: int,
) -> BlockPlan:
    """Block `i` of the way down or up, at `level` counted from the largest size."""
    n, features = len(config.block_out_channels), config.block_out_channels[level]
    attention, resample = kind
    head_dims = per_level(config.attention_head_dim, n)
    heads, head_dim = head_dims[level], features // head_dims[level]
    if attention == "self":  # diffusers counts these from the first block on the way up, too
        heads, head_dim = features // head_dims[i], head_dims[i]
    return BlockPlan(
        features=features,
        attention=attention,
        heads=heads,
        head_dim=head_dim,
        depths=per_level(depth, layers) if attention == "cross" else (0,) * layers,
        only_cross_attention=per_level(config.only_cross_attention, n)[level],
        resample=resample if i < n - 1 else None,
        output_scale=config.resnet_out_scale_factor if resample == "resnet" else 1.0,
    )
