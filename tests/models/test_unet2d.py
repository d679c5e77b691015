"""UNet2DModel against diffusers' on the same random weights: layer, block, model."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from parity import array, assert_close, params_of, randomize, to_torch, with_weights_of

from qjax.models import resnet
from qjax.models.attention import AttentionBlock
from qjax.models.unet2d import (
    DownBlock,
    MidBlock,
    TimeProjection,
    UNet2DConfig,
    UNet2DModel,
    UpBlock,
)

SHAPES = [(1, 8, 8), (3, 8, 16), (2, 16, 12)]  # batch, height, width
TIME_DIM = 12

TINY = {
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "attention_head_dim": 8,
    "time_embedding_dim": TIME_DIM,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
}
RESNET_UP_DOWN = {
    "down_block_types": ("AttnDownBlock2D", "ResnetDownsampleBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "ResnetUpsampleBlock2D", "AttnUpBlock2D"),
    "block_out_channels": (8, 16, 16),
    "downsample_type": "resnet",
    "upsample_type": "resnet",
}
MODELS = {
    "ddpm": {
        "downsample_padding": 0,
        "flip_sin_to_cos": False,
        "freq_shift": 1,
        "attention_head_dim": None,
        "norm_eps": 1e-6,
        "layers_per_block": 2,
    },
    "scale_shift_and_classes": {
        "resnet_time_scale_shift": "scale_shift",
        "num_class_embeds": 5,
        "center_input_sample": True,
        "in_channels": 4,
        "out_channels": 5,
        "time_embedding_dim": None,
    },
    "scale_shift_with_attention_norm": {
        "resnet_time_scale_shift": "scale_shift",
        "attn_norm_num_groups": 2,
        "class_embed_type": "timestep",
        "act_fn": "gelu",
    },
    "fourier_and_class_vectors": {
        "time_embedding_type": "fourier",
        "class_embed_type": "identity",
        "add_attention": False,
        "mid_block_scale_factor": 1.5,
        "act_fn": "relu",
    },
    "learned_without_mid_block": {
        "time_embedding_type": "learned",
        "num_train_timesteps": 20,
        "mid_block_type": None,
        "act_fn": "mish",
    },
    "resnet_up_down": RESNET_UP_DOWN,
}
# All models at one shape each, and the first at all.
MODELS_AT_SHAPES = [
    *(("ddpm", shape) for shape in SHAPES),
    *((name, SHAPES[i % 3]) for i, name in enumerate(name for name in MODELS if name != "ddpm")),
]


def tiny_config(**settings):
    return UNet2DConfig.from_diffusers(TINY | settings)


def vector(b, seed=0):
    return array(b, TIME_DIM, seed=seed)


@pytest.fixture(scope="module")
def blocks():
    pytest.importorskip("torch")
    from diffusers.models.unets import unet_2d_blocks

    return unet_2d_blocks


# Layers


@pytest.mark.torch_oracle
@pytest.mark.parametrize(("shape", "groups"), [*zip(SHAPES, [1, 4, 8], strict=True)])
def test_group_norm_agrees_with_torch(shape, groups):
    torch = pytest.importorskip("torch")
    theirs = randomize(torch.nn.GroupNorm(groups, 8, eps=1e-3))
    x = array(*shape, 8) * 3 + 10
    ours = with_weights_of(theirs, resnet.GroupNorm(groups, 1e-3), x)
    assert_close(ours(x), theirs(to_torch(x)))


def test_group_norm_loses_no_digits_to_a_large_mean():
    x = array(2, 8, 8, 8).astype(np.float64)
    norm = resnet.GroupNorm(4, 1e-6)
    params = norm.init(jax.random.key(0), jnp.asarray(x, jnp.float32))
    # The shift costs inputs of 24 bits 8; a variance out of squares would lose 16.
    shifted = norm.apply(params, jnp.asarray(x + 256, jnp.float32))
    np.testing.assert_allclose(shifted, norm.apply(params, jnp.asarray(x, jnp.float32)), atol=2e-4)


def test_group_norm_that_does_not_divide_raises():
    with pytest.raises(ValueError, match="groups must divide the channels; got groups=3"):
        resnet.GroupNorm(3, 1e-6).init(jax.random.key(0), jnp.zeros((1, 2, 2, 8)))


@pytest.mark.torch_oracle
@pytest.mark.parametrize("shape", SHAPES)
def test_halving_and_doubling_agree_with_torch(blocks, shape):
    x = array(*shape, 8)
    for padding in (0, 1):
        theirs = randomize(blocks.Downsample2D(8, use_conv=True, padding=padding, name="op"))
        ours = with_weights_of(theirs, resnet.Downsample(padding), x)
        assert_close(ours(x), theirs(to_torch(x)))
    theirs = randomize(blocks.Upsample2D(8, use_conv=True))
    assert_close(with_weights_of(theirs, resnet.Upsample(), x)(x), theirs(to_torch(x)))
    theirs = blocks.Downsample2D(8, use_conv=False, padding=1, name="op")
    assert_close(resnet.downsample_mean(x), theirs(to_torch(x)))


@pytest.mark.quick_cases("plain-shape0", "up-shape1", "down-shape2")
@pytest.mark.torch_oracle
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    "settings",
    [
        {"resample": None, "time_scale_shift": "default", "act": "silu", "features": 8},
        {"resample": "up", "time_scale_shift": "scale_shift", "act": "gelu", "features": 12},
        {"resample": "down", "time_scale_shift": "default", "act": "mish", "features": 12},
    ],
    ids=["plain", "up", "down"],
)
def test_resnet_block_agrees_with_diffusers(blocks, shape, settings):
    theirs = randomize(
        blocks.ResnetBlock2D(
            in_channels=8,
            out_channels=settings["features"],
            temb_channels=TIME_DIM,
            groups=4,
            eps=1e-5,
            non_linearity=settings["act"],
            time_embedding_norm=settings["time_scale_shift"],
            output_scale_factor=1.5,
            up=settings["resample"] == "up",
            down=settings["resample"] == "down",
        )
    )
    x, time = array(*shape, 8), vector(shape[0])
    block = resnet.ResnetBlock(groups=4, eps=1e-5, output_scale=1.5, **settings)
    ours = with_weights_of(theirs, block, x, time)
    assert_close(ours(x, time), theirs(to_torch(x), to_torch(time)))


@pytest.mark.torch_oracle
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("groups", [None, 4])
def test_attention_block_agrees_with_diffusers(blocks, shape, groups):
    theirs = randomize(
        blocks.Attention(
            8,
            heads=2,
            dim_head=3,
            rescale_output_factor=1.5,
            eps=1e-5,
            norm_num_groups=groups,
            residual_connection=True,
            bias=True,
        )
    )
    x = array(*shape, 8)
    block = AttentionBlock(2, 3, groups=groups, eps=1e-5, output_scale=1.5)
    assert_close(with_weights_of(theirs, block, x)(x), theirs(to_torch(x)))


@pytest.mark.torch_oracle
@pytest.mark.parametrize("kind", ["positional", "fourier", "learned"])
def test_time_projection_agrees_with_diffusers(kind):
    torch = pytest.importorskip("torch")
    import diffusers

    config = tiny_config(time_embedding_type=kind, num_train_timesteps=20)
    theirs = randomize(diffusers.UNet2DModel.from_config(config.to_diffusers()).time_proj)
    for b in (1, 3, 5):
        t = np.arange(b, dtype=np.int32) * 4 + 1
        ours = with_weights_of(theirs, TimeProjection(config), t)
        assert_close(ours(t), theirs(torch.tensor(t)))


# Blocks


@pytest.mark.quick_cases("0-shape0", "1-shape1", "2-shape2")
@pytest.mark.torch_oracle
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("level", [0, 1, 2])
def test_down_and_up_blocks_agree_with_diffusers(level, shape):
    pytest.importorskip("torch")
    import diffusers

    config = tiny_config(**RESNET_UP_DOWN)
    reference = diffusers.UNet2DModel.from_config(config.to_diffusers())
    time = vector(shape[0])

    theirs = randomize(reference.down_blocks[level])
    attention, downsample = config.down_plan[level]
    down = DownBlock(config, config.block_out_channels[level], attention, downsample)
    x = array(*shape, config.block_out_channels[max(level - 1, 0)])
    ours = with_weights_of(theirs, down, x, time)(x, time)
    for kept, expected in zip(ours, theirs(to_torch(x), to_torch(time))[1], strict=True):
        assert_close(kept, expected)

    theirs = randomize(reference.up_blocks[level])
    attention, upsample = config.up_plan[level]
    channels = config.block_out_channels[::-1]
    up = UpBlock(config, channels[level], attention, upsample)
    x = array(*shape, channels[max(level - 1, 0)])
    widths = channels[level], channels[min(level + 1, 2)]
    skips = [array(*shape, c, seed=c) for c in widths]
    ours = with_weights_of(theirs, up, x, skips, time)(x, skips, time)
    kept = tuple(to_torch(skip) for skip in reversed(skips))
    assert_close(ours, theirs(to_torch(x), kept, to_torch(time)))


@pytest.mark.torch_oracle
@pytest.mark.parametrize("shape", SHAPES)
def test_mid_block_agrees_with_diffusers(shape):
    pytest.importorskip("torch")
    import diffusers

    config = tiny_config(mid_block_scale_factor=1.5)
    theirs = diffusers.UNet2DModel.from_config(config.to_diffusers()).mid_block
    x, time = array(*shape, 16), vector(shape[0])
    ours = with_weights_of(randomize(theirs), MidBlock(config), x, time)
    assert_close(ours(x, time), theirs(to_torch(x), to_torch(time)))


# Model


def some_labels(config, b):
    if config.class_embed_type == "identity":
        return vector(b, seed=1)
    return np.arange(b, dtype=np.int32) + 1 if config.has_labels else None


@functools.cache
def reference_model(name):
    """Diffusers' model, and ours with its parameters."""
    pytest.importorskip("torch")
    import diffusers

    config = tiny_config(**MODELS[name])
    theirs = randomize(diffusers.UNet2DModel.from_config(config.to_diffusers()))
    x, labels = array(1, 8, 8, config.in_channels), some_labels(config, 1)
    params = params_of(theirs, UNet2DModel(config), x, np.array([1], np.int32), labels)
    return theirs, UNet2DModel(config), params


@pytest.mark.quick_cases(
    "ddpm-shape0", "ddpm-shape2", "scale_shift_and_classes-*", "fourier*", "learned*"
)
@pytest.mark.torch_oracle
@pytest.mark.parametrize(("name", "shape"), MODELS_AT_SHAPES)
def test_model_agrees_with_diffusers(name, shape):
    theirs, model, params = reference_model(name)
    x, labels = array(*shape, model.config.in_channels), some_labels(model.config, shape[0])
    t = np.arange(shape[0], dtype=np.int32) * 7 + 3
    ours = jax.jit(model.apply)({"params": params}, x, t, labels)
    their_labels = None if labels is None else to_torch(labels)
    assert_close(ours, theirs(to_torch(x), to_torch(t), their_labels).sample)


def tiny_model(**settings):
    """A model with random weights everywhere, the zero-initialised last layer too."""
    model = UNet2DModel(tiny_config(**settings))
    labels = some_labels(model.config, 2)
    shapes = jax.eval_shape(model.init, jax.random.key(0), array(2, 8, 8, 3), 1, labels)
    rng = np.random.default_rng(0)
    draw = lambda leaf: jnp.asarray(rng.normal(0, 0.2, leaf.shape), jnp.float32)
    return model, jax.tree.map(draw, shapes)


def test_one_timestep_for_all_equals_one_for_each():
    smallest = {
        "block_out_channels": (8,),
        "down_block_types": ("DownBlock2D",),
        "up_block_types": ("UpBlock2D",),
        "mid_block_type": None,
    }
    model, variables = tiny_model(**smallest)
    x, apply = array(2, 8, 8, 3), jax.jit(model.apply)
    one = apply(variables, x, 5)
    assert np.array_equal(one, apply(variables, x, np.array([5.0, 5.0], np.float32)))


def test_untrained_model_predicts_zero():
    model, x = UNet2DModel(tiny_config()), array(1, 8, 8, 3)
    last_layer = jax.jit(lambda key: model.init(key, x, 3)["params"]["conv_out"])
    assert not any(leaf.any() for leaf in last_layer(jax.random.key(0)).values())


def test_fourier_frequencies_get_no_gradient():
    projection = TimeProjection(tiny_config(time_embedding_type="fourier"))
    t = np.array([2.0], np.float32)
    variables = projection.init(jax.random.key(0), t)
    gradient = jax.grad(lambda v: projection.apply(v, t).sum())(variables)
    assert not gradient["params"]["weight"].any()


def test_bfloat16_computes_in_bfloat16_and_stays_near_float32():
    model, variables = tiny_model(num_class_embeds=5)
    x, labels = array(2, 8, 8, 3), np.array([1, 2], np.int32)
    full = jax.jit(model.apply)(variables, x, 5, labels)
    half = jax.jit(model.clone(dtype=jnp.bfloat16).apply)(variables, x, 5, labels)
    assert half.dtype == jnp.bfloat16
    error = np.abs(np.asarray(half, np.float32) - full).max()
    assert 0 < error < 0.05 * np.abs(full).max()


def test_size_that_cannot_be_halved_raises():
    model, variables = tiny_model()
    with pytest.raises(ValueError, match=r"multiples of 2, .* x_t.shape=\(1, 8, 9, 3\)"):
        model.apply(variables, array(1, 8, 9, 3), 1)


def test_missing_and_unexpected_labels_raise():
    conditional, variables = tiny_model(num_class_embeds=5)
    with pytest.raises(ValueError, match="class-conditional and needs labels"):
        conditional.apply(variables, array(1, 8, 8, 3), 1)
    unconditional, variables = tiny_model()
    with pytest.raises(ValueError, match="unconditional .* call it with labels=None"):
        unconditional.apply(variables, array(1, 8, 8, 3), 1, np.array([1], np.int32))
