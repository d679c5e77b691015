"""AutoencoderKL: the variational autoencoder whose latents Stable Diffusion works on.

The encoder gives every pixel of the latents a normal distribution, and the decoder an image:

    moments = quant_conv(encoder(image))             [b, h/f, w/f, 2 c]
    mean, log_variance = split(moments),             log_variance clipped to [-30, 20]
    z = mean + exp(log_variance / 2) * noise         a sample; the mode is the mean
    image = decoder(post_quant_conv(z))              [b, h, w, 3], about in [-1, 1]

A diffusion model sees `config.scale_latents(z)`, and its answer goes through
`config.unscale_latents` to the decoder. For large images and batches see `tiling.py`.

Why float16 overflows. The sums that the residual blocks add to are never normalised
themselves: the normalisations stand inside the blocks, and one before `conv_out`. They take
out any common factor, so the image says nothing of the size of these sums, and training in a
wide dtype leaves it free. In SDXL's published weights they exceed 65504, the largest float16:
the sum becomes infinite, the next normalisation takes infinity from infinity, and the image
is black. bfloat16 has the range of float32 and needs nothing. For float16, a config with
`force_upcast` (diffusers' default, and SDXL's) makes every sum here a float32 one, whatever
the dtype of the weights: their range cannot be left. Only what comes in and goes out is
float16 then. The other way out are weights whose sums were made small; they come with
`force_upcast` false (https://huggingface.co/madebyollin/sdxl-vae-fp16-fix).

The function is that of diffusers' `AutoencoderKL`, with its names for settings and parameters.

References:
  Kingma and Welling, Auto-Encoding Variational Bayes, 2014, https://arxiv.org/abs/1312.6114.
  Rombach et al., High-Resolution Image Synthesis with Latent Diffusion Models, 2022,
  https://arxiv.org/abs/2112.10752, sections 3.1 and G.
  Podell et al., SDXL, 2023, https://arxiv.org/abs/2307.01952, section 2.4.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import linen as nn

from qjax.core.layers import Conv
from qjax.core.typing import Array, Float, PRNGKeyArray
from qjax.models.autoencoder_blocks import Decoder, Encoder, check_image, dtypes
from qjax.models.autoencoder_config import AutoencoderKLConfig
from qjax.models.convert import Target
from qjax.models.unet2d_keys import keys_of_params

LOG_VARIANCE_RANGE = (-30.0, 20.0)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DiagonalGaussian:
    """A normal distribution for every value of the latents, each on its own.

    Attributes:
      mean: `[b, h, w, c]`.
      log_variance: `[b, h, w, c]`, natural logarithm.
    """

    mean: Float[Array, "b h w c"]
    log_variance: Float[Array, "b h w c"]

    @classmethod
    def from_moments(cls, moments: Float[Array, "b h w c2"]) -> "DiagonalGaussian":
        """Means and log-variances out of what `AutoencoderKL.moments` gives, these clipped."""
        mean, log_variance = jnp.split(moments, 2, axis=-1)
        return cls(mean, jnp.clip(log_variance, *LOG_VARIANCE_RANGE))

    @property
    def std(self) -> Float[Array, "b h w c"]:
        """Standard deviations."""
        return jnp.exp(0.5 * self.log_variance)

    def mode(self) -> Float[Array, "b h w c"]:
        """The most likely latents: the mean."""
        return self.mean

    def sample(self, *, key: PRNGKeyArray) -> Float[Array, "b h w c"]:
        """Latents drawn from the distribution."""
        return self.mean + self.std * jax.random.normal(key, self.mean.shape, self.mean.dtype)


class AutoencoderKL(nn.Module):
    """Images to distributions of latents, and latents to images.

        posterior = model.apply(variables, image, method="encode")
        image = model.apply(variables, posterior.sample(key=key), method="decode")

    Attributes:
      config: Settings.
      dtype: Float dtype of the result, and of the computation but for `config.force_upcast`;
        None takes the input's.
    """

    config: AutoencoderKLConfig
    dtype: jnp.dtype | None = None

    def setup(self):
        config = self.config
        self.encoder = Encoder(config, 2 * config.latent_channels)
        self.decoder = Decoder(config)
        if config.use_quant_conv:
            self.quant_conv = Conv(2 * config.latent_channels, (1, 1), padding="VALID")
        if config.use_post_quant_conv:
            self.post_quant_conv = Conv(config.latent_channels, (1, 1), padding="VALID")

    def __call__(
        self, image: Float[Array, "b h w c"], *, key: PRNGKeyArray | None = None
    ) -> Float[Array, "b h w o"]:
        """The image after encoding and decoding: of the mode, or of a sample if `key` is given."""
        posterior = self.encode(image)
        return self.decode(posterior.mode() if key is None else posterior.sample(key=key))

    def encode(self, image: Float[Array, "b h w c"]) -> DiagonalGaussian:
        """The distribution of the latents, not scaled.

        Args:
          image: Values in [-1, 1]; height and width multiples of `config.size_multiple`.

        Raises:
          ValueError: If the size does not divide.
        """
        return DiagonalGaussian.from_moments(self.moments(image))

    def moments(self, image: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c2"]:
        """What `encode` splits: means, then log-variances, along the channels.

        This is what tiles are blended in (`qjax.models.tiling`), before anything is clipped.

        Raises:
          ValueError: As `encode`.
        """
        config = self.config
        check_image(image, config)
        dtype, result_dtype = dtypes(config, self.dtype, image)
        moments = self.encoder(image.astype(dtype))
        if config.use_quant_conv:
            moments = self.quant_conv(moments)
        return moments.astype(result_dtype)

    def decode(self, latents: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 o"]:
        """The image of these latents, about in [-1, 1] and not clipped.

        Args:
          latents: As `encode` gives them, not scaled.
        """
        config = self.config
        dtype, result_dtype = dtypes(config, self.dtype, latents)
        h = latents.astype(dtype)
        if config.use_post_quant_conv:
            h = self.post_quant_conv(h)
        return self.decoder(h).astype(result_dtype)


def checkpoint_keys(config: AutoencoderKLConfig) -> dict[str, Target]:
    """For every key of the checkpoint of this model: path, expected shape, transform.

    For checkpoints with the old names of the attention's projections see
    `qjax.models.unet2d_keys.rename_old_attention_keys`.
    """
    size = config.size_multiple
    image = jax.ShapeDtypeStruct((1, size, size, config.in_channels), jnp.float32)
    shapes = jax.eval_shape(AutoencoderKL(config).init, jax.random.key(0), image)
    return keys_of_params(shapes["params"])
