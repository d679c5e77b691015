"""Under `w8a8` every quantized layer is one int8 product with int32 sums, on a CPU too."""

import collections
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qjax.core.qtensor import is_qtensor
from qjax.core.quantize import plan, quantize
from qjax.kernels import quant_conv
from qjax.models.autoencoder_config import AutoencoderKLConfig
from qjax.models.components import build_component
from qjax.models.denoisers import abstract_params, build_denoiser
from qjax.models.dit import DiTConfig
from qjax.models.unet2d_condition_config import UNet2DConditionConfig
from qjax.models.unet2d_condition_inputs import Conditioning, abstract_inputs
from qjax.models.unet2d_config import UNet2DConfig
from qjax.recipes import w8a8

# With fewer input channels a CPU convolves the same integers as floats, which is faster there.
WIDTHS = (quant_conv.FLOAT_BELOW_CHANNELS, 2 * quant_conv.FLOAT_BELOW_CHANNELS)
INT8 = ("int8", "int8", "int32")

SD1 = UNet2DConditionConfig(
    sample_size=8,
    block_out_channels=WIDTHS,
    layers_per_block=1,
    down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    cross_attention_dim=12,
    attention_head_dim=2,
    norm_num_groups=8,
)
SDXL = dataclasses.replace(
    SD1,
    use_linear_projection=True,
    transformer_layers_per_block=(1, 2),
    addition_embed_type="text_time",
    addition_time_embed_dim=4,
    projection_class_embeddings_input_dim=8 + 6 * 4,
)
LDM = UNet2DConfig(
    sample_size=8,
    block_out_channels=WIDTHS,
    layers_per_block=1,
    down_block_types=("DownBlock2D", "AttnDownBlock2D"),
    up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    attention_head_dim=8,
    norm_num_groups=8,
)
DIT = DiTConfig(sample_size=8, num_layers=2, num_heads=2, head_dim=16, num_classes=5)
DENOISERS = {"sd1": SD1, "sdxl": SDXL, "ldm": LDM, "dit": DIT}
AUTOENCODER = AutoencoderKLConfig(
    down_block_types=("DownEncoderBlock2D",) * 2,
    up_block_types=("UpDecoderBlock2D",) * 2,
    block_out_channels=WIDTHS,
    norm_num_groups=8,
)


def assert_int8_wherever_quantized(found, entries):
    """One int8 product for every quantized layer; in float those left, and attention's two."""
    layers = [entry for entry in entries if entry.kind != "other"]
    quantized = [entry for entry in layers if entry.weight is not None]
    assert {entry.kind for entry in quantized} >= {"dense"}
    left = collections.Counter(entry.kind for entry in layers if entry.weight is None)
    attentions = sum(entry.path.endswith(("/to_q/kernel", "/qkv/kernel")) for entry in layers)
    integers = sum(n for (_, dtypes), n in found.items() if dtypes == INT8)
    floats = {name: n for (name, dtypes), n in found.items() if dtypes == ("float32",) * 3}
    assert integers == len(quantized)
    assert floats.get("conv_general_dilated", 0) == left["conv"]
    assert floats.get("dot_general", 0) == left["dense"] + 2 * attentions
    assert found.total() == integers + sum(floats.values())


def inputs_of(config):
    if isinstance(config, UNet2DConditionConfig):
        return abstract_inputs(config, batch=2)
    x_t = jax.ShapeDtypeStruct((2, 8, 8, config.in_channels), jnp.float32)
    whole = jax.ShapeDtypeStruct((2,), jnp.int32)
    return (x_t, whole, whole) if isinstance(config, DiTConfig) else (x_t, whole)


@pytest.mark.quick_cases("sd1", "dit")
@pytest.mark.parametrize("name", DENOISERS)
def test_every_quantized_layer_of_a_denoiser_multiplies_in_int8(name, products):
    config = DENOISERS[name].to_diffusers()
    denoiser = build_denoiser(config["_class_name"], config)
    params = abstract_params(denoiser)
    found = products(
        denoiser.model.apply,
        {"params": quantize(params, w8a8().quant)},
        *inputs_of(DENOISERS[name]),
    )
    assert_int8_wherever_quantized(found, plan(params, w8a8().quant).entries)


@pytest.mark.parametrize("half", ["encode", "decode"])
def test_every_quantized_layer_of_an_autoencoder_multiplies_in_int8(half, products):
    config = AUTOENCODER.to_diffusers()
    kind = build_component(config["_class_name"], config)
    params = abstract_params(kind)
    own = ("encoder", "quant_conv") if half == "encode" else ("decoder", "post_quant_conv")
    channels = AUTOENCODER.in_channels if half == "encode" else AUTOENCODER.latent_channels
    image = jax.ShapeDtypeStruct((2, 8, 8, channels), jnp.float32)
    apply = functools.partial(kind.model.apply, method=half)
    found = products(apply, {"params": quantize(params, w8a8().quant)}, image)
    entries = plan(params, w8a8().quant).entries
    assert_int8_wherever_quantized(found, [e for e in entries if e.path.split("/")[0] in own])


@pytest.mark.slow
def test_a_unet_with_int8_convolutions_runs_and_stays_near_the_float_one():
    one_level = dataclasses.replace(
        SD1,
        block_out_channels=WIDTHS[:1],
        down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",),
        mid_block_type=None,
    )
    config = one_level.to_diffusers()
    denoiser = build_denoiser(config["_class_name"], config)
    rng = np.random.default_rng(0)

    def draw(leaf):
        fan_in = leaf.size // leaf.shape[-1] if len(leaf.shape) > 1 else 4
        return (rng.standard_normal(leaf.shape) * fan_in**-0.5).astype(np.float32)

    params = jax.tree.map(draw, abstract_params(denoiser))
    qparams = quantize(params, w8a8().quant)
    leaves = jax.tree.leaves(qparams, is_leaf=is_qtensor)
    assert {leaf.ndim for leaf in leaves if is_qtensor(leaf)} == {2, 4}
    inputs = draw(jnp.zeros((2, 8, 8, 4))), 300, Conditioning(text=draw(jnp.zeros((2, 5, 12))))
    # Compiled in half the time, and run once.
    apply = jax.jit(denoiser.model.apply)
    expected = apply({"params": params}, *inputs)
    error = jnp.abs(apply({"params": qparams}, *inputs) - expected).max()
    assert 0 < error < 0.1 * jnp.abs(expected).max()
