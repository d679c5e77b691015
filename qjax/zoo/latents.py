"""The training images as the trained autoencoder sees them: what latent diffusion learns from.

For every image the mean and the standard deviation of its latents are kept, scaled as a
diffusion model sees them, and a training step draws from them anew.
"""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qjax.core.typing import Array, Float, Params, PRNGKeyArray, UInt8
from qjax.models.autoencoder_config import AutoencoderKLConfig
from qjax.models.autoencoder_kl import AutoencoderKL, checkpoint_keys
from qjax.models.convert import convert, load_checkpoint
from qjax.zoo.data import to_float

BATCH = 500


def load_autoencoder(folder: Path) -> tuple[AutoencoderKL, Params]:
    """The autoencoder in a component folder of diffusers' layout, float32."""
    checkpoint = load_checkpoint(folder)
    config = AutoencoderKLConfig.from_diffusers(checkpoint.config)
    params = convert(checkpoint, checkpoint_keys(config), dtype=np.float32, finish=_to_device)
    return AutoencoderKL(config), params


def _to_device(path: tuple[str, ...], array: np.ndarray) -> Array:
    return jnp.asarray(array)


def encode_images(
    model: AutoencoderKL, params: Params, images: UInt8[np.ndarray, "b h w c"]
) -> Float[np.ndarray, "b h2 w2 c2"]:
    """Means and standard deviations of the scaled latents, one after the other in the channels."""

    @jax.jit
    def encode(params, images):
        posterior: Any = model.apply({"params": params}, to_float(images), method="encode")
        mean = model.config.scale_latents(posterior.mean)
        return jnp.concatenate([mean, posterior.std * model.config.scaling_factor], axis=-1)

    parts = [
        np.asarray(encode(params, jnp.asarray(images[start : start + BATCH])))
        for start in range(0, len(images), BATCH)
    ]
    return np.concatenate(parts)


def draw_latents(key: PRNGKeyArray, moments: Float[Array, "b h w c2"]) -> Float[Array, "b h w c"]:
    """Latents drawn from what `encode_images` gives."""
    mean, std = jnp.split(moments, 2, axis=-1)
    return mean + std * jax.random.normal(key, mean.shape)


def scaling_factor(
    model: AutoencoderKL, params: Params, images: UInt8[np.ndarray, "b h w c"]
) -> float:
    """One over the standard deviation of the latents of all images, drawn with a fixed key.

    References:
      Rombach et al., 2022, https://arxiv.org/abs/2112.10752, section G.
    """
    assert model.config.scaling_factor == 1
    moments = jnp.asarray(encode_images(model, params, images))
    return float(1 / jnp.std(draw_latents(jax.random.key(0), moments)))
