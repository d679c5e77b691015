"""Time tables hold what the float time layers compute, and networks run on them instead."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qjax.core.config import QuantConfig, WeightSpec
from qjax.core.quantize import quantize
from qjax.models.denoisers import abstract_params, build_denoiser
from qjax.models.dit import DiTConfig
from qjax.models.samplers import PNDM
from qjax.models.time_rows import PROJECTION, VECTOR
from qjax.models.time_table import (
    drop_time_layers,
    dropped_layers,
    replaced_layers,
    restore_time_layers,
    split_layers,
    time_layers_of,
    time_table,
)
from qjax.models.unet2d_condition_config import UNet2DConditionConfig
from qjax.models.unet2d_condition_inputs import abstract_inputs
from qjax.models.unet2d_config import UNet2DConfig

STEPS = (981.0, 500.25, 1.0)

SMALL = {
    "sample_size": 4,
    "block_out_channels": (4, 8),
    "layers_per_block": 1,
    "norm_num_groups": 2,
}
CROSS = SMALL | {
    "attention_head_dim": 2,
    "cross_attention_dim": 6,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
}
PLAIN = SMALL | {
    "in_channels": 2,
    "out_channels": 2,
    "attention_head_dim": 2,
    "down_block_types": ("DownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "UpBlock2D"),
}
ONE_LEVEL = {
    "block_out_channels": (4,),
    "down_block_types": ("CrossAttnDownBlock2D",),
    "up_block_types": ("CrossAttnUpBlock2D",),
}
ONE_PLAIN_LEVEL = {
    "block_out_channels": (4,),
    "down_block_types": ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",),
}
XL = {
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 4,
    "projection_class_embeddings_input_dim": 7 + 6 * 4,
}


def cross(**settings):
    return UNet2DConditionConfig(**CROSS | settings).to_diffusers()


def plain(**settings):
    return UNet2DConfig(**PLAIN | settings).to_diffusers()


DIT = DiTConfig(
    sample_size=4,
    patch_size=2,
    in_channels=1,
    out_channels=1,
    num_layers=1,
    num_heads=2,
    head_dim=4,
    num_classes=3,
).to_diffusers()
OF_T_ALONE = {
    "sd1": cross(mid_block_type="UNetMidBlock2D"),
    "sd2": cross(**ONE_LEVEL, use_linear_projection=True, upcast_attention=True),
    "ldm4": cross(**ONE_LEVEL, in_channels=3, out_channels=3, attention_head_dim=1),
    "resampling": cross(
        down_block_types=("ResnetDownsampleBlock2D", "DownBlock2D"),
        mid_block_type=None,
        up_block_types=("ResnetUpsampleBlock2D", "UpBlock2D"),
        resnet_time_scale_shift="scale_shift",
        act_fn="gelu",
    ),
    "unet": plain(add_attention=False),
    "unet_resampling": plain(
        downsample_type="resnet", upsample_type="resnet", resnet_time_scale_shift="scale_shift"
    ),
    "fourier": plain(**ONE_PLAIN_LEVEL, time_embedding_type="fourier", flip_sin_to_cos=False),
}
WITH_MORE = {
    "sdxl": cross(**ONE_LEVEL, **XL),
    "classes_of_a_text_model": cross(**ONE_LEVEL, num_class_embeds=5),
    "unet_classes": plain(**ONE_PLAIN_LEVEL, num_class_embeds=5),
    "unet_learned": plain(
        **ONE_PLAIN_LEVEL,
        time_embedding_type="learned",
        num_train_timesteps=1000,
        num_class_embeds=5,
    ),
    "dit": DIT,
}
CONFIGS = OF_T_ALONE | WITH_MORE


@functools.cache
def network(name):
    """A module and random params, the zero-initialised last layers too."""
    config = CONFIGS[name]
    denoiser = build_denoiser(config["_class_name"], config)
    rng = np.random.default_rng(0)
    draw = lambda leaf: jnp.asarray(rng.normal(0, 0.3, leaf.shape), jnp.float32)
    return denoiser.model, jax.tree.map(draw, abstract_params(denoiser))


def told(model, b):
    """What the network is told besides images and timesteps, every image's its own."""
    rng = np.random.default_rng(1)
    config = model.config
    if isinstance(config, UNet2DConditionConfig):
        fields = abstract_inputs(config, batch=b, tokens=2)[2]
        draw = lambda leaf: rng.integers(0, 3, leaf.shape).astype(leaf.dtype)
        return jax.tree.map(draw, fields)
    if isinstance(config, UNet2DConfig) and not config.has_labels:
        return None
    return jnp.arange(b) % 3


def images(model, b):
    config = model.config
    shape = (b, 4, 4, config.in_channels)
    return np.random.default_rng(2).normal(size=shape).astype(np.float32)


def outputs_of_layers(name, t):
    """What the network's own time layers answer within a whole evaluation at timesteps `t`."""
    model, params = network(name)
    layers = ("time_out", VECTOR) if name in WITH_MORE else (PROJECTION,)
    keep = lambda module, method: module.name in layers and method == "__call__"

    def intermediates(params, x_t, t, labels):
        # What only the answer needs is not computed.
        answer = model.apply({"params": params}, x_t, t, labels, capture_intermediates=keep)
        return answer[1]["intermediates"]

    b = len(t)
    return jax.jit(intermediates)(params, images(model, b), t, told(model, b))


@pytest.mark.quick_cases("sd1", "sdxl", "unet", "dit")
@pytest.mark.parametrize("name", CONFIGS)
def test_a_table_is_what_the_float_layers_compute(name):
    model, params = network(name)
    table = time_table(model, params, STEPS)
    found = outputs_of_layers(name, np.asarray(STEPS, np.float32))
    found = jax.tree.map(lambda calls: calls[0], found, is_leaf=lambda x: isinstance(x, tuple))
    flat = {path[:-1]: leaf for path, leaf in jax.tree.leaves_with_path(found)}
    rows = dict(jax.tree.leaves_with_path(table))
    assert rows.keys() == flat.keys()
    for path, row in rows.items():
        assert row.dtype == jnp.float32
        error = np.abs(np.asarray(row) - np.asarray(flat[path])).max()
        assert error <= 1e-6 * np.abs(flat[path]).max(), path


@pytest.mark.quick_cases("sd1", "sdxl", "unet", "dit")
@pytest.mark.parametrize("name", [n for n in CONFIGS if n != "resampling"])
def test_without_its_time_layers_a_network_answers_the_same(name):
    model, params = network(name)
    rest, layers = drop_time_layers(model, params)
    assert set(dropped_layers(model, rest)) == set(replaced_layers(model)) and layers
    t = np.float32(STEPS[1])
    row = jax.tree.map(lambda leaf: leaf[1], time_table(model, params, STEPS))
    inputs = images(model, 2), t, told(model, 2)
    apply = jax.jit(model.apply)
    expected = apply({"params": params}, *inputs)
    np.testing.assert_allclose(
        apply({"params": rest, "time": row}, *inputs), expected, rtol=1e-5, atol=1e-5
    )
    with pytest.raises(ValueError, match=r"is in neither(.|\n)*pipe\.retarget"):
        jax.eval_shape(model.apply, {"params": rest}, *inputs)


@pytest.mark.parametrize("name", ["ldm4", "dit"])
def test_a_row_is_read_and_the_timestep_is_not(name):
    model, params = network(name)
    rest, _ = drop_time_layers(model, params)
    rows = time_table(model, params, STEPS)
    row = lambda i: jax.tree.map(lambda leaf: leaf[i], rows)
    x_t, labels = images(model, 2), told(model, 2)
    apply = jax.jit(model.apply)
    first = apply({"params": rest, "time": row(0)}, x_t, np.float32(3), labels)
    assert np.array_equal(
        first, apply({"params": rest, "time": row(0)}, x_t, np.float32(9), labels)
    )
    other = apply({"params": rest, "time": row(1)}, x_t, np.float32(3), labels)
    assert np.abs(first - other).max() > 1e-3
    full = apply({"params": params, "time": row(0)}, x_t, np.float32(9), labels)
    np.testing.assert_allclose(full, first, rtol=1e-5, atol=1e-5)


@pytest.mark.quick_cases("sd1", "dit")
@pytest.mark.parametrize("name", ["sd1", "sdxl", "unet", "dit"])
def test_float32_rows_do_not_change_the_dtype_of_the_computation(name):
    model, params = network(name)
    rest, _ = drop_time_layers(model, params)
    row = jax.tree.map(lambda leaf: leaf[0], time_table(model, params, STEPS))
    half = model.clone(dtype=jnp.bfloat16)
    variables = {"params": jax.tree.map(lambda p: p.astype(jnp.bfloat16), rest), "time": row}
    answer = jax.eval_shape(half.apply, variables, images(model, 2), 1, told(model, 2))
    assert answer.dtype == jnp.bfloat16


@pytest.mark.parametrize("name", CONFIGS)
def test_every_time_layer_is_found_and_dropped_layers_can_be_restored(name):
    model, params = network(name)
    rest, layers = drop_time_layers(model, params)
    paths = [jax.tree_util.keystr(p) for p, _ in jax.tree_util.tree_leaves_with_path(rest)]
    projections = [path for path in paths if PROJECTION in path]
    assert bool(projections) == (name in WITH_MORE and name != "dit")
    assert not any(VECTOR in path or "time_out" in path for path in paths)
    back = restore_time_layers(rest, layers)
    assert jax.tree.structure(back) == jax.tree.structure(dict(params))
    assert all(a is b for a, b in zip(jax.tree.leaves(back), jax.tree.leaves(params), strict=True))
    with pytest.raises(ValueError, match="must not be in the params"):
        restore_time_layers(params, layers)


def test_a_label_that_goes_through_the_features_of_t_keeps_their_weights():
    config = plain(time_embedding_type="fourier", class_embed_type="timestep")
    assert build_denoiser("UNet2DModel", config).model.time_layers() == (VECTOR,)
    model, _ = network("fourier")
    assert "time_proj" in replaced_layers(model)


def test_calls_of_one_timestep_have_equal_rows():
    sampler = PNDM(skip_prk_steps=True, steps_offset=1)
    timesteps = sampler.timesteps(5)
    assert len(timesteps) == 6 and timesteps[1] == timesteps[2]
    model, params = network("sd1")
    table = time_table(model, params, timesteps)
    alone = time_table(model, params, timesteps[[0, 1, 3]])
    for row, single in zip(jax.tree.leaves(table), jax.tree.leaves(alone), strict=True):
        assert row.shape[0] == 6 and np.array_equal(row[1], row[2])
        np.testing.assert_allclose(row[np.array([0, 1, 3])], single, rtol=1e-6, atol=1e-6)
        assert not np.array_equal(row[2], row[3])


def sizes(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def test_published_models_have_the_numbers_of_their_papers():
    """Serial-to-parallel, section on time information: counted from the published configs."""
    for name, blocks, channels, projected, dropped in (
        ("sd_v1_4", 22, 20160, 25_824_960, 27_875_520),
        ("sdxl", 17, 13760, 17_626_560, 2_050_560),
    ):
        # The depth of the transformers, which have no part in it, only costs time.
        config = dataclasses.replace(
            getattr(UNet2DConditionConfig, name)(), transformer_layers_per_block=1
        )
        denoiser = build_denoiser("UNet2DConditionModel", config.to_diffusers())
        params = abstract_params(denoiser)
        paths = {
            jax.tree_util.keystr(path, simple=True, separator="/").rsplit("/", 1)[0]
            for path, _ in jax.tree_util.tree_leaves_with_path(params)
        }
        projections = {path for path in paths if path.endswith(PROJECTION)}
        layers = split_layers(params, projections)[1]
        biases = [leaf for leaf in jax.tree.leaves(layers) if len(leaf.shape) == 1]
        assert len(projections) == blocks and sum(bias.size for bias in biases) == channels
        assert sizes(layers) == projected
        assert sizes(drop_time_layers(denoiser.model, params)[1]) == dropped
        steps = jax.ShapeDtypeStruct((50,), jnp.float32)
        rows = jax.eval_shape(denoiser.model.time_table, params, steps)
        assert sizes(rows) == 50 * (channels if name == "sd_v1_4" else 1280)


def test_networks_without_a_layer_of_t_alone_are_refused_by_name():
    lcm = build_denoiser("UNet2DConditionModel", cross(time_cond_proj_dim=4)).model
    assert time_layers_of(lcm) == ()
    with pytest.raises(ValueError, match="UNet2DConditionModel has none: its guidance"):
        replaced_layers(lcm)
    with pytest.raises(ValueError, match="function has none: it is no network of this library"):
        time_table(lambda variables, x_t, t, labels: x_t, {}, STEPS)


def test_missing_and_quantized_layers_are_refused_by_name():
    model, params = network("dit")
    rest, _ = drop_time_layers(model, params)
    with pytest.raises(ValueError, match="missing: conditioning/time_in, conditioning/time_out"):
        time_table(model, rest, STEPS)
    with pytest.raises(ValueError, match="quantized: conditioning/time_in/kernel"):
        time_table(model, quantize(params, QuantConfig(weight=WeightSpec(bits=8))), STEPS)
