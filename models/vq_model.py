"""VQModel: the autoencoder with a codebook that LDM-4 and LDM-8 work on the latents of.

Between encoder and decoder every pixel of the latents is replaced by the nearest of `n`
learned vectors `e_j`, the codebook:

    z = quant_conv(encoder(image))                        [b, h/f, w/f, d]
    code = argmin_j |z - e_j|^2,    z_q = e_code          for every pixel
    image = decoder(post_quant_conv(z_q))                 [b, h, w, 3], about in [-1, 1]

A diffusion model works on the continuous `z`: quantization belongs to `decode`, where it also
takes out small errors of the sampler. Gradients pass it as if it were the identity (the
straight-through estimator), so `d image / d z` is that of the decoder at `z_q`.

The function is that of diffusers' `VQModel`, with its names for settings and parameters.

References:
  van den Oord et al., Neural Discrete Representation Learning, 2017,
  https://arxiv.org/abs/1711.00937, equations 1 and 2.
  Esser et al., Taming Transformers for High-Resolution Image Synthesis, 2021,
  https://arxiv.org/abs/2012.09841, section 3.1.
  Rombach et al., High-Resolution Image Synthesis with Latent Diffusion Models, 2022,
  https://arxiv.org/abs/2112.10752, sections 3.1 and G.
"""

import jax
import jax.numpy as jnp
from flax import linen as nn

from qjax.core.layers import Conv
from qjax.core.typing import Array, Float, Int
from qjax.models.autoencoder_blocks import Decoder, Encoder, check_image, dtypes
from qjax.models.autoencoder_config import VQModelConfig
from qjax.models.convert import Target
from qjax.models.unet2d_keys import keys_of_params


def nearest_codes(
    latents: Float[Array, "b h w d"], codebook: Float[Array, "n d"]
) -> Int[Array, "b h w"]:
    """For every vector of `latents` the index of the nearest row of `codebook`, as int32.

    In float32, also where matrix units would round the factors: a rounded product picks other
    rows. Of rows equally near the first is taken. One image after the other, so that there is
    one table of `h w n` distances at a time.
    """
    rows = codebook.astype(jnp.float32)
    half_norms = 0.5 * jnp.sum(jnp.square(rows), axis=-1)

    def of_one(image: Float[Array, "h w d"]) -> Int[Array, "h w"]:
        # |z - e|^2 / 2 without |z|^2 / 2, which is the same for all rows.
        dots = jnp.matmul(image.astype(jnp.float32), rows.T, precision=jax.lax.Precision.HIGHEST)
        return jnp.argmin(half_norms - dots, axis=-1).astype(jnp.int32)

    return jax.lax.map(of_one, latents)


class VectorQuantizer(nn.Module):
    """The codebook: every vector replaced by the nearest of its rows.

    Attributes:
      num_embeddings: Rows of the codebook.
      dim: Width of a row.
    """

    num_embeddings: int
    dim: int

    def setup(self):
        bound = 1 / self.num_embeddings
        draw = lambda key, shape, dtype: jax.random.uniform(key, shape, dtype, -bound, bound)
        self.embedding = nn.Embed(self.num_embeddings, self.dim, embedding_init=draw)

    def __call__(self, latents: Float[Array, "b h w d"]) -> Float[Array, "b h w d"]:
        """The nearest rows; the gradient is that of the identity."""
        rows = jax.lax.stop_gradient(self.lookup(self.codes(latents)).astype(latents.dtype))
        return rows + (latents - jax.lax.stop_gradient(latents))  # an exact 0, or a NaN kept

    def codes(self, latents: Float[Array, "b h w d"]) -> Int[Array, "b h w"]:
        """Which rows these are."""
        return nearest_codes(jax.lax.stop_gradient(latents), self.embedding.embedding)

    def lookup(self, codes: Int[Array, "b h w"]) -> Float[Array, "b h w d"]:
        """The rows of these numbers."""
        return self.embedding(codes)


class VQModel(nn.Module):
    """Images to continuous latents, and latents or codes to images.

        latents = model.apply(variables, image, method="encode")
        image = model.apply(variables, latents, method="decode")

    Attributes:
      config: Settings.
      dtype: Float dtype of the result, and of the computation but for `config.force_upcast`
        (`qjax.models.autoencoder_kl` says why) and for the codebook, which is searched in
        float32 before anything is rounded; None takes the input's.
    """

    config: VQModelConfig
    dtype: jnp.dtype | None = None

    def setup(self):
        config = self.config
        self.encoder = Encoder(config, config.latent_channels)
        self.quant_conv = Conv(config.codebook_dim, (1, 1), padding="VALID")
        self.quantize = VectorQuantizer(config.num_vq_embeddings, config.codebook_dim)
        self.post_quant_conv = Conv(config.latent_channels, (1, 1), padding="VALID")
        self.decoder = Decoder(config)

    def __call__(self, image: Float[Array, "b h w c"]) -> Float[Array, "b h w o"]:
        """The image after encoding, quantizing and decoding."""
        return self.decode(self.encode(image))

    def encode(self, image: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 d"]:
        """Latents before quantization, not scaled.

        Args:
          image: Values in [-1, 1]; height and width multiples of `config.size_multiple`.

        Raises:
          ValueError: If the size does not divide.
        """
        check_image(image, self.config)
        dtype, result_dtype = dtypes(self.config, self.dtype, image)
        return self.quant_conv(self.encoder(image.astype(dtype))).astype(result_dtype)

    def codes(self, latents: Float[Array, "b h w d"]) -> Int[Array, "b h w"]:
        """The rows of the codebook that `decode` takes for these latents."""
        return self.quantize.codes(latents)

    def decode(self, latents: Array, *, force_not_quantize: bool = False) -> Array:
        """The image of these latents, about in [-1, 1] and not clipped.

        Args:
          latents: `[b, h, w, d]` as `encode` gives them, not scaled.
          force_not_quantize: Whether to leave out the codebook. If the config has
            `lookup_from_codebook`, `latents` must then be codes, as for `decode_codes`.

        Raises:
          ValueError: If these are codes and latents are wanted, or the other way round.
        """
        are_codes = jnp.issubdtype(latents.dtype, jnp.integer)
        if are_codes != (force_not_quantize and self.config.lookup_from_codebook):
            raise ValueError(
                "decode takes float latents, and codes only with force_not_quantize and a "
                f"config with lookup_from_codebook; got {latents.dtype} with {force_not_quantize=}"
                f" and lookup_from_codebook={self.config.lookup_from_codebook}. "
                "decode_codes takes codes whatever the config."
            )
        if are_codes:
            return self.decode_codes(latents)
        return self._decode(latents, quantize=not force_not_quantize)

    def decode_codes(self, codes: Int[Array, "b h w"]) -> Float[Array, "b h2 w2 o"]:
        """The image of these codes; they must be in [0, `num_vq_embeddings`)."""
        return self._decode(self.quantize.lookup(codes), quantize=False)

    def _decode(
        self, latents: Float[Array, "b h w d"], *, quantize: bool
    ) -> Float[Array, "b h2 w2 o"]:
        dtype, result_dtype = dtypes(self.config, self.dtype, latents)
        z_q = self.quantize(latents.astype(jnp.float32)) if quantize else latents
        return self.decoder(self.post_quant_conv(z_q.astype(dtype))).astype(result_dtype)


def checkpoint_keys(config: VQModelConfig) -> dict[str, Target]:
    """For every key of the checkpoint of this model: path, expected shape, transform.

    For checkpoints with the old names of the attention's projections see
    `qjax.models.unet2d_keys.rename_old_attention_keys`.
    """
    size = config.size_multiple
    image = jax.ShapeDtypeStruct((1, size, size, config.in_channels), jnp.float32)
    shapes = jax.eval_shape(VQModel(config).init, jax.random.key(0), image)
    return keys_of_params(shapes["params"])
