"""Tiny pipelines with random weights, float and quantized with per-step ranges."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qjax.calibrate.recipe import quantize_pipeline
from qjax.core.config import ActSpec, QuantConfig, Rule, WeightSpec
from qjax.core.metrics import relative_l2
from qjax.models.denoisers import abstract_params, build_denoiser
from qjax.models.dit import DiTConfig
from qjax.models.pipeline import Pipeline, Source
from qjax.models.samplers import DDIM
from qjax.models.schedules import Schedule
from qjax.models.unet2d_config import UNet2DConfig

DIT = DiTConfig(
    sample_size=4,
    patch_size=2,
    in_channels=2,
    out_channels=2,
    num_layers=2,
    num_heads=2,
    head_dim=8,
    num_classes=3,
)
UNET = UNet2DConfig(
    sample_size=8,
    in_channels=1,
    out_channels=1,
    block_out_channels=(8, 16),
    layers_per_block=1,
    down_block_types=("DownBlock2D", "AttnDownBlock2D"),
    up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    norm_num_groups=4,
    attention_head_dim=8,
    num_class_embeds=4,
)
EDGES = Rule(
    pattern=r"(.*/)?(conv_in|conv_out|patch_embed|conditioning|time_embedding|final_linear)(/.*)?"
)
PER_STEP = ActSpec(bits=8, mode="per_step", granularity="per_tensor", symmetric=False)


def _pipeline(class_name, config, **fields) -> Pipeline:
    data = config.to_diffusers()
    denoiser = build_denoiser(class_name, data)
    rng = np.random.default_rng(0)

    def draw(leaf):
        # As large as keeps a signal's size through layer after layer.
        fan_in = int(np.prod(leaf.shape[:-1])) if len(leaf.shape) > 1 else 100
        return jnp.asarray(rng.normal(0, fan_in**-0.5, leaf.shape), jnp.float32)

    params = jax.tree.map(draw, abstract_params(denoiser))
    return Pipeline.from_apply(
        denoiser.model.apply,
        params,
        DDIM(schedule=Schedule.linear(100, 1e-3, 0.1)),
        source=Source(model=class_name, config=data, name="tiny"),
        **(denoiser.fields | fields),
    )


def quantized(pipe: Pipeline, *, bits: int = 4, act: ActSpec | None = PER_STEP) -> Pipeline:
    """The pipeline at `bits` weights; float leaves stay float32."""
    config = QuantConfig(
        rules=(EDGES,), weight=WeightSpec(bits=bits), act=act, allow_unmatched=True
    )
    return quantize_pipeline(pipe, config)


@pytest.fixture(scope="session")
def dit() -> Pipeline:
    return _pipeline("DiTTransformer2DModel", DIT)


@pytest.fixture(scope="session")
def unet() -> Pipeline:
    return _pipeline("UNet2DModel", UNET, null_label=3)


@pytest.fixture(scope="session")
def quantize():
    return quantized


@pytest.fixture(scope="session")
def error():
    """`error(pipe, other)`: same-seed error of the final latents, 3 guided steps, 3 classes, on
    noise that nothing was calibrated on."""

    def error(pipe: Pipeline, other: Pipeline) -> float:
        settings = {
            "steps": 3,
            "guidance_scale": 2.0,
            "output": "latent",
            "key": jax.random.key(99),
        }
        labels = np.arange(32) % 3
        a, b = (np.asarray(p(labels=labels, **settings)) for p in (pipe, other))
        return relative_l2(b, a)

    return error
