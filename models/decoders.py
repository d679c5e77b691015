"""From a denoiser's latents to pictures, through the autoencoder they belong to."""

import functools
from dataclasses import dataclass

import jax
from jax.sharding import Mesh

from qjax.core.typing import Array, Float
from qjax.models.components import Component
from qjax.models.mesh import on_each_device
from qjax.models.tiling import one_at_a_time, tiled

PIXELS_AT_ONCE = 512 * 512
"""Of Stable Diffusion's decoder these take about 2 GiB in float32."""


@dataclass(frozen=True, kw_only=True, eq=False)
class LatentDecoder:
    """An autoencoder between latents and images, with the scale that the denoiser works at.

    Attributes:
      component: An `AutoencoderKL` or a `VQModel`.
      tiles: Whether latents larger than those of a training image are decoded in tiles: less
        memory, and colours that may differ a little from tile to tile.
    """

    component: Component
    tiles: bool = False

    @property
    def factor(self) -> int:
        """Pixels along one side of what is one pixel of the latents."""
        return self.component.model.config.size_multiple

    @property
    def channels(self) -> int:
        """Channels of an image."""
        return self.component.model.config.out_channels

    def decode(
        self, latents: Float[Array, "b h w c"], *, mesh: Mesh | None = None
    ) -> Float[Array, "b h2 w2 o"]:
        """Images, about in [-1, 1], of latents as the denoiser gives them.

        Batches of more than `PIXELS_AT_ONCE` pixels are decoded one image at a time.

        Args:
          latents: Of any size.
          mesh: Devices of which each decodes its part; latents and parameters lie there.
        """
        model, params = self.component.model, self.component.params
        return _decode(model, params, latents, tiles=self.tiles, mesh=mesh)


@functools.partial(jax.jit, static_argnums=0, static_argnames=("tiles", "mesh"))
def _decode(model, params, latents, *, tiles: bool, mesh: Mesh | None):
    decode = functools.partial(_decode_part, model, tiles=tiles)
    return on_each_device(mesh, decode, params, latents)


def _decode_part(model, params, latents, *, tiles: bool):
    def decode(z):
        return model.apply({"params": params}, z, method="decode")

    def part(z):
        return tiled(decode, z, tile=model.config.latent_tile) if tiles else decode(z)

    z = model.config.unscale_latents(latents)
    b, h, w, _ = z.shape
    small = b == 1 or b * h * w * model.config.size_multiple**2 <= PIXELS_AT_ONCE
    return part(z) if small else one_at_a_time(part, z)
