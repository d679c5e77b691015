"""AutoencoderKL against diffusers' on the same random weights: block, half, model; its range."""

import functools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from parity import array, assert_close, from_torch, randomize, to_torch, with_weights_of

from qjax.models import autoencoder_blocks as blocks
from qjax.models.autoencoder_config import AutoencoderKLConfig, VQModelConfig
from qjax.models.autoencoder_kl import AutoencoderKL, DiagonalGaussian, checkpoint_keys
from qjax.models.convert import convert, to_checkpoint
from qjax.models.unet2d_keys import rename_old_attention_keys

SHAPES = [(1, 8, 8), (3, 8, 16), (2, 16, 12)]  # batch, height, width
FLOAT16_MAX = 65504

TINY = {
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
    "block_out_channels": [8, 16],
    "norm_num_groups": 4,
}
MODELS = {
    "plain": {},
    "attention_everywhere": {
        "down_block_types": ["AttnDownEncoderBlock2D"] * 2,
        "up_block_types": ["AttnUpDecoderBlock2D"] * 2,
        "act_fn": "gelu",
        "in_channels": 4,
        "out_channels": 2,
    },
    "without_attention_and_1x1": {
        "down_block_types": ["DownEncoderBlock2D"] * 3,
        "up_block_types": ["UpDecoderBlock2D"] * 3,
        "block_out_channels": [8, 12, 16],
        "mid_block_add_attention": False,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
        "latent_channels": 5,
    },
}
EACH_AT_ONE_SHAPE = list(zip(MODELS, SHAPES, strict=True))
PLAIN_AT_ALL_SHAPES = [*EACH_AT_ONE_SHAPE, *(("plain", shape) for shape in SHAPES[1:])]
# As published with stable-diffusion-xl-base-1.0.
SDXL = """{
  "_class_name": "AutoencoderKL", "_diffusers_version": "0.20.0.dev0", "act_fn": "silu",
  "block_out_channels": [128, 256, 512, 512],
  "down_block_types": ["DownEncoderBlock2D", "DownEncoderBlock2D", "DownEncoderBlock2D",
    "DownEncoderBlock2D"],
  "force_upcast": true, "in_channels": 3, "latent_channels": 4, "layers_per_block": 2,
  "norm_num_groups": 32, "out_channels": 3, "sample_size": 1024, "scaling_factor": 0.13025,
  "up_block_types": ["UpDecoderBlock2D", "UpDecoderBlock2D", "UpDecoderBlock2D",
    "UpDecoderBlock2D"]
}"""
PRESETS = [
    AutoencoderKLConfig.sd_v1,
    AutoencoderKLConfig.sd_v2,
    AutoencoderKLConfig.sdxl,
    VQModelConfig.vq_f4,
    VQModelConfig.vq_f8,
]
OLD_NAMES = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}


def tiny_config(**settings):
    return AutoencoderKLConfig.from_diffusers(TINY | settings)


@functools.cache
def reference_model(name):
    """Diffusers' model, and ours with its parameters."""
    pytest.importorskip("torch")
    import diffusers

    config = tiny_config(**MODELS[name])
    theirs = randomize(diffusers.AutoencoderKL.from_config(config.to_diffusers()))
    tensors = {k: v.numpy() for k, v in theirs.state_dict().items()}
    return theirs, AutoencoderKL(config), convert(tensors, checkpoint_keys(config))


@functools.cache
def tiny_model(levels=2):
    """A model with random weights everywhere, norms and biases too."""
    shortened = {key: TINY[key][:levels] for key in TINY if isinstance(TINY[key], list)}
    model = AutoencoderKL(tiny_config(**shortened))
    targets = checkpoint_keys(model.config)
    rng = np.random.default_rng(0)
    draw = lambda shape: rng.normal(0, 0.2, shape).astype(np.float32)
    return model, convert({key: draw(target.shape) for key, target in targets.items()}, targets)


# Blocks


@pytest.mark.torch_oracle
@pytest.mark.parametrize(("name", "shape"), EACH_AT_ONE_SHAPE)
def test_blocks_agree_with_diffusers(name, shape):
    theirs, model, _ = reference_model(name)
    config, channels = model.config, model.config.block_out_channels
    attention = "Attn" in config.down_block_types[0]
    down, up = blocks.DownEncoderBlock, blocks.UpDecoderBlock
    cases = [
        (down, channels[0], channels[0], True, theirs.encoder.down_blocks[0]),
        (down, channels[-2], channels[-1], False, theirs.encoder.down_blocks[-1]),
        (up, channels[-1], channels[-1], True, theirs.decoder.up_blocks[0]),
        (up, channels[1], channels[0], False, theirs.decoder.up_blocks[-1]),
    ]
    for block, width, features, resample, reference in cases:
        x = array(*shape, width)
        ours = with_weights_of(reference, block(config, features, attention, resample), x)
        assert_close(ours(x), from_torch(reference(to_torch(x))))


@pytest.mark.torch_oracle
@pytest.mark.parametrize(("name", "shape"), EACH_AT_ONE_SHAPE)
def test_mid_block_agrees_with_diffusers(name, shape):
    theirs, model, _ = reference_model(name)
    x = array(*shape, model.config.block_out_channels[-1])
    reference = theirs.decoder.mid_block
    ours = with_weights_of(reference, blocks.MidBlock(model.config), x)
    assert_close(ours(x), from_torch(reference(to_torch(x))))


# Model


@pytest.mark.quick_cases("plain-shape0", "attention*", "without*")
@pytest.mark.torch_oracle
@pytest.mark.parametrize(("name", "shape"), PLAIN_AT_ALL_SHAPES)
def test_encode_and_decode_agree_with_diffusers(name, shape):
    theirs, model, params = reference_model(name)
    x, z = array(*shape, model.config.in_channels), array(*shape, model.config.latent_channels)
    posterior = jax.jit(functools.partial(model.apply, method="encode"))({"params": params}, x)
    expected = theirs.encode(to_torch(x)).latent_dist
    assert_close(posterior.mean, from_torch(expected.mean))
    assert_close(posterior.log_variance, from_torch(expected.logvar))
    assert_close(posterior.std, from_torch(expected.std))
    decoded = jax.jit(functools.partial(model.apply, method="decode"))({"params": params}, z)
    assert_close(decoded, from_torch(theirs.decode(to_torch(z)).sample))


@pytest.mark.torch_oracle
def test_whole_model_and_its_gradient_agree_with_diffusers():
    theirs, model, params = reference_model("plain")
    x, weights = array(2, 8, 12, 3), array(2, 8, 12, 3, seed=1)
    ours = lambda x: jnp.vdot(weights, model.apply({"params": params}, x))
    value, gradient = jax.jit(jax.value_and_grad(ours))(x)

    their_x = to_torch(x).requires_grad_()
    their_value = (theirs(their_x).sample * to_torch(weights)).sum()
    their_value.backward()
    assert float(value) == pytest.approx(their_value.item(), rel=1e-3)
    assert_close(gradient, from_torch(their_x.grad), tolerance=1e-3)


@pytest.mark.parametrize("log_variance", [-40, -1, 30])
def test_sample_has_the_mean_and_the_clipped_variance(log_variance, key):
    mean = jnp.full((1, 64, 64, 4), 3.0)
    moments = jnp.concatenate([mean, jnp.full_like(mean, log_variance)], axis=-1)
    posterior = DiagonalGaussian.from_moments(moments)
    std = math.exp(min(max(log_variance, -30), 20) / 2)
    noise = (np.asarray(posterior.sample(key=key), np.float64) - 3) / std
    assert np.array_equal(posterior.mode(), mean)
    np.testing.assert_allclose(posterior.std, std, rtol=1e-5)
    if log_variance > -30:  # below, the noise is less than the last digit of the mean
        assert noise.mean() == pytest.approx(0, abs=0.05)
        assert noise.std() == pytest.approx(1, abs=0.05)


def test_call_reconstructs_from_the_mode_or_with_a_key_from_a_sample(key):
    model, params = tiny_model(levels=1)

    @jax.jit
    def images(x):
        apply = functools.partial(model.apply, {"params": params})
        posterior = apply(x, method="encode")
        latents = jnp.concatenate([posterior.mode(), posterior.sample(key=key)])
        return apply(x), apply(x, key=key), *jnp.split(apply(latents, method="decode"), 2)

    of_mode, of_sample, expected_of_mode, expected_of_sample = images(array(1, 8, 8, 3))
    assert_close(of_mode, expected_of_mode)
    assert_close(of_sample, expected_of_sample)
    assert not np.allclose(of_mode, of_sample)


def test_vmap_over_batches_equals_one_large_batch():
    model, params = tiny_model(levels=1)
    decode = lambda z: model.apply({"params": params}, z, method="decode")
    z = array(4, 4, 6, 4)
    together = jax.jit(decode)(z)
    stacked = jax.jit(jax.vmap(decode))(z.reshape(2, 2, 4, 6, 4))
    assert_close(stacked.reshape(together.shape), together)


def test_size_that_cannot_be_halved_raises():
    model = AutoencoderKL(tiny_config())
    with pytest.raises(ValueError, match=r"multiples of 2, .* image.shape=\(1, 8, 9, 3\)"):
        jax.eval_shape(model.init, jax.random.key(0), array(1, 8, 9, 3))


# Range and precision


def with_large_sums(params, factor):
    """Params of a decoder whose residual sums are `factor` times larger, with the same image.

    What adds to the sums is scaled; of what passes them on, the bias only.
    """

    def scale(path, leaf):
        names = {entry.key for entry in path}
        adds = names & {"conv_in", "conv2", "to_out_0"}
        passes_on = names & {"conv_shortcut", "upsamplers_0"} and "bias" in names
        return leaf * np.float32(factor) if adds or passes_on else leaf

    return params | {"decoder": jax.tree_util.tree_map_with_path(scale, params["decoder"])}


LATENTS = array(1, 8, 8, 4)


@functools.cache
def model_of_large_sums():
    """A model, its params in float16, and the image that float32 makes of `LATENTS`."""
    model, params = tiny_model()
    params = with_large_sums(params, 2.0**14)
    params = jax.tree.map(lambda w: w.astype(np.float16), params)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(params))
    return model, params, decode_as(jnp.float32, model.config, params, LATENTS)


def decode_as(dtype, config, params, latents):
    decode = functools.partial(AutoencoderKL(config, dtype).apply, method="decode")
    return np.asarray(jax.jit(decode)({"params": params}, latents))


def test_size_of_the_residual_sums_does_not_show_in_the_image():
    model, _, decoded = model_of_large_sums()
    _, small = tiny_model()
    assert_close(decoded, decode_as(None, model.config, small, LATENTS), tolerance=5e-3)


def test_float16_overflows_where_nothing_prevents_it():
    model, params, _ = model_of_large_sums()
    intermediates = jax.jit(
        lambda z: model.apply(
            {"params": params}, z, method="decode", capture_intermediates=True, mutable=True
        )[1]["intermediates"]
    )(LATENTS)
    assert max(np.abs(leaf).max() for leaf in jax.tree.leaves(intermediates)) > FLOAT16_MAX
    naive = tiny_config(force_upcast=False)
    assert not np.isfinite(decode_as(jnp.float16, naive, params, LATENTS)).all()


def test_force_upcast_rounds_nothing_but_the_result_to_float16():
    model, params, expected = model_of_large_sums()
    assert model.config.force_upcast
    decoded = decode_as(jnp.float16, model.config, params, LATENTS)
    assert decoded.dtype == np.float16
    assert np.isfinite(decoded).all()
    assert np.array_equal(decoded, expected.astype(np.float16))


def test_force_upcast_follows_the_dtype_of_the_input():
    config, half = tiny_config(), jnp.asarray(LATENTS, jnp.float16)
    assert blocks.dtypes(config, None, half) == (jnp.float32, jnp.float16)
    assert blocks.dtypes(config, jnp.float32, half) == (jnp.float32, jnp.float32)
    assert blocks.dtypes(tiny_config(force_upcast=False), None, half) == (jnp.float16, jnp.float16)


def test_bfloat16_needs_no_upcast():
    model, params, expected = model_of_large_sums()
    decoded = decode_as(jnp.bfloat16, model.config, params, LATENTS)
    assert decoded.dtype == jnp.bfloat16
    assert_close(decoded.astype(np.float32), expected, tolerance=0.1)
    used = blocks.dtypes(model.config, jnp.bfloat16, jnp.asarray(LATENTS))
    assert used == (jnp.bfloat16, jnp.bfloat16)


def test_encoding_in_float16_is_upcast_too():
    model, params = tiny_model(levels=1)
    moments = lambda dtype: np.asarray(
        jax.jit(functools.partial(model.clone(dtype=dtype).apply, method="moments"))(
            {"params": params}, array(1, 8, 8, 3)
        )
    )
    assert np.array_equal(moments(jnp.float16), moments(None).astype(np.float16))


# Keys


@pytest.mark.torch_oracle
@pytest.mark.parametrize("name", MODELS)
def test_keys_and_shapes_are_those_of_diffusers(name):
    theirs, model, params = reference_model(name)
    table = checkpoint_keys(model.config)
    expected = {key: tuple(tensor.shape) for key, tensor in theirs.state_dict().items()}
    assert {key: target.shape for key, target in table.items()} == expected
    back = to_checkpoint(params, table)
    assert all(np.array_equal(back[key], theirs.state_dict()[key]) for key in expected)


@pytest.mark.torch_oracle
def test_stable_diffusion_has_the_published_keys_and_83_653_863_parameters():
    torch = pytest.importorskip("torch")
    import diffusers

    config = AutoencoderKLConfig.sdxl()
    with torch.device("meta"):
        theirs = diffusers.AutoencoderKL.from_config(config.to_diffusers()).state_dict()
    table = checkpoint_keys(config)
    assert {key: target.shape for key, target in table.items()} == {
        key: tuple(tensor.shape) for key, tensor in theirs.items()
    }
    assert sum(math.prod(target.shape) for target in table.values()) == 83_653_863


def test_old_attention_names_give_the_same_params():
    model, params = tiny_model()
    table = checkpoint_keys(model.config)
    tensors = to_checkpoint(params, table)
    old = dict(tensors)
    for new_name, old_name in OLD_NAMES.items():
        old = {key.replace(f".{new_name}.", f".{old_name}."): w for key, w in old.items()}
    assert sum(key not in tensors for key in old) == 2 * 4 * 2  # weight and bias, 2 attentions
    assert all(w is tensors[key] for key, w in rename_old_attention_keys(old).items())


# Settings


def test_published_config_is_read():
    assert AutoencoderKLConfig.from_diffusers(json.loads(SDXL)) == AutoencoderKLConfig.sdxl()


@pytest.mark.parametrize("preset", PRESETS)
def test_config_survives_json(preset):
    config = preset()
    text = json.dumps(config.to_diffusers())
    back = type(config).from_diffusers(json.loads(text))
    assert back == config and hash(back) == hash(config)


@pytest.mark.torch_oracle
def test_defaults_are_those_of_diffusers():
    pytest.importorskip("torch")
    import inspect

    import diffusers

    for cls, reference in [
        (AutoencoderKLConfig, diffusers.AutoencoderKL),
        (VQModelConfig, diffusers.VQModel),
    ]:
        parameters = inspect.signature(reference.__init__).parameters
        theirs = {name: p.default for name, p in parameters.items() if name != "self"}
        assert cls.from_diffusers(theirs) == cls()
        assert cls().to_diffusers().keys() - {"_class_name"} == theirs.keys()


def test_all_unknown_settings_are_named_at_once():
    wrong = {
        "act_fn": "snake",
        "decoder_depth": 7,
        "down_block_types": ["DownBlock2D"],
        "latents_mean": [0.0] * 4,
        "norm_num_groups": 7,
    }
    with pytest.raises(ValueError) as error:
        AutoencoderKLConfig.from_diffusers(wrong)
    for text in ["'snake'", "decoder_depth=7", "'DownBlock2D'", "latents_std=None", "groups=7"]:
        assert text in str(error.value)


@pytest.mark.parametrize(
    "settings",
    [
        {"scaling_factor": 0.5},
        {"scaling_factor": 1.5, "shift_factor": 0.25},
        {"latents_mean": [0.0, 1, 2, 3], "latents_std": [1.0, 2, 4, 8]},
    ],
    ids=["scale", "shift", "channels"],
)
def test_scaling_latents_can_be_undone(settings):
    config = tiny_config(**settings)
    z = array(1, 2, 2, 4)
    mean = np.asarray(settings.get("latents_mean", settings.get("shift_factor", 0)))
    expected = (z - mean) / np.asarray(settings.get("latents_std", 1)) * config.scaling_factor
    np.testing.assert_allclose(config.scale_latents(jnp.asarray(z)), expected, rtol=1e-5, atol=1e-6)
    back = config.unscale_latents(config.scale_latents(jnp.asarray(z)))
    np.testing.assert_allclose(back, z, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_stable_diffusion_decodes_512_pixels():
    config = AutoencoderKLConfig.sd_v1()
    model, targets = AutoencoderKL(config), checkpoint_keys(config)
    rng = np.random.default_rng(0)

    def draw(shape):
        fan_in = math.prod(shape[1:]) if len(shape) > 1 else 4
        return rng.standard_normal(shape, np.float32) * np.float32(fan_in**-0.5)

    params = convert({key: draw(target.shape) for key, target in targets.items()}, targets)
    decoded = jax.jit(functools.partial(model.apply, method="decode"))(
        {"params": params}, array(1, 64, 64, 4)
    )
    assert decoded.shape == (1, 512, 512, 3)
    assert np.isfinite(decoded).all()
    assert np.std(decoded) > 0
