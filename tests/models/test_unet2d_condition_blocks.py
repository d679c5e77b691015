"""The blocks of UNet2DConditionModel against diffusers' on the same random weights."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from parity import array, assert_close, from_torch, params_of, randomize, to_torch, with_weights_of

from qjax.models.convert import convert
from qjax.models.unet2d_condition_blocks import (
    DownBlock,
    MidBlock,
    UpBlock,
    Upsample,
    resize_nearest,
)
from qjax.models.unet2d_condition_config import UNet2DConditionConfig
from qjax.models.unet2d_condition_keys import transformer_keys_of_params
from qjax.models.unet2d_condition_plan import down_plan, mid_plan, up_plan

SHAPES = [(1, 8, 8), (3, 8, 4), (2, 7, 10)]  # batch, height, width; the last does not divide
TOKENS, TEXT_WIDTH, TIME_DIM = 5, 6, 12

# One of each type; all but the last of each direction halve or double.
CONFIG = UNet2DConditionConfig(
    block_out_channels=(8, 16, 8, 16),
    norm_num_groups=4,
    cross_attention_dim=TEXT_WIDTH,
    time_embedding_dim=TIME_DIM,
    down_block_types=(
        "CrossAttnDownBlock2D",
        "AttnDownBlock2D",
        "ResnetDownsampleBlock2D",
        "DownBlock2D",
    ),
    up_block_types=(
        "UpBlock2D",
        "CrossAttnUpBlock2D",
        "ResnetUpsampleBlock2D",
        "AttnUpBlock2D",
    ),
    attention_head_dim=(2, 4, 2, 8),
    layers_per_block=(2, 1, 1, 1),
    transformer_layers_per_block=((1, 0), 1, 1, 1),
    reverse_transformer_layers_per_block=(1, (0, 2), 1, 1),
    only_cross_attention=(True, False, False, False),
    resnet_out_scale_factor=1.5,
)


# Layers


@pytest.mark.quick_cases("new0-*", "new1-old0", "new2-old1", "new3-old2")
@pytest.mark.torch_oracle
@pytest.mark.parametrize("old", [(3, 4), (1, 5), (6, 2)])
@pytest.mark.parametrize("new", [(6, 8), (7, 9), (5, 7), (11, 4)])
def test_resizing_agrees_with_torch(old, new):
    torch = pytest.importorskip("torch")
    x = array(1, *old, 2)
    theirs = torch.nn.functional.interpolate(to_torch(x), size=new, mode="nearest")
    assert np.array_equal(resize_nearest(x, new), from_torch(theirs))


@pytest.mark.torch_oracle
@pytest.mark.parametrize("size", [(8, 6), (7, 5), (7, 6)])
def test_upsampling_to_a_size_agrees_with_diffusers(size):
    pytest.importorskip("torch")
    from diffusers.models.upsampling import Upsample2D

    theirs, x = randomize(Upsample2D(8, use_conv=True)), array(2, 4, 3, 8)
    shapes = jax.eval_shape(lambda key: Upsample().init(key, x, size), jax.random.key(0))
    tensors = {k: v.numpy() for k, v in theirs.state_dict().items()}
    params = convert(tensors, transformer_keys_of_params(shapes["params"]))
    assert_close(Upsample().apply({"params": params}, x, size), theirs(to_torch(x), size))


# Blocks


@functools.cache
def reference_blocks():
    pytest.importorskip("torch")
    import diffusers

    return randomize(diffusers.UNet2DConditionModel.from_config(CONFIG.to_diffusers()))


@pytest.mark.quick_cases("0", "2")
@pytest.mark.torch_oracle
@pytest.mark.parametrize("level", range(4))
def test_down_blocks_agree_with_diffusers(level):
    theirs, plan = reference_blocks().down_blocks[level], down_plan(CONFIG)[level]
    crosses = plan.attention == "cross"
    channels = CONFIG.block_out_channels[max(level - 1, 0)]
    for b, h, w in SHAPES:
        if plan.resample == "resnet":
            h, w = h + h % 2, w + w % 2  # the mean of 2x2 pixels needs even sizes
        x, time = array(b, h, w, channels), array(b, TIME_DIM)
        text = (array(b, TOKENS, TEXT_WIDTH, seed=1),) if crosses else ()
        ours = with_weights_of(theirs, DownBlock(CONFIG, plan), x, time, *text)(x, time, *text)
        kept = theirs(to_torch(x), to_torch(time), *map(to_torch, text))[1]
        for output, expected in zip(ours, kept, strict=True):
            assert_close(output, expected)


@pytest.mark.quick_cases("0", "2")
@pytest.mark.torch_oracle
@pytest.mark.parametrize("level", range(4))
def test_up_blocks_agree_with_diffusers(level):
    theirs, plan = reference_blocks().up_blocks[level], up_plan(CONFIG)[level]
    channels = CONFIG.block_out_channels[::-1]
    widths = [plan.features] * (len(plan.depths) - 1) + [channels[min(level + 1, 3)]]
    sized = plan.resample == "conv" and plan.attention != "self"  # as diffusers has it
    for (b, h, w), odd in zip(SHAPES, (0, 0, 1), strict=True):
        x, time = array(b, h, w, channels[max(level - 1, 0)]), array(b, TIME_DIM)
        skips = [array(b, h, w, c, seed=i) for i, c in enumerate(widths)]
        text, kwargs = None, {}
        if plan.attention == "cross":
            text = array(b, TOKENS, TEXT_WIDTH, seed=1)
            kwargs["encoder_hidden_states"] = to_torch(text)
        size = (2 * h - odd, 2 * w) if sized else None
        if sized:
            kwargs["upsample_size"] = size
        block = UpBlock(CONFIG, plan)
        apply = functools.partial(block.apply, size=size)
        params = params_of(theirs, block, x, skips, time, text)
        kept = tuple(to_torch(skip) for skip in reversed(skips))
        expected = theirs(to_torch(x), kept, to_torch(time), **kwargs)
        assert_close(jax.jit(apply)({"params": params}, x, skips, time, text), expected)


@pytest.mark.torch_oracle
@pytest.mark.parametrize("kind", ["UNetMidBlock2DCrossAttn", "UNetMidBlock2D"])
def test_mid_blocks_agree_with_diffusers(kind):
    pytest.importorskip("torch")
    import diffusers

    config = dataclasses.replace(
        CONFIG, mid_block_type=kind, mid_block_scale_factor=1.5, only_cross_attention=True
    )
    theirs = diffusers.UNet2DConditionModel.from_config(config.to_diffusers()).mid_block
    theirs, plan = randomize(theirs), mid_plan(config)
    for b, h, w in SHAPES:
        x, time = array(b, h, w, 16), array(b, TIME_DIM)
        text = () if plan.attention is None else (array(b, TOKENS, TEXT_WIDTH, seed=1),)
        ours = with_weights_of(theirs, MidBlock(config, plan), x, time, *text)
        kwargs = {"encoder_hidden_states": to_torch(text[0])} if text else {}
        assert_close(ours(x, time, *text), theirs(to_torch(x), to_torch(time), **kwargs))
