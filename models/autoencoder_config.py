"""Settings of the autoencoders, under the names that diffusers' classes use.

`AutoencoderKLConfig` belongs to `qjax.models.autoencoder_kl`, `VQModelConfig` to
`qjax.models.vq_model`. What both have, the two halves around the latents, is in
`AutoencoderConfig`.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, Self

import jax.numpy as jnp

from qjax.core.typing import Array, Float
from qjax.models.config_values import value_problems, with_defaults
from qjax.models.resnet import ACTIVATIONS

# Block type -> whether self-attention follows each of its ResNet blocks.
DOWN_BLOCKS = {"DownEncoderBlock2D": False, "AttnDownEncoderBlock2D": True}
UP_BLOCKS = {"UpDecoderBlock2D": False, "AttnUpDecoderBlock2D": True}
_TUPLES = (
    "sample_size",
    "down_block_types",
    "up_block_types",
    "block_out_channels",
    "latents_mean",
    "latents_std",
)
_SD_BLOCKS: dict[str, Any] = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class AutoencoderConfig:
    """What the two autoencoders share: an encoder and a decoder that mirrors it.

    Attributes:
      in_channels: Channels of the image that is encoded.
      out_channels: Channels of the image that is decoded.
      down_block_types: Keys of `DOWN_BLOCKS`, from the largest size to the smallest.
      up_block_types: Keys of `UP_BLOCKS`, from the smallest size to the largest.
      block_out_channels: Channels at each size, the largest first; multiples of
        `norm_num_groups`. Every size but the last is halved.
      layers_per_block: ResNet blocks in a down block; an up block has one more.
      act_fn: A key of `qjax.models.resnet.ACTIVATIONS`, for the ResNet blocks; the last
        activation of either half is always silu.
      latent_channels: Channels between the encoder and the decoder.
      norm_num_groups: Groups of every normalisation.
      sample_size: Height and width for which the model was trained; it runs at others too.
      scaling_factor: Latents are multiplied by it before a diffusion model sees them.
      force_upcast: Whether float16 computes in float32; `qjax.models.autoencoder_kl` says why.
      mid_block_add_attention: Whether there is attention at the smallest size.
    """

    CLASS_NAME: ClassVar[str]
    WHEN_MISSING: ClassVar[Mapping[str, Any]] = {}

    in_channels: int = 3
    out_channels: int = 3
    down_block_types: tuple[str, ...] = ("DownEncoderBlock2D",)
    up_block_types: tuple[str, ...] = ("UpDecoderBlock2D",)
    block_out_channels: tuple[int, ...] = (64,)
    layers_per_block: int = 1
    act_fn: str = "silu"
    latent_channels: int = 4
    norm_num_groups: int = 32
    sample_size: int | tuple[int, int] = 32
    scaling_factor: float = 0.18215
    force_upcast: bool = True
    mid_block_add_attention: bool = True

    def __post_init__(self):
        self._raise(_problems(vars(self)))

    @classmethod
    def from_diffusers(cls, config: Mapping[str, Any]) -> Self:
        """The settings in the `config.json` of the diffusers class.

        Missing keys take diffusers' defaults, but for those in `WHEN_MISSING`; keys that
        start with `_` are the library's own notes.

        Raises:
          ValueError: Naming every key and every value that this port does not have.
        """
        fields: dict[str, Any] = {field.name: field.default for field in dataclasses.fields(cls)}
        given = {key: value for key, value in config.items() if not key.startswith("_")}
        unknown = [
            f"{key}={value!r} (unknown key)"
            for key, value in given.items()
            if key not in fields and value is not None
        ]
        known = {key: value for key, value in given.items() if key in fields}
        values = fields | dict(cls.WHEN_MISSING) | known
        values |= {k: tuple(values[k]) for k in _TUPLES if isinstance(values.get(k), list)}
        wrong = unknown + value_problems(cls, values)
        values = with_defaults(cls, values)
        for key in ("down_block_types", "up_block_types"):
            values[key] = tuple(name.removeprefix("UNetRes") for name in values[key])
        values["act_fn"] = values["act_fn"].lower()
        cls._raise(wrong + _problems(values))
        return cls(**values)

    def to_diffusers(self) -> dict[str, Any]:
        """The `config.json` that the diffusers class reads."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        listed = {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}
        return {"_class_name": self.CLASS_NAME} | listed

    @property
    def size_multiple(self) -> int:
        """Pixels along one side of what becomes one pixel of the latents: 8 in SD."""
        return 2 ** (len(self.block_out_channels) - 1)

    @property
    def latent_tile(self) -> int:
        """Side of the latents of a training image: the tile for images larger than that."""
        size = self.sample_size
        return (size if isinstance(size, int) else min(size)) // self.size_multiple

    @classmethod
    def _raise(cls, problems: list[str]) -> None:
        if problems:
            raise ValueError(
                f"{cls.CLASS_NAME} is not available with these settings: {'; '.join(problems)}."
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class AutoencoderKLConfig(AutoencoderConfig):
    """Settings of an `AutoencoderKL`; the defaults are those of diffusers.

    Attributes:
      shift_factor: Subtracted from the latents before they are scaled; None: nothing.
      latents_mean: One shift for each channel instead, with `latents_std`.
      latents_std: Divides the shifted latents, channel by channel.
      use_quant_conv: Whether a 1x1 convolution follows the encoder.
      use_post_quant_conv: Whether a 1x1 convolution comes before the decoder.
    """

    CLASS_NAME: ClassVar[str] = "AutoencoderKL"

    shift_factor: float | None = None
    latents_mean: tuple[float, ...] | None = None
    latents_std: tuple[float, ...] | None = None
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True

    @classmethod
    def sd_v1(cls) -> "AutoencoderKLConfig":
        """Stable Diffusion 1.x and 2.x at 512x512; kl-f8 of latent diffusion."""
        return cls(sample_size=512, **_SD_BLOCKS)

    @classmethod
    def sd_v2(cls) -> "AutoencoderKLConfig":
        """Stable Diffusion 2.x at 768x768: the same model, trained no further."""
        return cls(sample_size=768, **_SD_BLOCKS)

    @classmethod
    def sdxl(cls) -> "AutoencoderKLConfig":
        """Stable Diffusion XL: the same shapes, trained anew; overflows float16."""
        return cls(sample_size=1024, scaling_factor=0.13025, **_SD_BLOCKS)

    def scale_latents(self, latents: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        """Latents as a diffusion model sees them: shifted, then scaled to about unit variance."""
        mean, std = self._statistics(latents)
        return (latents - mean) / std * self.scaling_factor

    def unscale_latents(self, latents: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        """The inverse of `scale_latents`: from the diffusion model to the decoder."""
        mean, std = self._statistics(latents)
        return latents * std / self.scaling_factor + mean

    def _statistics(self, latents: Array) -> tuple[Array, Array]:
        mean = self.latents_mean or self.shift_factor or 0.0
        std = self.latents_std or 1.0
        return jnp.asarray(mean, latents.dtype), jnp.asarray(std, latents.dtype)


@dataclasses.dataclass(frozen=True, kw_only=True)
class VQModelConfig(AutoencoderConfig):
    """Settings of a `VQModel`; the defaults are those of diffusers.

    A config without `scaling_factor` is older than the key, and the pipelines of that time
    left latents of a `VQModel` as they were. So it is read as 1, as latent diffusion was
    trained, and not as diffusers' later default of 0.18215, with which the published LDM-4
    models give broken images (https://github.com/huggingface/diffusers/issues/6725).

    Attributes:
      num_vq_embeddings: Vectors in the codebook.
      vq_embed_dim: Channels of the latents and of the codebook; None: `latent_channels`.
      norm_type: Only `"group"`; the `"spatial"` one of MoVQ is not here.
      lookup_from_codebook: Whether `decode` with `force_not_quantize` takes codes.
    """

    CLASS_NAME: ClassVar[str] = "VQModel"
    WHEN_MISSING: ClassVar[Mapping[str, Any]] = {"scaling_factor": 1.0}

    latent_channels: int = 3
    force_upcast: bool = False
    num_vq_embeddings: int = 256
    vq_embed_dim: int | None = None
    norm_type: Literal["group"] = "group"
    lookup_from_codebook: bool = False

    @classmethod
    def vq_f4(cls) -> "VQModelConfig":
        """First stage of LDM-4 on CelebA-HQ, FFHQ and LSUN bedrooms, at 256x256."""
        return cls(
            down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3,
            block_out_channels=(128, 256, 512),
            layers_per_block=2,
            latent_channels=3,
            num_vq_embeddings=8192,
            sample_size=256,
            scaling_factor=1.0,
        )

    @classmethod
    def vq_f8(cls) -> "VQModelConfig":
        """First stage of LDM-8 with a codebook, at 256x256; attention at 32x32.

        LDM-8 on LSUN churches has an `AutoencoderKL` of the shapes of `sd_v1` instead.
        """
        return cls(
            down_block_types=("DownEncoderBlock2D",) * 3 + ("AttnDownEncoderBlock2D",),
            up_block_types=("AttnUpDecoderBlock2D",) + ("UpDecoderBlock2D",) * 3,
            block_out_channels=(128, 256, 256, 512),
            layers_per_block=2,
            latent_channels=4,
            num_vq_embeddings=16384,
            sample_size=256,
            scaling_factor=1.0,
        )

    @property
    def codebook_dim(self) -> int:
        """Channels of the latents and of the codebook."""
        return self.vq_embed_dim or self.latent_channels

    def scale_latents(self, latents: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        """Latents as a diffusion model sees them."""
        return latents * self.scaling_factor

    def unscale_latents(self, latents: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        """The inverse of `scale_latents`: from the diffusion model to the decoder."""
        return latents / self.scaling_factor


def _problems(values: Mapping[str, Any]) -> list[str]:
    """Every setting that the port cannot follow, as `key=value (what it can)`."""
    found = []
    for key, table in (("down_block_types", DOWN_BLOCKS), ("up_block_types", UP_BLOCKS)):
        wrong = sorted(set(values[key]) - table.keys())
        found += [f"{key} has {name!r} (one of {', '.join(table)})" for name in wrong]
    sizes = {
        key: len(values[key])
        for key in ("block_out_channels", "down_block_types", "up_block_types")
    }
    if len(set(sizes.values())) > 1:
        counts = ", ".join(f"{key} of {count}" for key, count in sizes.items())
        found.append(f"{counts} entries (must be equally many)")
    if values["act_fn"] not in ACTIVATIONS:
        found.append(f"act_fn={values['act_fn']!r} (one of {', '.join(ACTIVATIONS)})")
    groups, channels = values["norm_num_groups"], values["block_out_channels"]
    if not groups or any(c % groups for c in channels):
        found.append(
            f"norm_num_groups={groups} with block_out_channels={channels} (must divide them all)"
        )
    if not math.isfinite(values["scaling_factor"]) or values["scaling_factor"] == 0:
        found.append(f"scaling_factor={values['scaling_factor']} (must be a number but 0)")
    if values.get("norm_type", "group") != "group":
        found.append(f"norm_type={values['norm_type']!r} (only 'group')")
    return found + _problems_of_statistics(values)


def _problems_of_statistics(values: Mapping[str, Any]) -> list[str]:
    mean, std = values.get("latents_mean"), values.get("latents_std")
    count, found = values["latent_channels"], []
    if (mean is None) != (std is None):
        found.append(f"latents_mean={mean} with latents_std={std} (both or neither)")
    if mean is not None and values["shift_factor"] is not None:
        found.append("latents_mean with a shift_factor (one of the two)")
    for key in ("latents_mean", "latents_std"):
        given = values.get(key)
        if given is not None and len(given) != count:
            found.append(f"{key} of {len(given)} numbers (one for each of {count} channels)")
    return found
