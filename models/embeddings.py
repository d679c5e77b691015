"""Embeddings that the model files share."""

import math

import jax.numpy as jnp
from flax import linen as nn

from qjax.core.layers import Dense
from qjax.core.typing import Array, Float


def timestep_embedding(
    t: Array,
    dim: int,
    *,
    flip_sin_to_cos: bool,
    downscale_freq_shift: float,
    max_period: float = 10000.0,
) -> Float[Array, "b d"]:
    """Sines and cosines of `t` at `dim / 2` frequencies, in float32.

    The frequencies are `max_period**(-j / (dim / 2 - downscale_freq_shift))`.

    Args:
      t: Timesteps `[b]` or a scalar, any number type; the range is that of the training
        schedule, 0 to 999 for a thousand steps.
      dim: Width of the embedding; an odd one gets a zero at its end.
      flip_sin_to_cos: Whether cosines come first.
      downscale_freq_shift: 1 as in the first diffusion models, 0 as in later ones.
      max_period: Longest period over 2 pi.
    """
    half = dim // 2
    exponent = jnp.arange(half, dtype=jnp.float32) / (half - downscale_freq_shift)
    frequencies = jnp.exp(-math.log(max_period) * exponent)
    angle = jnp.atleast_1d(t).astype(jnp.float32)[:, None] * frequencies
    waves = (
        (jnp.cos(angle), jnp.sin(angle)) if flip_sin_to_cos else (jnp.sin(angle), jnp.cos(angle))
    )
    embedding = jnp.concatenate(waves, axis=-1)
    return jnp.pad(embedding, ((0, 0), (0, dim % 2)))


class TimestepEmbedding(nn.Module):
    """Two-layer MLP from a sinusoidal embedding to the width that the blocks use.

    Attributes:
      features: Output width.
    """

    features: int

    @nn.compact
    def __call__(self, embedding: Float[Array, "b d"]) -> Float[Array, "b o"]:
        h = Dense(self.features, name="linear_1")(embedding)
        return Dense(self.features, name="linear_2")(nn.silu(h))
